"""What the user has set of threads is kept, and freed memory stays with the process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tempovlm.core.errors import UserError
from tempovlm.engine import threads
from tempovlm.engine.threads import (
    cpu_quota,
    default_threads,
    keep_memory,
    most_of_a_stage,
    physical_cores,
    pick_device,
    prepare,
)

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


@pytest.mark.parametrize("count", [0, -3, 100_000])
def test_a_number_of_threads_that_cannot_be_is_told(count: int) -> None:
    with pytest.raises(UserError, match=f"threads={count}: must be from 1"):
        prepare(count)


@pytest.mark.parametrize("named", ["0", "-1", "1025", "100000", "9" * 5000, "²", "none", "2.0"])
def test_a_variable_that_is_no_number_of_threads_is_told(named: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TEMPOVLM_THREADS", named)
    with pytest.raises(UserError, match=f"TEMPOVLM_THREADS {named[:60]}…?: must be a number from 1 to 1024"):
        prepare()


def test_an_empty_variable_says_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TEMPOVLM_THREADS", "")
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


COUNTING = """
import json, os, sys
own = None
exec(sys.argv[2])
import tempovlm
model = tempovlm.load(sys.argv[1], device="cpu", warmup=False, progress=False, **json.loads(sys.argv[3]))
import torch
counts = {f"{name}_NUM_THREADS": os.environ.get(f"{name}_NUM_THREADS") for name in ("OMP", "MKL", "OPENBLAS")}
again = tempovlm.load(sys.argv[1], device="cpu", warmup=False, progress=False)
model.answer(None, "what?", max_new_tokens=1)
threads = [torch.get_num_threads(), model.engine.threads, model.stamp().threads, again.engine.threads]
print(json.dumps({"threads": threads, "counts": counts, "own": own}))
"""
SET_BY_USERS = ("OMP_", "MKL_", "OPENBLAS_", "GOMP_", "KMP_", "TEMPOVLM_THREADS")


def counted(folder: Path, env: dict[str, str], before: str = "", **options: object) -> dict[str, Any]:
    """What a fresh process has set once it has loaded a model, and once it has loaded it again by default."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith(SET_BY_USERS)}
    command = [sys.executable, "-c", COUNTING, str(folder), before, json.dumps(options)]
    run = subprocess.run(command, env=clean | env, capture_output=True, text=True, check=True, timeout=120)
    return json.loads(run.stdout)


SET = "import torch; torch.set_num_threads({})"


