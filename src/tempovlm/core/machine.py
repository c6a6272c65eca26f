"""Keep measurements of several processes apart, and detect whether others use the machine."""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

from tempovlm.core.paths import cache_dir
from tempovlm.core.units import s_from_ms

BUSY_CORES = 0.25
"""A machine counts as busy if others use at least this many cores."""

SAMPLE_MS = 200.0
"""For how long the load is sampled."""

_log = logging.getLogger("tempovlm")


@contextlib.contextmanager
def machine_lock() -> Iterator[bool]:
    """Hold the machine's lock for measurements.

    The system frees the lock when its holder ends, however it ends. Waiting for another process is logged.

    Yields:
        Whether another process held it before.
    """
    with _lock_file() as file:
        waited = False
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            waited = True
            _log.warning("another process is measuring this machine; waiting for it to end")
            fcntl.flock(file, fcntl.LOCK_EX)
        try:
            yield waited
        finally:
            # A child that was forked meanwhile has the file open too: closing it here would not release the
            # lock.
            fcntl.flock(file, fcntl.LOCK_UN)


def _lock_file() -> TextIO:
    """Return a file in the cache directory, or in the system's temporary one if that is read-only."""
    name = "machine.lock"
    try:
        cache_dir().mkdir(parents=True, exist_ok=True)
        return (cache_dir() / name).open("a")
    except OSError:
        return (Path(tempfile.gettempdir()) / f"tempovlm-{os.getuid()}-{name}").open("a")


def busy_cores(sample_ms: float = SAMPLE_MS) -> float | None:
    """Count the cores that others use while this process sleeps; None if the system does not tell."""
    before = _busy_ticks()
    if before is None:
        return None
    start = time.perf_counter()
    time.sleep(s_from_ms(sample_ms))
    after, passed = _busy_ticks(), time.perf_counter() - start
    if after is None:
        return None
    return max(after - before, 0) / (passed * os.sysconf("SC_CLK_TCK"))


def warn_if_busy(consequence: str) -> float | None:
    """Check the load and, if others use the machine, log a warning that ends with `consequence`.

    Returns:
        The cores that others use; None if the system does not tell.
    """
    busy = busy_cores()
    if busy is not None and busy >= BUSY_CORES:
        _log.warning("the machine is busy: others use %.1f cores; %s", busy, consequence)
    return busy


def _busy_ticks() -> int | None:
    """Return the busy ticks of this process's processors, from the kernel's counters."""
    try:
        lines = Path("/proc/stat").read_text().splitlines()
        ours = {f"cpu{cpu}" for cpu in os.sched_getaffinity(0)}
    except (OSError, AttributeError):
        return None
    rows = [line.split() for line in lines]
    # Columns: user nice system idle iowait irq softirq steal; guests are counted in user already.
    return sum(int(t) for row in rows if row[0] in ours for t in (*row[1:4], *row[6:9]))
