"""A latency budget as a vector that a network can read: sinusoidal over the logarithm of the milliseconds.

Which setting is best changes with the ratio of budgets, not with their difference, and it changes in steps; so the
logarithm is encoded, finely enough that 1 % of budget is seen. Knows no knobs. Shapes: `B` batch, `F` frequencies.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

LEAST_MS, MOST_MS = 0.5, 200_000.0
"""Budgets outside are encoded as these; an unlimited budget and one that is used up are both legal inputs."""

RESOLUTION = 0.01
"""Share of the budget that must make a difference."""

_PHASE_OF_RESOLUTION = math.pi / 4
"""What one step of the resolution turns the fastest wave by: a sine or a cosine changes by at least 0.29."""

CENTRE, SPREAD = math.log(100.0), 2.0


class LatencyBudgetEncoder(nn.Module):
    """Milliseconds (B,) to features (B, width).

    Waves over the logarithm as over positions in A. Vaswani et al., Attention is all you need, arXiv 1706.03762,
    section 3.5: frequencies in geometric order, from half a turn over the whole range of budgets to an eighth of
    a turn over 1 % of a budget. Two linear layers follow.
    """

    frequencies: Tensor
    range_ms: Tensor

    def __init__(self, width: int, num_frequencies: int = 12) -> None:
        super().__init__()
        slowest = math.pi / math.log(MOST_MS / LEAST_MS)
        fastest = _PHASE_OF_RESOLUTION / math.log1p(RESOLUTION)
        steps = torch.linspace(0, 1, num_frequencies) if num_frequencies > 1 else torch.ones(1)
        self.width, self.num_frequencies = width, num_frequencies
        self.register_buffer("frequencies", slowest * (fastest / slowest) ** steps, persistent=False)
        self.register_buffer("range_ms", torch.tensor([LEAST_MS, MOST_MS]))
        self.mlp = nn.Sequential(nn.Linear(2 * num_frequencies + 1, width), nn.SiLU(), nn.Linear(width, width))

    @torch.no_grad()
    def fit(self, limits_ms: tuple[float, float]) -> None:
        """Take budgets outside of those of a training as the nearest of them: beyond, nothing was learned."""
        self.range_ms.copy_(torch.tensor(limits_ms).clamp(LEAST_MS, MOST_MS))

    def waves(self, budget_ms: Tensor) -> Tensor:
        """(B, 2F + 1): the standardised logarithm, sines and cosines."""
        least, most = self.range_ms
        log = torch.minimum(torch.maximum(budget_ms.float(), least), most).log().unsqueeze(-1)
        phase = log * self.frequencies
        return torch.cat(((log - CENTRE) / SPREAD, phase.sin(), phase.cos()), dim=-1)

    def forward(self, budget_ms: Tensor) -> Tensor:
        """(B,) milliseconds to (B, width)."""
        return self.mlp(self.waves(budget_ms))
