"""The experts of many tokens at once on CUDA: tokens sorted by expert on the device, two grouped products.

Nothing comes to the host, so that the work can be captured in a graph and the device never waits. Sums are taken
token by token in a fixed order and in float32: no atomics, equal results every time.

Shapes: `N` tokens, `D` width, `E` experts, `K` top-k, `F` expert width, `M` = N·K rows, `C` columns of a program.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

COLUMNS = 1024


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
def _gather_sum(rows_ptr, places_ptr, out_ptr, K, D: tl.constexpr, C: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    c = tl.program_id(1) * C + tl.arange(0, C)
    total = tl.zeros((C,), dtype=tl.float32)
    for k in range(0, K):
        place = tl.load(places_ptr + token * K + k)
        total += tl.load(rows_ptr + place * D + c, mask=c < D, other=0.0).to(tl.float32)
    tl.store(out_ptr + token * D + c, total.to(out_ptr.dtype.element_ty), mask=c < D)


def weighted_swiglu(h: Tensor, weights: Tensor, order: Tensor) -> Tensor:
    """SwiGLU of (M, 2F) times the weight at each row's place before the sort: (M, F)."""
    M, width = h.shape[0], h.shape[1] // 2
    out = h.new_empty(M, width)
    columns = min(COLUMNS, triton.next_power_of_2(width))
    with torch.cuda.device_of(h):
        _weighted_swiglu[(M, triton.cdiv(width, columns))](h, weights, order, out, width, columns)
    return out


def gather_sum(rows: Tensor, places: Tensor) -> Tensor:
    """The sum of the rows (M, D) at each token's K places (N, K): (N, D)."""
    (N, K), D = places.shape, rows.shape[1]
    out = rows.new_empty(N, D)
    columns = min(COLUMNS, triton.next_power_of_2(D))
    with torch.cuda.device_of(rows):
        _gather_sum[(N, triton.cdiv(D, columns))](rows, places, out, K, D, columns)
    return out


def grouped(x: Tensor, weights: Tensor, experts: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """What the experts make of (N, D): the weighted sum over each token's experts.

    Args:
        x: normalised tokens.
        weights: (N, K), the router's.
        experts: (N, K), those that it chose.
        gate_up: (E, 2F, D), gate rows then up rows.
        down: (E, D, F).
    """
    K = experts.shape[1]
    ordered, order = experts.flatten().to(torch.int16).sort()  # a radix sort passes over every byte of a key
    every = torch.arange(len(gate_up), device=x.device, dtype=torch.int16)
    ends = torch.searchsorted(ordered, every, right=True, out_int32=True)
    places = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=x.device))
    h = F.grouped_mm(x.index_select(0, order // K), gate_up.transpose(1, 2), offs=ends)
    hidden = weighted_swiglu(h, weights.flatten(), order)
    rows = F.grouped_mm(hidden, down.transpose(1, 2), offs=ends)
    return gather_sum(rows, places.view_as(experts))
