"""Keeps upper bounds true while a machine drifts: they widen when answers exceed them, and narrow slowly.

A calibration is of its hour. Afterwards the host may be shared, or warmer, or pictures larger, and a bound that
covered 98 of 100 answers covers 80; or the calibration met a busy minute, and a bound covers everything. After
every answer the logarithm of a factor on all bounds moves by step · (1 if the bound was exceeded, else 0, less the
allowed miss rate), so that in the long run bounds are exceeded at that rate whatever the machine does.

Source: I. Gibbs and E. Candès, Adaptive conformal inference under distribution shift, 2021, arXiv 2106.00170,
equation 2, on the bound itself instead of on its level.
"""

from __future__ import annotations

import math

MISS_RATE = 0.01
"""Share of answers that may exceed their bounds."""

STEP = 0.05
"""One answer beyond its bound widens all bounds by 5 %; a hundred that keep theirs undo it."""

LEAST, MOST = 0.7, 2.0
"""Bounds are never narrower or wider than so many times the calibrated ones."""


class OnlineMargin:
    """The factor on calibrated bounds, from the answers so far.

    Attributes:
        factor: by which calibrated bounds are multiplied.
    """

    def __init__(self, miss_rate: float = MISS_RATE, step: float = STEP) -> None:
        """A factor of 1."""
        self._miss_rate, self._step, self._log = miss_rate, step, 0.0
        self.factor = 1.0

    def observe(self, took_ms: float, bound_ms: float) -> None:
        """Learn from one answer.

        Args:
            took_ms: what it took.
            bound_ms: its calibrated bound, without the factor.
        """
        missed = took_ms > bound_ms * self.factor
        moved = self._log + self._step * (missed - self._miss_rate)
        self._log = min(max(moved, math.log(LEAST)), math.log(MOST))
        self.factor = math.exp(self._log)
