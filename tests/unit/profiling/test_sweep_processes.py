"""Sweeps of several processes, as `torchrun` starts them: the rows of a single one, killed and resumed or not."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
from sweep_fakes import STAMP, questions
from sweep_runs import PLAN, ledger_of, sweep

import tiny_model
from tempovlm.core.errors import UserError
from tempovlm.core.records import SweepRow
from tempovlm.engine.engine import Engine
from tempovlm.engine.threads import default_threads
from tempovlm.profiling import parts, processes, store
from tempovlm.profiling.entry import Share
from tempovlm.profiling.parts import Ledger
from tempovlm.profiling.sweep import run_sweep

COUNT = 13
BATCHED = replace(PLAN, batch_size=2, latency_samples=0)

SCRIPT = """
import os, sys, time
from pathlib import Path
sys.path[:0] = sys.argv[3].split(os.pathsep)
from tempovlm.core.errors import UserError
from tempovlm.profiling.entry import Share
share = Share.of_process()
import torch
torch.set_num_threads(1)
import tiny_model
from sweep_fakes import questions
from sweep_runs import ledger_of
from test_sweep_processes import BATCHED, COUNT
from tempovlm.engine.engine import Engine
from tempovlm.model.prompt import Tokenizer
from tempovlm.profiling import sweep
out, pictures = Path(sys.argv[1]), Path(sys.argv[2])
engine = Engine(tiny_model.build_model(), Tokenizer.load(pictures / "tiny" / "tokenizer.json"), name="tiny")
answer = sweep.answer_settings
def slow(*args):
    yield from answer(*args)
    time.sleep(float(os.environ.get("PAUSE_S", "0")))
sweep.answer_settings = slow
try:
    with ledger_of(engine, out, BATCHED, share.rank).opened(["text_vqa"]) as ledger:
        sweep.run_sweep(engine, {"text_vqa": questions(pictures, COUNT)}, BATCHED, ledger, share)
except UserError as error:
    sys.exit(f"error: {error}")
