"""One writer at a time in a folder, told apart by the system, so that a process that dies leaves none locked."""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

from tempovlm.core.errors import UserError


@contextlib.contextmanager
def held(folder: Path, flag: str = "output_dir") -> Iterator[None]:
    """Make a folder and hold it; the system lets go of it when the process ends, however it ends.

    Args:
        folder: that results are written to.
        flag: the one that named it, for the message.

    Raises:
        UserError: it cannot be made, or it is held already, by this process or another.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle = os.open(folder, os.O_RDONLY)
    except OSError as error:
        raise UserError(f"--{flag} {folder}: cannot be made ({error.strerror or error})") from None
    try:
        if not try_lock(handle, fcntl.LOCK_EX, f"--{flag} {folder}"):
            message = "another process is writing results there; wait for it to end, or use another directory"
            raise UserError(f"--{flag} {folder}: {message}")
        try:
            yield
        finally:
            # A child that was forked meanwhile has the folder open too: closing it here would not let go of it.
            fcntl.flock(handle, fcntl.LOCK_UN)
    finally:
        os.close(handle)


@contextlib.contextmanager
def marked(path: Path) -> Iterator[None]:
    """Let others see by `is_marked` that this process lives and has come this far."""
    handle = os.open(path, os.O_RDONLY)
    try:
        # Waits for the moment that another process looks, which takes a lock too.
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def is_marked(path: Path) -> bool:
    """Whether a process is within `marked` of a file."""
    try:
        handle = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        return False
    try:
        return not try_lock(handle, fcntl.LOCK_SH, str(path))
    finally:
        os.close(handle)


def try_lock(handle: int, kind: int, where: str) -> bool:
    """Lock an open file without waiting; False where another process holds it.

    Args:
        handle: of the file.
        kind: `fcntl.LOCK_EX` or `fcntl.LOCK_SH`.
        where: what the message calls the file.

    Raises:
        UserError: its file system has no locks.
    """
    try:
        fcntl.flock(handle, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        raise UserError(f"{where}: cannot be locked ({error.strerror or error}); use a local directory") from None
    return True
