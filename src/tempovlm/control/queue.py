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

from tempovlm.core.errors import UserError

PATIENCE_MS = 10_000.0
"""A request without a deadline is taken as if it had one that far in the future."""

MOST_WAITING = 256
"""Requests that may wait; another one is refused."""

LOOK_S = 0.002
"""Time between two looks at whether a request that waits is over, seconds."""


def check_waiting(count: int, most: int = MOST_WAITING) -> None:
    """Raise a `UserError` if `count` requests wait, and no more than `most` may."""
    if count >= most:
        raise UserError(f"{count} requests wait for this model; ask again later, or ask fewer at once")


@dataclass(eq=False, slots=True)
class Ticket:
    """One request's place at the door.

    Attributes:
        accepted_ms: when it came. deadline_ms: when it must have ended; infinite without a deadline.
        urgency: the order in which tickets are let in, lowest first.
        turn: notified, with the door's lock held, when the ticket may be let in.
    """

    accepted_ms: float
    deadline_ms: float
    urgency: tuple[float, int]
    turn: threading.Condition
    thread: int = field(default_factory=threading.get_ident)


class Door:
    """Lets requests through to a device."""

    def __init__(self, lanes: int = 1, most_waiting: int = MOST_WAITING) -> None:
        """Let `lanes` requests in at once."""
        self.lanes, self._most_waiting = lanes, most_waiting
        self._numbers = itertools.count()
        self._begin()

    def _begin(self) -> None:
        self._process = os.getpid()
        self._lock = threading.RLock()
        self._waiting: list[Ticket] = []
        self._inside: dict[int, int] = {}

    def __reduce__(self) -> tuple[Callable[..., Door], tuple[int, int]]:
        """A new door: a copy of a model is asked by others."""
        return Door, (self.lanes, self._most_waiting)

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

    def line_up(self, accepted_ms: float, deadline_ms: float = math.inf) -> Ticket:
        """Take a place at the door, which `enter` waits at; `leave` gives it up.

        Args:
            accepted_ms: when the request came.
            deadline_ms: when it must have ended.

        Raises:
            UserError: too many wait.
        """
        if self._process != os.getpid():  # a fork's child: those who waited live on in the parent alone
            self._begin()
        with self._lock:
            check_waiting(len(self._waiting), self._most_waiting)
            urgency = (min(deadline_ms, accepted_ms + PATIENCE_MS), next(self._numbers))
            ticket = Ticket(accepted_ms, deadline_ms, urgency, threading.Condition(self._lock))
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
            True; False, outside and without a lane, where `is_over`, asked every `LOOK_S`, ended the waiting.
        """
        me, is_waiting = threading.get_ident(), True
        with self._lock:
            try:
                while is_waiting and not self._may_enter(ticket, me):
                    ticket.turn.wait(None if is_over is None else LOOK_S)
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

    def share_ms(self, now_ms: float) -> float:
        """Return how long a request may take so that all who wait keep their deadlines; infinite for none.

        With `n` lanes, the request that waits at place `i` (from 0) runs in turn `i // n + 1` after this one, and
        every turn gets the same time.
        """
        waiting = list(self._waiting)
        shares = [
            (one.deadline_ms - now_ms) / (place // self.lanes + 2)
            for place, one in enumerate(waiting)
            if one.deadline_ms > now_ms
        ]
        return min(shares, default=math.inf)
