"""The parts of the vision side between its matrix products, each as one kernel: inference on CUDA only.

What stands here is the norm of a residual stream that lacks the biases of the products added to it, padding with
pooling windows and their means, and attention within a window. All compute in float32 and round once to the type
of their inputs. The activation is the one of `kernels/training.py`.

Shapes: `C` crops, `P` patches of a crop, `N` pooling windows of all crops, `K` patches of a window, `W` width,
`F` features of a patch.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor, nn

from tempovlm.model.kernels.training import quick_gelu

__all__ = ["biased_norm", "keep", "pad_windows", "pool", "quick_gelu"]

FEATURES = 1024
"""Features that one program of `pad_windows` copies."""


@triton.jit
def _biased_norm(
    x_ptr, before_ptr, bias_ptr, after_ptr, w_ptr, b_ptr, out_ptr, eps, W: tl.constexpr, W_PAD: tl.constexpr
):
    i = tl.arange(0, W_PAD)
    inside = i < W
    at = tl.program_id(0).to(tl.int64) * W + i
    left_out = tl.load(before_ptr + i, mask=inside, other=0.0)
    left_out += tl.load(bias_ptr + i, mask=inside, other=0.0).to(tl.float32)
    tl.store(after_ptr + i, left_out, mask=i < tl.where(tl.program_id(0) == 0, W, 0))
    x = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32) + left_out
    centred = tl.where(inside, x - tl.sum(x, axis=0) / W, 0.0)
    scale = tl.rsqrt(tl.sum(centred * centred, axis=0) / W + eps)
    w = tl.load(w_ptr + i, mask=inside, other=0.0).to(tl.float32)
    b = tl.load(b_ptr + i, mask=inside, other=0.0).to(tl.float32)
    tl.store(out_ptr + at, (centred * scale * w + b).to(out_ptr.dtype.element_ty), mask=inside)


def biased_norm(x: Tensor, sums: Tensor, place: int, bias: Tensor, norm: nn.LayerNorm) -> Tensor:
    """The layer norm of (…, W) plus what it lacks: `sums[place]` (W,), float32, and one more bias (W,).

    What it lacked is written to `sums[place + 1]`.
    """
    x, width = x.contiguous(), x.shape[-1]
    out = torch.empty_like(x)
    sizes = (width, triton.next_power_of_2(width))
    _biased_norm[(x.numel() // width,)](
        x, sums[place], bias, sums[place + 1], norm.weight, norm.bias, out, norm.eps, *sizes
    )
    return out


@triton.jit
def _keep(x_ptr, sum_ptr, bias_ptr, out_ptr, P, place, WIDTH: tl.constexpr, W: tl.constexpr, W_PAD: tl.constexpr):
    row, i = tl.program_id(0).to(tl.int64), tl.arange(0, W_PAD)
    inside = i < W
    token = row // P * (P + 1) + 1 + row % P  # the class token stands before a crop's patches
    x = tl.load(x_ptr + token * W + i, mask=inside, other=0.0).to(tl.float32)
    x += tl.load(sum_ptr + i, mask=inside, other=0.0) + tl.load(bias_ptr + i, mask=inside, other=0.0).to(
        tl.float32
    )
    tl.store(out_ptr + row * WIDTH + place * W + i, x.to(out_ptr.dtype.element_ty), mask=inside)


def keep(x: Tensor, left_out: Tensor, bias: Tensor, features: Tensor, place: int) -> None:
    """Write (C, P + 1, W), plus the two vectors (W,) that it lacks, to the place-th part of features (C, P, …)."""
    (C, T, W), width = x.shape, features.shape[-1]
    _keep[(C * (T - 1),)](x, left_out, bias, features, T - 1, place, width, W, triton.next_power_of_2(W))


@triton.jit
def _pad_windows(
    x_ptr, masks_ptr, pad_ptr, windows_ptr, means_ptr,
    SIDE: tl.constexpr, P: tl.constexpr, F: tl.constexpr, SPAN: tl.constexpr,
):  # fmt: skip
    window = tl.program_id(0).to(tl.int64)
    i = tl.program_id(1) * SPAN + tl.arange(0, SPAN)
    inside = i < F
    crop, place = window // (SIDE * SIDE), window % (SIDE * SIDE)
    corner = (crop * SIDE * P + place // SIDE * P) * (SIDE * P) + place % SIDE * P
    of_empty = tl.load(pad_ptr + i, mask=inside, other=0.0).to(tl.float32)
    of_partial = tl.load(pad_ptr + F + i, mask=inside, other=0.0).to(tl.float32)
    total = tl.zeros((SPAN,), dtype=tl.float32)
    for k in tl.static_range(P * P):
        patch = corner + (k // P) * (SIDE * P) + k % P
        share = tl.load(masks_ptr + patch)
        x = tl.load(x_ptr + patch * F + i, mask=inside, other=0.0).to(tl.float32)
        x += tl.where(share == 0, of_empty, tl.where(share < 1, of_partial, 0.0))
        rounded = x.to(windows_ptr.dtype.element_ty)
        tl.store(windows_ptr + (window * P * P + k) * F + i, rounded, mask=inside)
        total += rounded.to(tl.float32)
    mean = (total / (P * P)).to(means_ptr.dtype.element_ty)
    tl.store(means_ptr + window * F + i, mean, mask=inside)


def pad_windows(features: Tensor, masks: Tensor, pad: Tensor, side: int, pool: int) -> tuple[Tensor, Tensor]:
    """Features (C, P, F) with their padding embedding, by pooling window: (N, K, F), and the means (N, F).

    `masks` (C, P) and `pad` (2, F) are those of `Projector`; `side` windows of `pool` × `pool` patches lie along a
    side of a crop.
    """
    features, masks = features.contiguous(), masks.contiguous()
    C, _, F = features.shape
    windows = features.new_empty(C * side * side, pool * pool, F)
    means = features.new_empty(len(windows), F)
    span = min(FEATURES, triton.next_power_of_2(F))
    _pad_windows[(len(windows), triton.cdiv(F, span))](features, masks, pad, windows, means, side, pool, F, span)
    return windows, means


@triton.jit
def _pool(
    q_ptr, kv_ptr, out_ptr, scale,
    K: tl.constexpr, H: tl.constexpr, D: tl.constexpr, H_PAD: tl.constexpr, D_PAD: tl.constexpr,
):  # fmt: skip
    window = tl.program_id(0).to(tl.int64)
    h, d = tl.arange(0, H_PAD)[:, None], tl.arange(0, D_PAD)[None, :]
    inside = (h < H) & (d < D)
    at = h * D + d
    q = tl.load(q_ptr + window * H * D + at, mask=inside, other=0.0).to(tl.float32)
    most = tl.full((H_PAD,), float("-inf"), dtype=tl.float32)
    weight = tl.zeros((H_PAD,), dtype=tl.float32)
    out = tl.zeros((H_PAD, D_PAD), dtype=tl.float32)
    for key in tl.static_range(K):
        row = kv_ptr + (window * K + key) * (2 * H * D) + at
        k = tl.load(row, mask=inside, other=0.0).to(tl.float32)
        v = tl.load(row + H * D, mask=inside, other=0.0).to(tl.float32)
        score = tl.sum(q * k, axis=1) * scale
        higher = tl.maximum(most, score)
        fade, share = tl.exp(most - higher), tl.exp(score - higher)
        out = out * fade[:, None] + share[:, None] * v
        weight = weight * fade + share
        most = higher
    out = out / weight[:, None]
    tl.store(out_ptr + window * H * D + at, out.to(out_ptr.dtype.element_ty), mask=inside)


def pool(q: Tensor, kv: Tensor, num_heads: int) -> Tensor:
    """Attention of one query (N, W) to the keys and then values (N, K, 2·W) of its own window: (N, W)."""
    q, kv = q.contiguous(), kv.contiguous()
    N, W = q.shape
    out, head = torch.empty_like(q), W // num_heads
    sizes = (kv.shape[1], num_heads, head, triton.next_power_of_2(num_heads), triton.next_power_of_2(head))
    _pool[(N,)](q, kv, out, head**-0.5, *sizes)
    return out
