"""Gives memory of large bodies and pictures back: the C library keeps several times what a queue holds."""

from __future__ import annotations

import ctypes
import threading

LARGE_BYTES = 1_000_000
"""Smaller blocks are used again soon."""

TRIM_BYTES = 32_000_000
"""Bytes after which freed memory is given back; each time takes some milliseconds, beside the loop."""


_ARENA_MAX = -8
"""Number of the option M_ARENA_MAX in malloc.h."""

_ARENAS = 2


def share_arenas() -> None:
    """Let threads share their heaps from now on: with heaps of their own, each that waits holds some megabytes."""
    set_option = getattr(ctypes.CDLL(None), "mallopt", None)  # of glibc alone
    if set_option is not None:
        set_option(_ARENA_MAX, _ARENAS)


class Trim:
    """Counts bytes that were freed, from any thread."""

    def __init__(self) -> None:
        self._trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # of glibc alone
        self._lock, self._bytes = threading.Lock(), 0

    def count(self, num_bytes: int) -> None:
        """Count a body or a picture's pixels that are not needed any more; now and then give memory back."""
        if num_bytes < LARGE_BYTES:
            return
        with self._lock:
            self._bytes += num_bytes
            is_due = self._bytes >= TRIM_BYTES
            if is_due:
                self._bytes = 0
        if is_due and self._trim is not None:
            self._trim(0)
