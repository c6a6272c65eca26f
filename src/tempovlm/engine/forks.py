"""Keep a process that has computed usable after a fork, and detect children that cannot compute.

Only the thread that forks lives on in the child. OpenMP's workers are gone there, but libgomp
still waits for them (https://github.com/pytorch/pytorch/issues/17199), so they are ended before a fork, and
parent and child start new ones when needed: OpenMP 5.0, 3.2.44, `omp_pause_resource_all`. If that
is impossible, the child computes on one thread, which waits for no other. If another thread was computing at that
moment, it may have left a library's lock closed for ever, and CUDA does not work in a child; both raise an error.

Imports no torch.
"""

from __future__ import annotations

import ctypes
import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tempovlm.core.errors import UserError

_SOFT = 1  # OpenMP's name of the pause that keeps the user's settings
_NEVER_STARTED_A_PROGRAM = 0x40  # Linux's PF_FORKNOEXEC, among the flags of a process

_BUSY = (
    "this process was forked while another thread was computing, which can leave locks closed for ever; fork when "
    "none is, or start the process by spawn and load the model there"
)


NO_CUDA_IN_CHILD = "CUDA does not work in a process forked after it was used; start it by spawn and load there"


class Forks:
    """Follows the forks of this process from its creation on.

    Attributes:
        one_thread: True if a fork may have lost OpenMP's workers, so that only one thread can compute.
    """

    def __init__(self) -> None:
        # A child of a process that imported torch, but not this module, may have lost them already.
        self.one_thread = "torch" in sys.modules and _is_forked()
        self._is_paused = False
        self._computing: dict[int, int] = {}
        self._refusal: str | None = None
        os.register_at_fork(before=self._before, after_in_parent=self._after, after_in_child=self._begin_child)

    def check(self) -> None:
        """Raise a `UserError` if this process cannot compute."""
        if self._refusal is not None:
            raise UserError(self._refusal)

    @contextmanager
    def computing(self) -> Iterator[None]:
        """Mark work that a fork by another thread would interrupt.

        Raises:
            UserError: this process cannot compute.
        """
        self.check()
        me = threading.get_ident()
        depth = self._computing.get(me, 0)
        self._computing[me] = depth + 1
        try:
            yield
        finally:
            if depth:
                self._computing[me] = depth
            else:
                self._computing.pop(me, None)

    def others_compute(self) -> bool:
        """Whether another thread is computing."""
        me = threading.get_ident()
        return any(thread != me for thread in list(self._computing))

    def threads(self, count: int) -> int:
        """Return the number of threads asked for, or 1 if only one can compute."""
        return 1 if self.one_thread else count

    def _before(self) -> None:
        self._is_paused = not self.one_thread and _pause()

    def _after(self) -> None:
        self._is_paused = False

    def _begin_child(self) -> None:
        me = threading.get_ident()
        if self.others_compute():
            self._refusal = _BUSY
        self._computing = {thread: depth for thread, depth in self._computing.items() if thread == me}
        if "torch" in sys.modules and not self._is_paused:
            self.one_thread = True
        self._is_paused = False


def _pause() -> bool:
    """End the OpenMP workers of this thread; return whether none can be waited for any more."""
    if "torch" not in sys.modules:
        return True
    try:
        lines = Path("/proc/self/maps").read_text(encoding="utf-8", errors="surrogateescape").splitlines()
        names = {line.split(maxsplit=5)[5] for line in lines if "libgomp" in line.rpartition("/")[2]}
        return bool(names) and all(ctypes.CDLL(name).omp_pause_resource_all(_SOFT) == 0 for name in names)
    except (OSError, AttributeError):
        return False


def _is_forked() -> bool:
    """Whether this process came out of a fork and has started no program since; False if unknown."""
    try:
        fields = Path("/proc/self/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
        return bool(int(fields[6]) & _NEVER_STARTED_A_PROGRAM)
    except (OSError, ValueError, IndexError):
        return False


class ProcessLock:
    """A reentrant lock. A child of a fork finds it open; every copy is a separate lock."""

    def __init__(self) -> None:
        self._locks: dict[int, threading.RLock] = {}

    def __enter__(self) -> None:
        self._lock().acquire()

    def __exit__(self, *_: object) -> None:
        self._lock().release()

    def __reduce__(self) -> tuple[type[ProcessLock], tuple[()]]:
        """Return a new lock: a copied object must not share its lock."""
        return ProcessLock, ()

    def _lock(self) -> threading.RLock:
        return self._locks.setdefault(os.getpid(), threading.RLock())


FORKS = Forks()
"""The only instance; made at import, so that every later fork is followed."""
