"""The labelled rows that the first stage learns from.

A label is the tier that the decision rule takes at no price of time: that of the most accurate setting that fits a
budget, by the accuracies that are expected of a question (`expected.py`) or, literally, by its own answers.
Shapes: `N` questions, `K` settings, `T` tiers, `R` rows, of which each is a question with a budget.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from tempovlm.control.select import TIE, Ints, best
from tempovlm.lab.table import Floats, Table, budget_range, draw_budgets


def limits_ms(table: Table) -> tuple[float, float]:
    """Return what budgets are feasible, by the questions of training."""
    return budget_range(table.latency_ms[table.rows("train")])


@dataclass(frozen=True, slots=True)
class Rows:
    """Rows to learn from.

    Attributes:
        question: (R,) places in the table. budget_ms: (R,).
        tier: (R,) index of the label's tier.
        value: (R, T) accuracy of each tier at its usual best setting, see `tier_values`.
        share: (R, T) of the budget that this setting takes.
    """

    question: Ints
    budget_ms: Floats
    tier: Ints
    value: Floats
    share: Floats

    def __len__(self) -> int:
        return len(self.question)


def label(
    table: Table, question: Ints, budget_ms: Floats, time_price: float = 0.0, expected: Floats | None = None
) -> Rows:
    """The tier of the best setting of each question and budget, and what each tier has to offer.

    Args:
        table: of all parts.
        question: (R,) places in it.
        budget_ms: (R,).
        time_price: accuracy that the whole budget costs, for `Rows.value` and `Rows.share` alone.
        expected: (N, K) accuracies by which a setting is best; None takes the questions' own answers.
    """
    latency_ms, scores = table.latency_ms[question], table.accuracy if expected is None else expected
    setting = best(scores[question], latency_ms <= budget_ms[:, None], latency_ms, tie=TIE)
    tier = setting // table.per_tier
    return Rows(question, budget_ms, tier, *tier_values(table, question, budget_ms, time_price))


def tier_values(table: Table, question: Ints, budget_ms: Floats, time_price: float) -> tuple[Floats, Floats]:
    """Accuracy (R, T) of each question at each tier's best setting, and the share of the budget that this takes.

    Accuracy is 0, and the share 1, where no setting of the tier fits. Which setting of a tier is best is told by
    the mean over the questions of training, less the price of its time, so a question's own luck at one setting
    or another does not count, as it does in the literal label.
    """
    tiers = len(table.space.tiers)
    own, latency_ms = (x[question].reshape(len(question), tiers, -1) for x in (table.accuracy, table.latency_ms))
    usual, budgets = (
        table.accuracy[table.rows("train")].mean(axis=0).reshape(tiers, -1),
        budget_ms[:, None, None],
    )
    fits = latency_ms <= budgets
    place = best(usual, fits, latency_ms, time_price / budgets)[..., None]
    accuracy, used = (
        np.where(fits.any(axis=2), np.take_along_axis(values, place, 2).squeeze(2), nothing)
        for values, nothing in ((own, 0.0), (latency_ms / budgets, 1.0))
    )
    return accuracy, used


def draw_rows(
    table: Table,
    part: str,
    per_question: int,
    rng: np.random.Generator,
    time_price: float = 0.0,
    expected: Floats | None = None,
) -> Rows:
    """Draw budgets for every question of a part, log-uniform over the feasible range, and label them (`label`)."""
    question = np.repeat(table.rows(part), per_question)
    return label(table, question, draw_budgets(rng, len(question), limits_ms(table)), time_price, expected)
