"""Freed memory stays with the process: the same arrays made again are not paged in again."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tempovlm.core.errors import UserError
from tempovlm.engine.threads import default_threads, keep_memory, prepare

SCRIPT = """
import resource, sys
import numpy as np
from tempovlm.engine.threads import keep_memory
if sys.argv[1] == "kept":
    keep_memory()
for round in range(2):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(20):
        [np.ones(5_000_000, dtype=np.uint8) for _ in range(4)]
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(mode: str) -> int:
    run = subprocess.run([sys.executable, "-c", SCRIPT, mode], capture_output=True, text=True, check=True)
    return int(run.stdout)


@pytest.mark.parametrize("threads", [0, -3, 100_000])
def test_a_number_of_threads_that_cannot_be_is_told(threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=f"threads {threads}: must be from 1"):
        prepare(threads)
    monkeypatch.setenv("TEMPOVLM_THREADS", "100000")
    with pytest.raises(UserError, match="TEMPOVLM_THREADS 100000: must be at most"):
        prepare()


def test_a_variable_that_is_no_number_is_passed_by(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TEMPOVLM_THREADS", "²")
    assert default_threads() in (1, 2)


@pytest.mark.skipif(not keep_memory(), reason="the C library is not glibc")
def test_freed_memory_is_used_again() -> None:
    assert faults("kept") < 200 < 2000 < faults("given back")
