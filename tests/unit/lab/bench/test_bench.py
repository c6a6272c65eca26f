from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from bench_fakes import SPACE, FakeModel, sample

from tempovlm.core.errors import UserError
from tempovlm.core.files import make_folder
from tempovlm.core.paths import write_whole
from tempovlm.lab.bench import bench, summary

BUDGETS_MS = (50.0, 120.0, 1000.0)


def plan(model: FakeModel, **changes: Any) -> bench.BenchPlan:
    fields: dict[str, Any] = {
        "budgets_ms": BUDGETS_MS,
        "fixed": SPACE.native,
        "max_new_tokens": 16,
        "slower_existed": bench.slower_than(SPACE, model.profile),
    }
    return bench.BenchPlan(**(fields | changes))


def test_every_sample_meets_every_budget_once_in_mixed_order() -> None:
    model = FakeModel()
    samples = [sample(i) for i in range(12)]
    records = list(bench.measure(model, samples, plan(model)))
    assert len(records) == 12 * 4 == 12 * plan(model).runs_per_sample
    counts = Counter((r.question_id, r.run, r.budget_ms) for r in records)
    assert set(counts.values()) == {1}
    # A question's requests stay together; which budget comes first changes.
    assert [r.question_id for r in records] == [f"q{i}" for i in range(12) for _ in range(4)]
    assert len({records[4 * i].budget_ms for i in range(12)}) > 2
    again = list(bench.measure(FakeModel(), samples, plan(model)))
    assert again == records


def test_summary_by_hand() -> None:
    model = FakeModel()
    records = list(bench.measure(model, [sample(i) for i in range(8)], plan(model)))
    result = summary.summarise(records)
    tight, middle, loose = result["budgets"]
    # The cheapest setting takes 10 + 8 + 40 = 58 ms: too slow for 50 ms.
    assert (tight["budget_ms"], tight["adherence"], tight["feasible_share"]) == pytest.approx((50.0, 0.0, 0.0))
    assert (tight["p50_ms"], tight["accuracy"], tight["knobs"]) == (
        pytest.approx(58.0),
        pytest.approx(0.0),
        pytest.approx({"low/k4/b8": 1.0}),
    )
    # The slowest that fits 120 / 1.1 = 109.09 ms takes 108 ms: low, medium at 40 + 8 + 60, 40 + 12 + 50 …
    assert (middle["p50_ms"], middle["p99_ms"]) == pytest.approx((108.0, 108.0))
    assert middle["adherence"] == pytest.approx(1.0)
    assert middle["utilisation"] == pytest.approx(0.9)
    # With a second the largest setting runs: nothing slower existed.
    assert loose["knobs"] == pytest.approx({str(SPACE.largest): 1.0})
    assert (loose["utilisation"], loose["num_utilisation"]) == (None, 0)
    assert loose["accuracy"] == pytest.approx(1.0)
    fixed = result["fixed"]
    assert (fixed["knobs"], fixed["p50_ms"], fixed["p99_over_p50"]) == (
        str(SPACE.native),
        pytest.approx(186.0),
        pytest.approx(1.0),
    )
    assert sum(loose["stages_ms"].values()) == pytest.approx(loose["p50_ms"])


def test_a_failing_sample_is_recorded_and_counts_as_wrong_and_late() -> None:
    model = FakeModel()
    samples = [sample(0), sample(1, "broken.jpg"), sample(2), sample(3)]
    records = list(bench.measure(model, samples, plan(model, fixed=None)))
    failed = [r for r in records if r.error]
    assert [r.question_id for r in failed] == ["q1"] * 3
    assert failed[0].error == "OSError: broken.jpg: truncated"
    row = summary.summarise(records)["budgets"][2]
    assert (row["num_samples"], row["num_failed"], row["accuracy"], row["adherence"]) == pytest.approx(
        (4, 1, 0.75, 0.75)
    )
    assert summary.summarise(records)["num_failed"] == 3


