"""The trial of policies: questions, latencies, references, resamples of pictures, and outcomes.

One set of resampled pictures is shared by all policies, so differences are paired. The references are recomputed
in every resample: static mixtures fitted on training questions, unrestricted and within each budget, and a rule
that picks by answers (the twin pick or the hindsight oracle).

Shapes: `N` questions, `K` settings, `B` budgets, `R` resamples, the first of them the sample itself, `M` columns,
`V` vertices of a frontier.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np

from tempovlm.control.select import Ints, Mask
from tempovlm.lab.judge.offline import Rule, StaticMixture, mixed, upper_hull
from tempovlm.lab.statistics import DRAWS, Resamples
from tempovlm.lab.table import Floats, Table

_REFERENCE_BUDGETS = 32
_AREA_POINTS = 64
_DUST = 1e-9
_LEAST_MS = 1e-3

Points = tuple[Floats, Floats]
"""(R, V) mean latencies and accuracies."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """The outcome of a policy; arrays (N, B).

    Attributes:
        chosen: settings; None for the average of several runs.
        measured_ms: NaN where the chosen setting was not timed on that question.
        fits: whether any setting was expected to fit.
    """

    name: str
    accuracy: Floats
    latency_ms: Floats
    measured_ms: Floats
    fits: Mask
    chosen: Ints | None = None


@dataclass(frozen=True, kw_only=True)
class Trial:
    """The questions, latencies and references that policies are judged on.

    Attributes:
        table: the judged questions. budgets_ms: ascending.
        mixture: of static settings, found on training questions.
        dataset_mixtures: by data set, found on its training questions; one that is absent takes `mixture`.
        rivals: by name, rules that read nothing, at the same budget for each request; time costs them nothing.
        reference: the rule that policies are measured by, beside the mixture. reference_name: `twin pick` or
            `hindsight oracle`.
    """

    table: Table
    budgets_ms: tuple[float, ...]
    mixture: StaticMixture
    reference: Rule
    reference_name: str
    draws: int = DRAWS
    seed: int = 0
    dataset_mixtures: Mapping[str, StaticMixture] = field(default_factory=dict)
    rivals: Mapping[str, Rule] = field(default_factory=dict)

    def of_dataset(self, name: str) -> tuple[Trial, Ints]:
        """The same trial on one data set's questions and mixture, and where its questions stand here."""
        rows = np.flatnonzero(self.table.dataset == name)
        part = replace(
            self,
            table=self.table.take(rows),
            mixture=self.dataset_mixtures.get(name, self.mixture),
        )
        return part, rows

    def run(
        self, name: str, rule: Rule, budgets_ms: Sequence[float] | None = None, control_ms: float = 0.0
    ) -> Outcome:
        """Run a policy at every budget; its own time is taken off the budget and added to the latency."""
        budgets_ms = self.budgets_ms if budgets_ms is None else budgets_ms
        left_ms = [max(budget_ms - control_ms, _LEAST_MS) for budget_ms in budgets_ms]
        chosen = rule(self.table, left_ms)
        fits = self.table.upper_ms.min(axis=1)[:, None] <= np.array(left_ms)[None]
        accuracy, latency_ms, measured_ms = (
            np.take_along_axis(values, chosen, axis=1)
            for values in (self.table.accuracy, self.table.latency_ms, self.table.measured_ms)
        )
        return Outcome(name, accuracy, latency_ms + control_ms, measured_ms + control_ms, fits, chosen)

    def average(self, name: str, rules: Sequence[Rule], control_ms: float = 0.0) -> Outcome:
        """The mean outcome of several rules, such as several permutations of one control."""
        runs = [self.run(name, rule, control_ms=control_ms) for rule in rules]
        accuracy, latency_ms, measured_ms = (
            np.mean([getattr(run, field) for run in runs], axis=0)
            for field in ("accuracy", "latency_ms", "measured_ms")
        )
        return Outcome(name, accuracy, latency_ms, measured_ms, runs[0].fits)

    @cached_property
    def resamples(self) -> Resamples:
        """Bootstrap of the pictures."""
        return Resamples(clusters(self.table), self.draws, self.seed)

    @cached_property
    def mixture_points(self) -> Points:
        """Points of the mixture's settings."""
        return self._points(self.mixture.settings)

    @cached_property
    def feasible_points(self) -> list[Points]:
        """For each budget, of the settings of the mixture whose every setting fits it."""
        return [self._points(self.mixture.feasible(budget_ms)) for budget_ms in self.budgets_ms]

    def _points(self, settings: Ints) -> Points:
        means = self.resamples.means
        return means(self.table.latency_ms[:, settings]), means(self.table.accuracy[:, settings])

    @cached_property
    def reference_points(self) -> Points:
        """Points of the reference's frontier."""
        low, high = float(self.table.upper_ms.min()), float(self.table.upper_ms.max())
        grid = np.unique(np.concatenate([np.geomspace(low, high, _REFERENCE_BUDGETS), self.budgets_ms]))
        return self.frontier(self.run(self.reference_name, self.reference, grid.tolist()))

    @cached_property
    def reference_accuracy(self) -> Floats:
        """(R, B) of the reference at the same budgets."""
        return self.resamples.means(self.run(self.reference_name, self.reference).accuracy)

    @cached_property
    def rival_accuracy(self) -> dict[str, Floats]:
        """(R, B) of each rival at the same budgets."""
        return {name: self.resamples.means(self.run(name, rule).accuracy) for name, rule in self.rivals.items()}

    def frontier(self, outcome: Outcome) -> Points:
        """Vertices of a policy's rising concave hull, the cheapest static setting among its points."""
        first = (points[:, :1] for points in self.mixture_points)
        means = (self.resamples.means(outcome.latency_ms), self.resamples.means(outcome.accuracy))
        x, y = (np.concatenate(pair, axis=1) for pair in zip(first, means, strict=True))
        hull = upper_hull(x[0], y[0])
        return x[:, hull], y[:, hull]

    @cached_property
    def _area_grid_ms(self) -> Floats:
        ends_ms = np.sort(self.table.latency_ms.mean(axis=0))[[0, -1]]
        return np.geomspace(float(ends_ms[0]), float(ends_ms[1]), _AREA_POINTS)

    def area(self, points: Points) -> Floats:
        """(R,) mean accuracy over log latency, from the cheapest static setting to the dearest.

        Of the rising concave hull of the points in the sample itself, the same points in every resample.
        """
        x, y = points
        hull = upper_hull(x[0], y[0])
        at_ms = np.broadcast_to(self._area_grid_ms, (len(x), _AREA_POINTS))
        return mixed(x[:, hull], y[:, hull], at_ms).mean(axis=1)


def clusters(table: Table) -> list[str]:
    """The picture of each question, unique over data sets."""
    return [f"{d}/{i}" for d, i in zip(table.dataset.tolist(), table.image_id.tolist(), strict=True)]


def estimate(rows: Floats) -> dict[str, Any]:
    """Value and 95 % interval of resampled values (R,), the first of them of the sample itself."""
    low, high = np.quantile(rows[1:], (0.025, 0.975))
    return {"value": float(rows[0]), "interval": [float(low), float(high)]}


def without_dust(values: Floats) -> Floats:
    """Snap differences below rounding error to zero, so that no interval excludes zero by rounding noise."""
    return np.where(np.abs(values) < _DUST, 0.0, values)
