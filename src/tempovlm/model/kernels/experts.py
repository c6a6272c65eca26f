"""The experts of many tokens on CUDA: two products over tokens sorted by expert, each one kernel.

Nothing is copied to the host, so that the work can be captured in a graph and the device never waits. A program
owns
a tile of rows of one expert. It gathers its tokens while it multiplies and applies the operation after the
product,
so that neither gathered rows nor gate and up values pass through memory. An expert's last tile is half as high if
that is enough: with about 150 tokens an expert, whole tiles would be two fifths padding. Sums over a token's
experts are taken in a fixed order and in float32: no atomics, equal results every time.

Shapes: `N` tokens, `D` width, `E` experts, `K` top-k, `F` expert width, `M` = N·K rows, `R` rows of a tile, `C`
columns of one, `S` how many values are multiplied at a time.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from tempovlm.model.kernels.device import on_device

ROWS = 128
"""Rows of a tile; an expert's last one may have half of them."""

COLUMNS, STEP = 128, 64
"""Columns of a tile, and how many values are multiplied at a time."""

FEW, FEW_ROWS, FEW_COLUMNS = 16, 32, 64
"""Up to the first number of tokens, tiles have the second number of rows and the third of columns.

Reading the weights is all that takes time then, and more tiles read more at a time.
"""

SUM_COLUMNS = 1024
"""Columns that one program of `gather_sum` adds up."""

ENTRIES, MANY_ENTRIES, MANY = 64, 256, 16384
"""Choices that a program of the sort places: the second number if there are more than the third number of them."""

CHUNKS = 128
"""Counts of other programs that a program of the sort adds up at a time."""


@triton.jit(do_not_specialize=["M"])  # else a prompt of another length may need a compilation
def _count(experts_ptr, counts_ptr, M, E: tl.constexpr, E_PAD: tl.constexpr, C: tl.constexpr):
    at, e = tl.program_id(0) * C + tl.arange(0, C), tl.arange(0, E_PAD)
    found = tl.load(experts_ptr + at, mask=at < M, other=E_PAD)
    counts = tl.sum((found[:, None] == e[None, :]).to(tl.int32), axis=0)
    tl.store(counts_ptr + tl.program_id(0) * E + e, counts, mask=e < E)


