"""The schedule that a server asks before it lets a request line up at the door (`control/queue/door.py`).

    admit ── too many wait, or somebody would be late ──> refused, with the time after which to ask again
      │
      └──> waits, the most urgent first ──> a lane is free: began ──> end, which the next one begins at

It also says what the time of those who wait is worth (`control/price.py`), and refuses whoever would gain less. To
have admitted is a promise once a tenth of the budget has passed: then nobody is refused for another one's sake.
On a shared device (`joining.SharedDevice`) it goes by what one adds to the work of all in flight.
"""

from __future__ import annotations

import heapq
import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from tempovlm.control.forecast import Forecast
from tempovlm.control.joining import Need, SharedDevice
from tempovlm.control.price import ROUNDING, Envelope, LanePrice, Price
from tempovlm.control.queue.door import MOST_WAITING, End
from tempovlm.control.shares import (
    PATIENCE_MS,
    Discipline,
    even_shares_ms,
    has_passed,
    room_beside_ms,
    share_beside_ms,
    urgency_ms,
)

RECENT_STAYS = 8
"""Ended requests whose times say how long those stay that are inside."""

AT_ONCE = 0.1
"""Share of the budget within which a refusal counts as told at once. Whoever has waited longer was promised an
answer in time: it is refused only where it would be late."""


def is_at_once(waited_ms: float, budget_ms: float) -> bool:
    """Whether a request that is refused now is told at once; a budget counts as `PATIENCE_MS` at most."""
    return waited_ms <= AT_ONCE * min(budget_ms, PATIENCE_MS)


@dataclass(frozen=True, eq=False, slots=True)
class Stay:
    """One request that a schedule admitted.

    Attributes:
        accepted_ms: when it came. deadline_ms: when it must have ended; infinite without a deadline.
        need_ms: the time inside that it is expected to need at least. owner: who asked.
        runs_over: whether it takes its time even if it cannot be in time.
        weight: how much its accuracy counts beside that of others; set by who serves, not by who asks.
        expected_ms: the time that it takes if it gets the least, for those behind it; `need_ms` if None.
        gains: accuracy over lane time of the settings that it may run at; None if unknown.
        usual: that of an ordinary question at all settings, which prices the time of others; None if unknown.
        among: what it needs at least beside others; None if it is answered alone.
    """

    accepted_ms: float
    deadline_ms: float
    need_ms: float
    owner: str = ""
    runs_over: bool = False
    weight: float = 1.0
    expected_ms: float | None = None
    gains: Envelope | None = None
    usual: Envelope | None = None
    among: Need | None = None

    @property
    def worth(self) -> float:
        """The most weighted accuracy that lane time gains, over an ordinary question's; infinite if unknown.

        As a ratio it does not depend on how slow the machine was when the request came.
        """
        if self.gains is None or self.usual is None:
            return math.inf
        return self.weight * self.gains.steepest / self.usual.steepest if self.usual.steepest else 0.0

    def may_be_refused(self, now_ms: float) -> bool:
        """Whether it can make room for others: its refusal would still be told at once."""
        return is_at_once(now_ms - self.accepted_ms, self.deadline_ms - self.accepted_ms)


