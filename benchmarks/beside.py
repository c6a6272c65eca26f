"""Processes that run beside what a benchmark measures."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def beside(count: int, program: str, *words: str) -> Iterator[None]:
    """Run a Python program in some processes while the block runs; they are killed at its end."""
    others = [subprocess.Popen([sys.executable, "-c", program, *words]) for _ in range(count)]
    try:
        yield
    finally:
        for one in others:
            one.kill()
            one.wait()
