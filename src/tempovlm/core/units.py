"""Conversions between units of time. All other code uses milliseconds, in names that end in `_ms`."""

from __future__ import annotations

import time


def s_from_ms(duration_ms: float) -> float:
    """Convert milliseconds to seconds."""
    return duration_ms * 1e-3


def now_ms() -> float:
    """Return a monotonic clock in milliseconds; only differences have a meaning."""
    return time.perf_counter_ns() * 1e-6
