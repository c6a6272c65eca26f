"""A mixture of experts whose top-k is an argument; weights are not renormalised after the top-k.

Three ways to compute the same sum, chosen by the caller's situation: `grouped` visits each expert once with
all its tokens (prefill), `gathered` fetches the few experts that a few tokens visit (decode), `dense` runs all
experts and zeroes the unused ones (training on a GPU, where few large products beat many small ones). On CUDA in
bfloat16, where a look at the counts would stall the device, `kernels.experts` groups tokens instead.

Shapes: `N` tokens, `D` width, `E` experts, `K` top-k, `F` expert width.
"""

from __future__ import annotations

from contextlib import nullcontext
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tempovlm.model.config import ModelConfig
from tempovlm.model.layers import RMSNorm, gated_swiglu, has_kernels, swiglu

GATHER_LIMIT = 4
"""Up to this many tokens, fetching experts token by token beats sorting tokens into groups."""


def best(scores: Tensor, top_k: int) -> Tensor:
    """Return the experts (N, K) with the highest scores (N, E), highest first; ties go to the lower index.

    The kernels and `narrow` choose in the same order; the library's top-k breaks ties arbitrarily.
    """
    return scores.sort(dim=-1, descending=True, stable=True).indices[..., :top_k].contiguous()


class MoE(nn.Module):
    """One block's experts: `gate_up` (E, 2F, D) holds gate rows then up rows, `down` is (E, D, F)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        E, D, F_ = config.num_experts, config.width, config.expert_width
        self.norm = RMSNorm(D, config.norm_eps)
        self.router = nn.Linear(D, E, bias=False)
        self.gate_up = nn.Parameter(torch.empty(E, 2 * F_, D))
        self.down = nn.Parameter(torch.empty(E, D, F_))

    def forward(self, x: Tensor, top_k: int) -> Tensor:
        """Return the experts' addition to (B, T, D), each token visiting its `top_k` best."""
        flat = self.norm(x).view(-1, x.shape[-1])
        weights, experts = self.route(flat, top_k)
        if has_kernels(flat, self.gate_up):
            from tempovlm.model.kernels import experts as kernels

            return kernels.grouped(flat, weights, experts, self.gate_up, self.down).view_as(x)
        if flat.shape[0] <= GATHER_LIMIT:
            return self.gathered(flat, weights, experts).view_as(x)
        return self.grouped(flat, weights, experts).view_as(x)

    def add_to(self, x: Tensor, top_k: int, limits: Tensor | None = None) -> None:
        """Add the result of `forward` to (..., D) in place; only if `has_kernels`.

        With `limits` (N,), int32, a token visits as many experts as its limit says, at most `top_k`.
        """
        from tempovlm.model.kernels import experts as kernels

        flat = self.norm(x).view(-1, x.shape[-1])
        weights, experts = self.route(flat, top_k, limits)
        kernels.grouped(flat, weights, experts, self.gate_up, self.down, onto=x.view_as(flat))

    def scores(self, x: Tensor) -> Tensor:
        """Return the router's scores (N, E) of tokens (N, D), in float32 whatever the type of `x` and the weights.

        Rounded to bfloat16, two scores are often equal, and a prompt could visit other experts than a decode
        step, whose kernels sum in float32.
        """
        weight, kind = self.router.weight, x.device.type
        if has_kernels(x, weight):
            return torch.mm(x, weight.t(), out_dtype=torch.float32)
        with torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else nullcontext():
            return F.linear(x.float(), weight.float())

    def route(self, x: Tensor, top_k: int, limits: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return weights (N, K) in the type of `x`, and experts of (N, D) tokens: softmax first, then top-k.

        `limits` as in `add_to`.
        """
        scores = self.scores(x)
        if has_kernels(x, self.router.weight):
            from tempovlm.model.kernels import prefill

            return prefill.choose(scores, top_k, x.dtype, limits)
        assert limits is None, "only kernels limit single tokens"
        experts = best(scores, top_k)
        return scores.softmax(dim=-1).gather(-1, experts).to(x.dtype), experts

    def gathered(self, x: Tensor, weights: Tensor, experts: Tensor) -> Tensor:
        """Sum over each token's experts, one matrix-vector product after another: for a handful of tokens."""
        out = torch.zeros_like(x)
        for n, chosen in enumerate(experts.tolist()):
            hidden = swiglu(torch.stack([torch.mv(self.gate_up[e], x[n]) for e in chosen]))
            hidden = hidden * weights[n].unsqueeze(1)
            for row, expert in zip(hidden, chosen, strict=True):
                out[n].addmv_(self.down[expert], row)
        return out

    def grouped(self, x: Tensor, weights: Tensor, experts: Tensor) -> Tensor:
        """Sum over each token's experts, one pass over each expert that any token visits."""
        K = experts.shape[1]
        order = experts.view(-1).argsort()
        ends = torch.bincount(experts.view(-1), minlength=self.router.out_features).cumsum(0).tolist()
        parts = [(e, slice(start, end)) for e, (start, end) in enumerate(pairwise([0, *ends])) if end > start]
        rows = order // K
        inputs = x.index_select(0, rows)
        hidden = x.new_empty(len(rows), self.gate_up.shape[1])
        for expert, part in parts:
            torch.mm(inputs[part], self.gate_up[expert].t(), out=hidden[part])
        hidden = swiglu(hidden).mul_(weights.view(-1)[order].unsqueeze(-1))
        outputs = inputs  # not needed any more, and as large as the result
        for expert, part in parts:
            torch.mm(hidden[part], self.down[expert].t(), out=outputs[part])
        return torch.zeros_like(x).index_add_(0, rows, outputs)

    def dense(self, x: Tensor, weights: Tensor, experts: Tensor) -> Tensor:
        """Sum over each token's experts by running all of them; differentiable."""
        return self.weighted(x, x.new_zeros(x.shape[0], len(self.gate_up)).scatter(1, experts, weights))

    def weighted(self, x: Tensor, gates: Tensor) -> Tensor:
        """Sum over all experts of (N, D) by weights (N, E), 0 for those that a token does not visit."""
        E, F2, D = self.gate_up.shape
        hidden = gated_swiglu(F.linear(x, self.gate_up.view(E * F2, D)), gates)
        return F.linear(hidden, self.down.permute(1, 0, 2).reshape(D, -1))