"""
"""Arguments: output directory, folder of pictures and model, paths to import from."""


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pictures")
    questions(folder, COUNT)
    tiny_model.save_folder(folder / "tiny")
    return folder


@pytest.fixture(scope="module")
def single(engine: Engine, pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> list[SweepRow]:
    """The rows of one process that was not interrupted."""
    return sweep(engine, tmp_path_factory.mktemp("single") / "out", pictures, BATCHED, COUNT)


@contextmanager
def started(out: Path, pictures: Path, world: int, pause_s: float = 0.0) -> Iterator[list[subprocess.Popen[str]]]:
    """All processes of a run; none outlives the block."""
    paths = [str(Path(__file__).parent), str(Path(tiny_model.__file__).parent)]
    words = [sys.executable, "-c", SCRIPT, str(out), str(pictures), os.pathsep.join(paths)]
    running = []
    try:
        for rank in range(world):
            own = {"RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_RANK": str(rank), "PAUSE_S": str(pause_s)}
            environment = {**os.environ, "OMP_NUM_THREADS": "1", **own}
            running.append(subprocess.Popen(words, env=environment, stderr=subprocess.PIPE, text=True))
        yield running
    finally:
        for process in running:
            process.kill()
            process.communicate()


def run_all(out: Path, pictures: Path, world: int) -> list[SweepRow]:
    with started(out, pictures, world) as running:
        errors = [process.communicate(timeout=120)[1] for process in running]
        assert [process.returncode for process in running] == [0] * world, errors
    assert not (out / store.PARTS).exists()
    return store.read_rows(out / "text_vqa.parquet")[0]


@pytest.mark.parametrize("world", [2, 4])
def test_rows_and_their_order_are_those_of_a_single_process(
    world: int, single: list[SweepRow], pictures: Path, tmp_path: Path
) -> None:
    assert run_all(tmp_path / "out", pictures, world) == single


def await_parts(out: Path, least: int) -> list[Path]:
    deadline = time.monotonic() + 120
    while len(found := list((out / store.PARTS / "text_vqa").glob("*.jsonl"))) < least:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return found


@pytest.mark.parametrize(("before", "after"), [(2, 2), (4, 2), (2, 1), (1, 4)])
def test_killed_in_the_middle_and_resumed_by_as_many_or_others(
    before: int, after: int, single: list[SweepRow], pictures: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    with started(out, pictures, before, pause_s=0.2) as running:
        await_parts(out, 3)
        for process in running:
            process.send_signal(signal.SIGKILL)
    done = len(await_parts(out, 3))
    assert done < 14, "seven batches at two tiers: the run was over before it was killed"
    assert run_all(out, pictures, after) == single


def test_the_first_process_tells_that_another_one_died(
    single: list[SweepRow], pictures: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    with started(out, pictures, 2, pause_s=0.2) as (first, second):
        await_parts(out, 3)
        second.send_signal(signal.SIGKILL)
        _, said = first.communicate(timeout=120)
        assert first.returncode == 1
    assert "error: process 1 ended before its share was done; what is done is kept" in said
    assert not (out / "text_vqa.parquet").exists()
    assert run_all(out, pictures, 2) == single


def test_every_process_refuses_other_conditions(engine: Engine, tmp_path: Path) -> None:
    with ledger_of(engine, tmp_path, rank=1).opened([]):
        pass
    other = replace(ledger_of(engine, tmp_path, rank=2), conditions=PLAN.conditions("val") | {"seed": 1})
    with pytest.raises(UserError, match=r"sweep\.json: field seed is 42, this run's is 1"), other.opened([]):
        pass
    hardware = replace(ledger_of(engine, tmp_path), stamp=replace(STAMP, hardware="another GPU"))
    with pytest.raises(UserError, match=r"field stamp\.hardware"), hardware.opened([]):
        pass


def test_a_process_that_outlived_its_run_is_not_joined_by_another(engine: Engine, tmp_path: Path) -> None:
    with (
        ledger_of(engine, tmp_path, rank=1).opened([]),
        pytest.raises(UserError, match="process 1 of an earlier run is still at work there"),
        ledger_of(engine, tmp_path, rank=1).opened([]),
    ):
        pass


def test_what_an_earlier_run_left_says_nothing(tmp_path: Path) -> None:
    """Whether it was done or killed; the present one may not have begun."""
    for word in (processes.AT_WORK, processes.DONE):
        (tmp_path / "1").write_bytes(word)
        assert not processes._is_done(tmp_path / "1", time.time() + 60)
    (tmp_path / "1").write_bytes(b"")
    assert not processes._is_done(tmp_path / "1", 0.0)
    assert not processes._is_done(tmp_path / "2", 0.0)
    with processes.at_work(tmp_path, 1):
        assert not processes._is_done(tmp_path / "1", 0.0)
        processes.say_done(tmp_path, 1)
        assert processes._is_done(tmp_path / "1", 0.0)
    assert processes._is_done(tmp_path / "1", 0.0)
    with processes.at_work(tmp_path, 1):
        pass
    with pytest.raises(UserError, match="process 1 ended before"):
        processes.wait_for(tmp_path, [1], 0.0)


def test_rows_that_no_process_made_are_missed(engine: Engine, tmp_path: Path) -> None:
    samples = {"text_vqa": questions(tmp_path, 4)}
    with ledger_of(engine, tmp_path / "out", rank=1).opened(["text_vqa"]) as ledger:
        run_sweep(engine, {"text_vqa": samples["text_vqa"][:1]}, PLAN, ledger, Share(1, 2))
    with (
        ledger_of(engine, tmp_path / "out").opened(["text_vqa"]) as ledger,
        pytest.raises(UserError, match="rows of text_vqa are missing, though all processes are done"),
    ):
        run_sweep(engine, samples, PLAN, ledger, Share(0, 2))


def test_a_manifest_that_came_meanwhile_is_compared(
    engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between the look and the writing another process writes its own."""
    theirs = replace(ledger_of(engine, tmp_path), conditions=PLAN.conditions("val") | {"seed": 1})
    write = parts.write_new

    def late(path: Path, data: str) -> bool:
        with monkeypatch.context() as patch:
            patch.setattr(parts, "write_new", write)
            with theirs.opened([]):
                return write(path, data)

    monkeypatch.setattr(parts, "write_new", late)
    with pytest.raises(UserError, match="field seed is 1, this run's is 42"):
        ledger_of(engine, tmp_path, rank=1)._check_manifest()


@pytest.mark.parametrize(("rank", "world"), [("2", "2"), ("-1", "2"), ("0", "0"), ("x", "2"), ("0", "two")])
def test_places_that_are_none(rank: str, world: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setenv("WORLD_SIZE", world)
    with pytest.raises(UserError, match=f"RANK={rank} WORLD_SIZE={world}"):
        Share.of_process()


def test_processes_of_one_machine_share_its_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TEMPOVLM_THREADS", raising=False)
    monkeypatch.setattr("tempovlm.engine.threads.physical_cores", lambda: 6)
    found = []
    for beside in ("", "1", "2", "4", "8", "many"):
        monkeypatch.setenv("LOCAL_WORLD_SIZE", beside)
        found.append(default_threads())
    assert found == [2, 2, 2, 1, 1, 2]


def test_merged_rows_follow_the_questions(engine: Engine, tmp_path: Path, single: list[SweepRow]) -> None:
    ledger: Ledger = ledger_of(engine, tmp_path)
    with ledger.opened([]):
        for row in reversed(single):
            ledger.add("text_vqa", [row])
        ledger.merge("text_vqa", [f"q{i}" for i in range(COUNT)])
    merged = store.read_rows(tmp_path / "text_vqa.parquet")[0]
    assert merged == single
    assert list(dict.fromkeys(row.question_id for row in merged)) == [f"q{i}" for i in range(COUNT)]
