"""A child of a fork answers as its parent does, or says in one line why it cannot; it never hangs."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tempovlm.core.errors import UserError
from tempovlm.engine.engine import Engine
from tempovlm.engine.forks import ProcessLock
from tempovlm.engine.threads import pick_device

LIMIT_S = 280
SCRIPT = Path(__file__).with_name("forking.py")


def finished(command: list[str], limit_s: float) -> str:
    """What a command prints; it is ended with all its children where it takes longer."""
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True)
    try:
        out, _ = process.communicate(timeout=limit_s)
    except subprocess.TimeoutExpired:
        pytest.fail(f"nothing within {limit_s} s")
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    assert process.returncode == 0
    return out


@pytest.fixture(scope="module")
def found(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What became of each fork."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TEMPOVLM_CACHE_DIR", str(tmp_path_factory.mktemp("forks")))
        return json.loads(finished([sys.executable, str(SCRIPT), str(tiny_folder)], LIMIT_S))


@pytest.mark.parametrize(
    "way",
    [
        "child",
        "child's child",
        "child of a thread",
        "thread of a child",
        "stream",
        "stream that was begun",
        "one thread answers",
        "one thread in a child's child",
        "parent again",
    ],
)
def test_a_child_answers_as_its_parent(found: dict[str, Any], way: str) -> None:
    assert found["parent"]
    assert found[way] == found["parent"]


@pytest.mark.parametrize("way", ["pool", "executor", "one thread in a pool"])
def test_every_worker_answers(found: dict[str, Any], way: str) -> None:
    assert found[way] == [found["parent"]]


def test_children_answer_batches_load_and_calibrate(found: dict[str, Any]) -> None:
    assert found["batch"] == [found["parent"]] * 2
    assert found["load"] == [found["parent"], 2]
    assert found["calibrate"] == 4, "all of the settings that it has"


def test_threads_stay_where_openmp_starts_anew(found: dict[str, Any]) -> None:
    assert found["threads"] == 2


def test_one_thread_is_left_where_it_cannot(found: dict[str, Any]) -> None:
    assert found["one thread counts"] == [1, 1, True]
    assert found["one thread loads"] == [found["parent"], 1]
    assert found["two threads load"].startswith("refused: threads=2: this forked process has one")


@pytest.mark.parametrize("way", ["beside a thread", "load beside a thread"])
def test_a_child_of_a_busy_process_says_so(found: dict[str, Any], way: str) -> None:
    assert found[way].startswith("refused: this process was forked while another thread was computing")
    assert "\n" not in found[way]


def test_a_lock_that_another_thread_held_is_open_in_the_child(found: dict[str, Any]) -> None:
    assert found["beside a lock"] is True


def test_a_lock_of_a_process_is_taken_again_by_its_thread() -> None:
    lock = ProcessLock()
    with lock:
        again = lock._lock()
        assert again.acquire(blocking=False)
        again.release()


def test_cuda_in_a_child_is_told(monkeypatch: pytest.MonkeyPatch, engine: Engine) -> None:
    monkeypatch.setattr(torch.cuda, "_is_in_bad_fork", lambda: True)
    for device in ("auto", "cuda", "cuda:1"):
        with pytest.raises(UserError, match="CUDA does not work in a process forked after"):
            pick_device(device)
    assert pick_device("cpu").type == "cpu"
    monkeypatch.setattr(Engine, "device", torch.device("cuda"))
    monkeypatch.setattr(os, "getpid", lambda: -1)
    with pytest.raises(UserError, match="start it by spawn and load there"):
        engine.warmup()


LOCK = """
import fcntl, os, signal, time
from tempovlm.core.machine import _lock_file, machine_lock
with machine_lock():
    child = os.fork()
    if child == 0:
        signal.pause()
try:
    with _lock_file() as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    print("free")
finally:
    os.kill(child, signal.SIGKILL)
"""


def test_the_machine_is_free_again_though_a_child_was_forked_while_it_was_measured(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("TEMPOVLM_CACHE_DIR", str(tmp_path))
    assert finished([sys.executable, "-c", LOCK], 30) == "free\n"
