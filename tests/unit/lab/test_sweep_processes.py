"""Sweeps of several processes, as `torchrun` starts them: the rows of a single one, killed and resumed or not."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from sweep_fakes import STAMP, questions
from sweep_runs import PLAN, ledger_of, sweep

import tiny_model
from tempovlm.core.errors import UserError
from tempovlm.core.records import SweepRow
from tempovlm.engine.engine import Engine
from tempovlm.lab.core_exp import ledger as ledgers
from tempovlm.lab.core_exp import processes, store
from tempovlm.lab.core_exp.ledger import Ledger
from tempovlm.lab.core_exp.processes import Share
from tempovlm.lab.core_exp.sweep import run_sweep

COUNT = 13
BATCHED = replace(PLAN, batch_size=2, latency_samples=0)

SCRIPT = """
import gc, json, os, sys, time
from pathlib import Path
sys.path[:0] = sys.argv[2].split(os.pathsep)
import pandas, pyarrow.parquet, rich.progress, PIL.PngImagePlugin, PIL.JpegImagePlugin
import torch
torch.set_num_threads(1)
import tiny_model
from sweep_fakes import questions
from sweep_runs import ledger_of
from test_sweep_processes import BATCHED, COUNT
from tempovlm.core.errors import UserError
from tempovlm.engine.engine import Engine
from tempovlm.model.prompt import Tokenizer
from tempovlm.lab.core_exp import sweep
from tempovlm.lab.core_exp.processes import Share
pictures = Path(sys.argv[1])
engine = Engine(tiny_model.build_model(), Tokenizer.load(pictures / "tiny" / "tokenizer.json"), name="tiny")
answer = sweep.answer_settings

def run(out, stop_at):
    made = 0
    def until_stopped(*args):
        nonlocal made
        while made == stop_at:
            time.sleep(0.01)
        made += 1
        yield from answer(*args)
    sweep.answer_settings = until_stopped
    share = Share.of_process()
    try:
        with ledger_of(engine, out, BATCHED, share.rank).opened(["text_vqa"]) as ledger:
            sweep.run_sweep(engine, {"text_vqa": questions(pictures, COUNT)}, BATCHED, ledger, share)
    except UserError as error:
        sys.stderr.write(f"error: {error}")
        return 2
    return 0

