"""The best that can be done on one lane by who knows all arrivals: a dynamic program over the requests in order.

It knows when every request comes and by when it must be answered, and of each what the compared policy knows: the
expected accuracy of every setting, and how the times of a setting are distributed. It does not know how long an
answer will take nor whether it will be right. `V_i(t)` is the expected number of right answers in time among the
requests from `i` on if the lane is free at time `t` after request `i` came:

    V_i(t) = max( V_{i+1}(free(t)),  max_k E_s[ a_ik · 1(t + s <= b_i) + V_{i+1}(free(t + s)) ] )
    free(x) = max(0, x - gap to the next request)

Refusing is the first term; s is the time of setting k. This is exact for one lane that takes the requests in the
given order, up to the grid of times: a service time is rounded to the grid, and between two points of it the value
is interpolated. With one budget for all, the order of arrival is also that of the deadlines, and no other order is
better where times are known: exchanging two neighbours that run in the other order keeps both deadlines. With
several budgets the order is a restriction, and the value is a lower bound of the best.

Shapes: `n` requests, `K` settings, `L` points of time, `W` points of a service time.

Source: R. Bellman, Dynamic Programming, 1957; the exchange: W. E. Smith, Various optimizers for single-stage
production, Naval Research Logistics Quarterly 3 (1956).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tempovlm.core.progress import Advance, silent
from tempovlm.lab.table import Floats

REFUSE = -1
"""Stands for a refusal among settings."""


@dataclass(frozen=True, slots=True)
class Plan:
    """Says what to do with each request at each time that the lane can be free.

    Attributes:
        choices: (n, L) settings, or `REFUSE`. value: expected right answers in time, of all requests.
        step_ms: between two points of time.
    """

    choices: NDArray[np.int16]
    value: float
    step_ms: float

    def choice(self, request: int, waited_ms: float) -> int:
        """Return the setting, or `REFUSE`, of a request that could begin so long after it came."""
        last = self.choices.shape[1] - 1
        return int(self.choices[request, min(round(max(0.0, waited_ms) / self.step_ms), last)])


def service_shares(times_ms: Floats, step_ms: float) -> Floats:
    """Return the shares (K, W) of each setting's times (r, K) on a grid that begins at 0, rounded to it."""
    places = np.rint(times_ms / step_ms).astype(np.int64)
    shares = np.zeros((times_ms.shape[1], int(places.max()) + 1))
    np.add.at(shares, (np.arange(times_ms.shape[1]), places), 1.0 / len(times_ms))
    return shares


def plan(
    arrival_ms: Floats,
    budget_ms: Floats,
    accuracy: Floats,
    times_ms: Floats,
    step_ms: float = 1.0,
    advance: Advance = silent,
) -> Plan:
    """Compute what to do with each request.

    Args:
        arrival_ms: (n,) in the order in which the lane takes them.
        budget_ms: (n,) from the arrival to the deadline.
        accuracy: (n, K) expected accuracies.
        times_ms: (r, K) equally likely times of each setting.
        step_ms: between two points of time.
        advance: told of what is done.
    """
    shares = service_shares(times_ms, step_ms)
    width, count = shares.shape[1], len(arrival_ms)
    length = int(np.ceil(budget_ms.max() / step_ms)) + width + 1
    at = np.arange(length, dtype=float)  # in steps, as all times below
    gaps = np.diff(arrival_ms, append=arrival_ms[-1:]) / step_ms
    choices = np.empty((count, length), dtype=np.int16)
    value = np.zeros(length)
    in_time: dict[float, Floats] = {}
    for i in range(count - 1, -1, -1):
        budget = float(budget_ms[i]) / step_ms
        if budget not in in_time:
            in_time[budget] = _in_time(shares, budget, length)
        # With the lane free at a time on this request's clock, and on the grid beyond its end.
        later = np.interp(np.maximum(0.0, np.arange(length + width - 1) - gaps[i]), at, value)
        windows: Any = np.lib.stride_tricks.sliding_window_view(later, width)
        worth = windows @ shares.T + in_time[budget] * accuracy[i]
        best = worth.argmax(axis=1)
        gain = worth[np.arange(length), best]
        is_served = gain > later[:length]
        choices[i] = np.where(is_served, best, REFUSE)
        value = np.where(is_served, gain, later[:length])
        advance(count - i, count)
    return Plan(choices, float(value[0]), step_ms)


def _in_time(shares: Floats, steps: float, length: int) -> Floats:
    """Return the chance (L, K) that an answer that begins at each point of time is over within `steps`."""
    within = np.concatenate([np.zeros((len(shares), 1)), np.cumsum(shares, axis=1)], axis=1)
    left = np.floor(steps - np.arange(length) + 1e-9).astype(np.int64) + 1
    chance: Floats = within[:, np.clip(left, 0, shares.shape[1])].T
    return chance
