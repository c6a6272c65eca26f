"""Exp 8's script: a smoke run on a tiny model, resuming, and the file that it writes."""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from scripts import script
from torch import nn

import tiny_model
from tempovlm.control.checkpoint import save_controller
from tempovlm.control.learned.llm_based import LLMBasedController
from tempovlm.control.learned.networks import Knob1PredictorBudgetLanguageGlance, SupervisedController
from tempovlm.control.learned.observation import vision_width
from tempovlm.core.errors import UserError
from tempovlm.lab import exp8_adaptive as adaptive
from tempovlm.lab.bench import bench
from tempovlm.lab.bench.summary import Record
from tempovlm.testbed.bed import Bed
from timings import UNTOLD_MS, Ticks, untold_ms

SCRIPT = "controller/test_adaptive_inference"
SPACE = tiny_model.SPACE


def words(folder: Path, bed: Path, out: Path, *more: str) -> list[str]:
    base = [
        "--model_path",
        str(folder),
        "--dataset",
        "text_vqa",
        "okvqa",
        "--data_dir",
        str(bed),
        "--device",
        "cpu",
    ]
    return [*base, "--num_samples", "4", "--max_new_tokens", "2", "--output_path", str(out), *more]


def samples_of(result: dict[str, Any]) -> list[dict[str, Any]]:
    """The samples of a result file, a record each."""
    kept = result["samples"]
    return [kept["same"] | dict(zip(kept["columns"], row, strict=True)) for row in kept["rows"]]


@pytest.fixture(autouse=True)
def _any_machine(ticks: Ticks) -> None:
    """Whether a budget is met hangs on what was done, not on this machine."""


def untold_of(sample: dict[str, Any]) -> float:
    """What of its total no stage has."""
    prefix = "timings_ms."
    return untold_ms({name.removeprefix(prefix): v for name, v in sample.items() if name.startswith(prefix)})


