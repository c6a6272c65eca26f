"""Ends a request before its time: at its deadline where it asked for that, or when its caller cancels it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

from tempovlm.core.request import Request
from tempovlm.latency.clock import StageClock

Tick = Callable[[], None]
"""Called between pieces of work; raises `Interrupted` where the rest is not wanted."""


class Interrupted(Exception):  # noqa: N818 - no error
    """The request is over before its first token.

    Attributes:
        reason: why. stage: the stage in which it ended.
    """

    def __init__(self, reason: Literal["deadline", "cancelled", "rejected"], stage: str) -> None:
        super().__init__(reason)
        self.reason, self.stage = reason, stage


class Watch:
    """Looks at the clock and asks the caller, for one request; costs nothing where neither can end it."""

    def __init__(self, request: Request, clock: StageClock, cancel: Callable[[], bool] | None) -> None:
        """Watch a request; `cancel` says True where its answer is not wanted any more."""
        self._clock, self._cancel = clock, cancel
        self._stops_at_ms = request.budget_ms if request.on_deadline == "stop" else None

    def reason(self, needs_ms: float = 0.0) -> Literal["deadline", "cancelled"] | None:
        """Say why the request ends before work of `needs_ms`; None where it goes on."""
        if self._cancel is not None and self._cancel():
            return "cancelled"
        if self._stops_at_ms is not None and self._clock.elapsed_ms() + needs_ms > self._stops_at_ms:
            return "deadline"
        return None

    def check(self, stage: str) -> None:
        """Raise `Interrupted` where the request ends before or within a stage."""
        reason = self.reason()
        if reason is not None:
            raise Interrupted(reason, stage)

    def ticks(self, stage: str) -> Tick | None:
        """A check for between the blocks of a stage; None where nothing can end the request there."""
        if self._cancel is None and self._stops_at_ms is None:
            return None
        return lambda: self.check(stage)
