"""Counts the cores that are free: two threads beside a busy process are slower than one that waits for nobody."""

from __future__ import annotations

import os

from tempovlm.core.units import now_ms
from tempovlm.engine.threads import cpus

_LOAD = "/proc/loadavg"

APART_MS = 1.0
"""Least time between two looks."""


class FreeCores:
    """Looks, at each stage, at how many threads of all processes run or want to.

    A process that runs for a moment is no neighbour: two looks, a millisecond apart, must see it. Where the count
    says nothing of the cores that this process may use, or cannot be read, all are free.
    """

    def __init__(self) -> None:
        self.count = self._before = self._now = cpus()
        self._looked_ms = 0.0
        try:
            self._file = os.open(_LOAD, os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            self._file = -1
        if self.count != os.cpu_count():
            self.close()

    def close(self) -> None:
        """Look no more."""
        if self._file >= 0:
            os.close(self._file)
        self._file = -1

    __del__ = close

    def look(self) -> int:
        """Return the cores that the caller may fill, itself counted; at least one."""
        if self._file < 0:
            return self.count
        if (time_ms := now_ms()) >= self._looked_ms + APART_MS:
            try:
                running = running_in(os.pread(self._file, 128, 0))
            except OSError:
                self.close()
                return self.count
            self._before, self._now, self._looked_ms = self._now, self.count - (running - 1), time_ms
        return max(1, self._before, self._now)


def running_in(load: bytes) -> int:
    """Return the threads that run or want to, the caller among them, from the fourth field of `/proc/loadavg`.

    A count of none, as some containers give it, says that the caller runs alone.
    """
    fields = load.split()
    count = fields[3].partition(b"/")[0] if len(fields) > 3 else b""
    return max(1, int(count)) if count.isdigit() else 1
