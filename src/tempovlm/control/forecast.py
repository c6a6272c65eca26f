"""Tells who may come while a request is answered: those who came after earlier moments like this one.

Arrivals come in bursts, so those who wait tell only half of what lane time will be worth: at the first request of
a burst nobody waits yet. What will come is not known, but what came after similar moments is. A moment is the
begin of an answer; moments are alike if about as many requests had come shortly before them. Each of the most
similar earlier moments is a scenario: the requests that came within one budget after it, with their deadlines. The
price of lane time is the mean of the prices of the scenarios (`price.Price`), as the slope of a mean is the mean
of the slopes.

Nothing is fitted beforehand: a server learns from its own last arrivals, and prices by those who wait alone until
it has seen some.

Shapes: `S` scenarios, `J` requests of a scenario.
"""

from __future__ import annotations

import math
import threading
from bisect import bisect_left, bisect_right
from collections import deque

import numpy as np

from tempovlm.control.select import Floats

MOMENTS = 1024
"""Earlier moments that are remembered."""

SCENARIOS = 64
"""The most similar of them, which are taken to be equally likely."""

LEAST_SCENARIOS = 8
"""With fewer, nobody is expected to come."""

_OF_KNOWN = 4
"""Of few moments, the most similar quarter are scenarios."""

FOLLOWING = 64
"""Requests of a scenario at most: more cannot be served within a budget anyway."""

RECENT = 64
"""Arrivals whose mean budget is how far ahead and back is looked."""


class Forecast:
    """Remembers arrivals, and says what may come. It has no clock."""

    def __init__(self) -> None:
        """Nothing has come yet."""
        self._lock = threading.Lock()  # those who ask may be other threads than who tells
        self._arrivals_ms: list[float] = []
        self._deadlines_ms: list[float] = []
        self._budgets_ms: deque[float] = deque(maxlen=RECENT)
        self._open: deque[tuple[float, float, float]] = deque()  # moments whose scenario is not over
        self._similar = np.full(MOMENTS, np.inf)  # logarithm of the arrivals before each
        self._first_ms = np.full(MOMENTS, np.inf)
        self._following_ms = np.full((MOMENTS, FOLLOWING), np.inf)
        self._count = 0

    def came(self, accepted_ms: float, deadline_ms: float) -> None:
        """Remember a request; one without a deadline binds nobody."""
        if not math.isfinite(deadline_ms):
            return
        with self._lock:
            place = bisect_right(self._arrivals_ms, accepted_ms)
            self._arrivals_ms.insert(place, accepted_ms)
            self._deadlines_ms.insert(place, deadline_ms)
            self._budgets_ms.append(deadline_ms - accepted_ms)

    def began(self, now_ms: float) -> None:
        """Remember a moment at which an answer begins, and what came after earlier ones."""
        if not self._budgets_ms:
            return
        with self._lock:
            horizon_ms = self._horizon_ms
            self._close(now_ms, horizon_ms)
            if not self._open or self._open[-1][0] < now_ms:
                self._open.append((now_ms, horizon_ms, self._activity(now_ms)))

    def shares_ms(self, waiting: int, now_ms: float, lanes: int = 1) -> Floats:
        """Return how long a request that begins may take in each scenario (S,) for who may come to get as much.

        A scenario's requests come after those who wait. The one in place i, counted from the request itself, binds
        it by its deadline over i, as in `shares.common_share_ms`; none does where the lane would be idle before
        the first one comes. Of no scenario, or of an empty one, it is infinite.

        Args:
            waiting: how many wait.
            now_ms: when the request begins.
            lanes: that serve them side by side.
        """
        turns = -(-np.arange(waiting + 1, waiting + 2 + FOLLOWING) // lanes)
        with self._lock:
            known = min(self._count, MOMENTS)
            if known < LEAST_SCENARIOS:
                return np.array([math.inf])
            distance = np.abs(self._similar[:known] - self._activity(now_ms))
            count = min(SCENARIOS, max(LEAST_SCENARIOS, known // _OF_KNOWN))
            chosen = np.argsort(distance, kind="stable")[:count]  # others break ties as the processor has it
            shares_ms: Floats = (self._following_ms[chosen] / turns[1:]).min(axis=1)
            return np.maximum(shares_ms, self._first_ms[chosen] / turns[0])

    @property
    def _horizon_ms(self) -> float:
        return sum(self._budgets_ms) / len(self._budgets_ms)

    def _activity(self, now_ms: float) -> float:
        """Return by what moments are compared: the logarithm of one and those that came within a budget before."""
        before = bisect_left(self._arrivals_ms, now_ms - self._horizon_ms)
        return math.log1p(bisect_right(self._arrivals_ms, now_ms) - before)

    def _close(self, now_ms: float, horizon_ms: float) -> None:
        """Turn the moments whose scenarios are over into such, and forget what none needs any more."""
        while self._open and self._open[0][0] + self._open[0][1] <= now_ms:
            at_ms, ahead_ms, similar = self._open.popleft()
            begin, end = (bisect_right(self._arrivals_ms, one) for one in (at_ms, at_ms + ahead_ms))
            place, end = self._count % MOMENTS, min(end, begin + FOLLOWING)
            self._count += 1
            self._similar[place] = similar
            self._following_ms[place] = np.inf
            self._following_ms[place, : end - begin] = np.sort(self._deadlines_ms[begin:end]) - at_ms
            self._first_ms[place] = self._arrivals_ms[begin] - at_ms if end > begin else np.inf
        oldest_ms = (self._open[0][0] if self._open else now_ms) - horizon_ms
        over = bisect_left(self._arrivals_ms, oldest_ms)
        if over > FOLLOWING:
            del self._arrivals_ms[:over], self._deadlines_ms[:over]
