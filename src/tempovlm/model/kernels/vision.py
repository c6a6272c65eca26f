"""The parts of the vision side between its matrix products, each as one kernel: inference on CUDA only.

They are the norm of a residual stream that lacks the biases of the products added to it, the
product with the fused activation, padding with pooling windows and their means, and attention within a window.
All compute in float32 and round once to the type of their inputs.

Shapes: `C` crops, `P` patches of a crop, `N` pooling windows of all crops, `K` patches of a window, `W` width,
`F` features of a patch, `S` parts of a product.
"""

from __future__ import annotations

from functools import cache

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor, nn
from triton.tools.tensor_descriptor import TensorDescriptor

from tempovlm.model.kernels.device import on_device
from tempovlm.model.kernels.training import quick_gelu

FEATURES = 1024
"""Features that one program of `pad_windows` copies."""

TILE, STEP, GROUP = 128, 64, 8
"""Rows and columns of a product's tile, values multiplied at a time, tiles of rows that share their columns."""

PROGRAMS = 2
"""Programs of the product on each processor: one multiplies while the other one's activation is computed."""


@triton.jit
def _biased_norm(
    x_ptr, parts_ptr, before_ptr, bias_ptr, after_ptr, w_ptr, b_ptr, out_ptr, eps, rows,
    S: tl.constexpr, W: tl.constexpr, W_PAD: tl.constexpr,
):  # fmt: skip
    i = tl.arange(0, W_PAD)
    inside = i < W
    at = tl.program_id(0).to(tl.int64) * W + i
    left_out = tl.load(before_ptr + i, mask=inside, other=0.0)
    left_out += tl.load(bias_ptr + i, mask=inside, other=0.0).to(tl.float32)
    tl.store(after_ptr + i, left_out, mask=i < tl.where(tl.program_id(0) == 0, W, 0))
    x = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
    if S > 0:
        for part in tl.static_range(S):
            x += tl.load(parts_ptr + part * rows * W + at, mask=inside, other=0.0).to(tl.float32)
        tl.store(x_ptr + at, x.to(x_ptr.dtype.element_ty), mask=inside)
    x += left_out
    centred = tl.where(inside, x - tl.sum(x, axis=0) / W, 0.0)
    scale = tl.rsqrt(tl.sum(centred * centred, axis=0) / W + eps)
    w = tl.load(w_ptr + i, mask=inside, other=0.0).to(tl.float32)
    b = tl.load(b_ptr + i, mask=inside, other=0.0).to(tl.float32)
    tl.store(out_ptr + at, (centred * scale * w + b).to(out_ptr.dtype.element_ty), mask=inside)


@on_device
def biased_norm(
    x: Tensor, sums: Tensor, place: int, bias: Tensor, norm: nn.LayerNorm, parts: Tensor | None = None
) -> Tensor:
    """Apply layer norm to (…, W) plus its missing biases: `sums[place]` (W,), float32, and one more bias (W,).

    The missing biases are written to `sums[place + 1]`. The `parts` (S, rows, W) of a product are added to `x`.
    """
    rows, width = x.numel() // x.shape[-1], x.shape[-1]
    out = torch.empty_like(x)
    sizes = (0 if parts is None else len(parts), width, triton.next_power_of_2(width))
    _biased_norm[(rows,)](
        x, parts, sums[place], bias, sums[place + 1], norm.weight, norm.bias, out, norm.eps, rows, *sizes
    )
    return out


@triton.jit
def _gelu(x, FAST: tl.constexpr):
    """Quick-GELU x · sigmoid(1.702 x), as x / 2 · (1 + tanh(0.851 x)): the device has an instruction for tanh."""
    if FAST:
        half = tl.inline_asm_elementwise(
            "tanh.approx.f32 $0, $1;", "=f,f", [0.851 * x], dtype=tl.float32, is_pure=True, pack=1
        )
        return 0.5 * x * (1 + half)
    return x * tl.sigmoid(1.702 * x)


