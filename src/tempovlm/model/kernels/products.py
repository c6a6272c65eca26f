"""Device programs of one token's matrix products: a program owns a few rows, reads them once, sums in float32.

With `EARLY` a program is started while the kernel before it still runs (programmatic dependent launch, CUDA
programming guide): it loads its first weights, which never change, and only then waits for the results of that
kernel. So memory stays busy between two kernels. Values that a program reads before it waits must
have been written before the previous kernel began, and are read past the processor's own cache if a step
changes them. Every kernel lets the next one start at once, except those whose docstring gives a reason.

Shapes: `D` width, `E` experts, `K` top-k, `F` expert width, `R` rows of a program, `C` columns that it reads at a
time.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


@triton.jit
def _rows_of(w_ptr, at, i, inside_rows, D: tl.constexpr):
    """Columns `i` of the rows that begin at `at`: (R, C)."""
    inside = inside_rows[:, None] & (i < D)[None, :]
    return tl.load(w_ptr + at[:, None] + i[None, :], mask=inside, other=0.0, eviction_policy="evict_first")


@triton.jit
def _normed_rows(
    x_ptr, norm_ptr, w_ptr, scales_ptr, r, rows, eps,
    D: tl.constexpr, R: tl.constexpr, C: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """Products (R,) of rows `r` of a matrix (rows, D) with a normalised vector.

    The norm's scale is one number: it is computed beside the sums and applied to them at the end.
    """
    at, c = r.to(tl.int64) * D, tl.arange(0, C)
    total = tl.zeros((R, C), dtype=tl.float32)
    squares = tl.zeros((C,), dtype=tl.float32)
    w = _rows_of(w_ptr, at, c, r < rows, D)
    norm = tl.load(norm_ptr + c, mask=c < D, other=0.0)
    if EARLY:
        gdc_wait()
    for start in tl.static_range(0, D, C):
        i = start + c
        if start > 0:
            w = _rows_of(w_ptr, at, i, r < rows, D)
            norm = tl.load(norm_ptr + i, mask=i < D, other=0.0)
        x = tl.load(x_ptr + i, mask=i < D, other=0.0)
        total += w.to(tl.float32) * (x * norm.to(tl.float32))[None, :]
        squares += x * x
    out = tl.sum(total, axis=1) * tl.rsqrt(tl.sum(squares, axis=0) / D + eps)
    if scales_ptr is not None:
        out *= tl.load(scales_ptr + r, mask=r < rows, other=0.0)
    return out


@triton.jit
def norm_matvec(
    x_ptr, norm_ptr, w_ptr, scales_ptr, out_ptr, rows, eps,
    D: tl.constexpr, R: tl.constexpr, C: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """Out (rows,) = W (rows, D) · norm(x)."""
    if EARLY:
        gdc_launch_dependents()
    r = tl.program_id(0) * R + tl.arange(0, R)
    out = _normed_rows(x_ptr, norm_ptr, w_ptr, scales_ptr, r, rows, eps, D, R, C, EARLY)
    tl.store(out_ptr + r, out, mask=r < rows)


@triton.jit
def route(
    x_ptr, norm_ptr, w_ptr, scales_ptr, scores_ptr, ticket_ptr, chosen_ptr, shares_ptr, K, parts, eps,
    D: tl.constexpr, E: tl.constexpr, E_PAD: tl.constexpr, R: tl.constexpr, C: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """The router's scores; the last program to arrive writes the K best experts and their shares."""
    if EARLY:
        gdc_launch_dependents()
    r = tl.program_id(0) * R + tl.arange(0, R)
    tl.store(
        scores_ptr + r, _normed_rows(x_ptr, norm_ptr, w_ptr, scales_ptr, r, E, eps, D, R, C, EARLY), mask=r < E
    )
    tl.debug_barrier()
    if tl.atomic_add(ticket_ptr, 1) == parts - 1:
        e = tl.arange(0, E_PAD)
        # Other programs wrote these: read past this processor's own cache.
        scores = tl.load(scores_ptr + e, mask=e < E, other=float("-inf"), cache_modifier=".cg")
        masses = tl.exp(scores - tl.max(scores, axis=0))
        # An expert's place is the number of experts that beat it; equal scores go to the lower index.
        beats = (scores[None, :] > scores[:, None]) | (
            (scores[None, :] == scores[:, None]) & (e[None, :] < e[:, None])
        )
        place = tl.sum(beats.to(tl.int32), axis=1)
        is_chosen = (place < K) & (e < E)
        tl.store(chosen_ptr + place, e, mask=is_chosen)
        tl.store(shares_ptr + place, masses / tl.sum(masses, axis=0), mask=is_chosen)
        tl.store(ticket_ptr, 0)


