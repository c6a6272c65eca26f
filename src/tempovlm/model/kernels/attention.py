"""Attention of a training step, forward and backward, without a mask in memory: in bfloat16 or float32.

A mask of all pairs of tokens is read once for each head and pass, and takes most of the time of attention with
heads as narrow as the pocket's. Here it follows from the number of a token's segment (FlashAttention, Dao 2023,
arXiv 2307.08691). Queries, keys and values are parts of one row, and so are their gradients.
Shapes: `B` rows, `T` tokens, `D` width, `H` heads, `W` head width.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from tempovlm.model.kernels.device import on_device
from tempovlm.model.kernels.training import start_norm_rotate, start_norm_rotate_backward

TILE, WARPS, STAGES = 64, 4, 2
"""Queries and keys of a tile."""

NARROWEST_HEAD, WIDEST_HEAD = 16, 128
NEVER: tl.constexpr = tl.constexpr(-1e30)
"""Score of a pair that may not meet; finite, so that a tile without any pair gives no NaN."""


def fits(width: int, heads: int) -> bool:
    """Whether the kernels take heads of this width: a power of two within limits."""
    head = width // heads
    return NARROWEST_HEAD <= head <= WIDEST_HEAD and head & (head - 1) == 0


@triton.jit
def _allowed(queries, keys, T, segments_ptr, base, PACKED: tl.constexpr):
    pairs = (keys < T)[None, :] & (queries >= 0)[:, None]
    if PACKED:
        own = tl.load(segments_ptr + base + queries, mask=queries < T, other=-2)[:, None]
        other = tl.load(segments_ptr + base + keys, mask=keys < T, other=-3)[None, :]
        pairs = pairs & (keys[None, :] <= queries[:, None]) & ((other == 0) | (other == own))
    return pairs


@triton.jit
def _forward(
    q_ptr, k_ptr, v_ptr, q_row, k_row, v_row, segments_ptr, out_ptr, lse_ptr, scale, T,
    H: tl.constexpr, W: tl.constexpr, N: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    tile, pair = tl.program_id(0) % tl.cdiv(T, N), (tl.program_id(0) // tl.cdiv(T, N)).to(tl.int64)
    b, h = pair // H, pair % H
    queries, w, base = tile * N + tl.arange(0, N), tl.arange(0, W), b * T
    at = h * W + w[None, :]
    here = (queries < T)[:, None]
    q = tl.load(q_ptr + (base + queries)[:, None] * q_row + at, mask=here, other=0.0)
    most = tl.full((N,), NEVER, tl.float32)
    total = tl.zeros((N,), tl.float32)
    gathered = tl.zeros((N, W), tl.float32)
    end = T
    if PACKED:
        end = tl.minimum(T, (tile + 1) * N)
    for start in range(0, end, N):
        keys = start + tl.arange(0, N)
        inside = (keys < T)[:, None]
        k = tl.load(k_ptr + (base + keys)[:, None] * k_row + at, mask=inside, other=0.0)
        v = tl.load(v_ptr + (base + keys)[:, None] * v_row + at, mask=inside, other=0.0)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
        scores = tl.where(_allowed(queries, keys, T, segments_ptr, base, PACKED), scores, NEVER)
        higher = tl.maximum(most, tl.max(scores, axis=1))
        shrink = tl.exp(most - higher)
        weights = tl.exp(scores - higher[:, None])
        total = total * shrink + tl.sum(weights, axis=1)
        gathered = gathered * shrink[:, None] + tl.dot(weights.to(v.dtype), v, input_precision="ieee")
        most = higher
    out = (gathered / total[:, None]).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + (base + queries)[:, None] * (H * W) + at, out, mask=here)
    tl.store(lse_ptr + pair * T + queries, most + tl.log(total), mask=queries < T)


@triton.jit
def _backward_queries(
    q_ptr, k_ptr, v_ptr, q_row, k_row, v_row, segments_ptr, out_ptr, lse_ptr, d_ptr, delta_ptr, dq_ptr, dq_row,
    scale, T, H: tl.constexpr, W: tl.constexpr, N: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    tile, pair = tl.program_id(0) % tl.cdiv(T, N), (tl.program_id(0) // tl.cdiv(T, N)).to(tl.int64)
    b, h = pair // H, pair % H
    queries, w, base = tile * N + tl.arange(0, N), tl.arange(0, W), b * T
    at = h * W + w[None, :]
    here = (queries < T)[:, None]
    line = pair * T + queries
    q = tl.load(q_ptr + (base + queries)[:, None] * q_row + at, mask=here, other=0.0)
    d = tl.load(d_ptr + (base + queries)[:, None] * (H * W) + at, mask=here, other=0.0)
    out = tl.load(out_ptr + (base + queries)[:, None] * (H * W) + at, mask=here, other=0.0)
    lse = tl.load(lse_ptr + line, mask=queries < T, other=0.0)[:, None]
    delta = tl.sum(d.to(tl.float32) * out.to(tl.float32), axis=1)
    tl.store(delta_ptr + line, delta, mask=queries < T)
    dq = tl.zeros((N, W), tl.float32)
    end = T
    if PACKED:
        end = tl.minimum(T, (tile + 1) * N)
    for start in range(0, end, N):
        keys = start + tl.arange(0, N)
        inside = (keys < T)[:, None]
        k = tl.load(k_ptr + (base + keys)[:, None] * k_row + at, mask=inside, other=0.0)
        v = tl.load(v_ptr + (base + keys)[:, None] * v_row + at, mask=inside, other=0.0)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
        pairs = _allowed(queries, keys, T, segments_ptr, base, PACKED)
        weights = tl.where(pairs, tl.exp(scores - lse), 0.0)
        slope = weights * (tl.dot(d, tl.trans(v), input_precision="ieee") - delta[:, None])
        dq += tl.dot(slope.to(k.dtype), k, input_precision="ieee")
    dq = (dq * scale).to(dq_ptr.dtype.element_ty)
    tl.store(dq_ptr + (base + queries)[:, None] * dq_row + at, dq, mask=here)


@triton.jit
def _backward_keys(
    q_ptr, k_ptr, v_ptr, q_row, k_row, v_row, segments_ptr, lse_ptr, d_ptr, delta_ptr,
    dk_ptr, dv_ptr, dk_row, dv_row, scale, T,
    H: tl.constexpr, W: tl.constexpr, N: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    tile, pair = tl.program_id(0) % tl.cdiv(T, N), (tl.program_id(0) // tl.cdiv(T, N)).to(tl.int64)
    b, h = pair // H, pair % H
    keys, w, base = tile * N + tl.arange(0, N), tl.arange(0, W), b * T
    at = h * W + w[None, :]
    inside = (keys < T)[:, None]
    k = tl.load(k_ptr + (base + keys)[:, None] * k_row + at, mask=inside, other=0.0)
    v = tl.load(v_ptr + (base + keys)[:, None] * v_row + at, mask=inside, other=0.0)
    dk, dv = tl.zeros((N, W), tl.float32), tl.zeros((N, W), tl.float32)
    begin = 0
    if PACKED:
        begin = tile * N
    for start in range(begin, T, N):
        queries = start + tl.arange(0, N)
        here = (queries < T)[:, None]
        line = pair * T + queries
        q = tl.load(q_ptr + (base + queries)[:, None] * q_row + at, mask=here, other=0.0)
        d = tl.load(d_ptr + (base + queries)[:, None] * (H * W) + at, mask=here, other=0.0)
        lse = tl.load(lse_ptr + line, mask=queries < T, other=0.0)[:, None]
        delta = tl.load(delta_ptr + line, mask=queries < T, other=0.0)[:, None]
        scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
        pairs = _allowed(queries, keys, T, segments_ptr, base, PACKED) & here
        weights = tl.where(pairs, tl.exp(scores - lse), 0.0)
        dv += tl.dot(tl.trans(weights.to(d.dtype)), d, input_precision="ieee")
        slope = weights * (tl.dot(d, tl.trans(v), input_precision="ieee") - delta)
        dk += tl.dot(tl.trans(slope.to(q.dtype)), q, input_precision="ieee")
    kind = dk_ptr.dtype.element_ty
    tl.store(dk_ptr + (base + keys)[:, None] * dk_row + at, (dk * scale).to(kind), mask=inside)
    tl.store(dv_ptr + (base + keys)[:, None] * dv_row + at, dv.to(kind), mask=inside)


Parts = tuple[Tensor, Tensor, Tensor]
"""Queries, keys and values, or their gradients: (B, T, D) each, rows of any length apart."""


@on_device
def _start_forward(first: Tensor, parts: Parts, segments: Tensor | None, heads: int) -> tuple[Tensor, Tensor]:
    """Return what the tokens gather (B, T, D) and the logarithms of their sums (B, H, T)."""
    B, T, D = first.shape
    out = torch.empty(B, T, D, dtype=first.dtype, device=first.device)
    sums = torch.empty(B, heads, T, dtype=torch.float32, device=first.device)
    width = D // heads
    _forward[(triton.cdiv(T, TILE) * B * heads,)](
        *parts, *(one.stride(1) for one in parts), out if segments is None else segments, out, sums, width**-0.5,
        T, heads, width, TILE, segments is not None, num_warps=WARPS, num_stages=STAGES,
    )  # fmt: skip
    return out, sums


@on_device
def _start_backward(
    d: Tensor, parts: Parts, segments: Tensor | None, kept: tuple[Tensor, Tensor], slopes: Parts
) -> None:
    """Write the gradients of queries, keys and values into `slopes`; `kept` is what `_start_forward` returned."""
    out, sums = kept
    B, T, D = out.shape
    heads = sums.shape[1]
    delta = torch.empty_like(sums)
    strides, width = [one.stride(1) for one in parts], D // heads
    given = out if segments is None else segments
    sizes = (width**-0.5, T, heads, width, TILE, segments is not None)
    grid, (dq, dk, dv) = (triton.cdiv(T, TILE) * B * heads,), slopes
    _backward_queries[grid](
        *parts, *strides, given, out, sums, d, delta, dq, dq.stride(1), *sizes, num_warps=WARPS, num_stages=STAGES
    )
    _backward_keys[grid](
        *parts, *strides, given, sums, d, delta, dk, dv, dk.stride(1), dv.stride(1), *sizes,
        num_warps=WARPS, num_stages=STAGES,
    )  # fmt: skip


def _thirds(rows: Tensor) -> Parts:
    """Split (B, T, 3D) into its three parts (B, T, D)."""
    first, second, third = rows.chunk(3, dim=-1)
    return first, second, third


class _CropAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, qkv: Tensor, heads: int) -> Tensor:
        qkv = qkv.contiguous()
        out, sums = _start_forward(qkv[..., : qkv.shape[-1] // 3], _thirds(qkv), None, heads)
        ctx.save_for_backward(qkv, out, sums)
        return out

    @staticmethod
    def backward(ctx: Any, d: Tensor) -> tuple[Tensor, None]:
        qkv, out, sums = ctx.saved_tensors
        slope = torch.empty_like(qkv)
        _start_backward(d.contiguous(), _thirds(qkv), None, (out, sums), _thirds(slope))
        return slope, None


def crop_attention(qkv: Tensor, heads: int) -> Tensor:
    """Let all tokens of a row look at each other: queries, keys and values (B, T, 3D) to (B, T, D)."""
    return _CropAttention.apply(qkv, heads)


class _PackedAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, qkv: Tensor, q_weight: Tensor, k_weight: Tensor, cos: Tensor, sin: Tensor, segments: Tensor,
        eps: float,
    ) -> Tensor:  # fmt: skip
        qkv, cos, sin = qkv.contiguous(), cos.contiguous(), sin.contiguous()
        heads = qkv.shape[-1] // (3 * cos.shape[-1])
        first, second, values = _thirds(qkv)
        q, k = (
            start_norm_rotate(x, weight, cos, sin, eps) for x, weight in ((first, q_weight), (second, k_weight))
        )
        out, sums = _start_forward(q, (q, k, values), segments, heads)
        ctx.save_for_backward(qkv, q_weight, k_weight, cos, sin, segments, q, k, out, sums, torch.tensor(eps))
        return out

    @staticmethod
    def backward(ctx: Any, d: Tensor) -> tuple[Tensor | None, ...]:
        qkv, q_weight, k_weight, cos, sin, segments, q, k, out, sums, eps = ctx.saved_tensors
        slope, dq, dk = torch.empty_like(qkv), torch.empty_like(q), torch.empty_like(k)
        (x_q, x_k, values), (slope_q, slope_k, slope_v) = _thirds(qkv), _thirds(slope)
        _start_backward(d.contiguous(), (q, k, values), segments, (out, sums), (dq, dk, slope_v))
        dw_q = start_norm_rotate_backward(x_q, q_weight, cos, sin, dq, slope_q, eps.item())
        dw_k = start_norm_rotate_backward(x_k, k_weight, cos, sin, dk, slope_k, eps.item())
        return slope, dw_q, dw_k, None, None, None, None


def packed_attention(
    qkv: Tensor, norms: tuple[Tensor, Tensor], tables: tuple[Tensor, Tensor], segments: Tensor, eps: float
) -> Tensor:
    """Return what tokens (B, T, D) gather that look back at the picture and at their own question.

    Args:
        qkv: (B, T, 3D) before norm and rotation.
        norms: weights (D,) of the norms of queries and keys.
        tables: cosines and sines (B, T, 1, W), float32.
        segments: (B, T) int32, 0 for the picture, which all see, and a number for each question.
        eps: of both norms.
    """
    return _PackedAttention.apply(qkv, *norms, *tables, segments, eps)
