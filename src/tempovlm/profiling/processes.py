"""The processes that share a sweep: each has a file that says whether it is at work, done or dead.

The file is locked for as long as its process lives, so that a dead one is told from a slow one, however it was
started. A file that is older than the reading process is of an earlier run: all processes of a run are started
together and load a model before they say anything. Knows no question and no model.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

from tempovlm.core.errors import UserError
from tempovlm.core.locks import try_lock

AT_WORK, DONE = b"at work", b"done"

POLL_S = 0.1
"""How often a process that waits for others looks again."""


def process_began_s() -> float:
    """When this process was started, in seconds since the epoch; now, where the system does not tell."""
    with contextlib.suppress(OSError, ValueError, IndexError, AttributeError):
        fields = Path("/proc/self/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
        age_s = time.clock_gettime(time.CLOCK_BOOTTIME) - int(fields[19]) / os.sysconf("SC_CLK_TCK")
        return time.time() - age_s
    return time.time()


@contextlib.contextmanager
def at_work(folder: Path, rank: int) -> Iterator[None]:
    """Say that this process is at work while the block runs.

    Raises:
        UserError: a process of the same rank, of an earlier run, is still at work there.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle = os.open(folder / str(rank), os.O_RDWR | os.O_CREAT, 0o666)
    except OSError as error:
        raise UserError(f"{folder}: cannot be written ({error.strerror or error})") from None
    try:
        if not try_lock(handle, fcntl.LOCK_EX, str(folder)):
            raise UserError(f"{folder}: process {rank} of an earlier run is still at work there; end it")
        _say(handle, AT_WORK)
        yield
    finally:
        os.close(handle)


def say_done(folder: Path, rank: int) -> None:
    """Say that this process, which is at work, has done its share."""
    handle = os.open(folder / str(rank), os.O_RDWR)
    try:
        _say(handle, DONE)
    finally:
        os.close(handle)


def _say(handle: int, word: bytes) -> None:
    os.truncate(handle, 0)
    os.pwrite(handle, word, 0)


def wait_for(folder: Path, ranks: Iterable[int], began_s: float) -> None:
    """Return when processes of these ranks, which were started at this time or later, have done their shares.

    Raises:
        UserError: one ended before.
    """
    for rank in ranks:
        while not _is_done(folder / str(rank), began_s):
            time.sleep(POLL_S)
    shutil.rmtree(folder, ignore_errors=True)


def _is_done(path: Path, began_s: float) -> bool:
    try:
        handle = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        return False
    try:
        if os.fstat(handle).st_mtime < began_s:
            return False
        word = os.pread(handle, len(AT_WORK), 0)
        if word != AT_WORK:  # it has just opened or is just changing its file, or it is done
            return word == DONE
        if not try_lock(handle, fcntl.LOCK_SH, str(path)):
            return False
        if os.pread(handle, len(AT_WORK), 0) == DONE:
            return True
    finally:
        os.close(handle)
    raise UserError(
        f"process {path.name} ended before its share was done; what is done is kept: run the same command again"
    )
