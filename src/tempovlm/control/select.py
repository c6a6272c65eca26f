"""The decision rule, used by the guard, the judge and the trainers.

Shapes: `K` settings, after any number of leading axes; arguments broadcast.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.floating]
Ints = NDArray[np.int64]
Mask = NDArray[np.bool_]

TIE = 0.0025
"""Accuracies (shares of 1) that differ by at most this count as equal."""


def best(
    scores: Floats, fits: Mask, cost_ms: Floats, price_per_ms: float | Floats = 0.0, tie: float = 0.0
) -> Ints:
    """Return the setting with the highest score - price * cost among those that fit; the cheapest where none fits.

    Args:
        scores: (..., K), higher is better.
        fits: (..., K) settings that may be chosen.
        cost_ms: (..., K) expected latency, infinite for a missing setting.
        price_per_ms: score that a millisecond costs; broadcasts against (..., K).
        tie: scores that differ by at most this count as equal, and the cheapest of them is chosen.

    Returns:
        Indices (...); the first of equally cheap settings.
    """
    worth = np.where(fits, scores, -np.inf)
    if not isinstance(price_per_ms, float | int) or price_per_ms:
        worth = worth - price_per_ms * np.where(fits, cost_ms, 0.0)
    top = np.maximum.reduce(worth, axis=-1, keepdims=True)
    near = worth >= (top - tie if tie else top)  # all of them where nothing fits: -inf >= -inf
    chosen: Ints = np.where(near, cost_ms, np.inf).argmin(axis=-1)
    return chosen