@triton.jit
def expert_hidden(
    x_ptr, norm_ptr, chosen_ptr, shares_ptr, w_ptr, scales_ptr, hidden_ptr, eps,
    D: tl.constexpr, F: tl.constexpr, E: tl.constexpr, R: tl.constexpr, C: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """SwiGLU of rows of the slot-th chosen expert, times its share.

    The next kernel may start only after the choice, because it reads it, and uses its weights, before it waits.
    """
    tile, slot = tl.program_id(0), tl.program_id(1)
    f, c = tile * R + tl.arange(0, R), tl.arange(0, C)
    if EARLY:
        gdc_wait()
        gdc_launch_dependents()
    # For NaN no comparison chose an expert; the index must still be valid.
    expert = tl.minimum(tl.maximum(tl.load(chosen_ptr + slot), 0), E - 1)
    share = tl.load(shares_ptr + slot)
    at = expert.to(tl.int64) * (2 * F * D) + f * D
    gate = tl.zeros((R, C), dtype=tl.float32)
    up = tl.zeros((R, C), dtype=tl.float32)
    squares = tl.zeros((C,), dtype=tl.float32)
    for start in tl.static_range(0, D, C):
        i = start + c
        w_gate = _rows_of(w_ptr, at, i, f < F, D)
        w_up = _rows_of(w_ptr + F * D, at, i, f < F, D)
        x = tl.load(x_ptr + i, mask=i < D, other=0.0)
        normed = x * tl.load(norm_ptr + i, mask=i < D, other=0.0).to(tl.float32)
        gate += w_gate.to(tl.float32) * normed[None, :]
        up += w_up.to(tl.float32) * normed[None, :]
        squares += x * x
    scale = tl.rsqrt(tl.sum(squares, axis=0) / D + eps)
    gate_rows = tl.sum(gate, axis=1) * scale
    up_rows = tl.sum(up, axis=1) * scale
    if scales_ptr is not None:
        gate_rows *= tl.load(scales_ptr + expert * 2 * F + f, mask=f < F, other=0.0)
        up_rows *= tl.load(scales_ptr + expert * 2 * F + F + f, mask=f < F, other=0.0)
    hidden = gate_rows * tl.sigmoid(gate_rows) * up_rows * share
    tl.store(hidden_ptr + slot * F + f, hidden, mask=f < F)


@triton.jit
def _slot_rows(slot, K, chosen_ptr, r, D: tl.constexpr, E: tl.constexpr, ROUTED: tl.constexpr):
    """Return rows `r` of the slot-th matrix among all rows of all matrices; past the last slot, of the last."""
    row = r.to(tl.int64)
    if ROUTED:
        expert = tl.load(chosen_ptr + tl.minimum(slot, K - 1), cache_modifier=".cg")
        row += tl.minimum(tl.maximum(expert, 0), E - 1).to(tl.int64) * D
    return row


@triton.jit
def _add_product(total, w, slot, in_ptr, w_ptr, scales_ptr, row, inside, c, F: tl.constexpr, C: tl.constexpr):
    """Return sums (R, C) plus the products of one slot's input with its rows; `w` holds their first columns."""
    if scales_ptr is not None:
        scales = tl.load(scales_ptr + row, mask=inside, other=0.0)[:, None]
    for start in tl.static_range(0, F, C):
        f = start + c
        if start > 0:
            w = _rows_of(w_ptr, row * F, f, inside, F)
        value = tl.load(in_ptr + slot * F + f, mask=f < F, other=0.0)[None, :]
        total += w.to(tl.float32) * (value if scales_ptr is None else value * scales)
    return total


@triton.jit
def add_matvec(
    in_ptr, chosen_ptr, w_ptr, scales_ptr, x_ptr, K, D: tl.constexpr, F: tl.constexpr, E: tl.constexpr,
    ROUTED: tl.constexpr, R: tl.constexpr, C: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """X (D,) += Σ over K of W[chosen] (D, F) · in (K, F); a single plain product where nothing is routed."""
    if EARLY:
        gdc_launch_dependents()
    r, c = tl.program_id(0) * R + tl.arange(0, R), tl.arange(0, C)
    total = tl.zeros((R, C), dtype=tl.float32)
    # Two slots at a time, and the next two in flight: enough loads, and no more than registers hold.
    row, other_row = _slot_rows(0, K, chosen_ptr, r, D, E, ROUTED), _slot_rows(1, K, chosen_ptr, r, D, E, ROUTED)
    w, other_w = (
        _rows_of(w_ptr, row * F, c, r < D, F),
        _rows_of(w_ptr, other_row * F, c, r < tl.where(K > 1, D, 0), F),
    )
    if EARLY:
        gdc_wait()
    for slot in range(0, K, 2):
        is_next, is_other = r < tl.where(slot + 2 < K, D, 0), r < tl.where(slot + 3 < K, D, 0)
        next_row = _slot_rows(slot + 2, K, chosen_ptr, r, D, E, ROUTED)
        next_other_row = _slot_rows(slot + 3, K, chosen_ptr, r, D, E, ROUTED)
        next_w = _rows_of(w_ptr, next_row * F, c, is_next, F)
        next_other_w = _rows_of(w_ptr, next_other_row * F, c, is_other, F)
        total = _add_product(total, w, slot, in_ptr, w_ptr, scales_ptr, row, r < D, c, F, C)
        if slot + 1 < K:
            total = _add_product(total, other_w, slot + 1, in_ptr, w_ptr, scales_ptr, other_row, r < D, c, F, C)
        row, other_row, w, other_w = next_row, next_other_row, next_w, next_other_w
    x = tl.load(x_ptr + r, mask=r < D, other=0.0)
    tl.store(x_ptr + r, x + tl.sum(total, axis=1), mask=r < D)