@pytest.mark.parametrize(
    ("env", "before", "count"),
    [
        ({"OMP_NUM_THREADS": "1"}, "", 1),
        ({"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "2"}, "import torch", 1),
        ({}, SET.format(3), 3),
        (
            {"OMP_WAIT_POLICY": "ACTIVE"},
            "import torch; own = torch.get_num_threads(); torch.set_num_threads(own)",
            None,
        ),
        ({}, "import torch", 1),
    ],
    ids=str,
)
def test_the_threads_that_the_user_set_are_kept(
    tiny_folder: Path, env: dict[str, str], before: str, count: int | None
) -> None:
    found = counted(tiny_folder, env, before)
    assert found["threads"] == [count or found["own"]] * 4
    assert all(found["counts"][name] == value for name, value in env.items() if name in found["counts"])


def test_an_argument_wins_and_is_not_taken_for_what_the_user_set(tiny_folder: Path) -> None:
    kept = counted(tiny_folder, {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}, threads=3)
    assert kept["threads"][1:] == [3, 3, 1]
    assert (kept["counts"]["OMP_NUM_THREADS"], kept["counts"]["OPENBLAS_NUM_THREADS"]) == ("1", "1")
    free = counted(tiny_folder, {}, threads=3)
    assert free["threads"][1:] == [3, 3, min(2, physical_cores())]


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """The environment of a user who has set nothing, before torch is imported, on eight cores."""
    environ: dict[str, str] = {}
    monkeypatch.setattr(os, "environ", environ)
    monkeypatch.setitem(sys.modules, "torch", None)
    monkeypatch.setattr(threads, "_MINE", {})
    monkeypatch.setattr(threads, "physical_cores", lambda: 8)
    monkeypatch.setattr(threads, "cpu_quota", lambda: None)
    return environ


@pytest.mark.parametrize(
    ("env", "count"),
    [
        ({}, 2),
        ({"OMP_NUM_THREADS": "1"}, 1),
        ({"OMP_NUM_THREADS": "6"}, 6),
        ({"OMP_NUM_THREADS": " 3,2 "}, 3),
        ({"MKL_NUM_THREADS": "1"}, 1),
        ({"OMP_NUM_THREADS": "4", "MKL_NUM_THREADS": "3"}, 3),
        ({"OMP_NUM_THREADS": "1", "TEMPOVLM_THREADS": "3"}, 3),
        ({"OMP_NUM_THREADS": "many"}, 2),
        ({"OMP_NUM_THREADS": "0"}, 2),
        ({"OPENBLAS_NUM_THREADS": "1"}, 2),
    ],
)
def test_variables_of_the_user_win_over_the_default(
    alone: dict[str, str], env: dict[str, str], count: int
) -> None:
    alone |= env
    assert prepare() == count
    assert env.items() <= alone.items()
    assert "OPENBLAS_NUM_THREADS" not in alone or "OPENBLAS_NUM_THREADS" in env


def test_processes_of_one_machine_share_its_cores(alone: dict[str, str]) -> None:
    found = []
    for beside in ("", "1", "4", "8", "16", "many"):
        alone["LOCAL_WORLD_SIZE"] = beside
        found.append(default_threads())
    assert found == [2, 2, 2, 1, 1, 2]


def test_the_one_thread_that_torchrun_sets_is_not_the_users(alone: dict[str, str]) -> None:
    alone |= {"TORCHELASTIC_RUN_ID": "none", "LOCAL_WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}
    assert default_threads() == 2
    alone["LOCAL_WORLD_SIZE"] = "1"
    assert default_threads() == 1, "a process that it starts alone keeps what the user has set"
    alone |= {"LOCAL_WORLD_SIZE": "2", "OMP_NUM_THREADS": "3"}
    assert default_threads() == 3


def test_what_was_set_here_is_not_taken_for_the_users(alone: dict[str, str]) -> None:
    assert prepare(5) == 5
    assert alone["OMP_NUM_THREADS"] == "5"
    assert prepare() == 2
    alone["OMP_NUM_THREADS"] = "1"
    assert prepare() == 1


@pytest.mark.parametrize(
    ("env", "waits"),
    [
        ({}, {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "0", "KMP_BLOCKTIME": "0"}),
        ({"OMP_WAIT_POLICY": "active"}, {"OMP_WAIT_POLICY": "active"}),
        (
            {"KMP_BLOCKTIME": "200", "GOMP_SPINCOUNT": "1000"},
            {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "1000", "KMP_BLOCKTIME": "200"},
        ),
        (
            {"OMP_WAIT_POLICY": "passive", "KMP_AFFINITY": "none"},
            {"OMP_WAIT_POLICY": "passive", "KMP_AFFINITY": "none", "GOMP_SPINCOUNT": "0", "KMP_BLOCKTIME": "0"},
        ),
    ],
)
def test_how_the_users_threads_wait_is_kept(
    alone: dict[str, str], env: dict[str, str], waits: dict[str, str]
) -> None:
    alone |= env
    prepare()
    names = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME", "KMP_AFFINITY")
    assert {name: alone[name] for name in names if name in alone} == waits


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="the system ties no process to processors")
def test_no_more_threads_than_processors_that_are_ours(tiny_folder: Path) -> None:
    tie = "import os; os.sched_setaffinity(0, [min(os.sched_getaffinity(0))])"
    assert counted(tiny_folder, {}, tie)["threads"] == [1] * 4


CFS = {"cpu,cpuacct/a/cpu.cfs_quota_us": "400", "cpu,cpuacct/a/cpu.cfs_period_us": "100"}


@pytest.mark.parametrize(
    ("groups", "files", "cores"),
    [
        ("0::/\n", {"cpu.max": "150000 100000\n"}, 1.5),
        ("0::/a/b\n", {"a/cpu.max": "50000 100000\n", "a/b/cpu.max": "max 100000\n"}, 0.5),
        ("4:cpu,cpuacct:/a\n0::/\n", CFS, 4),
        ("4:cpu:/\n", {"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100"}, None),
        ("0::/\n", {"cpu.max": "max 100000\n"}, None),
        ("0::/\n", {}, None),
        ("", {}, None),
    ],
)
def test_limits_of_control_groups(tmp_path: Path, groups: str, files: dict[str, str], cores: float | None) -> None:
    for name, text in {"proc/self/cgroup": groups, **{f"sys/fs/cgroup/{n}": t for n, t in files.items()}}.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    assert cpu_quota(tmp_path) == (None if cores is None else pytest.approx(cores))


@pytest.mark.usefixtures("alone")
def test_a_quota_below_two_cores_leaves_one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    for quota, count in ((0.5, 1), (1.9, 1), (2.0, 2), (16.0, 2), (None, 2)):
        monkeypatch.setattr(threads, "cpu_quota", lambda quota=quota: quota)
        assert default_threads() == count, quota


def test_without_mkl_a_count_that_torch_would_not_take_is_the_users(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in threads._COUNTS:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(threads, "_MINE", {})
    monkeypatch.setattr(threads, "cpus", lambda: 4)
    monkeypatch.setattr(threads, "physical_cores", lambda: 2)
    for count, chosen in ((1, 1), (2, None), (4, None), (7, 7)):
        torch = SimpleNamespace(get_num_threads=lambda count=count: count, _C=SimpleNamespace(__file__="/absent"))
        assert threads._chosen_in(torch) == chosen  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("env", "given", "count"),
    [({}, None, 12), ({}, 3, 3), ({"TEMPOVLM_THREADS": "20"}, None, 20), ({"OMP_NUM_THREADS": "2"}, None, 2)],
)
def test_a_stage_may_have_all_cores_unless_the_user_sets_a_number(
    alone: dict[str, str], monkeypatch: pytest.MonkeyPatch, env: dict[str, str], given: int | None, count: int
) -> None:
    monkeypatch.setattr(threads, "physical_cores", lambda: 12)
    monkeypatch.setattr(threads, "cpu_quota", lambda: None)
    alone |= env
    assert most_of_a_stage(given) == count
    if not env:
        monkeypatch.setattr(threads, "physical_cores", lambda: 40)
        assert most_of_a_stage(given) == (given or 16)
