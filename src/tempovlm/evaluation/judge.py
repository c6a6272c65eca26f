"""The statistics by which policies are judged: accuracy at matched latency, regret, adherence, what content buys.

The unit is the request, clustered by picture: every interval comes from one set of resampled pictures, shared by
all policies, so differences are paired. Accuracy is compared at the mean latency that a policy really took, never
at its nominal budget, with the best random mixture of static settings, recomputed in every resample. Knows no
model and draws nothing.

Shapes: `N` questions, `K` settings, `B` budgets, `R` resamples, the first of them the sample itself, `M` columns.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import combinations
from typing import Any

import numpy as np

from tempovlm.control.baselines import KNOBS, varying
from tempovlm.evaluation import statistics
from tempovlm.evaluation.offline import (
    Floats,
    Ints,
    Mask,
    Rule,
    StaticMixture,
    mixed,
    restricted,
    shuffled,
    upper_hull,
)
from tempovlm.profiling.decisions import DecisionTable
from tempovlm.profiling.progress import Advance, silent

SCHEMA = "tempovlm.judge/1"
DRAWS = 2000

_ORACLE_BUDGETS = 32
_AREA_POINTS = 64
_MIN_SOLID_SHARE = 0.95
_DUST = 1e-9
_LEAST_MS = 1e-3
_LEVELS = {"p50": 0.5, "p95": 0.95, "p99": 0.99}


class Resamples:
    """Bootstrap samples of whole pictures, drawn once for everything; the same draws as `clustered_bootstrap`."""

    def __init__(self, clusters: Sequence[str], draws: int = DRAWS, seed: int = 0) -> None:
        names = {name: i for i, name in enumerate(dict.fromkeys(clusters))}
        self._place = np.array([names[name] for name in clusters])
        picks = np.random.default_rng(seed).integers(len(names), size=(draws, len(names)))
        counts = np.stack([np.bincount(row, minlength=len(names)) for row in picks])
        self._weights = np.concatenate([np.ones((1, len(names))), counts])
        self._sizes = (self._weights @ np.bincount(self._place))[:, None]

    def means(self, values: Floats) -> Floats:
        """(R, M) means of the columns of (N, M)."""
        sums = np.zeros((self._weights.shape[1], values.shape[1]))
        np.add.at(sums, self._place, values)
        return self._weights @ sums / self._sizes


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a policy did and what came of it; arrays (N, B).

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
    """What policies are judged on.

    Attributes:
        table: the judged questions. budgets_ms: ascending.
        decided_ms: (N, K) latencies that rules go by. scored_ms: (N, K) that they are charged.
        mixture: of static settings, found on training questions.
        oracle: the reference from above. oracle_kind: `noise-corrected` or `plain`.
    """

    table: DecisionTable
    decided_ms: Floats
    scored_ms: Floats
    budgets_ms: tuple[float, ...]
    mixture: StaticMixture
    oracle: Rule
    oracle_kind: str
    draws: int = DRAWS
    seed: int = 0

    def run(
        self, name: str, rule: Rule, budgets_ms: Sequence[float] | None = None, control_ms: float = 0.0
    ) -> Outcome:
        """What a rule chooses at every budget; its own time is taken off the budget and added to the latency."""
        budgets_ms = self.budgets_ms if budgets_ms is None else budgets_ms
        left_ms = [max(budget_ms - control_ms, _LEAST_MS) for budget_ms in budgets_ms]
        chosen = rule(self.table, self.decided_ms, left_ms)
        fits = self.decided_ms.min(axis=1)[:, None] <= np.array(left_ms)[None]
        accuracy, latency_ms, measured_ms = (
            np.take_along_axis(values, chosen, axis=1)
            for values in (self.table.accuracy, self.scored_ms, self.table.latency_ms)
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
        """Of the pictures."""
        return Resamples(clusters(self.table), self.draws, self.seed)

    @cached_property
    def mixture_points(self) -> tuple[Floats, Floats]:
        """(R, V) mean latencies and accuracies of the mixture's settings."""
        index = self.mixture.settings
        return self.resamples.means(self.scored_ms[:, index]), self.resamples.means(self.table.accuracy[:, index])

    @cached_property
    def oracle_points(self) -> tuple[Floats, Floats]:
        """(R, V) mean latencies and accuracies of the oracle's frontier."""
        low, high = float(self.decided_ms.min()), float(self.decided_ms.max())
        grid = np.unique(np.concatenate([np.geomspace(low, high, _ORACLE_BUDGETS), self.budgets_ms]))
        return self.frontier(self.run("oracle", self.oracle, grid.tolist()))

    @cached_property
    def oracle_accuracy(self) -> Floats:
        """(R, B) of the oracle at the same budgets."""
        return self.resamples.means(self.run("oracle", self.oracle).accuracy)

    def frontier(self, outcome: Outcome) -> tuple[Floats, Floats]:
        """(R, V) vertices of a policy's rising concave hull, the cheapest static setting among its points."""
        first = (points[:, :1] for points in self.mixture_points)
        means = (self.resamples.means(outcome.latency_ms), self.resamples.means(outcome.accuracy))
        x, y = (np.concatenate(pair, axis=1) for pair in zip(first, means, strict=True))
        hull = upper_hull(x[0], y[0])
        return x[:, hull], y[:, hull]

    @cached_property
    def _area_grid_ms(self) -> Floats:
        ends_ms = np.sort(self.scored_ms.mean(axis=0))[[0, -1]]
        return np.geomspace(float(ends_ms[0]), float(ends_ms[1]), _AREA_POINTS)

    def area(self, points: tuple[Floats, Floats]) -> Floats:
        """(R,) mean accuracy over log latency, from the cheapest static setting to the dearest.

        Of the rising concave hull of the points (R, V) in the sample itself, the same points in every resample.
        """
        x, y = points
        hull = upper_hull(x[0], y[0])
        at_ms = np.broadcast_to(self._area_grid_ms, (len(x), _AREA_POINTS))
        return mixed(x[:, hull], y[:, hull], at_ms).mean(axis=1)


