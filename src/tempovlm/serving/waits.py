"""Tells since when what an event loop handles has waited for it: in a burst longer than the rest of the way in.

While the loop handles some requests, the bytes of others lie in their sockets. Their budgets run: a client counts
from when it sent them. When they came is not told, but it was not before the loop looked last.
"""

from __future__ import annotations

import asyncio
import selectors
from typing import Any

from tempovlm.core.units import now_ms

AT_ONCE_MS = 0.1
"""A look at the sockets that takes longer waited until something came."""


class Lag:
    """Follows a loop's looks at its sockets; it has no clock.

    Attributes:
        since_ms: the time before which nothing came of what is handled now.
    """

    def __init__(self, time_ms: float) -> None:
        self.since_ms = self._handling_ms = time_ms

    def looked(self, begin_ms: float, end_ms: float) -> None:
        """Take a look from `begin_ms` to `end_ms`: what it finds at once came while others were handled."""
        self.since_ms = end_ms if end_ms - begin_ms > AT_ONCE_MS else self._handling_ms
        self._handling_ms = end_ms


class _Selector(selectors.DefaultSelector):
    """Tells a `Lag` of each look."""

    def __init__(self) -> None:
        super().__init__()
        self.lag = Lag(now_ms())

    def select(self, *given: Any, **named: Any) -> list[tuple[selectors.SelectorKey, int]]:
        """Wait for events."""
        begin_ms = now_ms()
        events = super().select(*given, **named)
        self.lag.looked(begin_ms, now_ms())
        return events


class WatchedLoop(asyncio.SelectorEventLoop):
    """An event loop that knows since when what it handles may have waited.

    Attributes:
        lag: of its looks at its sockets.
    """

    def __init__(self) -> None:
        selector = _Selector()
        self.lag = selector.lag
        super().__init__(selector)


def ready_since_ms(loop: Any) -> float:
    """Return since when what a loop handles now may have waited; now, where the loop does not know."""
    return loop.lag.since_ms if isinstance(loop, WatchedLoop) else now_ms()
