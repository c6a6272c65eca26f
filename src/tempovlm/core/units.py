"""Conversions between units of time. All other code uses milliseconds, in names that end in `_ms`."""

from __future__ import annotations

import time
from datetime import UTC, datetime, timedelta


def s_from_ms(duration_ms: float) -> float:
    """Convert milliseconds to seconds."""
    return duration_ms * 1e-3


def now_ms() -> float:
    """Return a monotonic clock in milliseconds; only differences have a meaning."""
    return time.perf_counter_ns() * 1e-6


def wall_clock(at_ms: float) -> datetime:
    """Return the date and time, in UTC, of a moment of the monotonic clock."""
    return datetime.now(UTC) - timedelta(milliseconds=now_ms() - at_ms)
