"""Whether a request may join others that are in flight: by what that costs itself, and those who run.

Pictures and prompts of all who came are read before anybody's next step, and a step makes a token for all. So one
that joins delays each of the others by its own picture and prompt, and by what a step for more of them takes
longer.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from tempovlm.latency.profile import Sharing

UNKNOWN_MS = 1e9
"""Stands for a time that was not measured: beside it nobody is expected in time."""


@dataclass(frozen=True, slots=True)
class Need:
    """The rest of a request in flight, by its times alone as they were calibrated.

    Attributes:
        reading_ms: from the opened picture to the first token; 0 once it is there.
        step_ms: of a later token. steps: number of those that may still come.
        deadline_ms: when it must have ended; infinite without a deadline.
        margin, crowding: factors on both times that earlier answers taught: of all, and of those among others.
    """

    reading_ms: float
    step_ms: float
    steps: int
    deadline_ms: float = math.inf
    margin: float = 1.0
    crowding: float = 1.0

    @property
    def calibrated(self) -> Need:
        """The same need without what earlier answers among others taught."""
        return replace(self, crowding=1.0)

    @property
    def factor(self) -> float:
        """The factor on both times."""
        return self.margin * self.crowding

    @property
    def is_known(self) -> bool:
        """Whether its times were measured."""
        return self.step_ms < UNKNOWN_MS


@dataclass(frozen=True, slots=True)
class Forecast:
    """When requests in flight end if no other one joins.

    Attributes:
        at_ms: when it was made. reading_ms: from then until everybody's first token is there.
        step_ms: of a later token, which a step makes for all. spread: a factor on both, for a bound.
    """

    at_ms: float
    reading_ms: float
    step_ms: float
    spread: float

    @classmethod
    def of(cls, needs: Sequence[Need], sharing: Sharing, now_ms: float) -> Forecast:
        """Return the forecast for some requests."""
        step_ms = max((one.factor * sharing.step.on(one.step_ms) for one in needs), default=0.0)
        return cls(now_ms, ahead_ms(needs, sharing), step_ms, sharing.spread)

    def expected_ms(self, steps: int) -> float:
        """Return the time from then on of an answer that takes some steps after its first token, or after now."""
        return self.reading_ms + steps * self.step_ms

    def end_ms(self, steps: int) -> float:
        """Return when such an answer has ended at the latest."""
        return self.at_ms + self.spread * self.expected_ms(steps)


def ahead_ms(needs: Sequence[Need], sharing: Sharing) -> float:
    """Return how long one that joins waits until those before it are read."""
    return sum(one.factor * sharing.reading.on(one.reading_ms) for one in needs)


def ends_ms(needs: Sequence[Need], sharing: Sharing, now_ms: float) -> list[float]:
    """Return when each of some requests has ended at the latest, if no other one joins."""
    forecast = Forecast.of(needs, sharing, now_ms)
    return [forecast.end_ms(one.steps) for one in needs]


def may_join(others: Sequence[Need], joiner: Need, before: Sharing, after: Sharing, now_ms: float) -> bool:
    """Return whether a request that joins is in time, and makes none late that is in time without it.

    Args:
        others: those in flight.
        joiner: the one that would join.
        before: the factors for the others.
        after: with one more.
        now_ms: on the clock of the deadlines.
    """
    without, (*ends, own_ms) = ends_ms(others, before, now_ms), ends_ms([*others, joiner], after, now_ms)
    is_late = any(
        alone_ms <= one.deadline_ms < end_ms for one, alone_ms, end_ms in zip(others, without, ends, strict=True)
    )
    return own_ms <= joiner.deadline_ms and not is_late


def may_become(others: Sequence[Need], own: Need, wanted: Need, sharing: Sharing, now_ms: float) -> bool:
    """Return whether a request in flight may need something else: none is late that is in time without that.

    Args:
        others: those in flight beside it.
        own: what it was let in with.
        wanted: what it would need instead.
        sharing: the factors for all of them.
        now_ms: on the clock of the deadlines.
    """
    needs = [*others, own]
    before, after = ends_ms(needs, sharing, now_ms), ends_ms([*others, wanted], sharing, now_ms)
    return not any(
        as_is_ms <= one.deadline_ms < end_ms for one, as_is_ms, end_ms in zip(needs, before, after, strict=True)
    )


def narrowest(deadlines_ms: Sequence[float], begin_ms: float) -> tuple[int, float]:
    """Return how many of some requests, from the first one on, have the least time each; and all of that time.

    Args:
        deadlines_ms: in ascending order.
        begin_ms: when the first one begins.
    """
    times_ms = [deadline_ms - begin_ms for deadline_ms in deadlines_ms]
    count = min(range(1, len(times_ms) + 1), key=lambda place: times_ms[place - 1] / place)
    return count, times_ms[count - 1]


def in_turns(sharing: Sharing, turns: int) -> Sharing:
    """Return the factors for `turns` requests at one setting, all of which are read before anybody's next step."""
    reading = sharing.reading
    longer = replace(reading, at_short=turns * reading.at_short, at_long=turns * reading.at_long)
    return replace(sharing, reading=longer)


def slack_ms(needs: Sequence[Need], sharing: Sharing, now_ms: float) -> float:
    """Return how long the work for some requests may rest before one is late; infinite without deadlines."""
    ends = ends_ms(needs, sharing, now_ms)
    return min((one.deadline_ms - end_ms for one, end_ms in zip(needs, ends, strict=True)), default=math.inf)
