"""Each data set by itself: what policies that serve all of them reach on one, and gain over its static mixture.

The mixture is fitted on the training questions of the data set, so a policy gains nothing here by telling data
sets apart. Pictures are resampled within the data set. Knows no model and draws nothing.

Shapes: `B` budgets, `R` resamples, the first of them the sample itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tempovlm.control.select import Ints
from tempovlm.lab.judge.offline import mixed
from tempovlm.lab.judge.trial import Outcome, Trial, clusters, estimate, without_dust


def by_dataset(trial: Trial, outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """For each data set its size, its mixture's settings, and a row a policy and budget."""
    report: dict[str, Any] = {}
    for name in sorted(set(trial.table.dataset.tolist())):
        part, rows = trial.of_dataset(name)
        report[name] = {
            "num_questions": len(part.table),
            "num_images": len(set(clusters(part.table))),
            "mixture": [str(part.table.space.settings[i]) for i in part.mixture.settings],
            "policies": {outcome.name: _rows(part, rows, outcome) for outcome in outcomes},
        }
    return report


def _rows(part: Trial, rows: Ints, outcome: Outcome) -> list[dict[str, Any]]:
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
