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
from collections import deque

import numpy as np

MISS_RATE = 0.01
"""Share of answers that may exceed their bounds."""

STEP = 0.05
"""An answer beyond its bound widens the tail by 5 %; a hundred that keep theirs undo it."""

LEAST, MOST = 0.7, 2.0
"""Drift and tail together never go beyond these factors."""

MOST_COMPANY = 8.0
"""Nor company beyond this one."""

DRIFT_ANSWERS = 100
"""Answers of which the drift is the median; before there were any, they count as expected."""

COMPANY_COUNTS = 4
"""In company only every fourth answer counts for the drift: a slower machine is learned, a burst is not."""

SUSPECTS, SUSPECT = 4, 2
"""So many of the last few answers beyond their bounds are company."""

FORGET = 24
"""Answers within their ordinary bounds after which company is gone."""

HEADROOM = 0.05
"""Logarithm by which bounds exceed the slowest of the last answers in company."""


class OnlineMargin:
    """The factor on calibrated bounds, from the answers so far.

    Attributes:
        factor: by which calibrated bounds are multiplied.
    """

    def __init__(self, miss_rate: float = MISS_RATE, step: float = STEP) -> None:
        """A factor of 1."""
        self.factor = 1.0
        self._miss_rate, self._step = miss_rate, step
        self._tail = self._drift = self._company = 0.0
        self._ratios: deque[float] = deque([0.0] * DRIFT_ANSWERS, maxlen=DRIFT_ANSWERS)
        self._excess: deque[float] = deque(maxlen=FORGET)
        self._moves: deque[float] = deque(maxlen=SUSPECTS)
        self._remembers = self._observed = 0

    @property
    def has_company(self) -> bool:
        """Whether something else seems to use the machine."""
        return self._remembers > 0

    @property
    def _ordinary(self) -> float:
        return min(max(self._drift + self._tail, math.log(LEAST)), math.log(MOST))

    def observe(self, took_ms: float, bound_ms: float, expected_ms: float) -> None:
        """Learn from one answer.

        Args:
            took_ms: measured time.
            bound_ms: its calibrated bound, without the factor.
            expected_ms: the median of such answers, of its length.
        """
        excess = math.log(took_ms / bound_ms) - self._ordinary
        self._excess.append(excess)
        if sum(one > 0 for one in list(self._excess)[-SUSPECTS:]) >= SUSPECT:
            self._remembers = FORGET
            # The first of them looked like chance.
            self._tail -= sum(self._moves)
            self._moves.clear()
        elif self._remembers:
            self._remembers -= 1
            if not self._remembers:
                self._excess.clear()
        else:
            move = self._step * ((excess > 0) - self._miss_rate)
            self._tail += move
            self._moves.append(move)
            self._tail = min(max(self._tail, math.log(LEAST)), math.log(MOST))
        slowest = max(self._excess, default=0.0) + HEADROOM if self._remembers else 0.0
        self._company = min(max(slowest, 0.0), math.log(MOST_COMPANY))
        self._observed += 1
        if not self._remembers or self._observed % COMPANY_COUNTS == 0:
            self._ratios.append(math.log(took_ms / expected_ms))
            self._drift = float(np.median(self._ratios))
        self.factor = math.exp(self._ordinary + self._company)
