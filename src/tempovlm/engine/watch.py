"""Ends a request before its time: at its deadline where it asked for that, or when its caller cancels it."""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Literal

from tempovlm.core.request import Request
from tempovlm.core.units import now_ms

Tick = Callable[[], None]
"""Called between pieces of work; raises `Interrupted` where the rest is not wanted."""

RECENT = 16
"""Times of a kind of piece that are remembered."""


class Interrupted(Exception):  # noqa: N818 - no error
    """The request is over before its first token.

    Attributes:
        reason: why. stage: the stage in which it ended.
    """

    def __init__(self, reason: Literal["deadline", "cancelled", "rejected"], stage: str) -> None:
        super().__init__(reason)
        self.reason, self.stage = reason, stage


class Pieces:
    """Recent times of pieces of work, by stage and size: the least of them is what a piece takes at least."""

    def __init__(self) -> None:
        self._recent_ms: defaultdict[tuple[str, int], deque[float]] = defaultdict(lambda: deque(maxlen=RECENT))

    def __reduce__(self) -> tuple[type[Pieces], tuple[()]]:
        """A new record: a copy of a model may run elsewhere."""
        return Pieces, ()

    def add(self, stage: str, size: int, took_ms: float) -> None:
        """Remember the time of a piece."""
        self._recent_ms[stage, size].append(took_ms)

    def least_ms(self, stage: str, size: int) -> float:
        """Return the least recent time of such a piece; 0 for an unknown one."""
        return min(self._recent_ms.get((stage, size), ()), default=0.0)


class Watch:
    """Looks at the clock and asks the caller, for one request; costs nothing where neither can end it.

    A piece of work that is known to end after the deadline does not begin.
    """

    def __init__(
        self, request: Request, accepted_ms: float, pieces: Pieces, cancel: Callable[[], bool] | None = None
    ) -> None:
        """Watch a request accepted at `accepted_ms`; `cancel` says True where its answer is not wanted."""
        self.accepted_ms, self._pieces, self._cancel = accepted_ms, pieces, cancel
        self._stops_at_ms = request.budget_ms if request.on_deadline == "stop" else None
        self._elapsed_ms: Callable[[], float] = lambda: now_ms() - accepted_ms

    def go_by(self, elapsed_ms: Callable[[], float]) -> None:
        """Read the time since acceptance from a device's clock from now on."""
        self._elapsed_ms = elapsed_ms

    @property
    def is_idle(self) -> bool:
        """Whether nothing can end the request."""
        return self._cancel is None and self._stops_at_ms is None

    def reason(self, needs_ms: float = 0.0) -> Literal["deadline", "cancelled"] | None:
        """Say why the request ends before work of `needs_ms`; None where it goes on."""
        if self._cancel is not None and self._cancel():
            return "cancelled"
        if self._stops_at_ms is not None and self._elapsed_ms() + needs_ms > self._stops_at_ms:
            return "deadline"
        return None

    def check(self, stage: str, needs_ms: float = 0.0) -> None:
        """Raise `Interrupted` where the request ends before work of `needs_ms` in a stage."""
        reason = self.reason(needs_ms)
        if reason is not None:
            raise Interrupted(reason, stage)

    @contextmanager
    def piece(self, stage: str, size: int = 0) -> Iterator[None]:
        """Context of a piece of work of a size; it does not begin where the request ends before or within it."""
        self.check(stage, self._pieces.least_ms(stage, size))
        start_ms = now_ms()
        yield
        self._pieces.add(stage, size, now_ms() - start_ms)

    def ticks(self, stage: str, size: int = 0) -> Tick | None:
        """A check for between the like pieces of a stage; None where nothing can end the request there."""
        return None if self.is_idle else partial(next, self._ticking(f"{stage} block", stage, size))

    def _ticking(self, name: str, stage: str, size: int) -> Iterator[None]:
        """Check at each step, at which a piece begins and the one before it, if any, ends."""
        self.check(stage, self._pieces.least_ms(name, size))
        start_ms = now_ms()
        while True:
            yield
            took_ms = now_ms() - start_ms
            self._pieces.add(name, size, took_ms)
            self.check(stage, took_ms)
            start_ms = now_ms()
