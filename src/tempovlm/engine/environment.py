"""Collects the machine, the versions and the model that figures belong to."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import subprocess
from datetime import UTC, datetime
from functools import cache
from pathlib import Path

import torch

from tempovlm.core.knobs import KnobSpace
from tempovlm.core.stamp import Stamp, __version__
from tempovlm.engine.threads import physical_cores

_FINGERPRINTED = (
    "hardware",
    "device",
    "threads",
    "torch",
    "tempovlm",
    "weights",
    "knob_space",
    "instructions",
    "cores",
)
"""Fields that a calibration depends on: if one changes, the machine is measured again."""

_OTHER_REPOSITORY = ("GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE", "GIT_COMMON_DIR", "GIT_OBJECT_DIRECTORY")
"""Variables by which git, within a hook or an alias, points its children at the user's repository."""


def collect_stamp(
    *,
    model: str,
    weights_hash: str,
    space: KnobSpace,
    device: torch.device,
    dtype: torch.dtype,
    data_source: str | None = None,
    decode_dtype: str = "bf16",
    threads: int | None = None,
    kernels: str = "",
    ranking: str | None = None,
) -> Stamp:
    """Collect the stamp of this process, now.

    The device's name includes the type of the weights: `cpu/float32`, and `cuda/bfloat16/fp8` if decode steps
    read others; `kernels` names those that run a CPU's stages, where they do. `threads` are those of the
    model if it has its own, else torch's in this thread.
    `ranking` is the digest of a ranking that is not the model's own.
    """
    kind = str(dtype).removeprefix("torch.") + (f"/{decode_dtype}" if decode_dtype != "bf16" else "")
    kind += f"/{kernels}" if kernels else ""
    return Stamp(
        hardware=hardware_name(device),
        device=f"{device.type}/{kind}",
        threads=torch.get_num_threads() if threads is None else threads,
        os=platform.platform(terse=True),
        python=platform.python_version(),
        torch=torch.__version__,
        tempovlm=__version__,
        commit=commit(),
        model=model,
        weights=weights_hash,
        knob_space=space.fingerprint,
        data_source=data_source,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        ranking=ranking,
        instructions=torch.backends.cpu.get_cpu_capability(),
        cores=physical_cores(),
    )


def fingerprint(stamp: Stamp) -> str:
    """Hash everything that a latency depends on to twelve hex digits."""
    fields = stamp.to_json()
    of_ranking = [] if stamp.ranking is None else [stamp.ranking]
    text = json.dumps([*(fields[name] for name in _FINGERPRINTED), *of_ranking])
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def hardware_name(device: torch.device) -> str:
    """Return the name of the processor that runs the model."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return _cpu_name()


@cache
def _cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


@cache
def commit() -> str | None:
    """Find the commit of this package's source, with `+` if it has changes; None if no commit contains it."""
    return commit_of(Path(__file__).parents[1])


def commit_of(package: Path) -> str | None:
    """Find the commit that contains a package's source, with `+` if its tracked files have changes.

    Args:
        package: folder of the package. It may lie within a repository that does not contain it, such as a virtual
            environment within the user's own: that repository's commit says nothing about the package.

    Returns:
        Twelve hex digits; None if git is missing, there is no repository, or its commit lacks the source.
    """
    try:
        head = _git(package, "rev-parse", "--short=12", "HEAD")
        _git(package, "cat-file", "-e", "HEAD:./__init__.py")
        return head + ("+" if _git(package, "status", "--porcelain", "--untracked-files=no", ".") else "")
    except (OSError, subprocess.SubprocessError):
        return None


def _git(folder: Path, *words: str) -> str:
    """Run git on the repository that holds a folder, even within a hook of another repository."""
    own = {name: value for name, value in os.environ.items() if name not in _OTHER_REPOSITORY}
    done = subprocess.run(
        ["git", "-C", str(folder), *words],
        capture_output=True,
        text=True,
        timeout=10,
        check=True,
        env={**own, "GIT_OPTIONAL_LOCKS": "0"},
    )
    return done.stdout.strip()
