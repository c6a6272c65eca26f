"""Shares of lane time: how long a request may take so that others keep their deadlines.

Times are of one clock, and requests stand in the order of their service.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Protocol


class Waits(Protocol):
    """A request that waits: when it must have ended, what it needs, and whether it then ends."""

    @property
    def deadline_ms(self) -> float:
        """When it must have ended; infinite without a deadline."""

    @property
    def need_ms(self) -> float:
        """The time inside that it is expected to need at least."""

    @property
    def runs_over(self) -> bool:
        """Whether it takes its time even if it cannot be in time."""


def share_beside_ms(
    waiting: Sequence[Waits], now_ms: float, lanes: int = 1, least_ms: float = 0.0, others: int = 0
) -> float:
    """Return how long a request may take so that all who wait get as much; infinite for none.

    Args:
        waiting: in the order of their service.
        now_ms: when it begins.
        lanes: that serve them side by side.
        least_ms: time that an answer takes at least. Of those with less some run all the same, and take a share;
            the others are over.
        others: requests on the other lanes, which are taken to begin as it does.
    """
    deadlines_ms = [
        math.inf if one.runs_over and has_passed(one.deadline_ms - now_ms, least_ms) else one.deadline_ms
        for one in waiting
    ]
    return common_share_ms([math.inf, *deadlines_ms], now_ms, lanes, least_ms, others)


def room_beside_ms(waiting: Sequence[Waits], now_ms: float, lanes: int = 1, others: int = 0) -> float:
    """Return how long a request may take so that all who wait can still be answered; infinite for none.

    They get the least time that each needs, one after another. Those that cannot be in time any more do not count.
    On several lanes it is `share_beside_ms`. The arguments are its own.
    """
    if lanes > 1:
        return share_beside_ms(waiting, now_ms, lanes, 0.0, others)
    room_ms, ahead_ms = math.inf, 0.0
    for one in waiting:
        left_ms = one.deadline_ms - now_ms
        is_over = has_passed(left_ms, ahead_ms + one.need_ms)
        if not is_over:
            room_ms = min(room_ms, left_ms - ahead_ms - one.need_ms)
        if one.runs_over or not is_over:
            ahead_ms += one.need_ms
    return room_ms


def common_share_ms(
    deadlines_ms: Sequence[float], now_ms: float, lanes: int = 1, least_ms: float = 0.0, others: int = 0
) -> float:
    """Return how long the first of some requests may take so that each of them gets as much before its deadline.

    On one lane that is the least (d_i - now) / i; on several, whole turns count, so that it is at most `lanes`
    times that. Those that can no longer be served count for nothing.

    Args:
        deadlines_ms: in the order of their service, the request itself first, whose own deadline binds nobody.
        now_ms: when the lane is free for it.
        lanes: that serve them side by side.
        least_ms: time that an answer takes at least.
        others: requests on the other lanes, which are taken to begin as it does.

    Returns:
        Infinity if nobody else waits.
    """
    left_ms = [one - now_ms for one in deadlines_ms[1:] if not has_passed(one - now_ms, least_ms)]
    return min((left / -(-(place + others) // lanes) for place, left in enumerate(left_ms, 2)), default=math.inf)


def even_shares_ms(times_ms: Sequence[float]) -> list[float]:
    """Return the lane time that each of some requests gets where all are alike, ascending.

    It maximises the sum of one concave function of their lane times, c1 + ... + ci being at most the i-th of
    `times_ms`: the least of times_ms[i] / i for the first ones up to there, and so on with those that remain. The
    first one's is `common_share_ms` of one lane.

    Args:
        times_ms: (n,) lane time until each one's deadline, in the order of their service.
    """
    shares_ms, done_ms = list[float](), 0.0
    rest_ms = list(times_ms)
    while rest_ms:
        share_ms, place = min(((time - done_ms) / place, -place) for place, time in enumerate(rest_ms, 1))
        count = -place
        shares_ms += [max(0.0, share_ms)] * count
        done_ms, rest_ms = rest_ms[count - 1], rest_ms[count:]
    return shares_ms


def has_passed(left_ms: float, least_ms: float) -> bool:
    """Whether a request can no longer be served in the time that is left."""
    return left_ms <= 0 or left_ms < least_ms
