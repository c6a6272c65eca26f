"""The accuracies that are expected of a question at every setting, smoothed over the questions of training.

One answer is right or wrong by luck as well as by its setting. So a question counts as the training questions that
are most like it, and these as if further ones, of the usual accuracy, were among them; the more of those, the less
a few lucky answers can turn a decision. No training question is among its own neighbours, nor are those about its
picture.

Shapes: `N` questions, `K` settings, `F` features.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from tempovlm.control.baselines import NearestNeighbours, picture_folds
from tempovlm.control.select import TIE, Ints, best
from tempovlm.lab.exp3_first_stage.data import limits_ms
from tempovlm.lab.features import Features32
from tempovlm.lab.table import Floats, Table, draw_budgets

USUAL_QUESTIONS = (20, 50, 100, 200)
"""Numbers of questions of the usual accuracy to choose from."""

_BUDGETS = 16
"""Budgets of a training question at which the numbers are compared."""


@dataclass(frozen=True, eq=False, slots=True)
class Expected:
    """Expected accuracies.

    Attributes:
        accuracy: (N, K) from 0 to 1.
        neighbours: training questions that each mean is over. usual: questions of the usual accuracy among them.
    """

    accuracy: Floats
    neighbours: int
    usual: int

    def record(self) -> dict[str, int]:
        """Return the numbers for a report."""
        return {"neighbours": self.neighbours, "usual_questions": self.usual}


def smoothed(table: Table, features: Features32, seed: int) -> Expected:
    """Return what is expected of the questions of all parts, by those of training.

    The number of neighbours minimises the squared error on other training pictures (`NearestNeighbours.fit`), the
    number of usual questions maximises the accuracy of the settings that the decision rule takes there.

    Args:
        table: of all parts.
        features: (N, F) by which questions are alike.
        seed: of the budgets at which the rule is compared.
    """
    train = table.rows("train")
    scaled, accuracy, images = features.astype(np.float64), table.accuracy[train], table.image_id[train]
    fitted = NearestNeighbours.fit(scaled[train], accuracy, images.tolist())
    near, overall = fitted.scores(scaled), np.tile(accuracy.mean(axis=0), (len(table), 1))
    folds = picture_folds(images.tolist())
    for fold in np.unique(folds):
        own, others = train[folds == fold], folds != fold
        if others.any():
            part = NearestNeighbours.fit(
                scaled[train[others]], accuracy[others], images[others].tolist(), (fitted.neighbours,)
            )
            near[own], overall[own] = part.scores(scaled[own]), accuracy[others].mean(axis=0)

    def mixed(usual: int) -> Floats:
        mean: Floats = (fitted.neighbours * near + usual * overall) / (fitted.neighbours + usual)
        return mean

    question = np.repeat(train, _BUDGETS)
    budget_ms = draw_budgets(np.random.default_rng(seed), len(question), limits_ms(table))
    earned = [_earned(table, mixed(usual), question, budget_ms) for usual in USUAL_QUESTIONS]
    usual = USUAL_QUESTIONS[int(np.argmax(earned))]
    return Expected(mixed(usual), fitted.neighbours, usual)


def _earned(table: Table, expected: Floats, question: Ints, budget_ms: Floats) -> float:
    """Mean accuracy of the settings that the rule takes by expected accuracies (N, K), at budgets of questions."""
    latency_ms = table.latency_ms[question]
    setting = best(expected[question], latency_ms <= budget_ms[:, None], latency_ms, tie=TIE)
    return float(table.accuracy[question, setting].mean())