@triton.jit(do_not_specialize=["rows"])
def _product_gelu(
    x, w, bias_ptr, out, rows, programs, N: tl.constexpr, K: tl.constexpr,
    TILE: tl.constexpr, STEP: tl.constexpr, GROUP: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    row_tiles = (rows + TILE - 1) // TILE
    column_tiles: tl.constexpr = (N + TILE - 1) // TILE
    HALF: tl.constexpr = TILE // 2
    for tile in tl.range(tl.program_id(0), row_tiles * column_tiles, programs, flatten=True):
        first = tile // (GROUP * column_tiles) * GROUP
        height = tl.minimum(row_tiles - first, GROUP)
        row = (first + tile % (GROUP * column_tiles) % height) * TILE
        column = tile % (GROUP * column_tiles) // height * TILE
        total = tl.zeros((TILE, TILE), dtype=tl.float32)
        for start in range(0, K, STEP):
            total = tl.dot(x.load([row, start]), w.load([column, start]).T, total)
        # Half of the columns at a time need half of the registers.
        left, right = tl.split(tl.permute(tl.reshape(total, (TILE, 2, HALF)), (0, 2, 1)))
        i = column + tl.arange(0, HALF)
        left += tl.load(bias_ptr + i, mask=i < N, other=0.0).to(tl.float32)[None, :]
        out.store([row, column], _gelu(left, FAST).to(out.dtype))
        right += tl.load(bias_ptr + HALF + i, mask=HALF + i < N, other=0.0).to(tl.float32)[None, :]
        out.store([row, column + HALF], _gelu(right, FAST).to(out.dtype))


@cache
def _programs(device: torch.device) -> int:
    return PROGRAMS * torch.cuda.get_device_properties(device).multi_processor_count


@on_device
def product_gelu(x: Tensor, layer: nn.Linear) -> Tensor:
    """Return quick-GELU of a layer's product (M, N) with rows (M, K), whose strides are multiples of 16 bytes.

    Float32 is left to the library, whose products are exact, unlike these kernels'.
    """
    if x.is_cuda and x.dtype == torch.float32:
        return quick_gelu(F.linear(x, layer.weight, layer.bias))
    (M, K), N = x.shape, layer.out_features
    out = x.new_empty(M, N)
    most = triton.cdiv(M, TILE) * triton.cdiv(N, TILE)
    programs = min(_programs(x.device), most) if x.is_cuda else 1
    tiles = [TensorDescriptor.from_tensor(values, [TILE, STEP]) for values in (x, layer.weight)]
    halves = TensorDescriptor.from_tensor(out, [TILE, TILE // 2])
    _product_gelu[(programs,)](
        *tiles, layer.bias, halves, M, programs, N, K, TILE, STEP, GROUP, x.is_cuda, num_warps=4, num_stages=3
    )
    return out


@triton.jit
def _keep(
    x_ptr, parts_ptr, sum_ptr, bias_ptr, out_ptr, P, place, rows,
    S: tl.constexpr, WIDTH: tl.constexpr, W: tl.constexpr, W_PAD: tl.constexpr,
):  # fmt: skip
    row, i = tl.program_id(0).to(tl.int64), tl.arange(0, W_PAD)
    inside = i < W
    token = row // P * (P + 1) + 1 + row % P  # the class token precedes a crop's patches
    x = tl.load(x_ptr + token * W + i, mask=inside, other=0.0).to(tl.float32)
    for part in tl.static_range(S):
        x += tl.load(parts_ptr + (part * rows + token) * W + i, mask=inside, other=0.0).to(tl.float32)
    x += tl.load(sum_ptr + i, mask=inside, other=0.0) + tl.load(bias_ptr + i, mask=inside, other=0.0).to(
        tl.float32
    )
    tl.store(out_ptr + row * WIDTH + place * W + i, x.to(out_ptr.dtype.element_ty), mask=inside)


@on_device
def keep(
    x: Tensor, left_out: Tensor, bias: Tensor, features: Tensor, place: int, parts: Tensor | None = None
) -> None:
    """Write (C, P + 1, W), plus its two missing vectors (W,), to the place-th part of features (C, P, …).

    The `parts` (S, rows, W) of a product are added to the output, not to `x`.
    """
    (C, T, W), width = x.shape, features.shape[-1]
    sizes = (0 if parts is None else len(parts), width, W, triton.next_power_of_2(W))
    _keep[(C * (T - 1),)](x, parts, left_out, bias, features, T - 1, place, C * T, *sizes)


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


@on_device
def pad_windows(features: Tensor, masks: Tensor, pad: Tensor, side: int, pool: int) -> tuple[Tensor, Tensor]:
    """Return features (C, P, F) with padding embedding, by pooling window: (N, K, F), and the means (N, F).

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


@on_device
def pool(q: Tensor, kv: Tensor, num_heads: int) -> Tensor:
    """Attend with one query (N, W) to the keys and then values (N, K, 2·W) of its own window: (N, W)."""
    q, kv = q.contiguous(), kv.contiguous()
    N, W = q.shape
    out, head = torch.empty_like(q), W // num_heads
    sizes = (kv.shape[1], num_heads, head, triton.next_power_of_2(num_heads), triton.next_power_of_2(head))
    _pool[(N,)](q, kv, out, head**-0.5, *sizes)
    return out
