"""Freed memory stays with the process: the same arrays made again are not paged in again."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from tempovlm.core.errors import UserError
from tempovlm.engine.threads import default_threads, keep_memory, pick_device, prepare

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


def test_a_cuda_device_has_an_index(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without one it would be the first device in a thread that another thread made."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    found = {name: str(pick_device(name)) for name in ("auto", "cuda", "cuda:0", "cuda:1", "cpu")}
    assert found == {"auto": "cuda:1", "cuda": "cuda:1", "cuda:0": "cuda:0", "cuda:1": "cuda:1", "cpu": "cpu"}
    with pytest.raises(UserError, match="has 2 CUDA devices, from 0 on"):
        pick_device("cuda:2")
    for wrong in ("cuda:x", "cuda:-1", "cuda1", "gpu"):
        with pytest.raises(UserError, match="choose from auto, cpu, cuda"):
            pick_device(wrong)
