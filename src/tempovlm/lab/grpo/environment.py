"""The environment that policies act in: questions under budgets, and each setting's latency and accuracy.

Accuracy comes from the core experiment's table, or from the model itself, which then runs only what was drawn, and
nothing twice. Latency is the table's. Training budgets are drawn anew at every epoch; those that choose the epoch
and those of the report are drawn once, for other pictures.

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

from tempovlm.core.errors import UserError
from tempovlm.data.sample import Sample
from tempovlm.engine.engine import Engine
from tempovlm.lab.core_exp.batched import answer_settings
from tempovlm.lab.core_exp.plan import Job
from tempovlm.lab.exp3_first_stage.expected import Expected, smoothed
from tempovlm.lab.features import LearningJob, language_features
from tempovlm.lab.options import LABELS, AdaptiveFlags, GrpoFlags, GrpoOptions
from tempovlm.lab.table import Floats, Table, budget_range, draw_budgets

MASKED = -1e9
"""A logarithm of no probability; finite, so that a row in which everything is masked has no gradient of NaN."""

FIXED_BUDGETS = 8
"""Budgets for every question of the validation and of the test."""

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
            index = space.index(found.knobs)
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
    """The questions of a table, and the latency and accuracy of their settings; default: the table's accuracy.

    `expected` is the accuracy (N, K) that is expected of them, for regression; default: that of their answers.
    """

    def __init__(
        self, table: Table, accuracy: AccuracySource | None = None, expected: Expected | None = None
    ) -> None:
        self.table, self.space, self.smoothing = table, table.space, expected
        self.accuracy = accuracy or TableAccuracy(torch.tensor(table.accuracy))
        self.expected = self.accuracy if expected is None else TableAccuracy(torch.tensor(expected.accuracy))
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


@dataclass(frozen=True, eq=False, slots=True, kw_only=True)
class Task:
    """The questions that a policy learns on.

    Attributes:
        rows: questions of the training. validation: the same questions and budgets at every epoch.
        draw: budgets for questions of the training, new at every epoch.
    """

    env: Environment
    rows: NDArray[np.int64]
    validation: Batch
    draw: DrawBudgets
    options: GrpoOptions


@dataclass(frozen=True, kw_only=True)
class GrpoJob(GrpoFlags, LearningJob):
    """The job of Exp 4 and 5.

    Attributes:
        max_new_tokens: cap on answers, where accuracy comes from running the model.
    """

    options: GrpoOptions
    max_new_tokens: int = AdaptiveFlags.max_new_tokens

    def check(self) -> None:
        """Raise a `UserError` that names the first flag whose value makes no sense."""
        self.options.check()
        for name in ("hidden_dim", "max_new_tokens"):
            if getattr(self, name) < 1:
                raise UserError(f"--{name} {getattr(self, name)}: must be at least 1")


def gather(job: GrpoJob) -> tuple[Environment, list[Sample]]:
    """Read and check everything.

    Raises:
        UserError: a flag makes no sense, or results, estimator or pictures are missing or do not fit together.
    """
    job.check()
    estimator = job.estimator
    table, samples = job.read(job.results_dirs)
    table = table.split_by_picture(job.train_split, job.options.seed).for_training(estimator)
    options, expected = job.options, None
    if options.accuracy_source == "online":
        return Environment(table, OnlineAccuracy(job.engine, samples, job.max_new_tokens)), samples
    if options.regression_epochs and options.warm_start_values == LABELS[0]:
        expected = smoothed(table, language_features(job.engine, samples), options.seed)
    return Environment(table, expected=expected), samples


def limits_ms(env: Environment) -> tuple[float, float]:
    """Return the range of budgets; below and above it the guard decides alone."""
    return budget_range(env.table.upper_ms[env.table.rows("train")])


def new_task(env: Environment, options: GrpoOptions, judged: str = "validation") -> Task:
    """Return what to learn, and the questions and budgets of the part that it is judged on."""
    ends_ms = limits_ms(env)
    return Task(
        env=env,
        rows=env.table.rows("train"),
        validation=fixed_batch(env, judged, options.seed),
        draw=lambda rows, rng: draw_budgets(rng, len(rows), ends_ms),
        options=options,
    )


def fixed_batch(env: Environment, part: str, seed: int) -> Batch:
    """Put every question of a part under several budgets, under the guard's mask, as served."""
    rows = env.table.rows(part)
    every = np.repeat(rows, FIXED_BUDGETS)
    budgets = draw_budgets(np.random.default_rng([seed, len(rows)]), len(every), limits_ms(env))
    return env.batch(torch.as_tensor(every), torch.as_tensor(budgets), mask=True)
