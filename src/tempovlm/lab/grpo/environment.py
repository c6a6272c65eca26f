"""The environment that policies act in: questions under budgets, and each setting's latency and accuracy.

Accuracy comes from the core experiment's table, or from the model itself, which then runs only what was drawn, and
nothing twice. Latency is the table's.

Shapes: `N` questions, `K` settings, `T` tiers, `B` groups of a batch, `G` choices of a group.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tempovlm.core.knobs import KnobConfig
from tempovlm.data.sample import Sample
from tempovlm.engine.engine import Engine
from tempovlm.lab.core_exp.batched import answer_settings
from tempovlm.lab.core_exp.plan import Job
from tempovlm.lab.table import Floats, Table

MASKED = -1e9
"""A logarithm of no probability; finite, so that a row in which everything is masked has no gradient of NaN."""

LEAST_LEFT = 0.01
"""Share of the budget that counts as left where looking at the picture took all of it: its logarithm is needed."""

_log = logging.getLogger("tempovlm")


class AccuracySource(Protocol):
    """Says how good the answers at some settings are."""

    def __call__(self, rows: Tensor, settings: Tensor) -> Tensor:
        """Accuracies (B, G) of questions (B,) at settings (B, G), both indices on the CPU."""


@dataclass(frozen=True, eq=False, slots=True)
class TableAccuracy:
    """Accuracies (N, K) of the core experiment."""

    values: Tensor

    def __call__(self, rows: Tensor, settings: Tensor) -> Tensor:
        """Look them up."""
        return self.values[rows.unsqueeze(1), settings]


class OnlineAccuracy:
    """Runs the model at what was asked for and not answered before.

    A question that fails at a setting counts as answered wrongly there; it is counted and logged.
    """

    def __init__(
        self, engine: Engine, samples: Sequence[Sample], max_new_tokens: int = 16, known: Tensor | None = None
    ) -> None:
        """Answer `samples`, in the table's order; `known` (N, K) holds NaN where nothing was asked yet."""
        self.engine, self.samples, self.max_new_tokens = engine, samples, max_new_tokens
        size = (len(samples), len(engine.space))
        self.known = torch.full(size, torch.nan, dtype=torch.float64) if known is None else known.clone()
        self.runs = self.failures = 0

    def __call__(self, rows: Tensor, settings: Tensor) -> Tensor:
        """Run what is missing, one encoding for a picture's settings of a tier."""
        pairs = set(
            zip(rows.repeat_interleave(settings.shape[1]).tolist(), settings.flatten().tolist(), strict=True)
        )
        missing: dict[tuple[int, str], list[int]] = {}
        for row, setting in sorted(pairs):
            if torch.isnan(self.known[row, setting]):
                tier = self.engine.space.settings[setting].tier
                missing.setdefault((row, tier), []).append(setting)
        for (row, _), wanted in missing.items():
            self._run(row, wanted)
        return self.known[rows.unsqueeze(1), settings]

    def _run(self, row: int, wanted: list[int]) -> None:
        space, job = self.engine.space, Job(self.samples[row], self.max_new_tokens)
        for found in answer_settings(self.engine, [job], [space.settings[i] for i in wanted]):
            index = space.index(KnobConfig(tier=found.tier, top_k=found.top_k, num_blocks=found.num_blocks))
            self.runs += 1
            if found.accuracy is None:
                self.failures += 1
                _log.warning(
                    "%s %s at %s: %s", found.dataset, found.question_id, space.settings[index], found.error
                )
            self.known[row, index] = found.accuracy or 0.0


@dataclass(frozen=True, eq=False, slots=True)
class Batch:
    """Questions under budgets, as a policy sees them; all on the CPU.

    Attributes:
        rows: (B,) questions. budget_ms: (B,). left_ms: (B, T) of the budget at the second choice.
        allowed: (B, K) settings that may be chosen; None allows all.
        tiers: (B,) tiers that were chosen from outside, -1 where the policy chooses; None leaves all to it.
    """

    rows: Tensor
    budget_ms: Tensor
    left_ms: Tensor
    allowed: Tensor | None = None
    tiers: Tensor | None = None


class Environment:
    """The questions of a table, what their settings take and what they are worth: by the table unless told."""

    def __init__(self, table: Table, accuracy: AccuracySource | None = None) -> None:
        self.table, self.space = table, table.space
        self.accuracy = accuracy or TableAccuracy(torch.tensor(table.accuracy))
        self.latency_ms, self.upper_ms, self.look_ms = (
            torch.as_tensor(values, dtype=torch.float64)
            for values in (table.latency_ms, table.upper_ms, table.look_ms)
        )

    def allowed(self, rows: Tensor, budget_ms: Tensor) -> Tensor:
        """(B, K) the settings that the guard would let through; the cheapest where none would."""
        fits = self.upper_ms[rows] <= budget_ms.unsqueeze(1)
        cheapest = torch.nn.functional.one_hot(self.latency_ms[rows].argmin(dim=1), len(self.space)).bool()
        return torch.where(fits.any(dim=1, keepdim=True), fits, cheapest)

    def left_ms(self, rows: Tensor, budget_ms: Tensor) -> Tensor:
        """(B, T) what is left of (B,) budgets after looking at the picture at each tier."""
        every = budget_ms.unsqueeze(1)
        return torch.maximum(every - self.look_ms[rows], LEAST_LEFT * every)

    def batch(self, rows: Tensor, budget_ms: Tensor, *, mask: bool, tiers: Tensor | None = None) -> Batch:
        """Put questions (B,) under budgets (B,), with the guard's mask or without, some at given tiers."""
        allowed = self.allowed(rows, budget_ms) if mask else None
        return Batch(rows, budget_ms, self.left_ms(rows, budget_ms), allowed, tiers)


DrawBudgets = Callable[[NDArray[np.int64], np.random.Generator], Floats]
"""Questions (B,) → budgets (B,) in milliseconds."""

Actor = Callable[[Batch], Tensor]
"""A policy: log-probabilities (B, K) of the settings, which sum to 1 where nothing was chosen from outside."""
