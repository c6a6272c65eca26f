"""Keeps upper bounds valid while a machine drifts: they widen when answers exceed them, and narrow slowly.

A calibration holds for its hour. Later the host may be shared or warmer, or pictures larger, and a bound that
covered 98 of 100 answers covers 80; or the calibration met a busy minute, and a bound is too wide. After
every answer the logarithm of a factor on all bounds moves by step · (missed - allowed miss rate), with missed 1 if
the bound was exceeded and else 0. In the long run bounds are exceeded at the allowed rate on any machine.

Source: I. Gibbs and E. Candès, Adaptive conformal inference under distribution shift, 2021, arXiv 2106.00170,
equation 2, applied to the bound itself instead of its level.
"""

from __future__ import annotations

import math

MISS_RATE = 0.01
"""Share of answers that may exceed their bounds."""

STEP = 0.05
"""One answer beyond its bound widens all bounds by 5 %; a hundred answers within theirs undo it."""

LEAST, MOST = 0.7, 2.0
"""Limits of the factor on the calibrated bounds."""


class OnlineMargin:
    """The factor on calibrated bounds, adapted to the answers so far."""

    def __init__(self, miss_rate: float = MISS_RATE, step: float = STEP) -> None:
        """Start with a factor of 1."""
        self._miss_rate, self._step, self._log = miss_rate, step, 0.0

    @property
    def factor(self) -> float:
        """The factor on calibrated bounds."""
        return math.exp(self._log)

    def observe(self, took_ms: float, bound_ms: float) -> None:
        """Learn from one answer.

        Args:
            took_ms: measured time.
            bound_ms: its calibrated bound, without the factor.
        """
        missed = took_ms > bound_ms * self.factor
        moved = self._log + self._step * (missed - self._miss_rate)
        self._log = min(max(moved, math.log(LEAST)), math.log(MOST))
