"""The door to a device: requests pass it a few at a time, the most urgent first, and their waiting counts.

Requests that compute at once slow each other down, so that none of them takes what was measured. So they wait here
for a lane instead. The next one is that whose deadline comes first; one without a deadline waits `PATIENCE_MS` at
most for those that came later. The door has no clock: it compares the times that it is given, all of one clock.
Each change wakes the one thread whose turn it is: woken all at once, those who wait would take Python's lock from
the thread that feeds the device.

Whoever is inside can ask how long it may stay, so that those who wait keep their deadlines too: each of them gets
the same share of the time until the latest moment at which all before it must have ended.

A server asks its `Schedule` before it lets a request line up:

    admit ── too many wait, or somebody would be late ──> refused, with the time after which to ask again
      │
      └──> waits, the most urgent first ──> a lane is free: began ──> end, which the next one begins at

It also says what the time of those who wait is worth (`control/price.py`), and refuses whoever would gain less. To
have admitted is a promise once a tenth of the budget has passed: then nobody is refused for another one's sake.
"""

from __future__ import annotations

import heapq
import itertools
import math
import os
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Literal, NamedTuple, get_args

import numpy as np

from tempovlm.control.forecast import Forecast
from tempovlm.control.price import ROUNDING, Envelope, LanePrice, Price
from tempovlm.control.select import Floats
from tempovlm.control.shares import even_shares_ms, has_passed, room_beside_ms, share_beside_ms
from tempovlm.core.errors import UserError

PATIENCE_MS = 10_000.0
"""A request without a deadline is taken as if it had one that far in the future."""

MOST_WAITING = 256
"""Requests that may wait; another one is refused."""

LOOK_S = 0.002
"""Time between two looks at whether the first request that waits is over, seconds; the one at place `i` (from 0)
looks `i + 1` times more seldom, so that a long queue does not take the processor from whoever is inside."""

RECENT_STAYS = 8
"""Ended requests whose times say how long those stay that are inside."""

AT_ONCE = 0.1
"""Share of the budget within which a refusal counts as told at once. Whoever has waited longer was promised an
answer in time: it is refused only where it would be late."""


def is_at_once(waited_ms: float, budget_ms: float) -> bool:
    """Whether a request that is refused now is told at once; a budget counts as `PATIENCE_MS` at most."""
    return waited_ms <= AT_ONCE * min(budget_ms, PATIENCE_MS)


Discipline = Literal["edf", "fcfs", "slack"]
"""Order of service: the earliest deadline first, first come first served, or the least slack first."""

DISCIPLINES: tuple[Discipline, ...] = get_args(Discipline)


def urgency_ms(discipline: Discipline, accepted_ms: float, deadline_ms: float, need_ms: float) -> float:
    """Return the time by which requests are let in, lowest first; all on one clock.

    Args:
        discipline: `edf` goes by the deadline, `fcfs` by when a request came, `slack` by the latest moment at
            which it can begin.
        accepted_ms: when it came.
        deadline_ms: when it must have ended; one later than `PATIENCE_MS` after it came counts as that.
        need_ms: the time inside that it is expected to need at least.
    """
    if discipline == "fcfs":
        return accepted_ms
    due_ms = min(deadline_ms, accepted_ms + PATIENCE_MS)
    return due_ms - need_ms if discipline == "slack" else due_ms


def check_waiting(count: int, most: int = MOST_WAITING) -> None:
    """Raise a `UserError` if `count` requests wait, and no more than `most` may."""
    if count >= most:
        raise UserError(f"{count} requests wait for this model; ask again later, or ask fewer at once")


class End(NamedTuple):
    """The time at which a request that is inside ends: as expected, and at the latest, if others want its time."""

    expected_ms: float
    latest_ms: float


@dataclass(eq=False, slots=True)
class Ticket:
    """One request's place at the door.

    Attributes:
        accepted_ms: when it came. deadline_ms: when it must have ended; infinite without a deadline.
        urgency: the order in which tickets are let in, lowest first.
        turn: notified, with the door's lock held, when the ticket may be let in.
        runs_over: whether it takes its time even if it cannot be in time.
        need_ms: the time inside that it is expected to need at least.
    """

    accepted_ms: float
    deadline_ms: float
    urgency: tuple[float, int]
    turn: threading.Condition
    runs_over: bool = True
    need_ms: float = 0.0
    thread: int = field(default_factory=threading.get_ident)


