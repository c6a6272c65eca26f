"""Many tokens at once on CUDA: norms, rotation, and experts as two grouped products over tokens sorted by expert.

Chains of elementwise operations are one kernel each, rounded where the plain modules round: operation by operation
a block would be some 70 launches, most of them shorter than the gap to the next one. Nothing comes to the host, so
that the work can be captured in a graph and the device never waits. Sums are taken token by token in a fixed order
and in float32: no atomics, equal results every time.

Shapes: `N` tokens, `D` width, `W` head width, `E` experts, `K` top-k, `F` expert width, `M` = N·K rows, `C`
columns of a program.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from tempovlm.model.cache import KVCache

COLUMNS = 1024
ENTRIES = 2048
"""Choices of experts that a program of the sort looks through at a time."""


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
    """Values at `i` of a row, normalised with `scale` and weighted, rounded as the norm rounds them."""
    x = tl.load(x_ptr + i, mask=inside, other=0.0)
    unit = (x.to(tl.float32) * scale).to(x.dtype).to(tl.float32)
    return (unit * tl.load(w_ptr + i, mask=inside, other=0.0).to(tl.float32)).to(x.dtype).to(tl.float32)


@triton.jit
def _rotated(x_ptr, w_ptr, cos_ptr, sin_ptr, row, i, eps, D: tl.constexpr, W: tl.constexpr):
    """The row at `x_ptr`, normalised, weighted and rotated; `row` is its place in the tables."""
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


@triton.jit
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
def _choose(scores_ptr, weights_ptr, experts_ptr, K, E: tl.constexpr, E_PAD: tl.constexpr):
    row, e = tl.program_id(0).to(tl.int64), tl.arange(0, E_PAD)
    scores = tl.load(scores_ptr + row * E + e, mask=e < E, other=float("-inf")).to(tl.float32)
    masses = tl.exp(scores - tl.max(scores, axis=0))
    left = tl.where(e < E, masses / tl.sum(masses, axis=0), -1.0)
    for k in range(0, K):
        best = tl.max(left, axis=0)
        # Equal shares go to the lower index; what is not a number must still name an expert that there is.
        chosen = tl.minimum(tl.min(tl.where(left == best, e, E_PAD), axis=0), E - 1)
        tl.store(weights_ptr + row * K + k, best.to(weights_ptr.dtype.element_ty))
        tl.store(experts_ptr + row * K + k, chosen)
        left = tl.where(e == chosen, -1.0, left)


@triton.jit(do_not_specialize=["M"])  # else a prompt of another length may have to be compiled for
def _sort(experts_ptr, tokens_ptr, order_ptr, places_ptr, ends_ptr, M, K, C: tl.constexpr):
    # A program finds the rows of its expert, after those of all experts before it: a stable counting sort.
    expert, entry = tl.program_id(0), tl.arange(0, C)
    earlier = tl.zeros((C,), dtype=tl.int32)
    mine = tl.zeros((C,), dtype=tl.int32)
    for start in range(0, M, C):
        found = tl.load(experts_ptr + start + entry, mask=start + entry < M, other=2147483647)
        earlier += (found < expert).to(tl.int32)
        mine += (found == expert).to(tl.int32)
    place = tl.sum(earlier, axis=0)
    tl.store(ends_ptr + expert, place + tl.sum(mine, axis=0))
    for start in range(0, M, C):
        at = start + entry
        found = tl.load(experts_ptr + at, mask=at < M, other=2147483647)
        is_here = (found == expert).to(tl.int32)
        target = place + tl.cumsum(is_here, axis=0) - is_here
        tl.store(tokens_ptr + target, at // K, mask=found == expert)
        tl.store(order_ptr + target, at, mask=found == expert)
        tl.store(places_ptr + at, target, mask=found == expert)
        place += tl.sum(is_here, axis=0)


@triton.jit
def _weighted_swiglu(h_ptr, weights_ptr, order_ptr, out_ptr, F_: tl.constexpr, C: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    f = tl.program_id(1) * C + tl.arange(0, C)
    weight = tl.load(weights_ptr + tl.load(order_ptr + row)).to(tl.float32)
    gate = tl.load(h_ptr + row * (2 * F_) + f, mask=f < F_, other=0.0).to(tl.float32)
    up = tl.load(h_ptr + row * (2 * F_) + F_ + f, mask=f < F_, other=0.0).to(tl.float32)
    out = gate * tl.sigmoid(gate) * up * weight
    tl.store(out_ptr + row * F_ + f, out.to(out_ptr.dtype.element_ty), mask=f < F_)


@triton.jit
def _gather_sum(rows_ptr, places_ptr, out_ptr, K, D: tl.constexpr, C: tl.constexpr, ONTO: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    c = tl.program_id(1) * C + tl.arange(0, C)
    total = tl.zeros((C,), dtype=tl.float32)
    if ONTO:
        total += tl.load(out_ptr + token * D + c, mask=c < D, other=0.0).to(tl.float32)
    for k in range(0, K):
        place = tl.load(places_ptr + token * K + k).to(tl.int64)
        total += tl.load(rows_ptr + place * D + c, mask=c < D, other=0.0).to(tl.float32)
    tl.store(out_ptr + token * D + c, total.to(out_ptr.dtype.element_ty), mask=c < D)


def _rows(x: Tensor) -> Tensor:
    """(..., D) as rows of consecutive values, without a copy where they lie a stride apart."""
    rows = x.flatten(0, -2)
    return rows if rows.stride(1) == 1 else rows.contiguous()


def norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMS norm of (..., D), cast back before the weight is applied."""
    rows, D = _rows(x), x.shape[-1]
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    with torch.cuda.device_of(x):
        _norm[(len(rows),)](rows, rows.stride(0), weight, out, eps, D, triton.next_power_of_2(D))
    return out


