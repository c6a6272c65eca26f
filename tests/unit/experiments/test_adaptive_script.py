"""Exp 8's script: a smoke run on a tiny model, resuming, and the file that it writes."""

from __future__ import annotations

import contextlib
import json
import re
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from scripts import script
from torch import nn

import tiny_model
from stamps import STAMP
from tempovlm.control.checkpoint import save_controller
from tempovlm.control.learned.llm_based import LLMBasedController
from tempovlm.control.learned.networks import Knob1PredictorBudgetLanguageGlance, SupervisedController
from tempovlm.control.learned.observation import vision_width
from tempovlm.core.errors import UserError
from tempovlm.lab import exp8_adaptive as adaptive
from tempovlm.lab.bench import bench
from tempovlm.lab.bench.summary import Record
from tempovlm.lab.core_exp import store
from tempovlm.lab.core_exp.parquet import read_schema
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


def records_of(out: Path) -> list[Record]:
    """The records beside a result file, which says where they are and how many."""
    told = json.loads(out.read_text())["records"]
    records = adaptive.read_records(out.parent / told["file"])
    assert len(records) == told["count"]
    return records


@pytest.fixture(autouse=True)
def _any_machine(ticks: Ticks) -> None:
    """Whether a budget is met hangs on what was done, not on this machine."""


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
    records = records_of(out)
    assert len(records) == 8
    assert [untold_ms(r.timings_ms) for r in records] == pytest.approx([UNTOLD_MS] * 8, abs=1e-3)
    assert all(r.knobs and r.prediction and r.score is not None for r in records)
    assert {r.dataset for r in records} == {"text_vqa", "okvqa"}
    printed = capsys.readouterr().out
    assert "on time" in printed
    assert printed.endswith(f"{out}\n")
    assert sorted(path.name for path in out.parent.iterdir()) == ["out.json", "out.parquet"]


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
    records = records_of(out)
    assert [untold_ms(r.timings_ms) for r in records] == pytest.approx([UNTOLD_MS] * 8, abs=1e-3)
    assert all(r.timings_ms["control"] > 0 for r in records)


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
    records = records_of(out)
    assert len({(r.dataset, r.question_id) for r in records}) == len(records) == 4


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
    assert len(records_of(out)) == 4


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


QUESTION = {"question": "what?", "references": ("dog",), "picture": "a.jpg"}
RECORDS = [
    Record(
        **{"run": "budget", "dataset": "okvqa", "question_id": "007", "image_id": "okvqa/1", "budget_ms": 60.0},
        **{"prediction": "un café", "score": 0.3333, "knobs": "low/k4/b8", "policy": "table"},
        **{"feasible": True, "slower_existed": True, "num_output_tokens": 3, "finish_reason": "stop"},
        **{"predicted_p50_ms": 38.1, "predicted_upper_ms": 1234.5678},
        timings_ms={"queue": 0.0, "decode": 0.1, "total": 1234567.8901},
    ),
    Record(run="budget", dataset="okvqa", question_id="2", image_id="okvqa/1", budget_ms=0.5, error="no picture"),
    Record(
        **{"run": "budget", "dataset": "coco_caption", "question_id": "3", "image_id": "coco_caption/3"},
        **{"budget_ms": None, "score": None, "feasible": False, "timings_ms": {"prefill": 2.0, "total": 40.5}},
    ),
]


def with_types(record: Record) -> dict[str, tuple[type, Any]]:
    """The values of a record with their types: 1, 1.0 and True are equal in Python."""
    fields = record.to_json()
    fields |= fields.pop("timings_ms")
    return {name: (type(value), value) for name, value in fields.items()}


def test_records_are_read_as_they_were_measured(tmp_path: Path) -> None:
    asked = [replace(record, **QUESTION) for record in RECORDS]
    long = replace(asked[0], predicted_p50_ms=38.10004, timings_ms={**asked[0].timings_ms, "decode": 0.10004})
    adaptive.write(tmp_path / "a.b.json", {"seed": 1}, [long, *asked[1:]], STAMP)
    result = json.loads((tmp_path / "a.b.json").read_text())
    assert result == {"seed": 1, "records": {"file": "a.b.parquet", "count": 3}}
    assert [*map(with_types, records_of(tmp_path / "a.b.json"))] == [*map(with_types, RECORDS)]
    assert store.read_stamp(tmp_path / "a.b.parquet") == STAMP


