"""The elementwise parts of a training step, each one kernel forward and one backward, in bfloat16 or float32.

At the pocket model's widths a training step is limited by memory traffic, not products: operation by operation,
these three chains are most of it. Shapes: `N` rows, `E` experts, `F` expert width, `D` width.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from tempovlm.model.kernels.device import on_device

PAIRS = 64
ROWS = 16
ELEMENTS = 2048
NORM_PROGRAMS = 1056
"""Programs of the norm's backward pass; each keeps a partial sum of the weight's gradient."""


@triton.jit
def _gated_swiglu_forward(h_ptr, gates_ptr, out_ptr, pairs, F: tl.constexpr, F_PAD: tl.constexpr, P: tl.constexpr):
    pair = tl.program_id(0).to(tl.int64) * P + tl.arange(0, P)
    f = tl.arange(0, F_PAD)
    weight = tl.load(gates_ptr + pair, mask=pair < pairs, other=0.0).to(tl.float32)[:, None]
    inside = (pair < pairs)[:, None] & (f < F)[None, :]
    live = inside & (weight != 0)
    at = pair[:, None] * (2 * F) + f[None, :]
    gate = tl.load(h_ptr + at, mask=live, other=0.0).to(tl.float32)
    up = tl.load(h_ptr + at + F, mask=live, other=0.0).to(tl.float32)
    out = gate * tl.sigmoid(gate) * up * weight
    tl.store(out_ptr + pair[:, None] * F + f[None, :], out.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _gated_swiglu_backward(
    h_ptr, gates_ptr, d_ptr, dh_ptr, dgates_ptr, pairs, F: tl.constexpr, F_PAD: tl.constexpr, P: tl.constexpr
):
    pair = tl.program_id(0).to(tl.int64) * P + tl.arange(0, P)
    f = tl.arange(0, F_PAD)
    weight = tl.load(gates_ptr + pair, mask=pair < pairs, other=0.0).to(tl.float32)[:, None]
    inside = (pair < pairs)[:, None] & (f < F)[None, :]
    live = inside & (weight != 0)
    at = pair[:, None] * (2 * F) + f[None, :]
    gate = tl.load(h_ptr + at, mask=live, other=0.0).to(tl.float32)
    up = tl.load(h_ptr + at + F, mask=live, other=0.0).to(tl.float32)
    d = tl.load(d_ptr + pair[:, None] * F + f[None, :], mask=live, other=0.0).to(tl.float32)
    slope = tl.sigmoid(gate)
    silu = gate * slope
    d_gate = d * up * weight * (slope + silu * (1 - slope))
    kind = dh_ptr.dtype.element_ty
    tl.store(dh_ptr + at, d_gate.to(kind), mask=inside)
    tl.store(dh_ptr + at + F, (d * silu * weight).to(kind), mask=inside)
    total = tl.sum(d * silu * up, axis=1)
    tl.store(dgates_ptr + pair, total.to(dgates_ptr.dtype.element_ty), mask=pair < pairs)


class _GatedSwiGLU(torch.autograd.Function):
    @staticmethod
    @on_device
    def forward(ctx: Any, h: Tensor, gates: Tensor) -> Tensor:
        h, gates = h.contiguous(), gates.contiguous()
        width = h.shape[-1] // (2 * gates.shape[-1])
        out = h.new_empty(h.shape[0], h.shape[1] // 2)
        pairs, padded = gates.numel(), triton.next_power_of_2(width)
        _gated_swiglu_forward[(triton.cdiv(pairs, PAIRS),)](h, gates, out, pairs, width, padded, PAIRS)
        ctx.save_for_backward(h, gates)
        return out

    @staticmethod
    @on_device
    def backward(ctx: Any, d: Tensor) -> tuple[Tensor, Tensor]:
        h, gates = ctx.saved_tensors
        width = h.shape[-1] // (2 * gates.shape[-1])
        dh, dgates = torch.empty_like(h), torch.empty_like(gates)
        pairs, padded = gates.numel(), triton.next_power_of_2(width)
        _gated_swiglu_backward[(triton.cdiv(pairs, PAIRS),)](
            h, gates, d.contiguous(), dh, dgates, pairs, width, padded, PAIRS
        )
        return dh, dgates


def gated_swiglu(h: Tensor, gates: Tensor) -> Tensor:
    """Return SiLU(gate) · up · weight for every expert: (N, E·2F) and (N, E) to (N, E·F).

    An expert whose weight is zero gets an output and a gradient of zero, its weight included.
    """
    return _GatedSwiGLU.apply(h, gates)


@triton.jit
def _norm_rotate_forward(
    x_ptr, x_stride, w_ptr, cos_ptr, sin_ptr, out_ptr, rows, eps,
    D: tl.constexpr, W: tl.constexpr, D_PAD: tl.constexpr, R: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * R + tl.arange(0, R)
    i = tl.arange(0, D_PAD)
    inside = (row < rows)[:, None] & (i < D)[None, :]
    place = i % W
    partner = tl.where(place < W // 2, i + W // 2, i - W // 2)
    sign = tl.where(place < W // 2, -1.0, 1.0)[None, :]
    x = tl.load(x_ptr + row[:, None] * x_stride + i[None, :], mask=inside, other=0.0).to(tl.float32)
    other = tl.load(x_ptr + row[:, None] * x_stride + partner[None, :], mask=inside, other=0.0).to(tl.float32)
    scale = tl.rsqrt(tl.sum(x * x, axis=1) / D + eps)[:, None]
    w = tl.load(w_ptr + i, mask=i < D, other=0.0).to(tl.float32)[None, :]
    w_other = tl.load(w_ptr + partner, mask=i < D, other=0.0).to(tl.float32)[None, :]
    cos = tl.load(cos_ptr + row[:, None] * W + place[None, :], mask=inside, other=0.0)
    sin = tl.load(sin_ptr + row[:, None] * W + place[None, :], mask=inside, other=0.0)
    out = x * scale * w * cos + sign * other * scale * w_other * sin
    tl.store(out_ptr + row[:, None] * D + i[None, :], out.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _norm_rotate_backward(
    x_ptr, x_stride, w_ptr, cos_ptr, sin_ptr, d_ptr, dx_ptr, dx_stride, dw_ptr, rows, eps,
    D: tl.constexpr, W: tl.constexpr, D_PAD: tl.constexpr, R: tl.constexpr,
):  # fmt: skip
    i = tl.arange(0, D_PAD)
    place = i % W
    partner = tl.where(place < W // 2, i + W // 2, i - W // 2)
    partner_place = partner % W
    sign = tl.where(place < W // 2, 1.0, -1.0)[None, :]
    w = tl.load(w_ptr + i, mask=i < D, other=0.0).to(tl.float32)[None, :]
    dw = tl.zeros((D_PAD,), dtype=tl.float32)
    for tile in range(tl.program_id(0), tl.cdiv(rows, R), tl.num_programs(0)):
        row = (tile * R + tl.arange(0, R)).to(tl.int64)
        inside = (row < rows)[:, None] & (i < D)[None, :]
        x = tl.load(x_ptr + row[:, None] * x_stride + i[None, :], mask=inside, other=0.0).to(tl.float32)
        d = tl.load(d_ptr + row[:, None] * D + i[None, :], mask=inside, other=0.0).to(tl.float32)
        d_other = tl.load(d_ptr + row[:, None] * D + partner[None, :], mask=inside, other=0.0).to(tl.float32)
        cos = tl.load(cos_ptr + row[:, None] * W + place[None, :], mask=inside, other=0.0)
        sin = tl.load(sin_ptr + row[:, None] * W + partner_place[None, :], mask=inside, other=0.0)
        scale = tl.rsqrt(tl.sum(x * x, axis=1) / D + eps)[:, None]
        unit = x * scale
        dy = d * cos + sign * d_other * sin
        dw += tl.sum(dy * unit, axis=0)
        dyw = dy * w
        dx = scale * (dyw - unit * (tl.sum(dyw * unit, axis=1) / D)[:, None])
        tl.store(dx_ptr + row[:, None] * dx_stride + i[None, :], dx.to(dx_ptr.dtype.element_ty), mask=inside)
    tl.store(dw_ptr + tl.program_id(0) * D + i, dw, mask=i < D)


@on_device
def start_norm_rotate(x: Tensor, weight: Tensor, cos: Tensor, sin: Tensor, eps: float) -> Tensor:
    """Return what `norm_rotate` does, without gradients; rows of `x` (B, T, D) may lie any length apart."""
    B, T, D = x.shape
    out = torch.empty(B, T, D, dtype=x.dtype, device=x.device)
    sizes = (D, cos.shape[-1], triton.next_power_of_2(D), ROWS)
    _norm_rotate_forward[(triton.cdiv(B * T, ROWS),)](x, x.stride(1), weight, cos, sin, out, B * T, eps, *sizes)
    return out


@on_device
def start_norm_rotate_backward(
    x: Tensor, weight: Tensor, cos: Tensor, sin: Tensor, d: Tensor, dx: Tensor, eps: float
) -> Tensor:
    """Write the gradient of `x` into `dx`, whose rows may lie any length apart; return the weight's (D,)."""
    B, T, D = x.shape
    programs = min(NORM_PROGRAMS, triton.cdiv(B * T, ROWS))
    partial = torch.empty(programs, D, dtype=torch.float32, device=x.device)
    sizes = (D, cos.shape[-1], triton.next_power_of_2(D), ROWS)
    _norm_rotate_backward[(programs,)](
        x, x.stride(1), weight, cos, sin, d, dx, dx.stride(1), partial, B * T, eps, *sizes
    )
    return partial.sum(0).to(weight.dtype)


