"""Many tokens at once on CUDA: norms, rotation and the choice of experts, whose products are in `experts.py`.

Chains of elementwise operations are one kernel each, rounded where the plain modules round: operation by operation
a block would be about 70 launches, most shorter than the gap to the next one. Nothing is copied to the host, so
that the work can be captured in a graph and the device never waits.

Shapes: `N` tokens, `D` width, `W` head width, `E` experts, `K` top-k, `C` columns of a program.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from tempovlm.model.cache import KVCache
from tempovlm.model.kernels.device import on_device


@triton.jit
def _norm(x_ptr, stride, w_ptr, out_ptr, eps, D: tl.constexpr, C: tl.constexpr):
    row, i = tl.program_id(0).to(tl.int64), tl.arange(0, C)
    x = tl.load(x_ptr + row * stride + i, mask=i < D, other=0.0).to(tl.float32)
    scale = tl.rsqrt(tl.sum(x * x, axis=0) / D + eps)
    kind = out_ptr.dtype.element_ty
    w = tl.load(w_ptr + i, mask=i < D, other=0.0).to(tl.float32)
    tl.store(out_ptr + row * D + i, ((x * scale).to(kind).to(tl.float32) * w).to(kind), mask=i < D)


@triton.jit
def _unit(x_ptr, w_ptr, i, inside, scale):
    """Return values at `i` of a row, normalised with `scale` and weighted, rounded as the norm rounds them."""
    x = tl.load(x_ptr + i, mask=inside, other=0.0)
    unit = (x.to(tl.float32) * scale).to(x.dtype).to(tl.float32)
    return (unit * tl.load(w_ptr + i, mask=inside, other=0.0).to(tl.float32)).to(x.dtype).to(tl.float32)


@triton.jit
def _rotated(x_ptr, w_ptr, cos_ptr, sin_ptr, row, i, eps, D: tl.constexpr, W: tl.constexpr):
    """Return the row at `x_ptr`, normalised, weighted and rotated; `row` is its place in the tables."""
    inside, place = i < D, i % W
    x = tl.load(x_ptr + i, mask=inside, other=0.0).to(tl.float32)
    scale = tl.rsqrt(tl.sum(x * x, axis=0) / D + eps)
    is_first = place < W // 2
    partner = tl.where(is_first, i + W // 2, i - W // 2)
    own = _unit(x_ptr, w_ptr, i, inside, scale)
    other = _unit(x_ptr, w_ptr, partner, inside, scale)
    cos = tl.load(cos_ptr + row * W + place, mask=inside, other=0.0)
    sin = tl.load(sin_ptr + row * W + place, mask=inside, other=0.0)
    return own * cos + tl.where(is_first, -other, other) * sin


@triton.jit
def _norm_rotate(
    x_ptr, stride, w_ptr, cos_ptr, sin_ptr, out_ptr, eps, D: tl.constexpr, W: tl.constexpr, C: tl.constexpr
):
    row, i = tl.program_id(0).to(tl.int64), tl.arange(0, C)
    out = _rotated(x_ptr + row * stride, w_ptr, cos_ptr, sin_ptr, row, i, eps, D, W)
    tl.store(out_ptr + row * D + i, out.to(out_ptr.dtype.element_ty), mask=i < D)


@triton.jit(do_not_specialize=["T", "start", "capacity"])  # else other lengths and places may need a compilation
def _split(
    qkv_ptr, q_norm_ptr, k_norm_ptr, cos_ptr, sin_ptr, q_ptr, keys_ptr, values_ptr, eps, T, start, capacity,
    D: tl.constexpr, W: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    row, part, i = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.arange(0, C)
    x_ptr, inside = qkv_ptr + row * (3 * D) + part * D, i < D
    kind = q_ptr.dtype.element_ty
    entry = ((row // T * (D // W) + i // W) * capacity + start + row % T) * W + i % W
    if part == 0:
        q = _rotated(x_ptr, q_norm_ptr, cos_ptr, sin_ptr, row, i, eps, D, W)
        tl.store(q_ptr + row * D + i, q.to(kind), mask=inside)
    elif part == 1:
        k = _rotated(x_ptr, k_norm_ptr, cos_ptr, sin_ptr, row, i, eps, D, W)
        tl.store(keys_ptr + entry, k.to(kind), mask=inside)
    else:
        tl.store(values_ptr + entry, tl.load(x_ptr + i, mask=inside, other=0.0), mask=inside)


@triton.jit
def _split_rows(
    qkv_ptr, q_norm_ptr, k_norm_ptr, cos_ptr, sin_ptr, entries_ptr, q_ptr, keys_ptr, values_ptr, eps,
    D: tl.constexpr, W: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    row, part, i = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.arange(0, C)
    x_ptr, inside = qkv_ptr + row * (3 * D) + part * D, i < D
    kind = q_ptr.dtype.element_ty
    entry = tl.load(entries_ptr + row)
    is_kept = inside & (entry >= 0)
    if part == 0:
        q = _rotated(x_ptr, q_norm_ptr, cos_ptr, sin_ptr, row, i, eps, D, W)
        tl.store(q_ptr + row * D + i, q.to(kind), mask=inside)
    elif part == 1:
        k = _rotated(x_ptr, k_norm_ptr, cos_ptr, sin_ptr, row, i, eps, D, W)
        tl.store(keys_ptr + entry * D + i, k.to(kind), mask=is_kept)
    else:
        tl.store(values_ptr + entry * D + i, tl.load(x_ptr + i, mask=inside, other=0.0), mask=is_kept)


@triton.jit
def _choose(scores_ptr, limits_ptr, weights_ptr, experts_ptr, K, E: tl.constexpr, E_PAD: tl.constexpr):
    row, e = tl.program_id(0).to(tl.int64), tl.arange(0, E_PAD)
    limit = K
    if limits_ptr is not None:
        limit = tl.load(limits_ptr + row)
    first = 0
    scores = tl.load(scores_ptr + row * E + e, mask=e < E, other=float("-inf")).to(tl.float32)
    top = tl.max(scores, axis=0)
    total = tl.sum(tl.exp(scores - top), axis=0)
    for k in range(0, K):
        best = tl.max(scores, axis=0)
        # Ties go to the lower index; for NaN the result must still be a valid expert.
        chosen = tl.minimum(tl.min(tl.where(scores == best, e, E_PAD), axis=0), E - 1)
        share = tl.exp(best - top) / total
        if limits_ptr is not None:  # slots past a row's own number visit an expert that is visited anyway
            first = tl.where(k == 0, chosen, first)
            share = tl.where(k < limit, share, 0.0)
            chosen = tl.where(k < limit, chosen, first)
        tl.store(weights_ptr + row * K + k, share.to(weights_ptr.dtype.element_ty))
        tl.store(experts_ptr + row * K + k, chosen)
        scores = tl.where(e == chosen, float("-inf"), scores)


def _rows(x: Tensor) -> Tensor:
    """View (..., D) as rows of consecutive values, without a copy if they lie a stride apart."""
    rows = x.flatten(0, -2)
    return rows if rows.stride(1) == 1 else rows.contiguous()


@on_device
def norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Apply RMS norm to (..., D), cast back before the weight is applied."""
    rows, D = _rows(x), x.shape[-1]
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    _norm[(len(rows),)](rows, rows.stride(0), weight, out, eps, D, triton.next_power_of_2(D))
    return out


