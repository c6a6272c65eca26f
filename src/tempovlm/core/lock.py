"""A lock for values that are copied and sent to other processes."""

from __future__ import annotations

import threading


class OwnLock:
    """A re-entrant lock; every copy, also one in another process, has a free lock of its own."""

    def __init__(self) -> None:
        self._lock = threading.RLock()

    def __enter__(self) -> None:
        self._lock.acquire()

    def __exit__(self, *raised: object) -> None:
        self._lock.release()

    def __reduce__(self) -> tuple[type[OwnLock], tuple[()]]:
        """A new lock: one that guards other values has no part in this one's."""
        return OwnLock, ()
