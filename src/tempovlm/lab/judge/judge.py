"""The statistics by which policies are judged: accuracy at matched latency, adherence, what content buys.

The unit is the request, clustered by picture: every interval comes from one set of resampled pictures, shared by
all policies, so differences are paired. Accuracy is compared at the mean latency that a policy really took, never
at its nominal budget, with the best random mixture of static settings; beside it stands the best mixture whose
every setting fits the budget. Several budgets are several tests, so p-values are corrected over the budgets of a
policy.

Shapes: `N` questions, `K` settings, `B` budgets, `R` resamples, the first of them the sample itself.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any

import numpy as np

from tempovlm.control.baselines import varying
from tempovlm.control.select import Ints
from tempovlm.core.knobs import KNOBS
from tempovlm.core.progress import Advance, silent
from tempovlm.lab import statistics
from tempovlm.lab.judge.offline import Rule, free, mixed, restricted, shuffled
from tempovlm.lab.judge.trial import Outcome, Points, Trial, clusters, estimate, without_dust
from tempovlm.lab.table import Floats

SCHEMA = "tempovlm.judge/2"

_MIN_SOLID_SHARE = 0.95
_LEVELS = {"p50": 0.5, "p95": 0.95, "p99": 0.99}


def share_closed(gain: Floats, gap: Floats) -> dict[str, Any] | None:
    """Share of a gap (R,) that a gain (R,) closes; None where the gap may well be nothing."""
    solid = gap > 1e-6
    if not solid[0] or solid.mean() < _MIN_SOLID_SHARE:
        return None
    return estimate(gain[solid] / gap[solid])


def judge(trial: Trial, outcome: Outcome, unpriced: Outcome | None = None) -> dict[str, Any]:
    """Everything that is said about one policy.

    Args:
        trial: what it is judged on.
        outcome: what it did.
        unpriced: what it does where time costs nothing, as it costs the rivals at the same budget nothing; None if
            that is the same.
    """
    latency_ms = trial.resamples.means(outcome.latency_ms)
    accuracy = trial.resamples.means(outcome.accuracy)
    matched = mixed(*trial.mixture_points, latency_ms)
    gain, gap = without_dust(accuracy - matched), mixed(*trial.reference_points, latency_ms) - matched
    against = _tested(gain)
    below = trial.reference_accuracy - accuracy
    own = accuracy if unpriced is None else trial.resamples.means(unpriced.accuracy)
    ahead = {name: without_dust(own - rival) for name, rival in trial.rival_accuracy.items()}
    at_budget = {name: _tested(gains) for name, gains in ahead.items()}
    points = trial.frontier(outcome)
    rows = []
    for b, budget_ms in enumerate(trial.budgets_ms):
        rows.append(
            {
                "budget_ms": budget_ms,
                "accuracy": estimate(accuracy[:, b]),
                "mean_latency_ms": float(latency_ms[0, b]),
                "against_mixture": {**against[b], "mixture_accuracy": float(matched[0, b])},
                "against_feasible_mixture": _against_feasible(trial, b, accuracy[:, b], latency_ms[:, b]),
                "at_same_budget": {
                    name: {**cells[b], "rival_accuracy": float(trial.rival_accuracy[name][0, b])}
                    for name, cells in at_budget.items()
                },
                "gap": float(gap[0, b]),
                "gap_closed": share_closed(gain[:, b], gap[:, b]),
                "below_reference": estimate(below[:, b]),
                "fallback_rate": float(1 - outcome.fits[:, b].mean()),
                **timeliness(trial, outcome, b),
                "knobs": _knobs(trial, outcome, b),
            }
        )
    area = trial.area(points)
    return {
        "by_budget": rows,
        "area": estimate(area),
        "area_against_mixture": estimate(without_dust(area - trial.area(trial.mixture_points))),
        "gap_closed": share_closed(gain.sum(axis=1), gap.sum(axis=1)),
        "against_mixture": estimate(gain.mean(axis=1)),
        "at_same_budget": {name: estimate(gains.mean(axis=1)) for name, gains in ahead.items()},
        "below_reference": estimate(below.mean(axis=1)),
    }


def _tested(gains: Floats) -> list[dict[str, Any]]:
    """Return the estimate of a gain (R, B) at each budget, with its p-value, raw and corrected over them."""
    p_values = [statistics.bootstrap_p_value(one) for one in gains[1:].T]
    return [
        {**estimate(gains[:, b]), "p_value": p, "holm_p_value": corrected}
        for b, (p, corrected) in enumerate(zip(p_values, statistics.holm(p_values), strict=True))
    ]


def _against_feasible(trial: Trial, budget: int, accuracy: Floats, latency_ms: Floats) -> dict[str, Any]:
    """Gain (R,) over the best mixture of settings that fit a budget, at the policy's mean latency.

    Where that is above the dearest of those settings the mixture stays at it: it cannot spend more.
    """
    matched = mixed(*trial.feasible_points[budget], latency_ms[:, None])[:, 0]
    return {**estimate(without_dust(accuracy - matched)), "mixture_accuracy": float(matched[0])}


def timeliness(trial: Trial, outcome: Outcome, budget: int) -> dict[str, Any]:
    """Adherence with Wilson interval, quantiles of latency / budget, utilisation: of measured requests only."""
    budget_ms = trial.budgets_ms[budget]
    is_known = ~np.isnan(outcome.measured_ms[:, budget])
    taken_ms = outcome.measured_ms[is_known, budget]
    empty = {"adherence": None, "adherence_wilson": None, "latency_over_budget": None, "utilisation": None}
    if not len(taken_ms):
        return {"num_measured": 0, **empty, "num_utilisation": 0}
    on_time = int((taken_ms <= budget_ms).sum())
    slower = trial.table.latency_ms[is_known].max(axis=1) > outcome.latency_ms[is_known, budget]
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
    subject: str | None = None,
    looking: Sequence[str] = (),
    ablated: Sequence[str] | None = (),
    control_ms: Mapping[str, float] | None = None,
    shuffles: int = 3,
    advance: Advance = silent,
) -> tuple[dict[str, Any], list[Outcome]]:
    """Run and judge every rule, its shuffled control and its ablations.

    Args:
        trial: what they are judged on.
        rules: by name.
        subject: name of the rule that the report is about; None for the best of them.
        looking: names of rules that look at content, which get a shuffled control.
        ablated: names of rules that are run again with one, two and three knobs; None for the subject and the
            table.
        control_ms: what the choices of a rule take, for those that take anything worth counting.
        shuffles: permutations of a control; their outcomes are averaged.
        advance: told of what is done.

    Returns:
        The measured part of the report, and the outcome of each rule.
    """
    again = 2 if ablated is None else len(ablated)
    steps, done = len(rules) + len(looking) + again, 0
    advance(done, steps)
    outcomes: list[Outcome] = []
    report: dict[str, Any] = {"policies": {}, "shuffled": {}, "ablation": {}}
    own_ms = {name: (control_ms or {}).get(name, 0.0) for name in rules}
    for name, rule in rules.items():
        outcomes.append(trial.run(name, rule, control_ms=own_ms[name]))
        unpriced = None if free(rule) is rule else trial.run(name, free(rule), control_ms=own_ms[name])
        report["policies"][name] = {**judge(trial, outcomes[-1], unpriced), "control_ms": own_ms[name]}
        advance(done := done + 1, steps)
    report["subject"] = best_policy(report["policies"]) if subject is None else subject
    if ablated is None:
        ablated = [name for name in dict.fromkeys((report["subject"], "table")) if name in rules]
    by_name = {outcome.name: outcome for outcome in outcomes}
    for name in looking:
        control = trial.average(name, [shuffled(rules[name], seed) for seed in range(shuffles)], own_ms[name])
        report["shuffled"][name] = _control(trial, by_name[name], control)
        advance(done := done + 1, steps)
    for name in ablated:
        report["ablation"][name] = ablation(trial, rules[name], own_ms[name])
        advance(done := done + 1, steps)
    report["by_dataset"] = by_dataset(trial, outcomes)
    report["static"] = _static(trial)
    report["reference"] = {
        "name": trial.reference_name,
        "area": estimate(trial.area(trial.reference_points)),
        "accuracy": [estimate(trial.reference_accuracy[:, b]) for b in range(len(trial.budgets_ms))],
        "against_mixture": judge(trial, trial.run(trial.reference_name, trial.reference))["against_mixture"],
        "frontier": _curve(trial.reference_points),
    }
    return report, outcomes


def best_policy(policies: Mapping[str, Any]) -> str:
    """Name the policy that gains most over the static mixture; the hindsight oracle is none."""
    gains = {name: one["against_mixture"]["value"] for name, one in policies.items() if name != "oracle"}
    return max(gains or policies, key=lambda name: gains.get(name, 0.0))


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
    latency_ms, accuracy = trial.table.latency_ms.mean(axis=0), trial.table.accuracy.mean(axis=0)
    return {
        "settings": [
            {"knobs": str(knobs), "mean_latency_ms": float(latency_ms[i]), "accuracy": float(accuracy[i])}
            for i, knobs in enumerate(space)
        ],
        "mixture": [str(space.settings[i]) for i in trial.mixture.settings],
        "feasible_mixtures": [
            {
                "budget_ms": budget_ms,
                "settings": [str(space.settings[i]) for i in trial.mixture.feasible(budget_ms)],
                "fits": bool((trial.mixture.fit_ms <= budget_ms).any()),
            }
            for budget_ms in trial.budgets_ms
        ],
        "mixture_area": estimate(trial.area(trial.mixture_points)),
        "frontier": _curve(trial.mixture_points),
    }


def _curve(points: Points) -> list[dict[str, float]]:
    pairs = zip(points[0][0].tolist(), points[1][0].tolist(), strict=True)
    return [{"mean_latency_ms": x, "accuracy": y} for x, y in pairs]


def by_dataset(trial: Trial, outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """For each data set its size, its mixture's settings, and a row a policy and budget.

    The mixture is fitted on the training questions of the data set, so a policy gains nothing here by telling data
    sets apart. Pictures are resampled within the data set.
    """
    report: dict[str, Any] = {}
    for name in sorted(set(trial.table.dataset.tolist())):
        part, rows = trial.of_dataset(name)
        report[name] = {
            "num_questions": len(part.table),
            "num_images": len(set(clusters(part.table))),
            "mixture": [str(part.table.space.settings[i]) for i in part.mixture.settings],
            "policies": {outcome.name: _dataset_rows(part, rows, outcome) for outcome in outcomes},
        }
    return report


def _dataset_rows(part: Trial, rows: Ints, outcome: Outcome) -> list[dict[str, Any]]:
    """A row a budget of what a policy did on the questions of one data set."""
    accuracy = part.resamples.means(outcome.accuracy[rows])
    latency_ms = part.resamples.means(outcome.latency_ms[rows])
    matched = mixed(*part.mixture_points, latency_ms)
    gain = without_dust(accuracy - matched)
    return [
        {
            "budget_ms": budget_ms,
            "accuracy": estimate(accuracy[:, b]),
            "mean_latency_ms": float(latency_ms[0, b]),
            "against_mixture": {**estimate(gain[:, b]), "mixture_accuracy": float(matched[0, b])},
        }
        for b, budget_ms in enumerate(part.budgets_ms)
    ]