def test_columns_have_the_types_that_their_values_have(tmp_path: Path) -> None:
    adaptive.write(tmp_path / "a.json", {}, [replace(RECORDS[1], error="x")], STAMP)
    (types,) = {tuple(map(str, read_schema(path).types)) for path in tmp_path.glob("*.parquet")}
    adaptive.write(tmp_path / "a.json", {}, RECORDS, STAMP)
    columns = read_schema(tmp_path / "a.parquet")
    assert tuple(map(str, columns.types))[: len(types)] == types, "of a failed request alone too"
    assert {str(columns.field(name).type) for name in columns.names if name.startswith("timings_ms.")} == {
        "decimal128(18, 4)"
    }


def test_a_summary_never_lies_beside_records_of_another_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, whole = tmp_path / "out.json", adaptive.write_whole
    adaptive.write(out, {"seed": 1}, RECORDS, STAMP)

    def killed_at(suffix: str) -> Any:
        def write_whole(path: Path, data: str | bytes) -> None:
            if path.suffix == suffix:
                raise KeyboardInterrupt
            whole(path, data)

        return write_whole

    for suffix, kept in ((".parquet", RECORDS), (".json", RECORDS[:1])):
        with monkeypatch.context() as patch:
            patch.setattr(adaptive, "write_whole", killed_at(suffix))
            with pytest.raises(KeyboardInterrupt):
                adaptive.write(out, {"seed": 2}, RECORDS[:1], STAMP)
        assert [path.name for path in tmp_path.iterdir()] == ["out.parquet"]
        assert adaptive.read_records(tmp_path / "out.parquet") == kept


def test_a_run_killed_between_its_files_asks_nothing_again(
    tiny_folder: Path, small_bed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, whole = tmp_path / "out.json", adaptive.write_whole
    given = words(tiny_folder, small_bed, out, "--controller_path", "fixed", "--latency_budget", "5000")

    def killed(path: Path, data: str | bytes) -> None:
        if path == out:
            raise KeyboardInterrupt
        whole(path, data)

    with monkeypatch.context() as patch:
        patch.setattr(adaptive, "write_whole", killed)
        with pytest.raises(KeyboardInterrupt):
            script(SCRIPT).main(given)
    before = adaptive.read_records(tmp_path / "out.parquet")
    assert not out.exists()
    monkeypatch.setattr(bench, "measure", lambda *_: pytest.fail("asked again"))
    script(SCRIPT).main(given)
    assert records_of(out) == before
    assert len(before) == 4


def test_records_of_others_are_named(tmp_path: Path) -> None:
    def refused(named: str) -> None:
        with pytest.raises(UserError, match=named):
            adaptive.read_records(tmp_path / "text_vqa.parquet")

    refused("no such results file")
    store.write_rows(tmp_path, "text_vqa", [], STAMP)
    refused(r"text_vqa\.parquet: its schema is tempovlm\.core_exp/1, not tempovlm\.adaptive_inference/3")
    (tmp_path / "text_vqa.parquet").write_bytes(b"PAR1")
    refused("half-written or damaged")


def test_a_missing_package_is_told_before_the_first_question(
    tiny_folder: Path, small_bed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    monkeypatch.setattr(bench, "measure", lambda *_: pytest.fail("asked"))
    with pytest.raises(ModuleNotFoundError) as caught:
        script(SCRIPT).main(words(tiny_folder, small_bed, tmp_path / "o.json", "--controller_path", "fixed"))
    assert caught.value.name == "pyarrow"


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
        (["--output_path", "o.parquet"], r"--output_path o\.parquet: .* a name that ends in \.json"),
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
    assert json.loads(out.read_text())["num_failed"] == 0
    ids = [record.question_id for record in records_of(out)]
    assert len(asked) == len(ids) - 1, "all but the one that was answered"
    assert set(asked) < set(ids)
