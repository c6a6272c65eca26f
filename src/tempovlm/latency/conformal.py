"""Split-conformal adjustment of predicted quantiles, and their coverage. Pure functions on arrays.

A quantile head is only as good as its training. Shifted by a quantile of its own errors on data that training did
not
see, it covers the next value of the same kind with at least the stated probability, however bad the head is
(Vovk et al. 2005; for quantile regression Romano, Patterson and Candès 2019, arXiv 1905.03222). The guarantee is
marginal and assumes exchangeable values; rows of one image are dependent, so it is checked on other images.

Shapes: `n` values, `S` stages, `L` levels, `G` groups.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from tempovlm.latency.features import Floats


def conformal_rank(count: int, level: float) -> int | None:
    """Return the place of the bound among `count` ascending scores: ceil((count + 1) · level), counted from 1.

    None if there are too few scores for a finite bound of that level.
    """
    # Rounded first: (999 + 1) · 0.99 is a little over 990 in floating point, which would cost a rank.
    rank = max(1, math.ceil(round((count + 1) * level, 9)))
    return rank if rank <= count else None


def conformal_quantile(scores: Floats, level: float) -> float:
    """Compute the conformal bound of scores (n,) without NaN; infinite if there are too few."""
    known = np.sort(scores[np.isfinite(scores)])
    rank = conformal_rank(len(known), level)
    return math.inf if rank is None else float(known[rank - 1])


def margins(observed: Floats, predicted: Floats, levels: Sequence[float]) -> Floats:
    """Compute additions to predictions (n, S, L) that make them cover observed values (n, S); all logarithms.

    Returns:
        (S, L). If a level needs more values than there are, the largest error seen is used; 0 if a stage
        has no value.
    """
    result = np.zeros(predicted.shape[1:])
    for stage in range(predicted.shape[1]):
        for i, level in enumerate(levels):
            scores = observed[:, stage] - predicted[:, stage, i]
            known = scores[np.isfinite(scores)]
            if len(known):
                bound = conformal_quantile(known, level)
                result[stage, i] = bound if math.isfinite(bound) else known.max()
    return result


def coverage(observed: Floats, predicted: Floats) -> Floats:
    """Compute the share (S, L) of observed values (n, S) at or below predictions (n, S, L); NaN without values."""
    known = np.isfinite(observed)
    below = (observed[..., None] <= predicted) & known[..., None]
    counts = known.sum(axis=0)[:, None]
    return np.where(counts > 0, below.sum(axis=0) / np.maximum(counts, 1), np.nan)


def coverage_by_group(observed: Floats, predicted: Floats, groups: NDArray[np.str_]) -> Floats:
    """Compute `coverage` (G, S, L) of the values of each group (n,), groups in ascending order."""
    return np.stack([coverage(observed[groups == name], predicted[groups == name]) for name in np.unique(groups)])