class _NormRotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, cos: Tensor, sin: Tensor, eps: float) -> Tensor:
        if x.stride(0) != x.shape[1] * x.stride(1) or x.stride(2) != 1:
            x = x.contiguous()
        cos, sin = cos.contiguous(), sin.contiguous()
        ctx.save_for_backward(x, weight, cos, sin, torch.tensor(eps))
        return start_norm_rotate(x, weight, cos, sin, eps)

    @staticmethod
    def backward(ctx: Any, d: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        x, weight, cos, sin, eps = ctx.saved_tensors
        dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        dw = start_norm_rotate_backward(x, weight, cos, sin, d.contiguous(), dx, eps.item())
        return dx, dw, None, None, None


def norm_rotate(x: Tensor, weight: Tensor, cos: Tensor, sin: Tensor, eps: float) -> Tensor:
    """Apply RMS norm over the full width, then the rotary embedding of each head: (B, T, D) to the same shape.

    `cos` and `sin` are (B, T, 1, head width) in float32; the first and second half of a head turn together.
    """
    return _NormRotate.apply(x, weight, cos, sin, eps)


@triton.jit
def _quick_gelu_forward(x_ptr, out_ptr, count, S: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * S + tl.arange(0, S)
    x = tl.load(x_ptr + at, mask=at < count, other=0.0).to(tl.float32)
    tl.store(out_ptr + at, (x * tl.sigmoid(1.702 * x)).to(out_ptr.dtype.element_ty), mask=at < count)


@triton.jit
def _quick_gelu_backward(x_ptr, d_ptr, dx_ptr, count, S: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * S + tl.arange(0, S)
    x = tl.load(x_ptr + at, mask=at < count, other=0.0).to(tl.float32)
    d = tl.load(d_ptr + at, mask=at < count, other=0.0).to(tl.float32)
    slope = tl.sigmoid(1.702 * x)
    dx = d * slope * (1 + 1.702 * x * (1 - slope))
    tl.store(dx_ptr + at, dx.to(dx_ptr.dtype.element_ty), mask=at < count)


class _QuickGELU(torch.autograd.Function):
    @staticmethod
    @on_device
    def forward(ctx: Any, x: Tensor) -> Tensor:
        x = x.contiguous()
        out = torch.empty_like(x)
        _quick_gelu_forward[(triton.cdiv(x.numel(), ELEMENTS),)](x, out, x.numel(), ELEMENTS)
        ctx.save_for_backward(x)
        return out

    @staticmethod
    @on_device
    def backward(ctx: Any, d: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        dx = torch.empty_like(x)
        _quick_gelu_backward[(triton.cdiv(x.numel(), ELEMENTS),)](x, d.contiguous(), dx, x.numel(), ELEMENTS)
        return dx


def quick_gelu(x: Tensor) -> Tensor:
    """CLIP's activation: x · sigmoid(1.702 x), any shape."""
    return _QuickGELU.apply(x)
