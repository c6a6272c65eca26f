"""Device and number type of a model; a CPU's threads and their wait policy, set before torch is imported.

By default OpenMP's workers spin while they wait, and spinning threads that share cores with another
process delay each other: a factor of 2 to 10 as measured. Threads that sleep while they wait lose no more than
the other process takes. Importing this module imports no torch.
"""

from __future__ import annotations

import ctypes
import os
import sys
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

from tempovlm.core.checks import checked_integer, shown, wrong_argument
from tempovlm.core.errors import UserError
from tempovlm.engine.forks import FORKS, NO_CUDA_IN_CHILD

if TYPE_CHECKING:
    import torch

DEFAULT_THREADS = 2
"""Default maximum of threads: the pocket's matrices are too small for more."""

MOST_OF_A_STAGE = 16
"""Threads of a stage of the CPU's kernels that a calibration tries, where the user set none."""

MOST_THREADS = 1024
"""If OpenMP cannot start as many threads as asked, it ends the process without a message."""

_PASSIVE = {
    "OMP_WAIT_POLICY": "PASSIVE",
    "GOMP_SPINCOUNT": "0",
    "KMP_BLOCKTIME": "0",
}

_COUNTS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")
_MINE: dict[str, str] = {}
"""Values that this module has set, to tell them from the user's: variables, and `torch` for its count."""

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # names from the C library's mallopt
_KEPT_BYTES = {_MMAP_THRESHOLD: 32 << 20, _TRIM_THRESHOLD: 512 << 20}
"""Arrays up to the first size come from the heap; up to the second of it stays when they are freed."""


def prepare(threads: int | None = None) -> int:
    """Set the OpenMP environment, or torch's thread count if torch is already there; return the count.

    Values set by the user are kept. `threads` wins over `TEMPOVLM_THREADS`, that over a count that was given to
    `torch.set_num_threads`, that over `OMP_NUM_THREADS` and `MKL_NUM_THREADS` (the smaller one, since torch has
    one count for both), that over the default. The one thread that `torchrun` sets for each of several processes
    is not the user's. A wait policy other than passive is left alone with all that belongs to it. If torch was
    imported before and nobody set how its threads wait, the default is one thread: a single thread waits for
    nobody, which costs a sixth of the speed on an idle machine and saves the deadline on a busy one.
    A child of a process that had imported torch, but not `tempovlm.api`, has one thread too, as have workers of
    a forkserver that preloads torch alone.

    Raises:
        UserError: invalid number of threads, or more than one where a fork has left one.
    """
    keep_memory()
    FORKS.check()
    if threads is not None:
        threads = checked_integer("threads", threads, 1, MOST_THREADS)
        if FORKS.threads(threads) < threads:
            raise wrong_argument(
                "threads", threads, "this forked process has one; leave it out, or start it by spawn"
            )
    torch = sys.modules.get("torch")
    count = FORKS.threads(threads if threads is not None else default_threads())
    if torch is not None:
        # The library has read its environment already; changing it would only mislead the next call.
        _set_threads(torch, count)
        return count
    if os.environ.get("OMP_WAIT_POLICY", "PASSIVE").upper() == "PASSIVE":
        for name, value in _PASSIVE.items():
            os.environ.setdefault(name, value)
    for name in _COUNTS:
        if name not in os.environ:
            os.environ[name] = _MINE[name] = str(count)
    return count


def start_torch(threads: int | None = None) -> int:
    """Import torch with the threads that `prepare` sets; return their number.

    Raises:
        UserError: invalid number of threads.
    """
    count = prepare(threads)
    import torch

    _set_threads(torch, count)
    return count


def _set_threads(torch: ModuleType, count: int) -> None:
    if _chosen_in(torch) != count:
        _MINE["torch"] = str(count)
    torch.set_num_threads(count)


