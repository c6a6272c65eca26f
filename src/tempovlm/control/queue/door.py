"""The door to a device: requests pass it a few at a time, the most urgent first, and their waiting counts.

Requests that compute at once slow each other down, so that none of them takes what was measured. So they wait here
for a lane instead. The next one is that whose deadline comes first; one without a deadline waits `PATIENCE_MS` at
most for those that came later. The door has no clock: it compares the times that it is given, all of one clock.
Each change wakes the one thread whose turn it is: woken all at once, those who wait would take Python's lock from
the thread that feeds the device.

Whoever is inside can ask how long it may stay, so that those who wait keep their deadlines too: each of them gets
the same share of the time until the latest moment at which all before it must have ended.
"""

from __future__ import annotations

import itertools
import math
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from tempovlm.control.forecast import Forecast
from tempovlm.control.select import Floats
from tempovlm.control.shares import Discipline, room_beside_ms, share_beside_ms, urgency_ms
from tempovlm.core.errors import UserError

MOST_WAITING = 256
"""Requests that may wait; another one is refused."""

LOOK_S = 0.002
"""Time between two looks at whether the first request that waits is over, seconds; the one at place `i` (from 0)
looks `i + 1` times more seldom, so that a long queue does not take the processor from whoever is inside."""


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
        outer: another door, before which those wait that come to this one later; their time counts here too.
    """

    forecast: Forecast | None = None

    def __init__(
        self,
        lanes: int = 1,
        most_waiting: int = MOST_WAITING,
        discipline: Discipline = "edf",
        outer: Door | None = None,
    ) -> None:
        """Let `lanes` requests in at once, by a discipline."""
        self.outer = outer
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

    def _all_waiting(self) -> list[Ticket]:
        """Return those who wait here or at the outer door, the most urgent first."""
        if self.outer is None or not self.outer.waiting:
            return self._waiting
        with self.outer._lock:
            return sorted([*self._waiting, *self.outer._waiting], key=lambda one: one.urgency)

    def share_ms(self, now_ms: float, least_ms: float = 0.0) -> float:
        """Return how long a request that begins now may take so that all who wait get as much."""
        with self._lock:
            beside = max(0, len(self._inside) - 1)
            return share_beside_ms(self._all_waiting(), now_ms, self.lanes, least_ms, beside)

    def shares_ms(self, now_ms: float, least_ms: float = 0.0, ahead_ms: float = 0.0) -> float | Floats:
        """Return `share_ms` after work of others; with a forecast (S,) in each scenario of who may come."""
        share_ms = self.share_ms(now_ms + ahead_ms, least_ms)
        if self.forecast is None:
            return share_ms
        waiting = len(self._all_waiting())
        return np.minimum(share_ms, self.forecast.shares_ms(waiting, now_ms, self.lanes, ahead_ms))

    def room_ms(self, now_ms: float) -> float:
        """Return how long a request that begins now may take so that all who wait can still be answered."""
        with self._lock:
            return room_beside_ms(self._all_waiting(), now_ms, self.lanes, max(0, len(self._inside) - 1))

    def expect(self, end: End) -> None:
        """Say when this thread, which is inside, ends."""
        with self._lock:
            self._ends[threading.get_ident()] = end

    def ends(self) -> dict[int, End]:
        """Return when threads that are inside end, as far as they said so."""
        with self._lock:
            return dict(self._ends)
