"""Keeps upper bounds valid while a machine drifts: they widen when answers exceed them, and narrow slowly.

A calibration holds for its hour. Later the host may be shared or warmer, or pictures larger, and a bound that
covered 98 of 100 answers covers 80; or the calibration met a busy minute, and a bound is too wide. After
every answer the logarithm of a factor on all bounds moves by step · (missed - allowed miss rate), with missed 1 if
the bound was exceeded and else 0. In the long run bounds are exceeded at the allowed rate on any machine.

Company is faster than that: other processes start within an answer. So two slow answers are company, and an
answer's picture tells how fast the machine reads its prompt. Where company comes again and again, one slow half of
an answer makes the next answer careful. The constants are chosen by `benchmarks/company_simulated.py`.

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

LEAST, MOST = 0.5, 2.0
"""Drift and tail together never go beyond these factors."""

MOST_COMPANY = 8.0
"""Nor company beyond this one."""

DRIFT_ANSWERS = 100
"""Answers of which the drift is the median; before there were any, they count as expected."""

COMPANY_COUNTS = 4
"""In company only every fourth answer counts for the drift: a slower machine is learned, a burst is not."""

SUSPECTS, SUSPECT = 4, 2
"""So many of the last few answers beyond their bounds are company."""

RECURS = 1000
"""Company that returns within this number of answers comes again and again."""

SUSPICIOUS = 0.1
"""Logarithm by which half an answer then exceeds its bound before the next is expected to do so too."""

FORGET = 24
"""Answers within their ordinary bounds after which company is gone."""

HEADROOM, MOST_HEADROOM = 0.05, 0.5
"""Logarithm by which bounds exceed the slowest of the last answers in company, at first and at most."""

HEADROOM_STEP, HEADROOM_MISS_RATE = 0.03, 0.02
"""Step and allowed miss rate of the headroom, which adapts in company only."""

NARROW = 0.15
"""Logarithm by which the rest of an answer in company may be slower than its picture was."""

NOT_ENCODED = -0.7
"""Logarithm of a half: a picture that took less of its time was not encoded, and tells nothing."""


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
        self._headroom, self._last_company = HEADROOM, 0.0
        self._ratios: deque[float] = deque([0.0] * DRIFT_ANSWERS, maxlen=DRIFT_ANSWERS)
        self._excess: deque[float] = deque(maxlen=FORGET)
        self._moves: deque[float] = deque(maxlen=SUSPECTS)
        self._remembers = self._observed = self._spells = 0
        self._since = RECURS

    @property
    def middle(self) -> float:
        """The factor on medians: how much longer answers took than expected, in the middle."""
        return math.exp(min(max(self._drift, math.log(LEAST)), math.log(MOST)))

    @property
    def has_company(self) -> bool:
        """Whether something else seems to use the machine."""
        return self._remembers > 0

    @property
    def _ordinary(self) -> float:
        return min(max(self._drift + self._tail, math.log(LEAST)), math.log(MOST))

    def rest_factor(self, seen: float, usual: float) -> float:
        """Return the factor for the rest of an answer whose picture was encoded.

        A picture that took unusually long means company that has just come: the rest is expected to be as slow.
        One that was fast narrows the bounds that company widened.

        Args:
            seen: time for the picture over its median.
            usual: ratio that most pictures keep.
        """
        slower, company = math.log(seen) - self._drift, self._company
        if slower > math.log(usual):
            company = max(company, min(slower, math.log(MOST_COMPANY)))
        elif slower > NOT_ENCODED:
            company = min(company, max(slower, 0.0) + NARROW)
        return self.factor * math.exp(company - self._company)

    def observe(self, took_ms: float, bound_ms: float, expected_ms: float, half: float = 0.0) -> None:
        """Learn from one answer.

        Args:
            took_ms: measured time.
            bound_ms: its calibrated bound, without the factor.
            expected_ms: the median of such answers, of its length.
            half: time over calibrated bound of its slower half, before or after the second choice; 0 if unknown.
        """
        ordinary = self._ordinary
        excess = math.log(took_ms / bound_ms) - ordinary
        half_excess = math.log(half) - ordinary if half > 0 else -math.inf
        if self._remembers:
            move = HEADROOM_STEP * ((excess > self._company) - HEADROOM_MISS_RATE)
            self._headroom = min(max(self._headroom + move, 0.0), MOST_HEADROOM)
        self._excess.append(excess)
        self._since += 1
        if sum(one > 0 for one in list(self._excess)[-SUSPECTS:]) >= SUSPECT:
            self._declare_company()
        elif self._remembers:
            self._remembers -= 1
            if not self._remembers:
                self._excess.clear()
        else:
            move = self._step * ((excess > 0) - self._miss_rate)
            self._tail += move
            self._moves.append(move)
            self._tail = min(max(self._tail, math.log(LEAST)), math.log(MOST))
        expected = [max(self._excess, default=0.0)] if self._remembers else []
        if self._spells > 1 and self._since < RECURS and (excess > 0 or half_excess > SUSPICIOUS):
            expected.append(max(excess, half_excess))
        self._company = min(max(expected) + self._headroom, math.log(MOST_COMPANY)) if expected else 0.0
        self._company = max(self._company, 0.0)
        self._observed += 1
        if not self._remembers or self._observed % COMPANY_COUNTS == 0:
            self._ratios.append(math.log(took_ms / expected_ms))
            self._drift = float(np.median(self._ratios))
        self.factor = math.exp(self._ordinary + self._company)

    def _declare_company(self) -> None:
        """Remember it from now on; company that returns is first taken to be as slow as it was."""
        if not self._remembers:
            recurs = self._since < RECURS
            self._spells = self._spells + 1 if recurs else 1
            if recurs:
                self._excess[0] = max(self._excess[0], self._last_company)
        self._remembers, self._since = FORGET, 0
        self._last_company = max(self._excess)
        # The first of them looked like chance.
        self._tail -= sum(self._moves)
        self._moves.clear()
