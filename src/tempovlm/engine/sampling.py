"""Logits to a token: greedy, or from the nucleus of the distribution. Shapes: `B` rows, `V` vocabulary."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from tempovlm.core.request import Request

Sampler = Callable[[Tensor], Tensor]
"""(B, V) logits to (B,) tokens."""


def greedy(logits: Tensor) -> Tensor:
    """The likeliest token of each row."""
    return logits.argmax(dim=-1)


def sampler_for(request: Request, device: torch.device) -> Sampler:
    """Greedy at temperature 0, else a sampler with a generator of its own, seeded by the request."""
    if request.temperature == 0:
        return greedy
    generator = torch.Generator(device).manual_seed(request.seed)

    def sample(logits: Tensor) -> Tensor:
        probabilities = (logits.float() / request.temperature).softmax(dim=-1)
        kept = nucleus(probabilities, request.top_p)
        return torch.multinomial(kept, 1, generator=generator).squeeze(-1)

    return sample


def nucleus(probabilities: Tensor, top_p: float | Tensor) -> Tensor:
    """Zero all but the fewest likeliest tokens whose mass reaches `top_p` (Holtzman et al., arXiv 1904.09751)."""
    ordered, order = probabilities.sort(dim=-1, descending=True)
    before = ordered.cumsum(dim=-1) - ordered
    return torch.zeros_like(probabilities).scatter(-1, order, ordered.masked_fill(before >= top_p, 0.0))