@triton.jit(do_not_specialize=["M", "chunks"])
def _place(
    experts_ptr, counts_ptr, tokens_ptr, order_ptr, places_ptr, ends_ptr, M, K, chunks,
    E: tl.constexpr, E_PAD: tl.constexpr, C: tl.constexpr, CHUNKS: tl.constexpr,
):  # fmt: skip
    # A stable counting sort: after all of lower experts, and after those of the same one in chunks before.
    chunk, e = tl.program_id(0), tl.arange(0, E_PAD)
    total = tl.zeros((E_PAD,), dtype=tl.int32)
    before = tl.zeros((E_PAD,), dtype=tl.int32)
    for start in range(0, chunks, CHUNKS):
        other = start + tl.arange(0, CHUNKS)
        inside = (other < chunks)[:, None] & (e < E)[None, :]
        counts = tl.load(counts_ptr + other[:, None] * E + e[None, :], mask=inside, other=0)
        total += tl.sum(counts, axis=0)
        before += tl.sum(tl.where((other < chunk)[:, None], counts, 0), axis=0)
    ends = tl.cumsum(total, axis=0)
    tl.store(ends_ptr + e, ends, mask=e < tl.where(chunk == 0, E, 0))
    at = chunk * C + tl.arange(0, C)
    found = tl.load(experts_ptr + at, mask=at < M, other=E_PAD)
    is_mine = (found[:, None] == e[None, :]).to(tl.int32)
    rank = tl.cumsum(is_mine, axis=0) - is_mine + (ends - total + before)[None, :]
    target = tl.sum(is_mine * rank, axis=1)
    tl.store(tokens_ptr + target, at // K, mask=at < M)
    tl.store(order_ptr + target, at, mask=at < M)
    tl.store(places_ptr + at, target, mask=at < M)


@triton.jit
def _tile(ends_ptr, E: tl.constexpr, E_PAD: tl.constexpr, R: tl.constexpr, COLUMN_TILES: tl.constexpr):
    """Return the expert of this program, which of its tiles of columns it owns, and its rows: first and end.

    Programs of one tile of columns are neighbours, so that they read the same weights at the same time. Past
    the last tile the expert is E_PAD.
    """
    program, e = tl.program_id(0), tl.arange(0, E_PAD)
    end = tl.load(ends_ptr + e, mask=e < E, other=0)
    begin = tl.load(ends_ptr + e - 1, mask=(e > 0) & (e < E), other=0)
    tiles = (end - begin + R - 1) // R
    upto = tl.cumsum(tiles, axis=0) * COLUMN_TILES
    expert = tl.sum((upto <= program).to(tl.int32), axis=0)
    of = e == expert
    own = tl.maximum(tl.sum(tl.where(of, tiles, 0), axis=0), 1)
    place = program - tl.sum(tl.where(of, upto - tiles * COLUMN_TILES, 0), axis=0)
    first = tl.sum(tl.where(of, begin, 0), axis=0) + place % own * R
    return expert, place // own, first, tl.sum(tl.where(of, end, 0), axis=0)


@triton.jit
def _hidden_tile(
    x_ptr, tokens_ptr, order_ptr, weights_ptr, w, out_ptr, expert, column, first, end,
    D: tl.constexpr, F: tl.constexpr, R: tl.constexpr, C: tl.constexpr, S: tl.constexpr,
):  # fmt: skip
    r, f, s = first + tl.arange(0, R), column * C + tl.arange(0, C), tl.arange(0, S)
    token = tl.load(tokens_ptr + r, mask=r < end, other=0).to(tl.int64)
    rows_ptr = x_ptr + token[:, None] * D + s[None, :]
    at = expert * (2 * F) + column * C
    gate = tl.zeros((R, C), dtype=tl.float32)
    up = tl.zeros((R, C), dtype=tl.float32)
    for start in range(0, D, S):
        if D % S == 0:
            x = tl.load(rows_ptr + start)
        else:
            x = tl.load(rows_ptr + start, mask=(start + s < D)[None, :], other=0.0)
        gate = tl.dot(x, w.load([at, start]).T, gate)
        up = tl.dot(x, w.load([at + F, start]).T, up)
    weight = tl.load(weights_ptr + tl.load(order_ptr + r, mask=r < end, other=0)).to(tl.float32)
    out = gate * tl.sigmoid(gate) * up * weight[:, None]
    inside = (r < end)[:, None] & (f < F)[None, :]
    at_out = r.to(tl.int64)[:, None] * F + f[None, :]
    tl.store(out_ptr + at_out, out.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _hidden(
    x_ptr, tokens_ptr, order_ptr, ends_ptr, weights_ptr, w, out_ptr,
    D: tl.constexpr, F: tl.constexpr, E: tl.constexpr, E_PAD: tl.constexpr,
    R: tl.constexpr, C: tl.constexpr, S: tl.constexpr,
):  # fmt: skip
    expert, column, first, end = _tile(ends_ptr, E, E_PAD, R, (F + C - 1) // C)
    if expert < E:
        if end - first <= R // 2:
            _hidden_tile(
                x_ptr, tokens_ptr, order_ptr, weights_ptr, w, out_ptr, expert, column, first, end,
                D, F, R // 2, C, S,
            )  # fmt: skip
        else:
            _hidden_tile(
                x_ptr, tokens_ptr, order_ptr, weights_ptr, w, out_ptr, expert, column, first, end, D, F, R, C, S
            )


@triton.jit
def _down_tile(
    h, w, out_ptr, expert, column, first, end,
    D: tl.constexpr, F: tl.constexpr, R: tl.constexpr, C: tl.constexpr, S: tl.constexpr,
):  # fmt: skip
    total = tl.zeros((R, C), dtype=tl.float32)
    for start in range(0, F, S):
        total = tl.dot(h.load([first, start]), w.load([expert * D + column * C, start]).T, total)
    r, d = first + tl.arange(0, R), column * C + tl.arange(0, C)
    inside = (r < end)[:, None] & (d < D)[None, :]
    at_out = r.to(tl.int64)[:, None] * D + d[None, :]
    tl.store(out_ptr + at_out, total.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _down(
    h, h_half, ends_ptr, w, out_ptr,
    D: tl.constexpr, F: tl.constexpr, E: tl.constexpr, E_PAD: tl.constexpr,
    R: tl.constexpr, C: tl.constexpr, S: tl.constexpr,
):  # fmt: skip
    expert, column, first, end = _tile(ends_ptr, E, E_PAD, R, (D + C - 1) // C)
    if expert < E:
        if end - first <= R // 2:
            _down_tile(h_half, w, out_ptr, expert, column, first, end, D, F, R // 2, C, S)
        else:
            _down_tile(h, w, out_ptr, expert, column, first, end, D, F, R, C, S)


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


@on_device
def sort(experts: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Sort choices (N, K) by expert.

    Returns:
        The token of each row (M,), its place among the choices (M,), the row of each choice (N, K), and where the
        rows of each expert end (E,); all int32.
    """
    M = experts.numel()
    entries = ENTRIES if M <= MANY else MANY_ENTRIES
    chunks, sizes = triton.cdiv(M, entries), (num_experts, triton.next_power_of_2(num_experts), entries)
    tokens, order, places = (torch.empty(M, dtype=torch.int32, device=experts.device) for _ in range(3))
    counts, ends = (
        torch.empty(size, dtype=torch.int32, device=experts.device) for size in (chunks * num_experts, num_experts)
    )
    _count[(chunks,)](experts, counts, M, *sizes)
    _place[(chunks,)](experts, counts, tokens, order, places, ends, M, experts.shape[1], chunks, *sizes, CHUNKS)
    return tokens, order, places.view_as(experts), ends


@on_device
def hidden(x: Tensor, weights: Tensor, rows: tuple[Tensor, Tensor, Tensor], gate_up: Tensor) -> Tensor:
    """Return SwiGLU (M, F) of each row's token at its expert, times the router's weight.

    Args:
        x: tokens (N, D).
        weights: (N, K).
        rows: of `sort`: tokens (M,), places among the choices (M,), ends (E,).
        gate_up: (E, 2F, D).
    """
    (E, F2, D), (tokens, order, ends) = gate_up.shape, rows
    F, M = F2 // 2, len(tokens)
    height, width = _tile_size(len(x))
    out, columns = x.new_empty(M, F), min(width, triton.next_power_of_2(F))
    w = TensorDescriptor.from_tensor(gate_up.view(E * F2, D), [columns, STEP])
    _hidden[_grid(M, E, F, height, columns)](
        x, tokens, order, ends, weights, w, out, D, F, E, triton.next_power_of_2(E), height, columns, STEP,
        num_warps=8 if height == ROWS else 4, num_stages=4,
    )  # fmt: skip
    return out


@on_device
def down(h: Tensor, ends: Tensor, weight: Tensor, tokens: int | None = None) -> Tensor:
    """Multiply rows (M, F) by their experts' (E, D, F): (M, D). The rows of an expert end at `ends` (E,).

    No expert has more rows than there are `tokens`, `M` if not given.
    """
    (E, D, F), M = weight.shape, len(h)
    height, width = _tile_size(M if tokens is None else tokens)
    out, columns = h.new_empty(M, D), min(width, triton.next_power_of_2(D))
    w = TensorDescriptor.from_tensor(weight.view(E * D, F), [columns, STEP])
    tiles = [TensorDescriptor.from_tensor(h, [rows, STEP]) for rows in (height, height // 2)]
    _down[_grid(M, E, D, height, columns)](
        *tiles, ends, w, out, D, F, E, triton.next_power_of_2(E), height, columns, STEP,
        num_warps=4, num_stages=3,
    )  # fmt: skip
    return out


def _tile_size(tokens: int) -> tuple[int, int]:
    """Return rows and columns of a tile."""
    return (FEW_ROWS, FEW_COLUMNS) if tokens <= FEW else (ROWS, COLUMNS)


def _grid(rows: int, num_experts: int, width: int, height: int, columns: int) -> tuple[int]:
    """Return the programs for the largest possible number of tiles: an expert's last one may be partial."""
    return ((triton.cdiv(rows, height) + min(num_experts, rows)) * triton.cdiv(width, columns),)


@on_device
def gather_sum(rows: Tensor, places: Tensor, onto: Tensor | None = None) -> Tensor:
    """Sum the rows (M, D) at each token's K places (N, K), added to `onto` in place if given: (N, D)."""
    (N, K), D = places.shape, rows.shape[1]
    out = rows.new_empty(N, D) if onto is None else onto
    columns = min(SUM_COLUMNS, triton.next_power_of_2(D))
    _gather_sum[(N, triton.cdiv(D, columns))](rows, places, out, K, D, columns, onto is not None)
    return out


def grouped(
    x: Tensor,
    weights: Tensor,
    experts: Tensor,
    gate_up: Tensor,
    down_weight: Tensor,
    onto: Tensor | None = None,
) -> Tensor:
    """Return the weighted sum over each token's experts, (N, D).

    Args:
        x: normalised tokens.
        weights: (N, K), the router's.
        experts: (N, K), chosen by the router.
        gate_up: (E, 2F, D), gate rows then up rows.
        down_weight: (E, D, F).
        onto: (N, D) tensor that the sum is added to in place.
    """
    tokens, order, places, ends = sort(experts, len(gate_up))
    h = hidden(x, weights, (tokens, order, ends), gate_up)
    return gather_sum(down(h, ends, down_weight, len(x)), places, onto)
