from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pytest
import torch
from scripts import ROOT, script

from preloaded import Preloaded
from tempovlm.core.errors import UserError
from tempovlm.data.sample import Sample
from tempovlm.lab.core_exp import store, sweep
from tempovlm.lab.core_exp.plan import SweepPlan
from tempovlm.lab.core_exp.processes import Share
from tempovlm.lab.core_exp.questions import MANIFEST
from tempovlm.lab.script import FlagParser, flag, options_from, required, run
from tempovlm.testbed.bed import Bed

SCRIPT = "core_exp/run_core_experiment"
FILE = ROOT / "experiments" / f"{SCRIPT}.py"
PLAN = SweepPlan(settings=())
FEW = ["--tiers", "low", "--top_k", "8", "--num_blocks", "8", "16"]


def words(bed: Path, out: Path, *more: str) -> list[str]:
    base = ["--model_path", "pocket", "--dataset_names", "text_vqa", "--data_dir", str(bed), "--device", "cpu"]
    return [*base, "--output_dir", str(out), "--num_samples", "2", *FEW, *more]


def test_a_sweep_on_the_pocket(small_bed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main, out = script(SCRIPT).main, tmp_path / "out"
    main(words(small_bed, out, "--latency_samples", "1", "--repeats", "2"))
    assert capsys.readouterr().out == f"{out / 'text_vqa.parquet'}\n"
    rows, stamp = store.read_rows(out / "text_vqa.parquet")
    assert len(rows) == 4
    assert sum(row.is_measured for row in rows) == 2
    assert (stamp.model, stamp.data_source) == ("pocket", "synthetic")
    assert json.loads((out / MANIFEST).read_text())["bed"] == Bed.read(small_bed).to_json()
    main(words(small_bed, tmp_path / "json", "--format", "json"))
    assert len(store.read_results([tmp_path / "json"], ["text_vqa"])) == 4
    with pytest.raises(UserError, match="field seed is 42, this run's is 7"):
        main(words(small_bed, out, "--seed", "7"))


def test_twins_are_other_pictures_of_the_same_questions(
    small_bed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Path] = []
    run = sweep.run_sweep

    def watched(engine: object, datasets: dict[str, list[Sample]], *more: object) -> list[Path]:
        seen.extend(sample.image_path for sample in datasets["text_vqa"])
        return run(engine, datasets, *more)  # type: ignore[arg-type]

    monkeypatch.setattr(sweep, "run_sweep", watched)
    main = script(SCRIPT).main
    main(words(small_bed, tmp_path / "one"))
    main(words(small_bed, tmp_path / "two", "--twins"))
    own, twins = seen[:2], seen[2:]
    assert [path.parent.name for path in twins] == ["twins", "twins"]
    assert [path.name for path in twins] == [path.name for path in own]
    ids = [
        [row.question_id for row in store.read_rows(tmp_path / n / "text_vqa.parquet")[0]] for n in ("one", "two")
    ]
    assert ids[0] == ids[1]
    with pytest.raises(UserError, match="field twins"):
        main(words(small_bed, tmp_path / "two"))
    with pytest.raises(UserError, match=r"--twins: .* has no twin"):
        main(words(small_bed, tmp_path / "three", "--twins", "--split", "train"))


def test_resumes_after_a_kill(small_bed: Path, tmp_path: Path, preloaded: Preloaded) -> None:
    out = tmp_path / "out"
    given = words(small_bed, out, "--batch_size", "1", "--latency_samples", "2", "--repeats", "50")
    process = preloaded.start(FILE, *given, cwd=tmp_path, env={"TEMPOVLM_THREADS": "1"})
    try:
        deadline = time.monotonic() + 120
        while not list((out / store.PARTS).glob("*/*.jsonl")) and not (out / "text_vqa.parquet").exists():
            assert time.monotonic() < deadline
            time.sleep(0.01)
    finally:
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    done = {path.name for path in (out / store.PARTS).glob("*/*.jsonl")}
    assert done or (out / "text_vqa.parquet").exists()
    script(SCRIPT).main(words(small_bed, out, "--latency_samples", "2", "--repeats", "1"))
    rows, _ = store.read_rows(out / "text_vqa.parquet")
    assert len({row.key for row in rows}) == len(rows) == 4
    assert all(row.is_measured for row in rows)
    assert not (out / store.PARTS).exists()


def test_processes_write_one_file_like_a_single_one(
    small_bed: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    preloaded: Preloaded,
) -> None:
    main, one, two = script(SCRIPT).main, tmp_path / "one", tmp_path / "two"
    main(words(small_bed, one, "--batch_size", "1"))
    capsys.readouterr()
    given = words(small_bed, two, "--batch_size", "1")
    places = [{"TEMPOVLM_THREADS": "1", "WORLD_SIZE": "2", "RANK": rank} for rank in "01"]
    started = [preloaded.start(FILE, *given, cwd=tmp_path, env=place) for place in places]
    ended = [process.wait() for process in started]
    assert [process.returncode for process in ended] == [0, 0], [process.stderr for process in ended]
    assert [process.stdout for process in ended] == [f"{two / 'text_vqa.parquet'}\n", ""]
    assert store.read_rows(two / "text_vqa.parquet")[0] == store.read_rows(one / "text_vqa.parquet")[0]
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(UserError, match="field seed is 42, this run's is 7"):
        main(words(small_bed, two, "--seed", "7"))


@pytest.mark.parametrize(
    ("more", "named"),
    [
        (["--dataset_names", "imagenet"], "--dataset_names imagenet: unknown data set"),
        (["--num_samples", "0"], "--num_samples 0: must be at least 1"),
        (["--repeats", "0"], "--repeats 0"),
        (["--max_new_tokens", "0"], "--max_new_tokens 0"),
        (["--warmup", "-1"], "--warmup -1"),
        (["--latency_samples", "-1"], "--latency_samples -1"),
        (["--num_samples", "many"], "--num_samples: invalid int value: 'many'"),
        (["--split", "test"], "invalid choice: 'test'"),
        (["--datasets", "text_vqa"], "unrecognized arguments: --datasets"),
        (["--tiers", "huge"], "--tier huge: not in the knob space"),
        (["--latency_only"], "--latency_only: nothing would be run; give --latency_samples"),
        (["--model_path", "nowhere"], "nowhere: no such model"),
        (["--dataset_names", "coco_caption"], "--dataset_names coco_caption: captions are scored many at once"),
        (["--data_dir", "/nowhere"], "no folder /nowhere/text_vqa"),
    ],
)
def test_bad_flags_are_named(
    more: list[str], named: str, tiny_folder: Path, small_bed: Path, tmp_path: Path
) -> None:
    tiny = ["--model_path", str(tiny_folder), "--top_k", "4", "--num_blocks", "6"]
    with pytest.raises(UserError) as caught:
        script(SCRIPT).main(words(small_bed, tmp_path / "out", *tiny, *more))
    assert named in caught.value.flagged
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (UserError("x:\nwrong"), 2, "error: x: wrong\n"),
        (KeyboardInterrupt(), 130, "error: interrupted; run the same command again to resume\n"),
        (ModuleNotFoundError("no", name="pyarrow.parquet"), 2, "error: needs pyarrow, which is not installed: "),
    ],
)
def test_failures_take_one_line(
    error: BaseException, code: int, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    def main(_argv: list[str]) -> None:
        raise error

    with pytest.raises(SystemExit) as caught:
        run(main)
    out, err = capsys.readouterr()
    assert (caught.value.code, out) == (code, "")
    assert err.startswith(message)
    assert err.count("\n") == 1


def test_a_missing_module_of_our_own_is_a_bug() -> None:
    def main(_argv: list[str]) -> None:
        raise ModuleNotFoundError("no", name="tempovlm.nowhere")

    with pytest.raises(ModuleNotFoundError):
        run(main)


def test_flags_are_the_fields_of_dataclasses() -> None:
    @dataclass(frozen=True, kw_only=True)
    class Own:
        batch_size: int = flag(33, "questions of a batch")
        seed: int = PLAN.seed
        names: Sequence[str] = required("names", "--all_names")
        kind: Literal["a", "b"] | None = flag(None, "kind; default: both")
        is_loud: bool = flag(True, "whether to tell")

    parser = FlagParser("A script.\n\nMore about it.", Own, SweepPlan)
    args = parser.parse_args(["--all_names", "x", "y", "--no-is_loud", "--max_new_tokens", "3", "4"])
    assert (args.batch_size, args.repeats, args.twins) == (33, PLAN.repeats, False)
    assert (args.names, args.kind, args.is_loud) == (["x", "y"], None, False)
    plan = options_from(SweepPlan, {**vars(args), "settings": [], "warmup": None})
    assert (plan.max_new_tokens, plan.warmup, plan.settings) == ((3, 4), PLAN.warmup, ())
    told = " ".join(parser.format_help().split())
    assert "More about it" not in told
    assert "questions of a batch (default: 33)" in told
    assert "kind; default: both" in told
    assert "timed at batch 1 (default: 0)" in told
    assert "--seed" not in told
    for words, message in (
        ([], "--all_names"),
        (["--all_names", "x", "--kind", "c"], "choose from"),
        (["--al", "x"], "--all_names"),
    ):
        with pytest.raises(UserError, match=message):
            parser.parse_args(words)


def test_processes_of_torchrun(monkeypatch: pytest.MonkeyPatch) -> None:
    assert Share.of_process() == Share(0, 1)
    for name, value in (("RANK", "3"), ("WORLD_SIZE", "4"), ("LOCAL_RANK", "3")):
        monkeypatch.setenv(name, value)
    share = Share.of_process()
    assert share == Share(3, 4)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    assert [share.device(name) for name in ("cuda", "cpu", "cuda:1")] == ["cuda:3", "cpu", "cuda:1"]
    assert share.device("auto") == ("cuda:3" if torch.cuda.is_available() else "cpu")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert share.device("cuda") == "cuda:1", "several processes share a GPU"