class Schedule:
    """Says who may line up, by the times that are expected. It has neither a clock nor threads.

    It follows the door by its rule alone: a lane that becomes free is taken by the most urgent request.
    """

    def __init__(
        self,
        lanes: int = 1,
        most_waiting: int = MOST_WAITING,
        most_of_owner: int = MOST_WAITING,
        discipline: Discipline = "edf",
        price: Price | None = None,
        forecast: Forecast | None = None,
        device: SharedDevice | None = None,
    ) -> None:
        """Admit requests to a door.

        Args:
            lanes: of the door.
            most_waiting: the most that wait.
            most_of_owner: the most of one owner that wait.
            discipline: of the door.
            price: of lane time; derived by default.
            forecast: remembers all who come, admitted or not; None has nobody expected.
            device: on which requests are in flight together once that was measured; None has lanes alone.
        """
        self._forecast, self._device = forecast, device
        self._needs: dict[Stay, Need] = {}  # of those that have chosen what they do beside others
        self._lanes, self._most_waiting, self._most_of_owner = lanes, most_waiting, most_of_owner
        self._discipline, self.price = discipline, price or Price()
        self._last: Stay | None = None  # that came
        self._stays: list[Stay] = []  # the most urgent first
        self._began_ms: dict[Stay, float] = {}  # of those that are taken to be inside
        self._ends: dict[Stay, End] = {}  # of those of them that have chosen
        self._recent_ms: deque[float] = deque(maxlen=RECENT_STAYS)

    def __len__(self) -> int:
        """Return how many are admitted and have not ended."""
        return len(self._stays)

    @property
    def inside(self) -> tuple[Stay, ...]:
        """Those that are taken to be inside, in the order in which they began."""
        return tuple(self._began_ms)

    @property
    def running(self) -> int:
        """Requests that are taken to be inside."""
        return len(self._began_ms)

    @property
    def waiting(self) -> int:
        """Requests that are taken to wait."""
        return len(self._stays) - len(self._began_ms)

    @property
    def is_full(self) -> bool:
        """Whether no more may wait."""
        return self.waiting >= self._most_waiting

    @property
    def last_deadline_ms(self) -> float:
        """The latest deadline; infinite if a request has none, and minus infinity for no request."""
        return max((stay.deadline_ms for stay in self._stays), default=-math.inf)

    def admit(self, stay: Stay, now_ms: float) -> bool:
        """Admit a request unless it is refused.

        It is where too many wait; where it, or another one that is in time now, would be late by that; and where
        no setting gains what its lane time is worth to the others that wait.
        """
        self._notice(stay)
        of_owner = sum(one.owner == stay.owner for one in self._outside(self._stays))
        if self.is_full or of_owner >= self._most_of_owner:
            return False
        with_it = sorted([*self._stays, stay], key=self._urgency_ms)
        if self._late(with_it, now_ms) - self._late(self._stays, now_ms):
            return False
        if stay.gains is not None and not stay.gains.is_worth(self._price_per_ms(stay, with_it, now_ms)):
            return False
        self._stays = with_it
        self._let_in(now_ms)
        return True

    def admit_instead(self, stay: Stay, now_ms: float) -> Stay | None:
        """Admit a request that was refused in place of one that waits and gains less with a ms of lane time.

        Only those can be displaced that have waited for `AT_ONCE` of their budgets at most.

        Returns:
            The one that is refused instead, which has ended; None if there is no such one, and nothing changes.
        """
        if not self.price.is_derived or stay.gains is None:
            return None
        waiting = [one for one in self._outside(self._stays) if one.may_be_refused(now_ms)]
        worst = min(reversed(waiting), key=lambda one: one.worth, default=stay)
        if worst.worth >= stay.worth * (1 - ROUNDING):
            return None
        before = self._stays
        self._stays = [one for one in before if one is not worst]
        if self.admit(stay, now_ms):
            return worst
        self._stays = before
        return None

    def price_per_ms(self, now_ms: float, stay: Stay) -> float:
        """Return the price of lane time for an admitted request, in accuracy per ms.

        It is 0 if nobody else waits, and by the forecast nobody will.
        """
        return self._price_per_ms(stay, self._stays, now_ms)

    def lane_price_per_ms(self, now_ms: float) -> float:
        """Return the most that lane time costs one of those inside, in accuracy per ms; 0 if nobody is."""
        return max((self.price_per_ms(now_ms, one) for one in self._began_ms), default=0.0)

    def lane_price(self, now_ms: float, stay: Stay) -> LanePrice:
        """Return the price at which a request that begins now chooses its setting."""
        others, (begin_ms, lanes, beside) = self._others(stay), self._lanes_for(stay, now_ms)
        share_ms = share_beside_ms(others, begin_ms, lanes, stay.need_ms, beside)
        return self._price_of(stay, share_ms, len(others), now_ms)

    def _price_of(self, stay: Stay, share_ms: float, others: int, now_ms: float) -> LanePrice:
        """Return the price for one whose share beside some others is known: also beside those who may come."""
        if self._forecast is None or not self.price.is_derived:
            return LanePrice(self.price, share_ms, stay.weight)
        begin_ms, lanes, _ = self._lanes_for(stay, now_ms)
        foreseen_ms = self._forecast.shares_ms(others, now_ms, lanes, begin_ms - now_ms)
        return LanePrice(self.price, np.minimum(share_ms, foreseen_ms), stay.weight)

    def most_ms(self, now_ms: float, stay: Stay) -> float:
        """Return how long a request that begins now may take beside those who wait; infinite for none.

        Under a derived price those keep the least that they need, and otherwise each gets as much.
        """
        waiting, (begin_ms, lanes, beside) = self._others(stay), self._lanes_for(stay, now_ms)
        if self.price.is_derived and stay.usual is not None:
            return room_beside_ms(waiting, begin_ms, lanes, beside)
        return share_beside_ms(waiting, begin_ms, lanes, 0.0, beside)

    def expect(self, stay: Stay, end: End) -> None:
        """Say when a request that is inside ends, now that its setting is chosen."""
        if stay in self._began_ms:
            self._ends[stay] = end

    def share(self, stay: Stay, need: Need) -> None:
        """Say what a request that is in flight with others still needs, now that its setting is chosen."""
        if stay in self._began_ms:
            self._needs[stay] = need

    def end(self, stay: Stay, now_ms: float) -> None:
        """Say that a request has ended, or that nobody wants its answer."""
        self._stays.remove(stay)
        self._ends.pop(stay, None)
        self._needs.pop(stay, None)
        if stay in self._began_ms:
            stayed_ms = now_ms - self._began_ms.pop(stay)
            if stayed_ms > 0:  # else it was refused
                self._recent_ms.append(stayed_ms)
        self._let_in(now_ms)

    def drain_ms(self, now_ms: float) -> float:
        """Return the time until all that are here are expected to have ended, at the pace of the last ones."""
        if self.is_shared:
            return (
                max((end_ms for end_ms, _ in self._ends_among(self._stays, now_ms).values()), default=now_ms)
                - now_ms
            )
        inside_ms = sum(now_ms - began_ms for began_ms in self._began_ms.values())
        return max(0.0, sum(self._usual_ms(one.need_ms) for one in self._stays) - inside_ms) / self._lanes

    def _usual_ms(self, unknown_ms: float) -> float:
        """Return the mean time inside of the last ones; `unknown_ms` where none has ended."""
        return sum(self._recent_ms) / len(self._recent_ms) if self._recent_ms else unknown_ms

    def _notice(self, stay: Stay) -> None:
        """Remember a request that comes, once."""
        if self._forecast is not None and stay is not self._last:
            self._forecast.came(stay.accepted_ms, stay.deadline_ms)
            self._last = stay

    def _urgency_ms(self, stay: Stay) -> float:
        return urgency_ms(self._discipline, stay.accepted_ms, stay.deadline_ms, stay.need_ms)

    def _others(self, stay: Stay) -> list[Stay]:
        """Those who wait but for one, the most urgent first."""
        return [one for one in self._outside(self._stays) if one is not stay]

    @property
    def is_shared(self) -> bool:
        """Whether requests are in flight together, and it is known how."""
        return self._device is not None and self._device.is_measured

    def _lanes_for(self, stay: Stay, now_ms: float) -> tuple[float, int, int]:
        """Return when a request's lane is free for it, the number of lanes, and that of others that are inside.

        A shared device is one lane, free when what those inside add to its work is done.
        """
        if self._device is None or not self.is_shared:
            return now_ms, self._lanes, self.running - (stay in self._began_ms)
        inside = [self._need_of(one, now_ms) for one in self._began_ms if one is not stay]
        return now_ms + self._device.work_ms(inside), 1, 0

    def _need_of(self, stay: Stay, now_ms: float) -> Need:
        """Return what one still needs beside others: as it said, else the least."""
        need_ms, found = stay.need_ms, self._needs.get(stay, stay.among)
        if stay in self._ends and stay not in self._needs:  # it is answered alone
            need_ms, found = max(0.0, self._ends[stay].expected_ms - now_ms), None
        return found or Need(need_ms, 0.0, 0, stay.deadline_ms)

    def _ends_among(self, stays: Sequence[Stay], now_ms: float) -> dict[Stay, tuple[float, Need]]:
        """Return when some, the most urgent first, have ended at the latest where all share the device.

        Also what each needs.
        """
        assert self._device is not None
        order = [*self._began_ms, *self._outside(stays)]
        needs = [self._need_of(one, now_ms) for one in order]
        return dict(zip(order, zip(self._device.ends_ms(needs, now_ms), needs, strict=True), strict=True))

    def _price_per_ms(self, stay: Stay, stays: Sequence[Stay], now_ms: float) -> float:
        """Return the price for one of some stays, the most urgent first: at its place, if it waits."""
        if stay.usual is None:
            return 0.0
        if stay in self._began_ms:
            return self.lane_price(now_ms, stay).per_ms(stay.usual)
        others = len(self._outside(stays)) - 1
        return self._price_of(stay, self._share_ms(stay, stays, now_ms), others, now_ms).per_ms(stay.usual)

    def _share_ms(self, stay: Stay, stays: Sequence[Stay], now_ms: float) -> float:
        """Return the share of the lanes' time of one that waits; infinite if no other one does."""
        begin_ms, *_ = self._lanes_for(stay, now_ms)
        free_ms = [begin_ms] if self.is_shared else [free_ms for free_ms, _ in self._free(now_ms)]
        waiting = [one for one in self._outside(stays) if one is stay or not self._is_lost(one, free_ms[0])]
        if len(waiting) == 1:
            return math.inf
        times_ms = [sum(max(0.0, one.deadline_ms - free) for free in free_ms) for one in waiting]
        return even_shares_ms(times_ms)[waiting.index(stay)]

    @staticmethod
    def _is_lost(stay: Stay, free_ms: float) -> bool:
        return not stay.runs_over and has_passed(stay.deadline_ms - free_ms, stay.need_ms)

    def _let_in(self, now_ms: float) -> None:
        seats = self._device.seats if self._device is not None and self.is_shared else self._lanes
        free = max(0, seats - self.running)
        first = self._outside(self._stays)[:free]
        if first and self._forecast is not None:
            self._forecast.began(now_ms)
        self._began_ms |= dict.fromkeys(first, now_ms)

    def _outside(self, stays: Sequence[Stay]) -> list[Stay]:
        return [stay for stay in stays if stay not in self._began_ms]

    def _late(self, stays: Sequence[Stay], now_ms: float) -> set[Stay]:
        """Return those that wait, the most urgent first, and would end after their deadlines.

        Each needs its bound once those before it have taken their expected times; what these may take longer adds
        up in squares, as independent errors do. On a shared device those inside may be late too.
        """
        if self.is_shared:
            ends = self._ends_among(stays, now_ms)
            return {one for one, (end_ms, need) in ends.items() if end_ms > need.deadline_ms}
        free = self._free(now_ms)
        late = set[Stay]()
        for stay in self._outside(stays):
            begin_ms, square = heapq.heappop(free)
            expected_ms = stay.need_ms if stay.expected_ms is None else min(stay.expected_ms, stay.need_ms)
            end_ms, square = begin_ms + expected_ms, square + (stay.need_ms - expected_ms) ** 2
            if end_ms + math.sqrt(square) > stay.deadline_ms:
                late.add(stay)
                end_ms = max(begin_ms, min(end_ms, stay.deadline_ms))  # where it is cut
            heapq.heappush(free, (end_ms, square))
        return late

    def _free(self, now_ms: float) -> list[tuple[float, float]]:
        """Return when each lane is expected to be free, and the square of how much later it may be, as a heap."""
        usual_ms, free = self._usual_ms(0.0), [(now_ms, 0.0)] * (self._lanes - self.running)
        for one, began_ms in self._began_ms.items():
            unknown_ms = began_ms + max(usual_ms, one.need_ms)
            end = self._ends.get(one, End(unknown_ms, unknown_ms))
            expected_ms, latest_ms = (max(now_ms, min(time_ms, one.deadline_ms)) for time_ms in end)
            free.append((expected_ms, max(0.0, latest_ms - expected_ms) ** 2))
        heapq.heapify(free)
        return free
