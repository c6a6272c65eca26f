"""Make and lock the folder that a command writes its results to; `core.paths` writes the files.

File locks keep writers apart; the system frees them when a process ends, however it ends.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

from tempovlm.core.errors import UserError


def make_folder(path: Path, where: str = "--output_dir") -> Path:
    """Make a folder with its parents; errors say `where` it was named.

    Raises:
        UserError: the folder cannot be made or written to, or a file has its name.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{where} {path}: cannot be made ({error.strerror or error})") from None
    try:
        # Check now and not when there are results: that may be an hour away.
        with tempfile.TemporaryFile(dir=path):
            pass
    except OSError as error:
        raise UserError(f"{where} {path}: cannot be written to ({error.strerror or error})") from None
    return path


@contextlib.contextmanager
def writing_to(path: Path, where: str = "--output_dir") -> Iterator[Path]:
    """Make and lock a folder, so that two runs do not mix their files; errors say `where` it was named.

    Raises:
        UserError: the folder cannot be made or written to, a file has its name, or this or another process holds
            it already.
    """
    handle = os.open(make_folder(path, where), os.O_RDONLY)
    try:
        if not try_lock(handle, fcntl.LOCK_EX, f"{where} {path}"):
            message = "another process is writing results there; wait for it to end, or use another directory"
            raise UserError(f"{where} {path}: {message}")
        try:
            yield path
        finally:
            # A child that was forked meanwhile has the file open too: closing it here would not release the
            # lock.
            fcntl.flock(handle, fcntl.LOCK_UN)
    finally:
        os.close(handle)


@contextlib.contextmanager
def marked(path: Path) -> Iterator[None]:
    """Mark, for processes that ask `is_marked`, that this process lives and has come this far."""
    handle = os.open(path, os.O_RDONLY)
    try:
        # Wait while another process checks, which takes the lock too.
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
    """Lock an open file without waiting; return False if another process holds it.

    Args:
        handle: the open file.
        kind: `fcntl.LOCK_EX` or `fcntl.LOCK_SH`.
        where: name of the file in the message.

    Raises:
        UserError: the file system has no locks.
    """
    try:
        fcntl.flock(handle, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        raise UserError(f"{where}: cannot be locked ({error.strerror or error}); use a local directory") from None
    return True
