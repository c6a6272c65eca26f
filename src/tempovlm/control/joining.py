"""Whether a request may join others that are in flight: by what that costs itself, and those who run.

Pictures and prompts of all who came are read before anybody's next step, and a step makes a token for all. So one
that joins delays each of the others by its own picture and prompt, and by what a step for more of them takes
longer.

A schedule that admits requests to such a device counts it as that many seats (`SharedDevice`): those who have one
are in flight together, and the next ones begin when those have ended.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from tempovlm.latency.profile import Sharing

UNKNOWN_MS = 1e9
"""Stands for a time that was not measured: beside it nobody is expected in time."""

ALONE = Sharing(1, 1.0, 1.0, 1.0)
"""Of a request that is in flight alone."""

AT_A_TIME = 2
"""Requests with a budget in flight: more would choose before they know who waits, and could give nothing back."""


@dataclass(frozen=True, slots=True)
class Need:
    """The rest of a request in flight, by its times alone.

    Attributes:
        reading_ms: from the opened picture to the first token; 0 once it is there.
        step_ms: of a later token. steps: number of those that may still come.
        deadline_ms: when it must have ended; infinite without a deadline.
        crowding: the factor on both times that earlier answers among others taught.
        reserve_ms: what its bound exceeds its median by.
    """

    reading_ms: float
    step_ms: float
    steps: int
    deadline_ms: float = math.inf
    crowding: float = 1.0
    reserve_ms: float = 0.0

    @property
    def calibrated(self) -> Need:
        """The same need without what earlier answers among others taught."""
        times_ms = self.reading_ms / self.crowding, self.step_ms / self.crowding
        return Need(*times_ms, self.steps, self.deadline_ms, reserve_ms=self.reserve_ms / self.crowding)

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
        step_ms = sharing.step * max((one.step_ms for one in needs), default=0.0)
        return cls(now_ms, ahead_ms(needs, sharing), step_ms, sharing.spread)

    def expected_ms(self, steps: int) -> float:
        """Return the time from then on of an answer that takes some steps after its first token, or after now."""
        return self.reading_ms + steps * self.step_ms

    def end_ms(self, need: Need) -> float:
        """Return when one of the requests has ended at the latest."""
        return self.at_ms + self.spread * self.expected_ms(need.steps) + need.reserve_ms

    def is_lost(self, need: Need) -> bool:
        """Whether one of the requests is expected to end after its deadline even if nobody else joins.

        The step that is under way may be nearly done.
        """
        return self.at_ms + self.expected_ms(max(need.steps - 1, 0)) > need.deadline_ms


def ahead_ms(needs: Sequence[Need], sharing: Sharing) -> float:
    """Return how long one that joins waits until those before it are read."""
    return sharing.reading * sum(one.reading_ms for one in needs)


def ends_ms(needs: Sequence[Need], sharing: Sharing, now_ms: float) -> list[float]:
    """Return when each of some requests has ended at the latest, if no other one joins."""
    forecast = Forecast.of(needs, sharing, now_ms)
    return [forecast.end_ms(one) for one in needs]


def may_join(others: Sequence[Need], joiner: Need, before: Sharing, after: Sharing, now_ms: float) -> bool:
    """Return whether a request that joins is in time by its bound, and delays nobody beyond the deadline.

    That protects all that are expected in time, by their bounds or not: else who joins would delay them again.

    Args:
        others: those in flight.
        joiner: the one that would join.
        before: the factors for the others.
        after: with one more.
        now_ms: on the clock of the deadlines.
    """
    without, (*ends, own_ms) = Forecast.of(others, before, now_ms), ends_ms([*others, joiner], after, now_ms)
    is_late = any(
        end_ms > one.deadline_ms and not without.is_lost(one) for one, end_ms in zip(others, ends, strict=True)
    )
    return own_ms <= joiner.deadline_ms and not is_late


def slack_ms(needs: Sequence[Need], sharing: Sharing, now_ms: float) -> float:
    """Return how long the work for some requests may rest before one is late; infinite without deadlines."""
    ends = ends_ms(needs, sharing, now_ms)
    return min((one.deadline_ms - end_ms for one, end_ms in zip(needs, ends, strict=True)), default=math.inf)


@dataclass(frozen=True, slots=True)
class SharedDevice:
    """A device on which several requests are in flight together.

    Attributes:
        seats: requests that may be in flight.
        sharing: the factors for a number of them, as `LatencyProfile.sharing`; None while none were measured.
    """

    seats: int
    sharing: Callable[[int], Sharing | None]

    @property
    def is_measured(self) -> bool:
        """Whether it is known how requests share it."""
        return self.sharing(self.seats) is not None

    def factors(self, in_flight: int) -> Sharing:
        """Return the factors for some in flight, as many as there are seats at most."""
        found = ALONE if in_flight <= 1 else self.sharing(min(in_flight, self.seats))
        assert found is not None
        return found

    def ends_ms(self, needs: Sequence[Need], now_ms: float) -> list[float]:
        """Return when each of some requests has ended at the latest, if no other one comes.

        As many as there are seats are in flight together, in their order. The others are counted one after
        another, since each has to find a place beside those that have begun.
        """
        together, later = needs[: self.seats], needs[self.seats :]
        ends = ends_ms(together, self.factors(len(together)), now_ms)
        for one in later:
            ends += ends_ms([one], ALONE, max(ends))
        return ends

    def work_ms(self, needs: Sequence[Need]) -> float:
        """Return how much of the device's time some requests take while they are in flight together.

        It is the reading of each, and its part of the steps, which serve all.
        """
        count = max(1, min(len(needs), self.seats))
        sharing, steps_ms = self.factors(count), sum(one.steps * one.step_ms for one in needs)
        return ahead_ms(needs, sharing) + sharing.step * steps_ms / count
