"""Logits to a token: greedy, or from the nucleus of the distribution. Shapes: `B` rows, `V` vocabulary."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from tempovlm.core.request import Request
from tempovlm.model.decoder import BROKEN

Sampler = Callable[[Tensor], Tensor]
"""Return tokens (B,) from logits (B, V), `BROKEN` for rows whose logits are not numbers."""

_LEAST_TEMPERATURE, _MOST_TEMPERATURE = 1e-30, 1e30
"""Temperatures beyond these, by which float32 cannot divide, are clipped: the likeliest token, or any token."""


def greedy(logits: Tensor) -> Tensor:
    """Return the likeliest token of each row."""
    best, tokens = logits.max(dim=-1)  # a NaN anywhere in a row is its maximum
    return torch.where(best.isfinite(), tokens, BROKEN)


def sampler_for(request: Request, device: torch.device) -> Sampler:
    """Return greedy sampling at temperature 0, else a sampler with its own generator, seeded by the request."""
    if request.temperature == 0:
        return greedy
    generator = torch.Generator(device).manual_seed(request.seed)

    def sample(logits: Tensor) -> Tensor:
        is_sound, kept = candidates(logits, usable(request.temperature), request.top_p)
        return torch.where(is_sound, torch.multinomial(kept, 1, generator=generator).squeeze(-1), BROKEN)

    return sample


def usable(temperature: float) -> float:
    """Return the nearest temperature that float32 can divide by."""
    return min(max(temperature, _LEAST_TEMPERATURE), _MOST_TEMPERATURE)


def candidates(logits: Tensor, temperature: float | Tensor, top_p: float | Tensor) -> tuple[Tensor, Tensor]:
    """Return whether logits (B, V) are numbers (B,), and the masses (B, V) to draw by; even masses if not."""
    logits = logits.float()
    best = logits.amax(dim=-1, keepdim=True)
    is_sound = best.isfinite()
    below = torch.where(is_sound, logits - best, 0.0)  # before the division, which could overflow
    return is_sound.squeeze(-1), nucleus((below / temperature).softmax(dim=-1), top_p)


def nucleus(probabilities: Tensor, top_p: float | Tensor) -> Tensor:
    """Zero all but the fewest likeliest tokens whose mass reaches `top_p` (Holtzman et al., arXiv 1904.09751)."""
    ordered, order = probabilities.sort(dim=-1, descending=True)
    before = ordered.cumsum(dim=-1) - ordered
    is_left_out = (before >= top_p) & (before > 0)  # never the likeliest: a float32 rounds tiny masses to 0
    return torch.zeros_like(probabilities).scatter(-1, order, ordered.masked_fill(is_left_out, 0.0))