def test_a_fault_of_the_program_is_not_a_failing_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    model = FakeModel()
    monkeypatch.setattr(model, "answer", lambda *_args, **_options: None)
    with pytest.raises(AttributeError):
        next(bench.measure(model, [sample(0)], plan(model)))


def test_first_answers_count_in_the_adherence_only() -> None:
    model = FakeModel()
    warm = list(bench.measure(model, [sample(i) for i in range(3)], plan(model, budgets_ms=(120.0,))))
    late = {"total": 300.0}
    fresh = summary.Record(
        run="fresh",
        dataset="text_vqa",
        question_id="q9",
        image_id="i9",
        budget_ms=120.0,
        timings_ms=late,
        score=1.0,
    )
    row = summary.summarise([*warm, fresh])["budgets"][0]
    assert (row["num_samples"], row["num_adherence"], row["adherence"], row["p99_ms"]) == pytest.approx(
        (3, 4, 0.75, 108.0)
    )
    assert row["fresh"] == pytest.approx(
        {"num_samples": 1, "num_failed": 0, "adherence": 0.0, "p50_ms": 300.0, "max_ms": 300.0}
    )


def test_fresh_answers_run_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[list[str]] = []

    def run(command: list[str], **_options: Any) -> Any:
        seen.append(command)
        answer = FakeModel().answer("a.jpg", "q", float(command[command.index("--budget_ms") + 1]))
        failed = len(seen) > 1
        text, complaint = json.dumps(answer.to_json()) + "\n", "a warning\ntempovlm: error: no such model\n"
        return type("Done", (), {"returncode": 2 if failed else 0, "stdout": text, "stderr": complaint})

    monkeypatch.setattr(bench.subprocess, "run", run)
    model = FakeModel()
    records = list(bench.measure_fresh([sample(0)], plan(model, budgets_ms=(120.0, 200.0)), ["--model", "pocket"]))
    assert seen[0][1:6] == ["-m", "tempovlm", "answer", "a.jpg", "what does sign 0 say?"]
    assert seen[0][-3:] == ["--json", "--model", "pocket"]
    assert (records[0].run, records[0].total_ms, records[0].score) == (
        "fresh",
        pytest.approx(108.0),
        pytest.approx(1.0),
    )
    assert records[1].error == "tempovlm: error: no such model"


def test_result_is_plain_json_with_the_promised_fields() -> None:
    model = FakeModel()
    records = list(bench.measure(model, [sample(i) for i in range(4)], plan(model)))
    result = json.loads(json.dumps(summary.rounded(summary.summarise(records))))
    promised = "budget_ms num_samples accuracy adherence adherence_wilson utilisation p50_ms p95_ms p99_ms knobs"
    for row in result["budgets"]:
        assert set(promised.split()) <= set(row)
        assert len(row["adherence_wilson"]) == 2
        assert sum(row["knobs"].values()) == pytest.approx(1.0)
    json.dumps([record.to_json() for record in records])


def test_an_answer_at_the_budget_is_on_time() -> None:
    model = FakeModel()
    (record,) = bench.measure(model, [sample(0)], plan(model, budgets_ms=(120.0,), fixed=None))
    assert replace(record, budget_ms=108.0).on_time
    assert not replace(record, budget_ms=107.9).on_time


def test_slower_without_a_profile() -> None:
    slower = bench.slower_than(SPACE, None)
    assert slower(SPACE.native)
    assert not slower(SPACE.largest)


def test_files_are_whole_or_absent(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "a" / "b")
    write_whole(folder / "x.json", "{}")
    assert [path.name for path in folder.iterdir()] == ["x.json"]
    with pytest.raises(UserError, match="cannot be written"):
        write_whole(folder / "x.json" / "y", "text")
    with pytest.raises(UserError, match="--output_dir"):
        make_folder(folder / "x.json")