def clusters(table: DecisionTable) -> list[str]:
    """The picture of each question, unique over data sets."""
    return [f"{d}/{i}" for d, i in zip(table.dataset.tolist(), table.image_id.tolist(), strict=True)]


def estimate(rows: Floats) -> dict[str, Any]:
    """Value and 95 % interval of resampled values (R,), the first of them of the sample itself."""
    low, high = np.quantile(rows[1:], (0.025, 0.975))
    return {"value": float(rows[0]), "interval": [float(low), float(high)]}


def _without_dust(values: Floats) -> Floats:
    """What rounding alone makes differ from zero is zero, so that no interval excludes zero by it."""
    return np.where(np.abs(values) < _DUST, 0.0, values)


def share_closed(gain: Floats, gap: Floats) -> dict[str, Any] | None:
    """Share of a gap (R,) that a gain (R,) closes; None where the gap may well be nothing."""
    solid = gap > 1e-6
    if not solid[0] or solid.mean() < _MIN_SOLID_SHARE:
        return None
    return estimate(gain[solid] / gap[solid])


def judge(trial: Trial, outcome: Outcome) -> dict[str, Any]:
    """Everything that is said about one policy."""
    latency_ms = trial.resamples.means(outcome.latency_ms)
    accuracy = trial.resamples.means(outcome.accuracy)
    matched = mixed(*trial.mixture_points, latency_ms)
    gain, gap = _without_dust(accuracy - matched), mixed(*trial.oracle_points, latency_ms) - matched
    regret = trial.oracle_accuracy - accuracy
    points = trial.frontier(outcome)
    rows = []
    for b, budget_ms in enumerate(trial.budgets_ms):
        rows.append(
            {
                "budget_ms": budget_ms,
                "accuracy": estimate(accuracy[:, b]),
                "mean_latency_ms": float(latency_ms[0, b]),
                "against_mixture": {**estimate(gain[:, b]), "mixture_accuracy": float(matched[0, b])},
                "gap": float(gap[0, b]),
                "gap_closed": share_closed(gain[:, b], gap[:, b]),
                "regret": estimate(regret[:, b]),
                "fallback_rate": float(1 - outcome.fits[:, b].mean()),
                **timeliness(trial, outcome, b),
                "knobs": _knobs(trial, outcome, b),
            }
        )
    area = trial.area(points)
    return {
        "by_budget": rows,
        "area": estimate(area),
        "area_against_mixture": estimate(_without_dust(area - trial.area(trial.mixture_points))),
        "gap_closed": share_closed(gain.sum(axis=1), gap.sum(axis=1)),
        "against_mixture": estimate(gain.mean(axis=1)),
        "regret": estimate(regret.mean(axis=1)),
    }


def timeliness(trial: Trial, outcome: Outcome, budget: int) -> dict[str, Any]:
    """Adherence with Wilson interval, quantiles of latency / budget, utilisation: of measured requests only."""
    budget_ms = trial.budgets_ms[budget]
    is_known = ~np.isnan(outcome.measured_ms[:, budget])
    taken_ms = outcome.measured_ms[is_known, budget]
    empty = {"adherence": None, "adherence_wilson": None, "latency_over_budget": None, "utilisation": None}
    if not len(taken_ms):
        return {"num_measured": 0, **empty, "num_utilisation": 0}
    on_time = int((taken_ms <= budget_ms).sum())
    slower = trial.scored_ms[is_known].max(axis=1) > outcome.latency_ms[is_known, budget]
    ratios = (taken_ms / budget_ms).tolist()
    return {
        "num_measured": len(taken_ms),
        "adherence": on_time / len(taken_ms),
        "adherence_wilson": list(statistics.wilson_interval(on_time, len(taken_ms))),
        "latency_over_budget": {name: statistics.quantile(ratios, level) for name, level in _LEVELS.items()},
        "utilisation": statistics.utilisation(taken_ms.tolist(), [budget_ms] * len(taken_ms), slower.tolist()),
        "num_utilisation": int(slower.sum()),
    }


