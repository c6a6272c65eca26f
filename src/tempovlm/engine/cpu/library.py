"""Compiles `kernels.c` for this processor, once, and loads it.

The compiled file is kept in the cache folder, or that of `TEMPOVLM_KERNELS_DIR`, by source, flags and
instructions. A C compiler is taken where there is one (`CC`, `cc`, `gcc`, `clang`); else that of the extra `cpu`.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import platform
import shlex
import subprocess
import sys
import tempfile
from functools import cache
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path
from shutil import which
from typing import Literal

from tempovlm.core.errors import UserError
from tempovlm.core.paths import cache_dir, expanded, write_whole

_log = logging.getLogger("tempovlm")

Precision = Literal["float32", "bfloat16"]
"""Type of the factors of products; sums are float32."""

Instructions = Literal["avx2", "avx512", "avx512-bf16"]
"""Instructions of a processor that the kernels know, fewest first."""

_COMMON = ["-std=gnu11", "-O3", "-ffp-contract=fast", "-fvisibility=hidden", "-shared", "-fPIC"]
_LINKED = ["-lpthread", "-lm"]
_AVX512 = ["-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mfma"]
_FLAGS: dict[tuple[Instructions, Precision], list[str]] = {
    ("avx2", "float32"): ["-mavx2", "-mfma"],
    ("avx512", "float32"): _AVX512,
    ("avx512-bf16", "float32"): _AVX512,
    ("avx512-bf16", "bfloat16"): [*_AVX512, "-mavx512bf16", "-DBF16"],
}
_LONGEST_S = 120


def instructions() -> Instructions | None:
    """Return what this processor has, at most what `ATEN_CPU_CAPABILITY` allows torch; None for too little."""
    import torch

    if sys.platform != "linux" or platform.machine() != "x86_64":
        return None
    capability = torch.backends.cpu.get_cpu_capability()
    if capability.startswith("AVX512"):
        return "avx512-bf16" if "avx512_bf16" in _processor() else "avx512"
    return "avx2" if capability == "AVX2" else None


@cache
def _processor() -> frozenset[str]:
    """Return the words that describe the first processor: its maker, and its flags."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return frozenset()
    return frozenset(text.partition("\n\n")[0].split())


def best_precision() -> Precision:
    """Return the faster type: bfloat16 on AMD's processors that have instructions for it, else float32.

    Intel's processors have them too, but multiply prompts and pictures faster in float32 (docs/log.md).
    """
    is_fast = instructions() == "avx512-bf16" and "AuthenticAMD" in _processor()
    return "bfloat16" if is_fast else "float32"


def fault() -> str | None:
    """Return why the kernels cannot run here; None if they can."""
    if instructions() is None:
        return "needs Linux on a processor with AVX2; leave it out"
    if not any(which(command[0]) for command in _compilers()) and not is_compiled(best_precision()):
        return "needs a C compiler; pip install 'tempovlm[cpu]'"
    return None


def is_compiled(precision: Precision) -> bool:
    """Whether the library is in the cache folder."""
    found = instructions()
    return found is not None and _path(found, precision).is_file()


def _compilers() -> list[list[str]]:
    """Return the commands that may compile C, in order: the user's, the system's, the one of the extra."""
    named = _named()
    found = [[path] for name in ("cc", "gcc", "clang") if (path := which(name))]
    own = [[sys.executable, "-m", "ziglang", "cc"]] if find_spec("ziglang") else []
    return [*([named] if named else []), *found, *own]


def _named() -> list[str]:
    """Return the command that `CC` holds, in words; as one word where its quotes do not match."""
    text = os.environ.get("CC", "")
    try:
        return shlex.split(text)
    except ValueError:
        return [text]


def _source() -> bytes:
    return (files("tempovlm.engine.cpu") / "kernels.c").read_bytes()


def _path(found: Instructions, precision: Precision) -> Path:
    flags = " ".join([*_COMMON, *_FLAGS[found, precision], *_LINKED])
    digest = hashlib.sha256(_source() + flags.encode()).hexdigest()[:16]
    named = os.environ.get("TEMPOVLM_KERNELS_DIR")
    return (expanded(named) if named else cache_dir() / "kernels") / f"{found}-{precision}-{digest}.so"


@cache
def library(precision: Precision) -> ctypes.CDLL:
    """Return the library whose products have factors of a type; compile it if that was not done yet.

    Raises:
        OSError: no compiler compiled it; its message is that of the last one.
    """
    found = instructions()
    if found is None or (found, precision) not in _FLAGS:
        raise OSError(f"this processor has no instructions for {precision}")
    path = _path(found, precision)
    if path.is_file():
        try:
            return ctypes.CDLL(str(path))
        except OSError:  # cut off, or of another C library: compile it again
            pass
    return _compiled(path, [*_COMMON, *_FLAGS[found, precision]])


def _compiled(path: Path, flags: list[str]) -> ctypes.CDLL:
    """Compile, keep the library at a path that several processes may write at once, and load it.

    Where the path cannot be written, the library is loaded from a folder that goes with it.
    """
    message = "no C compiler"
    with tempfile.TemporaryDirectory(prefix="tempovlm-") as folder:
        source, made = Path(folder, "kernels.c"), Path(folder, "kernels.so")
        source.write_bytes(_source())
        for compiler in _compilers():
            command = [*compiler, *flags, "-o", str(made), str(source), *_LINKED]
            try:
                done = subprocess.run(command, capture_output=True, text=True, timeout=_LONGEST_S, check=False)
                message = f"{shlex.join(compiler)}: {done.stderr.strip()[-300:]}"
                if done.returncode == 0:
                    return ctypes.CDLL(str(_kept(made, path)))
            except (OSError, subprocess.TimeoutExpired) as error:
                message = f"{shlex.join(compiler)}: {error}"
            if compiler == _named():
                told = (
                    "the compiler of CC cannot compile the kernels, others are tried; correct CC or unset it: %s"
                )
                _log.warning(told, " ".join(message.split()))
    raise OSError(message)


def _kept(made: Path, path: Path) -> Path:
    """Return the path of a copy that stays, or of the library itself where none can be written."""
    try:
        write_whole(path, made.read_bytes())
        return path
    except UserError:
        return made
