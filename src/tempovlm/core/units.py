"""Conversions between units of time. Everywhere else time is milliseconds, in names that end in `_ms`."""

from __future__ import annotations

import time


def s_from_ms(duration_ms: float) -> float:
    """Milliseconds to seconds."""
    return duration_ms * 1e-3


def now_ms() -> float:
    """A monotonic clock in milliseconds; only differences mean anything."""
    return time.perf_counter_ns() * 1e-6