def _knobs(trial: Trial, outcome: Outcome, budget: int) -> dict[str, float] | None:
    if outcome.chosen is None:
        return None
    return statistics.shares(str(trial.table.space.settings[k]) for k in outcome.chosen[:, budget])


def judge_all(
    trial: Trial,
    rules: Mapping[str, Rule],
    *,
    looking: Sequence[str] = (),
    ablated: Sequence[str] = (),
    control_ms: Mapping[str, float] | None = None,
    shuffles: int = 3,
    advance: Advance = silent,
) -> tuple[dict[str, Any], list[Outcome]]:
    """Run and judge every rule, its shuffled control and its ablations.

    Args:
        trial: what they are judged on.
        rules: by name.
        looking: names of rules that look at content, which get a shuffled control.
        ablated: names of rules that are run again with one, two and three knobs.
        control_ms: what the choices of a rule take, for those that take anything worth counting.
        shuffles: permutations of a control; their outcomes are averaged.
        advance: told of what is done.

    Returns:
        The measured part of the report, and the outcome of each rule.
    """
    steps, done = len(rules) + len(looking) + len(ablated), 0
    advance(done, steps)
    outcomes: list[Outcome] = []
    report: dict[str, Any] = {"policies": {}, "shuffled": {}, "ablation": {}}
    own_ms = {name: (control_ms or {}).get(name, 0.0) for name in rules}
    for name, rule in rules.items():
        outcomes.append(trial.run(name, rule, control_ms=own_ms[name]))
        report["policies"][name] = {**judge(trial, outcomes[-1]), "control_ms": own_ms[name]}
        advance(done := done + 1, steps)
    by_name = {outcome.name: outcome for outcome in outcomes}
    for name in looking:
        control = trial.average(name, [shuffled(rules[name], seed) for seed in range(shuffles)], own_ms[name])
        report["shuffled"][name] = _control(trial, by_name[name], control)
        advance(done := done + 1, steps)
    for name in ablated:
        report["ablation"][name] = ablation(trial, rules[name], own_ms[name])
        advance(done := done + 1, steps)
    report["static"] = _static(trial)
    report["oracle"] = {
        "kind": trial.oracle_kind,
        "area": estimate(trial.area(trial.oracle_points)),
        "accuracy": [estimate(trial.oracle_accuracy[:, b]) for b in range(len(trial.budgets_ms))],
        "against_mixture": judge(trial, trial.run("oracle", trial.oracle))["against_mixture"],
        "frontier": _curve(trial.oracle_points),
    }
    return report, outcomes


def _control(trial: Trial, outcome: Outcome, control: Outcome) -> dict[str, Any]:
    """The control's own judgement, and what it lost against the real content."""
    judged = judge(trial, control)
    lost = trial.area(trial.frontier(outcome)) - trial.area(trial.frontier(control))
    kept = ("area", "area_against_mixture", "gap_closed", "against_mixture")
    return {**{name: judged[name] for name in kept}, "content_gain": estimate(lost)}


def ablation(trial: Trial, rule: Rule, control_ms: float = 0.0) -> list[dict[str, Any]]:
    """The rule with every subset of the knobs; the others stay native."""
    rows = []
    for count in range(1, len(KNOBS) + 1):
        for knobs in combinations(KNOBS, count):
            fewer = restricted(rule, varying(trial.table.space, knobs))
            outcome = trial.run("+".join(knobs), fewer, control_ms=control_ms)
            means = (trial.resamples.means(outcome.accuracy), trial.resamples.means(outcome.latency_ms))
            rows.append(
                {
                    "knobs": list(knobs),
                    "area": estimate(trial.area(trial.frontier(outcome))),
                    "accuracy": means[0][0].tolist(),
                    "mean_latency_ms": means[1][0].tolist(),
                }
            )
    return rows


def _static(trial: Trial) -> dict[str, Any]:
    """Every static setting on the judged questions, and the mixture's settings and frontier."""
    space = trial.table.space
    latency_ms, accuracy = trial.scored_ms.mean(axis=0), trial.table.accuracy.mean(axis=0)
    return {
        "settings": [
            {"knobs": str(knobs), "mean_latency_ms": float(latency_ms[i]), "accuracy": float(accuracy[i])}
            for i, knobs in enumerate(space)
        ],
        "mixture": [str(space.settings[i]) for i in trial.mixture.settings],
        "mixture_area": estimate(trial.area(trial.mixture_points)),
        "frontier": _curve(trial.mixture_points),
    }


def _curve(points: tuple[Floats, Floats]) -> list[dict[str, float]]:
    pairs = zip(points[0][0].tolist(), points[1][0].tolist(), strict=True)
    return [{"mean_latency_ms": x, "accuracy": y} for x, y in pairs]