class Door:
    """Lets requests through to a device.

    Attributes:
        lanes: how many are inside at once. discipline: who is let in first, of those that line up from then on.
        forecast: of a server's requests, which its schedule keeps; None has nobody expected.
    """

    forecast: Forecast | None = None

    def __init__(self, lanes: int = 1, most_waiting: int = MOST_WAITING, discipline: Discipline = "edf") -> None:
        """Let `lanes` requests in at once, by a discipline."""
        self.lanes, self._most_waiting, self.discipline = lanes, most_waiting, discipline
        self._numbers = itertools.count()
        self._begin()

    def _begin(self) -> None:
        self._process = os.getpid()
        self._lock = threading.RLock()
        self._waiting: list[Ticket] = []
        self._inside: dict[int, int] = {}
        self._ends: dict[int, End] = {}

    def __reduce__(self) -> tuple[Callable[..., Door], tuple[int, int, Discipline]]:
        """A new door: a copy of a model is asked by others."""
        return Door, (self.lanes, self._most_waiting, self.discipline)

    @property
    def waiting(self) -> int:
        """Requests that wait."""
        return len(self._waiting)

    @property
    def is_inside(self) -> bool:
        """Whether this thread is inside."""
        return threading.get_ident() in self._inside

    def strangers(self, thread: int | None) -> int:
        """Return how many threads but this one are inside or wait."""
        with self._lock:
            return len({*self._inside, *(one.thread for one in self._waiting)} - {thread})

    @property
    def is_busy(self) -> bool:
        """Whether anybody is inside or waits."""
        return bool(self._inside or self._waiting)

    def line_up(
        self, accepted_ms: float, deadline_ms: float = math.inf, need_ms: float = 0.0, *, runs_over: bool = True
    ) -> Ticket:
        """Take a place at the door, which `enter` waits at; `leave` gives it up.

        Args:
            accepted_ms: when the request came.
            deadline_ms: when it must have ended.
            need_ms: the time inside that it is expected to need at least.
            runs_over: whether it is answered even if it cannot be in time.

        Raises:
            UserError: too many wait.
        """
        if self._process != os.getpid():  # a fork's child: those who waited live on in the parent alone
            self._begin()
        with self._lock:
            check_waiting(len(self._waiting), self._most_waiting)
            urgency = (urgency_ms(self.discipline, accepted_ms, deadline_ms, need_ms), next(self._numbers))
            turn = threading.Condition(self._lock)
            ticket = Ticket(accepted_ms, deadline_ms, urgency, turn, runs_over, need_ms)
            self._waiting.append(ticket)
            self._waiting.sort(key=lambda one: one.urgency)
            return ticket

    def leave(self, tickets: Sequence[Ticket]) -> None:
        """Give up places that were not used."""
        with self._lock:
            self._waiting = [one for one in self._waiting if one not in tickets]
            self._call()

    @contextmanager
    def enter(self, ticket: Ticket, is_over: Callable[[], bool] | None = None) -> Iterator[bool]:
        """Wait for the ticket's turn, and be inside while the block runs; whoever is inside enters at once.

        Yields:
            True; False, outside and without a lane, where `is_over`, asked again and again, ended the waiting.
        """
        me, is_waiting = threading.get_ident(), True
        with self._lock:
            try:
                while is_waiting and not self._may_enter(ticket, me):
                    place = self._waiting.index(ticket)
                    ticket.turn.wait(None if is_over is None else LOOK_S * (place + 1))
                    is_waiting = is_over is None or not is_over()
                if is_waiting:
                    self._inside[me] = self._inside.get(me, 0) + 1
            finally:
                self._waiting.remove(ticket)
                self._call()
        if not is_waiting:
            yield False
            return
        try:
            yield True
        finally:
            with self._lock:
                self._inside[me] -= 1
                if not self._inside[me]:
                    del self._inside[me]
                    self._ends.pop(me, None)
                self._call()

    def _call(self) -> None:
        """Wake the thread whose turn it is, if there is a lane; of its tickets, the one that it waits with."""
        if self._waiting and len(self._inside) < self.lanes:
            first = self._waiting[0].thread
            for ticket in itertools.takewhile(lambda one: one.thread == first, self._waiting):
                ticket.turn.notify()

    def _may_enter(self, ticket: Ticket, thread: int) -> bool:
        if thread in self._inside:
            return True
        ahead = next(one for one in self._waiting if one is ticket or self._is_elsewhere(one, thread))
        return ahead is ticket and len(self._inside) < self.lanes

    @staticmethod
    def _is_elsewhere(ticket: Ticket, thread: int) -> bool:
        """Whether another thread waits with a ticket; of its own tickets a thread uses them as it likes."""
        return ticket.thread != thread

    def share_ms(self, now_ms: float, least_ms: float = 0.0) -> float:
        """Return how long a request that begins now may take so that all who wait get as much."""
        with self._lock:
            return share_beside_ms(self._waiting, now_ms, self.lanes, least_ms, max(0, len(self._inside) - 1))

    def shares_ms(self, now_ms: float, least_ms: float = 0.0) -> float | Floats:
        """Return `share_ms`, or with a forecast (S,) its value in each scenario of who may come."""
        share_ms = self.share_ms(now_ms, least_ms)
        if self.forecast is None:
            return share_ms
        return np.minimum(share_ms, self.forecast.shares_ms(self.waiting, now_ms, self.lanes))

    def room_ms(self, now_ms: float) -> float:
        """Return how long a request that begins now may take so that all who wait can still be answered."""
        with self._lock:
            return room_beside_ms(self._waiting, now_ms, self.lanes, max(0, len(self._inside) - 1))

    def expect(self, end: End) -> None:
        """Say when this thread, which is inside, ends."""
        with self._lock:
            self._ends[threading.get_ident()] = end

    def ends(self) -> dict[int, End]:
        """Return when threads that are inside end, as far as they said so."""
        with self._lock:
            return dict(self._ends)


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
    ) -> None:
        """Admit requests to a door.

        Args:
            lanes: of the door.
            most_waiting: the most that wait.
            most_of_owner: the most of one owner that wait.
            discipline: of the door.
            price: of lane time; derived by default.
            forecast: remembers all who come, admitted or not; None has nobody expected.
        """
        self._forecast = forecast
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
        others = self._others(stay)
        share_ms = share_beside_ms(others, now_ms, self._lanes, stay.need_ms, self._beside(stay))
        return self._price_of(stay, share_ms, len(others), now_ms)

    def _price_of(self, stay: Stay, share_ms: float, others: int, now_ms: float) -> LanePrice:
        """Return the price for one whose share beside some others is known: also beside those who may come."""
        if self._forecast is None or not self.price.is_derived:
            return LanePrice(self.price, share_ms, stay.weight)
        foreseen_ms = self._forecast.shares_ms(others, now_ms, self._lanes)
        return LanePrice(self.price, np.minimum(share_ms, foreseen_ms), stay.weight)

    def most_ms(self, now_ms: float, stay: Stay) -> float:
        """Return how long a request that begins now may take beside those who wait; infinite for none.

        Under a derived price those keep the least that they need, and otherwise each gets as much.
        """
        waiting, beside = self._others(stay), self._beside(stay)
        if self.price.is_derived and stay.usual is not None:
            return room_beside_ms(waiting, now_ms, self._lanes, beside)
        return share_beside_ms(waiting, now_ms, self._lanes, 0.0, beside)

    def expect(self, stay: Stay, end: End) -> None:
        """Say when a request that is inside ends, now that its setting is chosen."""
        if stay in self._began_ms:
            self._ends[stay] = end

    def end(self, stay: Stay, now_ms: float) -> None:
        """Say that a request has ended, or that nobody wants its answer."""
        self._stays.remove(stay)
        self._ends.pop(stay, None)
        if stay in self._began_ms:
            stayed_ms = now_ms - self._began_ms.pop(stay)
            if stayed_ms > 0:  # else it was refused
                self._recent_ms.append(stayed_ms)
        self._let_in(now_ms)

    def drain_ms(self, now_ms: float) -> float:
        """Return the time until all that are here are expected to have ended, at the pace of the last ones."""
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

    def _beside(self, stay: Stay) -> int:
        """Return the number of others that are inside."""
        return self.running - (stay in self._began_ms)

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
        free_ms = [free_ms for free_ms, _ in self._free(now_ms)]
        waiting = [one for one in self._outside(stays) if one is stay or not self._is_lost(one, free_ms[0])]
        if len(waiting) == 1:
            return math.inf
        times_ms = [sum(max(0.0, one.deadline_ms - free) for free in free_ms) for one in waiting]
        return even_shares_ms(times_ms)[waiting.index(stay)]

    @staticmethod
    def _is_lost(stay: Stay, free_ms: float) -> bool:
        return not stay.runs_over and has_passed(stay.deadline_ms - free_ms, stay.need_ms)

    def _let_in(self, now_ms: float) -> None:
        free = self._lanes - self.running
        first = self._outside(self._stays)[:free]
        if first and self._forecast is not None:
            self._forecast.began(now_ms)
        self._began_ms |= dict.fromkeys(first, now_ms)

    def _outside(self, stays: Sequence[Stay]) -> list[Stay]:
        return [stay for stay in stays if stay not in self._began_ms]

    def _late(self, stays: Sequence[Stay], now_ms: float) -> set[Stay]:
        """Return those that wait, the most urgent first, and would end after their deadlines.

        Each needs its bound once those before it have taken their expected times; what these may take longer adds
        up in squares, as independent errors do.
        """
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