def keep_memory() -> bool:
    """Let the process keep the memory that its arrays free; False if the C library is not glibc.

    Otherwise every activation above about 100 kB is mapped, paged in and unmapped by each operation that makes it.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return False
    return all(mallopt(name, value) == 1 for name, value in _KEPT_BYTES.items())


def default_threads() -> int:
    """Return the threads that the user set, see `prepare`; else the available cores, at most two.

    Processes that `torchrun` started on one machine share its cores.

    Raises:
        UserError: `TEMPOVLM_THREADS` is not a number from 1 to 1024.
    """
    told = _chosen()
    if told is not None:
        return told
    if sys.modules.get("torch") is not None and not any(name in os.environ for name in _PASSIVE):
        return 1
    return min(DEFAULT_THREADS, _own_cores())


def most_of_a_stage(threads: int | None = None) -> int:
    """Return the most threads of a stage of the CPU's kernels, whose threads never spin for long.

    Those that the user set, here or as `prepare` says; else the available cores, at most `MOST_OF_A_STAGE`.
    """
    return threads or _chosen() or min(MOST_OF_A_STAGE, _own_cores())


def _chosen() -> int | None:
    """Return the threads that the user set; None if there are none.

    Raises:
        UserError: `TEMPOVLM_THREADS` is not a number from 1 to 1024.
    """
    named = os.environ.get("TEMPOVLM_THREADS", "")
    if named:
        count = int(named) if named.isdecimal() and len(named) <= len(str(MOST_THREADS)) else 0
        if not 1 <= count <= MOST_THREADS:
            raise UserError(f"TEMPOVLM_THREADS {shown(named)}: must be a number from 1 to {MOST_THREADS}")
        return count
    torch = sys.modules.get("torch")
    chosen = None if torch is None else _chosen_in(torch)
    if chosen is not None:
        return chosen
    told = [count for count in map(_told, _COUNTS) if count]
    return min(MOST_THREADS, *told) if told else None


def _own_cores() -> int:
    """Return the cores that this process may fill; at least one. Processes of `torchrun` share a machine's."""
    cores, quota = physical_cores(), cpu_quota()
    beside = os.environ.get("LOCAL_WORLD_SIZE", "")
    sharers = max(1, int(beside)) if beside.isdecimal() else 1
    return max(1, (cores if quota is None else min(cores, int(quota))) // sharers)


def _told(name: str) -> int | None:
    """Return the count in a variable set by the user; of a list, the outermost. None if there is no number."""
    value = os.environ.get(name, "")
    first = value.partition(",")[0].strip()
    is_users = _MINE.get(name) != value and not _is_of_torchrun(name, value)
    return int(first) if is_users and first.isdecimal() and int(first) > 0 else None


def _is_of_torchrun(name: str, value: str) -> bool:
    """Whether `torchrun` may have set it, as it does when it starts several processes and the user has not."""
    several = os.environ.get("LOCAL_WORLD_SIZE", "1") != "1" and "TORCHELASTIC_RUN_ID" in os.environ
    return several and (name, value) == ("OMP_NUM_THREADS", "1")


def _chosen_in(torch: ModuleType) -> int | None:
    """Return the threads that someone else gave to `torch.set_num_threads`; None if nobody has.

    MKL reveals it, because torch passes it the count of every such call. Without MKL it is any
    count that torch would not have chosen by itself.
    """
    count = int(torch.get_num_threads())  # a thread takes over a value set in another when it asks
    if _MINE.get("torch") == str(count) or FORKS.others_compute():  # which sets it for a while
        return None
    try:
        local = ctypes.CDLL(torch._C.__file__).MKL_Set_Num_Threads_Local  # lower case takes an address
    except (AttributeError, OSError):
        return None if count in {physical_cores(), cpus(), *map(_told, _COUNTS)} else count
    previous = int(local(0))
    local(previous)
    return count if previous else None


def cpu_quota(root: Path = Path("/")) -> float | None:
    """Return the processor time that control groups allow this process, in cores; None without a limit.

    Args:
        root: root of the file system whose `proc` and `sys` are read.
    """
    try:
        lines = (root / "proc/self/cgroup").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return None
    shares = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        for folder in (Path(path), *Path(path).parents):
            shares += _shares(root / "sys/fs/cgroup", controllers, folder.as_posix().lstrip("/"))
    return min(shares, default=None)


def _shares(groups: Path, controllers: str, path: str) -> list[float]:
    """Return the limit of one control group, version 1 or 2; nothing if it has none."""
    try:
        if controllers:
            folder = groups / controllers / path
            quota, period = ((folder / f"cpu.cfs_{name}_us").read_text() for name in ("quota", "period"))
        else:
            quota, period = (groups / path / "cpu.max").read_text().split()
        return [int(quota) / int(period)] if int(quota) > 0 and int(period) > 0 else []
    except (OSError, ValueError):
        return []


def cpus() -> int:
    """Return the logical processors that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def physical_cores() -> int:
    """Return the number of cores that this process may run on, hyper-threads of a core counted once."""
    if not hasattr(os, "sched_getaffinity"):
        return cpus()
    cores = set()
    for cpu in os.sched_getaffinity(0):
        siblings = Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list")
        try:
            cores.add(siblings.read_text().strip())
        except OSError:
            cores.add(str(cpu))
    return len(cores)


def pick_device(device: str) -> torch.device:
    """Return the device of a name; `auto` means CUDA if available.

    A CUDA device gets its index: without one it would be another device in another thread.

    Raises:
        UserError: unknown name, or CUDA without a CUDA device.
    """
    import torch

    if device == "auto":
        device = "cuda" if torch.cuda._is_in_bad_fork() or torch.cuda.is_available() else "cpu"
    kind, _, index = device.partition(":")
    if kind not in ("cpu", "cuda") or (index and not index.isdecimal()) or (kind == "cpu" and index):
        raise wrong_argument("device", device, "unknown; choose from auto, cpu, cuda, cuda:1 and so on")
    if kind == "cuda" and torch.cuda._is_in_bad_fork():
        raise wrong_argument("device", device, NO_CUDA_IN_CHILD)
    if kind == "cuda" and not torch.cuda.is_available():
        raise wrong_argument("device", device, "this machine has no CUDA device; use cpu")
    if index and int(index) >= torch.cuda.device_count():
        raise wrong_argument(
            "device", device, f"this machine has {torch.cuda.device_count()} CUDA devices, from 0 on"
        )
    return (
        torch.device("cuda", int(index or torch.cuda.current_device())) if kind == "cuda" else torch.device(kind)
    )


def pick_dtype(dtype: torch.dtype | None, device: torch.device) -> torch.dtype:
    """Return the type of the weights. Default: that of the device.

    Raises:
        UserError: it is not a type that a model computes in.
    """
    import torch

    if dtype is None:
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point or dtype.itemsize < 2:
        raise UserError(f"dtype {shown(dtype)}: must be torch.float32, torch.bfloat16 or torch.float16")
    return dtype