def test_a_checkpoint_answers_within_its_budgets(
    tiny_folder: Path,
    small_bed: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("tempovlm.engine.calibration.stored_profile", lambda *_: tiny_model.make_profile())
    sizes = {"num_top_ks": len(SPACE.top_ks), "num_block_counts": len(SPACE.block_counts)}
    network = SupervisedController(16, len(SPACE.tiers), **sizes)
    path, out = tmp_path / "best.pt", tmp_path / "results" / "out.json"
    save_controller(path, kind="supervised", networks={"controller": network}, space=SPACE)
    more = ["--controller_path", str(path), "--latency_budget", "5000", "0.001", "5000"]
    script(SCRIPT).main(words(tiny_folder, small_bed, out, *more))
    result = json.loads(out.read_text())
    assert result["bed"] == Bed.read(small_bed).to_json()
    tight, loose = result["budgets"]
    assert (tight["budget_ms"], loose["budget_ms"]) == pytest.approx((0.001, 5000.0))
    assert (tight["adherence"], loose["adherence"]) == pytest.approx((0.0, 1.0))
    assert (tight["feasible_share"], loose["feasible_share"]) == pytest.approx((0.0, 1.0))
    assert tight["knobs"] == pytest.approx({str(SPACE.cheapest): 1.0})
    assert loose["mean_ms"] > 0
    assert sum(loose["knob_shares"]["tier"].values()) == pytest.approx(1.0)
    assert loose["stopped"]["num"] == 0
    assert result["controller"] == str(path)
    assert result["stamp"]["data_source"] == result["data_source"] == "synthetic"
    samples = samples_of(result)
    assert len(samples) == 8
    assert [*map(untold_of, samples)] == pytest.approx([UNTOLD_MS] * len(samples), abs=1e-3)
    assert all({"knobs", "prediction", "score"} <= set(sample) for sample in samples)
    assert {sample["dataset"] for sample in samples} == {"text_vqa", "okvqa"}
    printed = capsys.readouterr().out
    assert "on time" in printed
    assert printed.endswith(f"{out}\n")
    assert [path.name for path in out.parent.iterdir()] == ["out.json"]


@pytest.mark.parametrize("kind", ["llm_based", "two_stage_stage1"])
def test_checkpoints_that_glance(
    tiny_folder: Path, small_bed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    monkeypatch.setattr("tempovlm.engine.calibration.stored_profile", lambda *_: tiny_model.make_profile())
    width, sizes = tiny_model.CONFIG.width, {"num_top_ks": len(SPACE.top_ks)}
    networks: dict[str, nn.Module] = {
        "controller": LLMBasedController(width, 16, num_block_counts=len(SPACE.block_counts), **sizes)
    }
    if kind == "two_stage_stage1":
        networks = {"knob1": Knob1PredictorBudgetLanguageGlance(width, vision_width(width), 16)}
    path, out = tmp_path / "best.pt", tmp_path / "out.json"
    save_controller(path, kind=kind, networks=networks, space=SPACE)
    more = ["--controller_path", str(path), "--latency_budget", "5000", "0.001"]
    script(SCRIPT).main(words(tiny_folder, small_bed, out, *more))
    result = json.loads(out.read_text())
    assert [row["feasible_share"] for row in result["budgets"]] == pytest.approx([0.0, 1.0])
    samples = samples_of(result)
    assert [*map(untold_of, samples)] == pytest.approx([UNTOLD_MS] * len(samples), abs=1e-3)
    assert all(sample["timings_ms.control"] > 0 for sample in samples)


def test_an_interrupted_run_answers_only_the_rest(
    tiny_folder: Path, small_bed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, asked = tmp_path / "out.json", []
    whole = bench.measure

    def until_third(model: Any, samples: Any, plan: Any) -> Any:
        asked.extend(sample.question_id for sample in samples)
        if len(asked) == 3:
            raise KeyboardInterrupt
        return whole(model, samples, plan)

    monkeypatch.setattr(bench, "measure", until_third)
    more = ["--controller_path", "fixed", "--latency_budget", "5000"]
    with pytest.raises(KeyboardInterrupt):
        script(SCRIPT).main(words(tiny_folder, small_bed, out, *more))
    assert not out.exists()
    with (tmp_path / ".out.json.records.jsonl").open("ab") as file:
        file.write(b'{"run": "budg\xff')
    with pytest.raises(UserError, match="another max_new_tokens"):
        script(SCRIPT).main(words(tiny_folder, small_bed, out, *more, "--max_new_tokens", "1"))
    script(SCRIPT).main(words(tiny_folder, small_bed, out, *more))
    assert len(asked) == 5
    assert asked[3:] == [asked[2], asked[4]]
    samples = samples_of(json.loads(out.read_text()))
    assert len({(s["dataset"], s["question_id"]) for s in samples}) == len(samples) == 4


def test_a_run_that_waited_for_another_begins_anew(
    tiny_folder: Path, small_bed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, kept = tmp_path / "out.json", tmp_path / ".out.json.records.jsonl"

    @contextlib.contextmanager
    def waited() -> Iterator[bool]:
        kept.unlink(missing_ok=True)  # as the other process does at its end
        yield True

    def interrupted(*_: Any) -> Any:
        assert "conditions" in kept.read_text().splitlines()[0]
        raise KeyboardInterrupt

    monkeypatch.setattr(adaptive, "machine_lock", waited)
    more = ["--controller_path", "fixed", "--latency_budget", "5000"]
    with monkeypatch.context() as patch:
        patch.setattr(bench, "measure", interrupted)
        with pytest.raises(KeyboardInterrupt):
            script(SCRIPT).main(words(tiny_folder, small_bed, out, *more))
    script(SCRIPT).main(words(tiny_folder, small_bed, out, *more))
    assert len(samples_of(json.loads(out.read_text()))) == 4


def test_nothing_is_kept_where_every_question_failed(
    tiny_folder: Path, small_bed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, whole = tmp_path / "out.json", bench.measure

    def without_picture(model: Any, samples: Any, plan: Any) -> Any:
        return whole(model, [replace(sample, image_path=Path("gone.png")) for sample in samples], plan)

    more = ["--controller_path", "fixed", "--latency_budget", "5000"]
    with monkeypatch.context() as patch:
        patch.setattr(bench, "measure", without_picture)
        with pytest.raises(UserError, match=r"all \d+ answers failed.* gone\.png.*asks everything again"):
            script(SCRIPT).main(words(tiny_folder, small_bed, out, *more))
    script(SCRIPT).main(words(tiny_folder, small_bed, out, *more))
    assert json.loads(out.read_text())["num_failed"] == 0


def test_columns_lose_nothing_that_the_data_do_not_have() -> None:
    kept = {"run": "budget", "dataset": "okvqa", "image_id": "1", "budget_ms": 60.0}
    data = {"question": "what?", "references": ("dog",), "picture": "a.jpg"}
    done = Record(question_id="1", knobs="low/k4/b8", timings_ms={"decode": 2.0, "total": 40.5}, **kept, **data)
    failed = Record(question_id="2", error="no picture", **kept, **data)
    result = json.loads(adaptive.as_text({"seed": 1, "samples": adaptive.as_columns([done, failed])}))
    assert result["seed"] == 1
    assert result["samples"]["same"].items() >= kept.items()
    for record, sample in zip((done, failed), samples_of(result), strict=True):
        times = {name.partition(".")[2]: v for name, v in sample.items() if "." in name and v is not None}
        assert times == record.timings_ms
        others = {name: v for name, v in sample.items() if "." not in name}
        assert others | {"timings_ms": times} | data == record.to_json()


def test_stopped_answers_are_reported_apart(tiny_folder: Path, small_bed: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    more = ["--controller_path", "fixed", "--latency_budget", "0.001", "--on_deadline", "stop"]
    script(SCRIPT).main(words(tiny_folder, small_bed, out, *more, "--max_new_tokens", "6"))
    row = json.loads(out.read_text())["budgets"][0]
    assert row["stopped"]["num"] == row["num_samples"] == 4
    assert row["stopped"]["adherence"] == pytest.approx(0.0)


@pytest.mark.parametrize(
    ("more", "named"),
    [
        (["--controller_path", "absent.pt"], "--controller_path absent.pt: no such file"),
        (["--latency_budget", "nan"], "--latency_budget nan"),
        (["--latency_budget", "100", "-5"], "--latency_budget -5"),
        (["--latency_budget", "soon"], "latency_budget"),
        (["--dataset", "imagenet"], "--dataset imagenet: unknown data set"),
        (["--num_samples", "0"], "--num_samples 0"),
        (["--device", "cuda:x"], "--device cuda:x"),
        (["--data_dir", "absent"], "absent"),
        (["--on_deadline", "run"], "on_deadline"),
        (["--output_path", ""], r"--output_path \.: a folder"),
        (["--output_path", "/tmp"], "--output_path /tmp: a folder"),
        (["--output_path", "/dev/null/x/y.json"], "--output_path /dev/null/x: cannot be made"),
    ],
)
def test_bad_input_is_named(
    tiny_folder: Path, small_bed: Path, tmp_path: Path, more: list[str], named: str
) -> None:
    with pytest.raises(UserError) as caught:
        script(SCRIPT).main(
            words(tiny_folder, small_bed, tmp_path / "o.json", "--controller_path", "fixed", *more)
        )
    assert re.search(named, caught.value.flagged)


def test_defaults_are_those_of_the_protocol() -> None:
    args = script(SCRIPT).flags().parse_args([])
    assert (args.datasets, args.num_samples, args.budgets_ms) == (("text_vqa",), 100, pytest.approx((200.0,)))
    path = adaptive.default_path(args.datasets, args.budgets_ms)
    assert path == Path("results/adaptive_inference/text_vqa_200.json")


def stopped_after(count: int, whole: Any, path: Path | None = None) -> Any:
    """`bench.measure` that is killed at the question after so many; the last of them cannot see its picture."""
    done = 0

    def measure(model: Any, samples: Any, plan: Any) -> Any:
        nonlocal done
        if done == count:
            raise KeyboardInterrupt
        done += 1
        if done == count and path is not None:
            samples = [replace(one, image_path=path) for one in samples]
        return whole(model, samples, plan)

    return measure


def test_an_interrupted_run_goes_on_with_its_questions_and_asks_failed_ones_again(
    tiny_folder: Path, small_bed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, main = tmp_path / "out.json", script(SCRIPT).main
    more = ["--controller_path", "fixed", "--latency_budget", "5000"]
    given = words(tiny_folder, small_bed, out, *more)
    with monkeypatch.context() as patch:
        patch.setattr(bench, "measure", stopped_after(2, bench.measure, tmp_path / "gone.png"))
        with pytest.raises(KeyboardInterrupt):
            main(given)
    others, load = tmp_path / "others.png", adaptive.load_mixed
    others.write_bytes(b"another picture")

    def of_other_data(*args: Any, **options: Any) -> Any:
        return [replace(sample, image_path=others) for sample in load(*args, **options)]

    with monkeypatch.context() as patch:
        patch.setattr(adaptive, "load_mixed", of_other_data)
        with pytest.raises(
            UserError, match=r"records\.jsonl: the picture of question .* \(1 of \d+ questions differ"
        ):
            main(given)
    asked, whole = list[str](), bench.measure

    def noted(model: Any, samples: Any, plan: Any) -> Any:
        asked.extend(sample.question_id for sample in samples)
        return whole(model, samples, plan)

    monkeypatch.setattr(bench, "measure", noted)
    main(given)
    result = json.loads(out.read_text())
    assert result["num_failed"] == 0
    ids = [sample["question_id"] for sample in samples_of(result)]
    assert len(asked) == len(ids) - 1, "all but the one that was answered"
    assert set(asked) < set(ids)
