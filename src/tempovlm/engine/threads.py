"""Where a model runs: device and type of numbers; a CPU's threads and how they wait, set before torch is imported.

With this a busy neighbour slows us in proportion and not tenfold.

OpenMP's workers spin while they wait, unless told otherwise, and spinning threads that share cores with another
process hold up each other: measured here, a factor of 2 to 10. Imports no torch.
"""

from __future__ import annotations

import ctypes
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from tempovlm.core.checks import checked_integer, shown
from tempovlm.core.errors import UserError

if TYPE_CHECKING:
    import torch

DEFAULT_THREADS = 2
"""At most this many threads: the pocket's matrices are too small to feed more."""

MOST_THREADS = 1024
"""Where OpenMP cannot start the threads that it was told to, it ends the process without a word."""

_PASSIVE = {
    "OMP_WAIT_POLICY": "PASSIVE",
    "GOMP_SPINCOUNT": "0",
    "KMP_BLOCKTIME": "0",
}

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # names of the C library's mallopt
_KEPT_BYTES = {_MMAP_THRESHOLD: 32 << 20, _TRIM_THRESHOLD: 512 << 20}
"""Arrays up to the first size come from the heap; up to the second of it stays when they are freed."""


def prepare(threads: int | None = None) -> int:
    """Set the OpenMP environment, or torch's thread count if torch is already there; return the count.

    Variables that the user has set are kept. `threads` wins over `TEMPOVLM_THREADS`, that over the default.
    Where torch was imported before without a passive wait policy, the default is one thread: a single thread
    waits for nobody, which costs a sixth of the speed on an idle machine and saves the deadline on a busy one.

    Raises:
        UserError: no such number of threads.
    """
    keep_memory()
    if threads is not None:
        threads = checked_integer("threads", threads, 1, MOST_THREADS)
    count = threads if threads is not None else default_threads()
    if threads is None and "torch" in sys.modules and not _is_passive():
        count = 1
    torch = sys.modules.get("torch")
    if torch is not None:
        # The library has read its environment; changing it now would only mislead the next call.
        torch.set_num_threads(count)
        return count
    for name, value in _PASSIVE.items():
        os.environ.setdefault(name, value)
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ.setdefault(name, str(count))
    return count


def start_torch(threads: int | None = None) -> int:
    """Import torch with the threads that `prepare` says; returns their number.

    Raises:
        UserError: no such number of threads.
    """
    count = prepare(threads)
    import torch

    torch.set_num_threads(count)
    return count


def keep_memory() -> bool:
    """Let the process keep the memory that its arrays free; False where the C library is not glibc.

    Else every activation beyond some 100 kB is mapped, paged in and unmapped again by the operation that makes it.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return False
    return all(mallopt(name, value) == 1 for name, value in _KEPT_BYTES.items())


def _is_passive() -> bool:
    return os.environ.get("OMP_WAIT_POLICY", "").upper() == "PASSIVE"


def default_threads() -> int:
    """`TEMPOVLM_THREADS` if it is a positive number, else the physical cores that are ours, at most two.

    Raises:
        UserError: it is more than any machine can start.
    """
    named = os.environ.get("TEMPOVLM_THREADS", "")
    if named.isdecimal() and int(named) > 0:
        if int(named) > MOST_THREADS:
            raise UserError(f"TEMPOVLM_THREADS {named}: must be at most {MOST_THREADS}")
        return int(named)
    return max(1, min(DEFAULT_THREADS, physical_cores()))


def physical_cores() -> int:
    """Cores that this process may run on, hyper-threads of a core counted once."""
    if not hasattr(os, "sched_getaffinity"):
        return os.cpu_count() or 1
    cores = set()
    for cpu in os.sched_getaffinity(0):
        siblings = Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list")
        try:
            cores.add(siblings.read_text().strip())
        except OSError:
            cores.add(str(cpu))
    return len(cores)


def pick_device(device: str) -> torch.device:
    """The device of a name; `auto` takes CUDA where there is some.

    Raises:
        UserError: unknown, or CUDA where there is none.
    """
    import torch

    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    kind, _, index = device.partition(":")
    if kind not in ("cpu", "cuda") or (index and not index.isdecimal()) or (kind == "cpu" and index):
        raise UserError(f"--device {device}: unknown; choose from auto, cpu, cuda")
    if kind == "cuda" and not torch.cuda.is_available():
        raise UserError(f"--device {device}: this machine has no CUDA device; use --device cpu")
    if index and int(index) >= torch.cuda.device_count():
        raise UserError(f"--device {device}: this machine has {torch.cuda.device_count()} CUDA devices, from 0 on")
    return torch.device(device)


def pick_dtype(dtype: torch.dtype | None, device: torch.device) -> torch.dtype:
    """The type of the weights; that of the device unless told.

    Raises:
        UserError: it is no type that a model computes in.
    """
    import torch

    if dtype is None:
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point or dtype.itemsize < 2:
        raise UserError(f"dtype {shown(dtype)}: must be torch.float32, torch.bfloat16 or torch.float16")
    return dtype
