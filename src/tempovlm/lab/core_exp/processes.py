"""Coordinate the processes that share a sweep: a file for each says whether it is at work, done or dead.

The file is locked while its process lives, so that a dead process can be told from a slow one once it has
begun. One that ends before, while it loads, is waited for; `torchrun` ends the others then. A file that is older
than the reading process is of an earlier run: all processes of a run are started together and load a model before
they say anything.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import math
import os
import shutil
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from tempovlm.core.errors import UserError
from tempovlm.core.files import try_lock
from tempovlm.engine.threads import prepare

AT_WORK, DONE = b"at work", b"done"

POLL_S = 0.1
"""Interval between checks of a waiting process."""

NOTICE_AFTER_S = 60.0
"""Time to wait silently for a process that has not appeared: it may be loading a model."""

_log = logging.getLogger("tempovlm")


def process_began_s() -> float:
    """Return the start of this process, in seconds since the epoch; now, if the system does not know."""
    with contextlib.suppress(OSError, ValueError, IndexError, AttributeError):
        fields = Path("/proc/self/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
        age_s = time.clock_gettime(time.CLOCK_BOOTTIME) - int(fields[19]) / os.sysconf("SC_CLK_TCK")
        return time.time() - age_s
    return time.time()


@dataclass(frozen=True, slots=True)
class Share:
    """The rank of this process under `torchrun`; `began_s` is its start, in seconds since the epoch."""

    rank: int = 0
    world: int = 1
    began_s: float = field(default_factory=process_began_s, compare=False)

    @classmethod
    def of_process(cls) -> Share:
        """Read the variables that `torchrun` sets; a process without them is alone.

        Raises:
            UserError: `RANK` and `WORLD_SIZE` are not a valid rank and number of processes.
        """
        rank, world = os.environ.get("RANK", "0"), os.environ.get("WORLD_SIZE", "1")
        if not (rank.isdecimal() and world.isdecimal() and int(rank) < int(world)):
            raise UserError(f"RANK={rank} WORLD_SIZE={world}: give numbers from 0 to below WORLD_SIZE, or neither")
        return cls(int(rank), int(world))

    def device(self, wanted: str) -> str:
        """Return the GPU of this process if several share the work and the flag names none.

        More processes than GPUs take turns: one alone leaves a GPU idle while it starts kernels and writes rows.
        """
        if self.world == 1 or wanted not in ("auto", "cuda"):
            return wanted
        prepare()  # threads are set before torch is imported
        import torch

        is_cuda = wanted == "cuda" or torch.cuda.is_available()
        if not is_cuda:
            return "cpu"
        local, gpus = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
        return f"cuda:{local % gpus if gpus else local}"


@contextlib.contextmanager
def at_work(folder: Path, rank: int) -> Iterator[None]:
    """Mark this process as at work while the block runs.

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
    """Mark this process, which is at work, as finished."""
    handle = os.open(folder / str(rank), os.O_RDWR)
    try:
        _say(handle, DONE)
    finally:
        os.close(handle)


def _say(handle: int, word: bytes) -> None:
    os.truncate(handle, 0)
    os.pwrite(handle, word, 0)


class Patience:
    """Waits in steps, and logs once, after a minute, the reason for waiting."""

    def __init__(self, notice: str) -> None:
        self._notice, self._left_s = notice, NOTICE_AFTER_S

    def wait(self, step_s: float) -> None:
        """Wait a step."""
        time.sleep(step_s)
        self._left_s -= step_s
        if self._left_s <= 0:
            _log.warning("%s", self._notice)
            self._left_s = math.inf


def wait_for(folder: Path, ranks: Iterable[int], began_s: float) -> None:
    """Wait until processes of these ranks, started at this time or later, have finished their shares.

    Raises:
        UserError: one ended before.
    """
    for rank in ranks:
        path = folder / str(rank)
        waiting = Patience(f"process {rank} has not begun its share; was it started?")
        while not _is_done(path, began_s):
            if _has_begun(path, began_s):
                time.sleep(POLL_S)
            else:
                waiting.wait(POLL_S)
    shutil.rmtree(folder, ignore_errors=True)


def _has_begun(path: Path, began_s: float) -> bool:
    """Whether the file exists and belongs to the present run."""
    try:
        return path.stat().st_mtime >= began_s
    except FileNotFoundError:
        return False


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
