"""A latency budget as a vector that a network can read: sinusoidal over the logarithm of the milliseconds.

The best setting changes with the ratio of budgets, not with their difference, and in steps. So the logarithm is
encoded, finely enough that a change of 1 % is visible. Shapes: `B` batch, `F` frequencies.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

LEAST_MS, MOST_MS = 0.5, 200_000.0
"""Budgets outside of this range are clipped to it; an unlimited and a used-up budget are both legal inputs."""

RESOLUTION = 0.01
"""Relative change of a budget that must be visible."""

_PHASE_OF_RESOLUTION = math.pi / 4
"""Turn of the fastest wave for one step of the resolution: its sine or cosine changes by at least 0.29."""

CENTRE, SPREAD = math.log(100.0), 2.0


class LatencyBudgetEncoder(nn.Module):
    """Return features (B, width) of budgets (B,) in milliseconds.

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
        """Clip budgets to the range seen in training: nothing was learned outside of it."""
        self.range_ms.copy_(torch.tensor(limits_ms).clamp(LEAST_MS, MOST_MS))

    def waves(self, budget_ms: Tensor) -> Tensor:
        """Return the standardised logarithm, sines and cosines (B, 2F + 1)."""
        least, most = self.range_ms
        log = torch.minimum(torch.maximum(budget_ms.float(), least), most).log().unsqueeze(-1)
        phase = log * self.frequencies
        return torch.cat(((log - CENTRE) / SPREAD, phase.sin(), phase.cos()), dim=-1)

    def forward(self, budget_ms: Tensor) -> Tensor:
        """Return features (B, width) of milliseconds (B,)."""
        return self.mlp(self.waves(budget_ms))
