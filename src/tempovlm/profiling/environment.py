"""The machine, the versions and the model that figures belong to. Measures nothing."""

from __future__ import annotations

import hashlib
import json
import platform
import subprocess
from datetime import UTC, datetime
from functools import cache
from pathlib import Path

import torch

from tempovlm.core.knobs import KnobSpace
from tempovlm.core.stamp import Stamp
from tempovlm.core.version import __version__

_FINGERPRINTED = ("hardware", "device", "threads", "torch", "tempovlm", "weights", "knob_space")
"""What a calibration depends on: where one of these changes, the machine is measured again."""


def collect_stamp(
    *,
    model: str,
    weights: str,
    space: KnobSpace,
    device: torch.device,
    dtype: torch.dtype,
    data_source: str | None = None,
    decode_weights: str = "bf16",
    threads: int | None = None,
) -> Stamp:
    """The stamp of this process, now.

    The device's name tells the type of the weights too: `cpu/float32`, and `cuda/bfloat16/fp8` where decode steps
    read others. `threads` are those of the model where it has its own, else torch's in this thread.
    """
    kind = str(dtype).removeprefix("torch.") + (f"/{decode_weights}" if decode_weights != "bf16" else "")
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
        weights=weights,
        knob_space=space.fingerprint,
        data_source=data_source,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
    )


def fingerprint(stamp: Stamp) -> str:
    """Twelve hex digits that change with whatever a latency depends on."""
    fields = stamp.to_json()
    text = json.dumps([fields[name] for name in _FINGERPRINTED])
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def hardware_name(device: torch.device) -> str:
    """The name of the processor that runs the model."""
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
    """The commit of the source tree, with `+` where it has changes; None outside a repository."""
    folder = Path(__file__).parent
    try:
        head = _git(folder, "rev-parse", "--short=12", "HEAD")
        return head + ("+" if _git(folder, "status", "--porcelain", "--untracked-files=no", ".") else "")
    except (OSError, subprocess.SubprocessError):
        return None


def _git(folder: Path, *words: str) -> str:
    done = subprocess.run(
        ["git", "-C", str(folder), *words], capture_output=True, text=True, timeout=10, check=True
    )
    return done.stdout.strip()