gc.freeze()  # else each fork copies and collects what was imported
for line in sys.stdin:
    job = json.loads(line)
    pids = []
    for rank in range(len(job["stop_at"])):
        pids.append(os.fork())
        if pids[-1] == 0:
            code = 1
            try:
                os.environ.update(RANK=str(rank), WORLD_SIZE=str(len(job["stop_at"])))
                os.dup2(os.open(f"{job['out']}.{rank}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
                code = run(Path(job["out"]), job["stop_at"][rank])
            finally:
                os._exit(code)
    print(json.dumps(pids), flush=True)
    print(json.dumps([os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]), flush=True)
"""
"""Loads once, and forks the processes of each job. Arguments: pictures, paths to import from."""


class Launcher:
    """Starts sweeps of several processes, as `torchrun` would."""

    def __init__(self, pictures: Path) -> None:
        paths = [str(Path(__file__).parent), str(Path(tiny_model.__file__).parent)]
        words = [sys.executable, "-c", SCRIPT, str(pictures), os.pathsep.join(paths)]
        self.process = subprocess.Popen(
            words,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def start(self, out: Path, stop_at: list[int | None]) -> list[int]:
        """The numbers of the processes; each stops by itself before it has made more parts, or never."""
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps({"out": str(out), "stop_at": stop_at}) + "\n")
        self.process.stdin.flush()
        return self.codes()

    def codes(self) -> list[int]:
        """How each of them ended."""
        assert self.process.stdout is not None
        return json.loads(self.process.stdout.readline())

    def rows(self, out: Path, world: int) -> list[SweepRow]:
        """What a run that nobody interrupts leaves."""
        self.start(out, [None] * world)
        codes = self.codes()
        assert codes == [0] * world, [out.with_name(f"{out.name}.{rank}").read_text() for rank in range(world)]
        assert not (out / store.PARTS).exists()
        return store.read_rows(out / "text_vqa.parquet")[0]


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


@pytest.fixture(scope="module")
def launcher(pictures: Path) -> Iterator[Launcher]:
    one = Launcher(pictures)
    yield one
    os.killpg(one.process.pid, signal.SIGKILL)  # those that stopped by themselves too
    one.process.communicate()


@pytest.mark.parametrize("world", [2, 4])
def test_rows_and_their_order_are_those_of_a_single_process(
    world: int, single: list[SweepRow], launcher: Launcher, tmp_path: Path
) -> None:
    assert launcher.rows(tmp_path / "out", world) == single


def await_parts(out: Path, count: int) -> None:
    """Return once so many of the 14 parts (seven batches at two tiers) are there."""
    deadline = time.monotonic() + 120
    while (found := len(list((out / store.PARTS / "text_vqa").glob("*.jsonl")))) < count:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert found == count


@pytest.mark.parametrize(("before", "each", "after"), [(2, 3, 2), (4, 1, 2), (2, 3, 1), (1, 3, 4)])
def test_killed_in_the_middle_and_resumed_by_as_many_or_others(
    before: int, each: int, after: int, single: list[SweepRow], launcher: Launcher, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    pids = launcher.start(out, [each] * before)
    await_parts(out, before * each)
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
    assert launcher.codes() == [-signal.SIGKILL] * before
    await_parts(out, before * each)
    assert launcher.rows(out, after) == single


def test_the_first_process_tells_that_another_one_died(
    single: list[SweepRow], launcher: Launcher, tmp_path: Path
) -> None:
    """The first has made its seven parts and waits."""
    out = tmp_path / "out"
    pids = launcher.start(out, [None, 2])
    await_parts(out, 7 + 2)
    os.kill(pids[1], signal.SIGKILL)
    assert launcher.codes() == [2, -signal.SIGKILL]
    assert (
        "error: process 1 ended before its share was done; what is done is kept"
        in (tmp_path / "out.0").read_text()
    )
    assert not (out / "text_vqa.parquet").exists()
    assert launcher.rows(out, 2) == single


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
    with ledger_of(engine, tmp_path / "out").opened(["text_vqa"]) as first:
        with ledger_of(engine, tmp_path / "out", rank=1).opened(["text_vqa"]) as second:
            run_sweep(engine, {"text_vqa": samples["text_vqa"][:1]}, PLAN, second, Share(1, 2))
        with pytest.raises(UserError, match="rows of text_vqa are missing, though all processes are done"):
            run_sweep(engine, samples, PLAN, first, Share(0, 2))


def test_a_manifest_that_came_meanwhile_is_compared(
    engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between the look and the writing another process writes its own."""
    theirs = replace(ledger_of(engine, tmp_path), conditions=PLAN.conditions("val") | {"seed": 1})
    write = ledgers.write_if_absent

    def late(path: Path, data: str) -> bool:
        with monkeypatch.context() as patch:
            patch.setattr(ledgers, "write_if_absent", write)
            with theirs.opened([]):
                return write(path, data)

    monkeypatch.setattr(ledgers, "write_if_absent", late)
    with pytest.raises(UserError, match="field seed is 1, this run's is 42"):
        ledger_of(engine, tmp_path, rank=1)._check_manifest()


@pytest.mark.parametrize(("rank", "world"), [("2", "2"), ("-1", "2"), ("0", "0"), ("x", "2"), ("0", "two")])
def test_places_that_are_none(rank: str, world: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setenv("WORLD_SIZE", world)
    with pytest.raises(UserError, match=f"RANK={rank} WORLD_SIZE={world}"):
        Share.of_process()


def test_merged_rows_follow_the_questions(engine: Engine, tmp_path: Path, single: list[SweepRow]) -> None:
    ledger: Ledger = ledger_of(engine, tmp_path)
    with ledger.opened([]):
        for row in reversed(single):
            ledger.add("text_vqa", [row])
        ledger.merge("text_vqa", [f"q{i}" for i in range(COUNT)])
    merged = store.read_rows(tmp_path / "text_vqa.parquet")[0]
    assert merged == single
    assert list(dict.fromkeys(row.question_id for row in merged)) == [f"q{i}" for i in range(COUNT)]


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Time passes at once; a wait is interrupted after three times what passes without a word."""
    steps: list[float] = []

    def passed(step_s: float) -> None:
        steps.append(step_s)
        if len(steps) == 3 * round(processes.NOTICE_AFTER_S / processes.POLL_S):
            raise KeyboardInterrupt

    monkeypatch.setattr(processes.time, "sleep", passed)


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize("left", [None, processes.AT_WORK, processes.DONE])
def test_who_does_not_appear_is_named_once(
    left: bytes | None, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Whether or not an earlier run left a file of that process."""
    if left is not None:
        (tmp_path / "1").write_bytes(left)
    with pytest.raises(KeyboardInterrupt):
        processes.wait_for(tmp_path, [1], time.time() + 60)
    assert [record.message for record in caplog.records] == ["process 1 has not begun its share; was it started?"]


@pytest.mark.usefixtures("impatient")
def test_who_works_slowly_is_waited_for_without_a_word(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with processes.at_work(tmp_path, 1), pytest.raises(KeyboardInterrupt):
        processes.wait_for(tmp_path, [1], 0.0)
    assert not caplog.records


@pytest.mark.usefixtures("impatient")
def test_a_first_process_that_does_not_appear_is_named_once(
    engine: Engine, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(KeyboardInterrupt):
        ledger_of(engine, tmp_path, rank=1).await_first()
    assert [record.message for record in caplog.records] == [
        f"{tmp_path}: process 0 has not opened it; was it started?"
    ]
