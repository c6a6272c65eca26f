"""Headroom of content: what a setting for each kind of question gains over one setting for all, at one budget.

Shapes: `N` questions, `K` settings.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Texts = NDArray[np.str_]
Mask = NDArray[np.bool_]

QUANTILES = (0.1, 0.3, 0.5, 0.7, 0.9)
"""Places of five budgets among what the settings up to the native one take."""

SMOOTHING = 20.0
"""Questions of all kinds that are added to those of each kind, so that few questions choose nothing."""


@dataclass(frozen=True, eq=False, slots=True)
class Scored:
    """Questions with the accuracy of each setting, from 0 to 1.

    Attributes:
        accuracy: (N, K). datasets: (N,) data set of each question. kinds: (N,) its kind.
    """

    accuracy: Floats
    datasets: Texts
    kinds: Texts

    @property
    def weights(self) -> Floats:
        """Weights (N,) under which the mean over questions is the mean of the data sets' means."""
        names, place, counts = np.unique(self.datasets, return_inverse=True, return_counts=True)
        weights: Floats = len(self.datasets) / (len(names) * counts[place].astype(float))
        return weights

    def mean(self, settings: NDArray[np.int64] | int) -> float:
        """Return the accuracy with these settings, (N,) or one for all, in per cent."""
        own = self.accuracy[np.arange(len(self.accuracy)), settings]
        return 100 * float(np.average(own, weights=self.weights))


@dataclass(frozen=True, eq=False, slots=True)
class Headroom:
    """One setting for all, one for each kind, and the points that each test question gains, (N,)."""

    single: int
    chosen: dict[str, int]
    settings: NDArray[np.int64]
    gains: Floats


def headroom_at(train: Scored, test: Scored, fits: Mask) -> Headroom:
    """Choose among the settings that fit, (K,), on training questions, and score the others.

    A kind that the training questions lack gets the setting for all.
    """
    overall = np.average(train.accuracy, axis=0, weights=train.weights)
    chosen = {}
    for kind in np.unique(train.kinds):
        own = train.accuracy[train.kinds == kind]
        smoothed = (own.sum(axis=0) + SMOOTHING * overall) / (len(own) + SMOOTHING)
        chosen[str(kind)] = int(np.where(fits, smoothed, -1.0).argmax())
    single = int(np.where(fits, overall, -1.0).argmax())
    settings = np.array([chosen.get(kind, single) for kind in test.kinds.tolist()])
    own, one = test.accuracy[np.arange(len(settings)), settings], test.accuracy[:, single]
    return Headroom(single, chosen, settings, 100 * test.weights * (own - one))


def budgets_up_to(taken: Floats, native: float) -> list[float]:
    """Return five budgets: `QUANTILES` of what settings take, (K,), up to the native one."""
    return [float(budget) for budget in np.quantile(taken[taken <= native], QUANTILES)]
