"""The router of a training step, forward and backward: softmax, top-k, all experts' weights, sums over tokens.

Operation by operation, with a sort and a one-hot table of eight bytes for every pair of token and expert, this is
as dear as the experts. Shapes: `N` tokens, `D` width, `E` experts.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from tempovlm.model.kernels.device import on_device

PROGRAMS = 1056
"""Each keeps sums of its own, which are added up afterwards."""

PAIRS = 16384
"""Pairs of experts that are compared at a time, over all tokens of a tile."""


@triton.jit
def _weigh(scores_ptr, gates_ptr, sums_ptr, rows, top_k, E: tl.constexpr, E_PAD: tl.constexpr, R: tl.constexpr):
    e = tl.arange(0, E_PAD)
    chosen = tl.zeros((E_PAD,), tl.float32)
    mass = tl.zeros((E_PAD,), tl.float32)
    squares = tl.zeros((E_PAD,), tl.float32)
    earlier = e[None, None, :] < e[None, :, None]
    for tile in range(tl.program_id(0), tl.cdiv(rows, R), tl.num_programs(0)):
        row = tile * R + tl.arange(0, R)
        inside = (row < rows)[:, None] & (e < E)[None, :]
        at = row[:, None] * E + e[None, :]
        scores = tl.load(scores_ptr + at, mask=inside, other=-float("inf"))
        scores = tl.where((row < rows)[:, None], scores, 0.0)
        mine, other = scores[:, :, None], scores[:, None, :]
        ahead = (other > mine) | ((other == mine) & earlier)
        is_best = (tl.sum(ahead.to(tl.int32), axis=2) < top_k) & inside
        raised = tl.exp(scores - tl.max(scores, axis=1)[:, None])
        share = tl.where(inside, raised / tl.sum(raised, axis=1)[:, None], 0.0)
        tl.store(gates_ptr + at, tl.where(is_best, share, 0.0).to(gates_ptr.dtype.element_ty), mask=inside)
        chosen += tl.sum(is_best.to(tl.float32), axis=0)
        mass += tl.sum(share, axis=0)
        squares += tl.sum(share * share, axis=0)
    out = sums_ptr + tl.program_id(0) * (3 * E) + e
    tl.store(out, chosen, mask=e < E)
    tl.store(out + E, mass, mask=e < E)
    tl.store(out + 2 * E, squares, mask=e < E)


@triton.jit
def _weigh_backward(
    scores_ptr, gates_ptr, d_ptr, d_sums_ptr, slope_ptr, rows,
    E: tl.constexpr, E_PAD: tl.constexpr, R: tl.constexpr,
):  # fmt: skip
    e = tl.arange(0, E_PAD)
    row = tl.program_id(0) * R + tl.arange(0, R)
    inside = (row < rows)[:, None] & (e < E)[None, :]
    at = row[:, None] * E + e[None, :]
    scores = tl.load(scores_ptr + at, mask=inside, other=-float("inf"))
    scores = tl.where((row < rows)[:, None], scores, 0.0)
    raised = tl.exp(scores - tl.max(scores, axis=1)[:, None])
    share = tl.where(inside, raised / tl.sum(raised, axis=1)[:, None], 0.0)
    gates = tl.load(gates_ptr + at, mask=inside, other=0.0)
    d = tl.load(d_ptr + at, mask=inside, other=0.0).to(tl.float32)
    d_mass = tl.load(d_sums_ptr + E + e, mask=e < E, other=0.0)[None, :]
    d_squares = tl.load(d_sums_ptr + 2 * E + e, mask=e < E, other=0.0)[None, :]
    d_share = tl.where(gates != 0, d, 0.0) + d_mass + 2 * share * d_squares
    slope = share * (d_share - tl.sum(d_share * share, axis=1)[:, None])
    tl.store(slope_ptr + at, slope.to(slope_ptr.dtype.element_ty), mask=inside)


def _sizes(experts: int) -> tuple[int, int, int]:
    padded = triton.next_power_of_2(experts)
    return experts, padded, max(PAIRS // padded**2, 1)


@on_device
def _start(scores: Tensor, top_k: int, kind: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return weights (N, E) and sums (3, E)."""
    N, E = scores.shape
    sizes = _sizes(E)
    programs = min(PROGRAMS, triton.cdiv(N, sizes[2]))
    gates = torch.empty(N, E, dtype=kind, device=scores.device)
    sums = torch.empty(programs, 3, E, dtype=torch.float32, device=scores.device)
    _weigh[(programs,)](scores, gates, sums, N, top_k, *sizes)
    return gates, sums.sum(0)


@on_device
def _start_backward(scores: Tensor, gates: Tensor, d: Tensor, d_sums: Tensor) -> Tensor:
    """Return the gradient of the scores (N, E), in the type of the weights."""
    N, E = scores.shape
    slope, sizes = torch.empty_like(gates), _sizes(E)
    _weigh_backward[(triton.cdiv(N, sizes[2]),)](scores, gates, d, d_sums, slope, N, *sizes)
    return slope


class _Route(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
        if x.is_cuda and x.dtype == weight.dtype == torch.bfloat16:
            scores = torch.mm(x, weight.t(), out_dtype=torch.float32)
        else:
            scores = F.linear(x.float(), weight.float())
        gates, sums = _start(scores, top_k, x.dtype)
        ctx.save_for_backward(x, weight, scores, gates)
        return gates, sums

    @staticmethod
    def backward(ctx: Any, d: Tensor, d_sums: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight, scores, gates = ctx.saved_tensors
        slope = _start_backward(scores, gates, d.contiguous(), d_sums.contiguous())
        return slope @ weight, slope.t() @ x, None


def route(x: Tensor, weight: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """Return the weights of all experts for tokens (N, D), 0 but for the `top_k` best, and sums over the tokens.

    Args:
        x: tokens.
        weight: (E, D) of the router.
        top_k: experts of a token.

    Returns:
        Weights (N, E) in the type of `x`, and float32 sums (3, E): the tokens that chose an expert, its
        probabilities, and their squares. The first has no gradient.
    """
    return _Route.apply(x, weight, top_k)