def norm_rotate(x: Tensor, weight: Tensor, cos: Tensor, sin: Tensor, eps: float) -> Tensor:
    """RMS norm of (B, T, D), then the rotary embedding of each head by `cos` and `sin` (B, T, 1, W)."""
    rows, D, W = _rows(x), x.shape[-1], cos.shape[-1]
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    sizes = (D, W, triton.next_power_of_2(D))
    with torch.cuda.device_of(x):
        _norm_rotate[(len(rows),)](
            rows, rows.stride(0), weight, cos.contiguous(), sin.contiguous(), out, eps, *sizes
        )
    return out


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
        step: which of its entries is written.
        start: the first token's place there.
    """
    B, T, D = *qkv.shape[:2], qkv.shape[2] // 3
    q = qkv.new_empty(B, T, D)
    cos, sin = (table.contiguous() for table in tables)
    with torch.cuda.device_of(qkv):
        _split[(B * T, 3)](
            qkv.contiguous(), *norms, cos, sin, q, entries.keys[step], entries.values[step], eps, T, start,
            entries.capacity, D, cos.shape[-1], triton.next_power_of_2(D),
        )  # fmt: skip
    return q


def choose(scores: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """The shares (N, K), in the type of the scores (N, E), and the experts that have the most of the softmax."""
    N, E = scores.shape
    weights = scores.new_empty(N, top_k)
    experts = torch.empty(N, top_k, dtype=torch.int32, device=scores.device)
    with torch.cuda.device_of(scores):
        _choose[(N,)](scores, weights, experts, top_k, E, triton.next_power_of_2(E), num_warps=1)
    return weights, experts


def sort(experts: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Choices (N, K) in the order of their experts.

    Returns:
        The token of each row (M,), its place among the choices (M,), the row of each choice (N, K), and where the
        rows of each expert end (E,); all int32.
    """
    M = experts.numel()
    tokens, order, places = (torch.empty(M, dtype=torch.int32, device=experts.device) for _ in range(3))
    ends = torch.empty(num_experts, dtype=torch.int32, device=experts.device)
    with torch.cuda.device_of(experts):
        _sort[(num_experts,)](experts, tokens, order, places, ends, M, experts.shape[1], ENTRIES, num_warps=8)
    return tokens, order, places.view_as(experts), ends


def weighted_swiglu(h: Tensor, weights: Tensor, order: Tensor) -> Tensor:
    """SwiGLU of (M, 2F) times the weight at each row's place before the sort: (M, F)."""
    M, width = h.shape[0], h.shape[1] // 2
    out = h.new_empty(M, width)
    columns = min(COLUMNS, triton.next_power_of_2(width))
    with torch.cuda.device_of(h):
        _weighted_swiglu[(M, triton.cdiv(width, columns))](h, weights, order, out, width, columns)
    return out


def gather_sum(rows: Tensor, places: Tensor, onto: Tensor | None = None) -> Tensor:
    """The sum of the rows (M, D) at each token's K places (N, K), added to `onto` in place if given: (N, D)."""
    (N, K), D = places.shape, rows.shape[1]
    out = rows.new_empty(N, D) if onto is None else onto
    columns = min(COLUMNS, triton.next_power_of_2(D))
    with torch.cuda.device_of(rows):
        _gather_sum[(N, triton.cdiv(D, columns))](rows, places, out, K, D, columns, onto is not None)
    return out


def grouped(
    x: Tensor,
    weights: Tensor,
    experts: Tensor,
    gate_up: Tensor,
    down: Tensor,
    onto: Tensor | None = None,
) -> Tensor:
    """What the experts make of (N, D): the weighted sum over each token's experts.

    Args:
        x: normalised tokens.
        weights: (N, K), the router's.
        experts: (N, K), those that it chose.
        gate_up: (E, 2F, D), gate rows then up rows.
        down: (E, D, F).
        onto: (N, D) that the sum is added to in place.
    """
    tokens, order, places, ends = sort(experts, len(gate_up))
    h = F.grouped_mm(x.index_select(0, tokens), gate_up.transpose(1, 2), offs=ends)
    hidden = weighted_swiglu(h, weights.flatten(), order)
    rows = F.grouped_mm(hidden, down.transpose(1, 2), offs=ends)
    return gather_sum(rows, places, onto)