@on_device
def norm_rotate(x: Tensor, weight: Tensor, cos: Tensor, sin: Tensor, eps: float) -> Tensor:
    """Apply RMS norm to (B, T, D), then the rotary embedding of each head by `cos` and `sin` (B, T, 1, W)."""
    rows, D, W = _rows(x), x.shape[-1], cos.shape[-1]
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    sizes = (D, W, triton.next_power_of_2(D))
    _norm_rotate[(len(rows),)](rows, rows.stride(0), weight, cos.contiguous(), sin.contiguous(), out, eps, *sizes)
    return out


@on_device
def split(
    qkv: Tensor, norms: tuple[Tensor, Tensor], tables: tuple[Tensor, Tensor], eps: float, entries: KVCache,
    step: int, start: int,
) -> Tensor:  # fmt: skip
    """Rotated queries (B, T, D) of the products (B, T, 3D); keys and values go to their places in the cache.

    Args:
        qkv: queries, keys and values, before the norm.
        norms: weights (D,) of the queries' and the keys' norm.
        tables: cosines and sines, (B, T, 1, W).
        eps: of both norms.
        entries: the cache.
        step: index of the entry to write.
        start: the first token's place there.
    """
    B, T, D = *qkv.shape[:2], qkv.shape[2] // 3
    q = qkv.new_empty(B, T, D)
    cos, sin = (table.contiguous() for table in tables)
    _split[(B * T, 3)](
        qkv.contiguous(), *norms, cos, sin, q, entries.keys[step], entries.values[step], eps, T, start,
        entries.capacity, D, cos.shape[-1], triton.next_power_of_2(D),
    )  # fmt: skip
    return q


@on_device
def split_rows(
    qkv: Tensor, norms: tuple[Tensor, Tensor], tables: tuple[Tensor, Tensor], eps: float, entries: Tensor,
    keys: Tensor, values: Tensor,
) -> Tensor:  # fmt: skip
    """Rotated queries (N, D) of the products (N, 3D); keys and values go to a cache of rows.

    Args:
        qkv: queries, keys and values, before the norm.
        norms: weights (D,) of the queries' and the keys' norm.
        tables: cosines and sines (N, W) of the tokens' places.
        eps: of both norms.
        entries: (N,) int64, each token's place in the cache; negative for a token that is not kept.
        keys: of all rows, (T, D).
        values: as `keys`.
    """
    N, D = len(qkv), qkv.shape[1] // 3
    q, (cos, sin) = qkv.new_empty(N, D), tables
    sizes = (D, cos.shape[-1], triton.next_power_of_2(D))
    _split_rows[(N, 3)](qkv, *norms, cos, sin, entries, q, keys, values, eps, *sizes)
    return q


@on_device
def choose(scores: Tensor, top_k: int, dtype: torch.dtype, limits: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Return the shares (N, K) and indices of the best experts by the softmax of scores (N, E), as `moe.best`.

    With `limits` (N,), a token has as many experts as its limit says; its other slots have the share 0.
    """
    N, E = scores.shape
    weights = scores.new_empty(N, top_k, dtype=dtype)
    experts = torch.empty(N, top_k, dtype=torch.int32, device=scores.device)
    _choose[(N,)](scores, limits, weights, experts, top_k, E, triton.next_power_of_2(E), num_warps=1)
    return weights, experts
