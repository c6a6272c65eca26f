from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from experiments.published import made_by
from experiments.scoreboard import readings
from experiments.scoreboard.readings import AbsentError, read_figure
from experiments.scoreboard.report import Row, judge_row, shown
from experiments.scoreboard.result_files import read_result
from experiments.scoreboard.targets import TARGETS, Bound, Reading, Source, Target, sources
from result_fakes import SHIPPED, put, stamp

from tempovlm.core.errors import UserError
from tempovlm.lab.bench.summary import Record, rounded, summarise

ROOT = Path(__file__).resolve().parents[3]
H100 = {"hardware": "NVIDIA H100 80GB HBM3", "device": "cuda/bfloat16", "model": "molmoe-1b, random weights"}
H200 = {"hardware": "NVIDIA H200", "device": "cuda/bfloat16", "model": "molmoe-1b, random weights"}


REPORTED = Bound.parse("reported")


def target(bound: Bound, **fields: Any) -> Target:
    about = {"name": "x", "about": "x", "experiment": "x", "unit": "%", "figure": {"path": "x"}}
    return Target(**(about | {"bound": bound, "source": Source(path="x.json")} | fields))


def test_the_table_is_short_and_every_name_stands_once() -> None:
    names = [one.name for one in TARGETS]
    assert len(names) == len(set(names)) <= 120


def test_every_file_is_there_and_has_what_its_rows_read() -> None:
    files = {one: read_result(ROOT, one, None) for one in sources()}
    unread = []
    for one in TARGETS:
        file = files[one.source]
        assert file is not None, one.source.path
        assert made_by(one.source.path) is not None, one.source.path
        try:
            one.measure(file.content)
        except AbsentError:
            unread.append(one.name)
    assert unread == []
    assert sources() == tuple(dict.fromkeys(one.source for one in TARGETS))


RECORD = {
    "winner": "b",
    "models": {"a": {"x": 1, "y": 4}, "b": {"x": 2, "y": None}},
    "rows": [{"name": "one", "ms": 3.0, "share": 0.4}, {"name": "two", "ms": 5.0, "share": 0.6, "used": None}],
    "text": "high",
}


@pytest.mark.parametrize(
    ("words", "value"),
    [
        ({"path": "rows.1.ms"}, 5),
        ({"path": "rows[name=one].ms", "scale": 100}, 300),
        ({"path": "rows[share>=0.5].ms"}, 5),
        ({"path": "rows[share=0.4].ms"}, 3),
        ({"path": "models.{winner}.x"}, 2),
        ({"path": "models.a|b.x", "pick": "max"}, 2),
        ({"path": "models.*.x", "pick": "min"}, 1),
        ({"path": "rows.*.ms", "pick": "mean"}, 4),
        ({"path": "models[?].x", "pick": "max", "minus": "models.a.x"}, 1),
        ({"path": "models.a.y", "over": "models.b.x"}, 2),
        ({"path": "rows.*.ms", "over": "rows.*.share", "pick": "max"}, 25 / 3),
        ({"path": "models.a.x", "needs": "text=high"}, 1),
    ],
)
def test_a_path_finds_its_figure(words: dict[str, Any], value: float) -> None:
    assert read_figure(RECORD, **words) == pytest.approx(value)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ({"path": "rows.2.ms"}, r"there is no field rows\.2"),
        ({"path": "models.c.x"}, r"there is no field models\.c"),
        ({"path": "text.x"}, r"there is no field text\.x"),
        ({"path": "rows[name=three].ms"}, r"there is no rows\[name=three\]"),
        ({"path": "rows[used].ms"}, r"there is no rows\[used\]"),
        ({"path": "models.b.y"}, r"field models\.b\.y is empty"),
        ({"path": "rows.*.ms"}, "there are 2 of rows"),
        ({"path": "models.a.x", "needs": "text=low"}, "field text is high, not low"),
    ],
)
def test_a_figure_that_is_not_there_is_named(words: dict[str, Any], said: str) -> None:
    with pytest.raises(AbsentError, match=said):
        read_figure(RECORD, **words)
    with pytest.raises(UserError, match="field text is not a finite number but 'high'"):
        read_figure(RECORD, "text")


@pytest.mark.parametrize("text", ["80", "= 80", "more"])
def test_a_bound_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="no bound"):
        Bound.parse(text)


@pytest.mark.parametrize(
    ("bound", "value", "met"),
    [
        (Bound("≤", 6), 6.0, True),
        (Bound("≤", 6), 6.0000001, False),
        (Bound("<", 6), 6.0, False),
        (Bound("≥", 90), 89.99999, False),
        (Bound(">", 0), 0.0, False),
        (REPORTED, -1.0, True),
    ],
)
def test_a_verdict_is_of_the_unrounded_value(bound: Bound, value: float, met: bool) -> None:
    assert target(bound).is_met(Reading(value)) is met
    assert bound.holds(float(shown(value, bound))) is met


def test_no_reading_has_no_verdict() -> None:
    assert target(REPORTED).is_met(None) is None


def test_either_of_two_bounds_is_enough() -> None:
    both = target(Bound("≥", 90), other=("y", Bound("≤", 0.3)))
    assert both.is_met(Reading(60, 0.3)) is True
    assert both.is_met(Reading(60, 0.31)) is False
    assert both.is_met(Reading(95, 5)) is True
    assert both.is_met(Reading(60)) is False


NAMED = {one.name: one for one in TARGETS}


def judged(name: str, content: Any, tmp_path: Path) -> Row:
    """The row of a target whose file holds this."""
    one = NAMED[name]
    put(tmp_path, one.source.path, content)
    return judge_row(one, read_result(tmp_path, one.source, SHIPPED), SHIPPED, tmp_path)


def engine_file(time_ms: Callable[[int, int, int], float]) -> dict[str, Any]:
    rows = [
        {"name": f"{tier}/k{k}/b{n}", "ms_median": time_ms(t, k, n), "stages_ms": {"decode": float(k)}}
        for t, tier in enumerate(("low", "medium", "high"))
        for k in (4, 6, 8, 10, 12)
        for n in (8, 10, 12, 14, 16)
    ]
    rows.append({"name": "vision_c1", "ms_median": 1.2})
    return {"rows": rows, "stamp": stamp(**H200)}


def test_engine_rows_have_a_first_target_and_a_goal(tmp_path: Path) -> None:
    record = engine_file(lambda t, _k, n: 10.0 * t + n)
    assert judged("vision_c1_first", record, tmp_path).met is True
    assert judged("vision_c1_goal", record, tmp_path).met is False
    absent = judged("vision_c7_goal", record, tmp_path)
    assert absent.met is None
    assert "there is no rows[name=vision_c7]" in str(absent.reason)
    assert judged("monotone_tier_and_depth", record, tmp_path).met is True
    assert judged("monotone_top_k_decode", record, tmp_path).met is True


def test_one_byte_rows_have_gain_and_loss(tmp_path: Path) -> None:
    rows = [{"name": "decode_k8_b16_ctx700", "ms_median": 0.5, "peers": {"bf16_weights": 0.8}}]
    record = {"rows": rows, "checks": {"weights_error_k8": 0.03}, "stamp": stamp(**H100)}
    gain = "decode_k8_b16_ctx700_fp8_speed_up_h100"
    assert judged(gain, record, tmp_path).measured == pytest.approx(1.6)
    assert judged("fp8_logit_error_k8_h100", record, tmp_path).measured == pytest.approx(3)
    assert "there is no rows[name=decode_k8" in str(judged(gain, record | {"rows": []}, tmp_path).reason)
    record = {"rows": [{"weights": "int8", "accuracy_loss": 0.005}], "stamp": stamp()}
    assert judged("int8_accuracy_loss_pocket", record, tmp_path).measured == pytest.approx(0.5)
    assert "no rows[weights=fp8]" in str(judged("fp8_accuracy_loss_pocket", record, tmp_path).reason)


def test_a_knob_that_buys_no_time_is_counted(tmp_path: Path) -> None:
    record = engine_file(lambda t, _k, n: 10.0 * t + (n if (t, n) != (2, 16) else 12.5))
    row = judged("monotone_tier_and_depth", record, tmp_path)
    assert (row.measured, row.met) == (pytest.approx(5), False)
    for high_ms, count in ((29.41, 0), (29.39, 25)):  # 2 % below 30 ms is within the noise
        record = engine_file(lambda t, _k, _n, high_ms=high_ms: (10.0, 30.0, high_ms)[t])  # type: ignore[misc]
        assert readings.reversals(record, "ms_median", "tier") == count
    del record["rows"][7]
    assert "74 of 75 settings" in str(judged("monotone_tier_and_depth", record, tmp_path).reason)


def estimator_report() -> dict[str, Any]:
    stages = ("vision_encoder", "projector", "prefill", "decode_per_token")
    errors = {"mae_ms": 0.04, "r2": 0.995, "median_ape": 0.02, "p95_ape": 0.06}
    part = {stage: dict(errors) for stage in stages}
    shares = {stage: {"0.5": 0.53, "0.9": 0.88, "0.99": 0.985} for stage in stages}
    return {
        "winner": "mlp",
        "candidates": {"mlp": {"test": part, "held_out": copy.deepcopy(part)}, "nearest": {}},
        "judged": {"mlp": {"predict_ms": 0.15}},
        "coverage": {"test": shares},
        "transfer": {"curve": [{"measurements": 25, "median_ape": {s: {"median": 0.04} for s in stages}}]},
        "stamp": stamp(**H200),
    }


def test_estimator_rows_read_the_winner(tmp_path: Path) -> None:
    record = estimator_report()
    names = [name for name in NAMED if name.startswith("exp1_") and name.endswith("_h200")]
    names = [name for name in names if NAMED[name].source.path.endswith("report.json")]
    assert len(names) == 6
    for name in names:
        assert judged(name, record, tmp_path).met is True, name
    record["candidates"]["mlp"]["held_out"]["decode_per_token"] |= {"p95_ape": 0.0601, "r2": 0.98}
    record["coverage"]["test"]["projector"]["0.5"] = 0.4699
    record["transfer"] = None
    assert judged("exp1_decode_per_token_p95_images_h200", record, tmp_path).met is True
    assert judged("exp1_r2_decode_per_token_h200", record, tmp_path).met is False
    assert judged("exp1_coverage_p50_h200", record, tmp_path).met is False
    on_cpu = record | {"stamp": stamp()}
    record["candidates"]["mlp"]["held_out"]["decode_per_token"]["p95_ape"] = 0.1501
    assert judged("exp1_decode_per_token_p95_settings_cpu", on_cpu, tmp_path).met is False
    assert judged("exp1_transfer_h200", record, tmp_path).met is None


def test_supervised_rows_are_met_by_accuracy_or_by_regret(tmp_path: Path) -> None:
    shares = {"overall": 0.7, "tier": 0.95, "top_k": 0.8, "num_blocks": 0.8, "regret_points": 0.2}
    record = {"validation": shares, "stamp": stamp()}
    row = judged("exp2_overall", record, tmp_path)
    assert (row.measured, row.met) == (pytest.approx(70), True)
    assert row.reason == "second bound ≤ 0.3 kept: 0.2"
    shares["regret_points"] = 0.4
    assert judged("exp2_overall", record, tmp_path).met is False
    assert judged("exp2_tier", record, tmp_path).met is True


def test_the_first_stage_is_held_against_ceiling_and_floor(tmp_path: Path) -> None:
    boosting = {"accuracy": 0.82, "ahead_points": -2.0, "interval_points": [-3.0, 0.5]}
    floor = {"accuracy": 0.7, "ahead_points": 3.0, "interval_points": [0.1, 5.0]}
    record = {"accuracy": 0.8, "gradient_boosting": boosting, "budget_only": floor, "stamp": stamp()}
    for name in ("exp3_tier_accuracy", "exp3_ceiling_gap", "exp3_gain_over_budget_only"):
        assert judged(name, record, tmp_path).met is True
    boosting["ahead_points"], floor["interval_points"] = -2.1, [0.0, 5.0]
    assert judged("exp3_ceiling_gap", record, tmp_path).measured == pytest.approx(2.1)
    for name in ("exp3_ceiling_gap", "exp3_gain_over_budget_only"):
        assert judged(name, record, tmp_path).met is False
    record["gradient_boosting"] = None
    assert judged("exp3_ceiling_gap", record, tmp_path).met is None


def judge_file(low: float, kind: str = "twin pick", folder: str = "checkpoints") -> dict[str, Any]:
    def policy(area: float, over_table: float) -> dict[str, Any]:
        rival = {"value": over_table, "interval": [over_table + low, over_table + 0.03]}
        mixture = {"value": 0.02, "interval": [low, 0.03]}
        rows = [{"against_mixture": mixture, "at_same_budget": {"table": rival, "best_static": rival}}] * 5
        whole = {
            "gap_closed": {"value": 0.5},
            "area": {"value": area},
            "at_same_budget": rows[0]["at_same_budget"],
        }
        return {"by_budget": rows, **whole}

    values = {
        f"{folder}/two_stage_controller/stage2/best_stage2_checkpoint.pt": (0.8, 0.0),
        f"{folder}/controller/queue/best_value.pt": (0.8, 0.01),
        f"{folder}/controller/supervised/best_supervised_controller.pt": (0.75, -0.04),
    }
    policies = {name: policy(*numbers) for name, numbers in values.items()}
    return {"policies": policies, "reference": {"name": kind}, "stamp": stamp()}


def test_controllers_are_judged_by_intervals(tmp_path: Path) -> None:
    good = judge_file(0.001)
    assert judged("judge_value_above_mixture_cpu", good, tmp_path).met is True
    assert judged("judge_value_gap_closed_cpu", good, tmp_path).met is True
    gain = judged("judge_two_stage_over_supervised_cpu", good, tmp_path)
    assert (gain.measured, gain.met) == (pytest.approx(4), True)
    assert judged("exp4_over_table", good, tmp_path).met is True
    assert judged("exp4_over_fixed", good, tmp_path).met is True
    assert judged("exp4_budgets_above_table", good, tmp_path).measured == pytest.approx(5)
    assert judged("exp4_least_over_table", good, tmp_path).met is True
    assert "there is no policies[*/best_controller.pt]" in str(judged("exp5_over_table", good, tmp_path).reason)
    own = judge_file(0.001, folder="checkpoints/gpu_h200") | {"stamp": stamp(**H200 | {"model": "pocket"})}
    assert judged("judge_two_stage_above_mixture_h200", own, tmp_path).met is True
    assert judged("judge_two_stage_over_supervised_h200", own, tmp_path).measured == pytest.approx(5)
    weak = judge_file(-0.005, kind="hindsight oracle")
    assert judged("judge_value_above_mixture_cpu", weak, tmp_path).met is False
    assert judged("exp4_over_table", weak, tmp_path).met is False
    assert judged("exp4_budgets_above_table", weak, tmp_path).measured == pytest.approx(0)
    assert "reference.name is hindsight oracle, not twin pick" in str(
        judged("judge_value_gap_closed_cpu", weak, tmp_path).reason
    )


def test_adherence_is_that_of_the_worst_feasible_budget(tmp_path: Path) -> None:
    def row(budget_ms: float, upper: float, feasible: float = 1.0, used: float | None = 0.8) -> dict[str, Any]:
        about = {"budget_ms": budget_ms, "num_samples": 1000, "feasible_share": feasible, "utilisation": used}
        return about | {"adherence_wilson": [0.9, upper], "stages_ms": {"control": 1.0}}

    record = {"budgets": [row(5, 0.1, 0.0), row(100, 0.971), row(200, 0.98, used=None)]}
    record |= {"stamp": stamp(), "on_deadline": "finish"}
    assert judged("exp8_adherence_cpu", record, tmp_path).measured == pytest.approx(97.1)
    assert judged("exp8_utilisation_cpu", record, tmp_path).met is True
    assert judged("exp8_control_cost_cpu", record, tmp_path).measured == pytest.approx(1)
    record["budgets"].append(row(50, 0.96))
    assert judged("exp8_adherence_cpu", record, tmp_path).met is False
    assert judged("exp8_control_cost_cpu", record, tmp_path).met is False
    stopped = record | {"on_deadline": "stop"}
    assert judged("exp8_adherence_cpu", stopped, tmp_path).met is None


def test_a_controllers_training_is_read_from_its_report(tmp_path: Path) -> None:
    over = {"over_seeds": {"accuracy": {"mean": -0.01, "interval": [-0.02, 0.0]}}}
    seeds = {"runs": [{}] * 5, "accuracy": {"std": 0.004}}
    record = {"reward": {"untrained": 0.4, "end": 0.6}, "seeds": seeds, "compared": over}
    record["stamp"] = stamp()
    for name in NAMED:
        if name.startswith(("exp4_", "exp5_")) and not name.endswith(("_fixed", "_table")):
            assert judged(name, record, tmp_path).met is True, name
    assert judged("exp5_over_exp4", record, tmp_path).measured == pytest.approx(-1)
    record["reward"] = {"untrained": 0.6, "end": 0.6}
    assert judged("exp4_reward_rise", record, tmp_path).met is False


def test_importances_are_read_from_both_files(tmp_path: Path) -> None:
    estimate = {"estimate": 0.9, "low": 0.7, "high": 0.97}
    record = {"summary": {"within_vqa": estimate, "difference": None}, "stamp": stamp()}
    assert judged("exp6_vqa_correlation", record, tmp_path).met is False
    assert judged("exp6_vqa_correlation_low", record, tmp_path).measured == pytest.approx(0.7)
    assert judged("exp6_task_difference", record, tmp_path).met is None
    val = {"joint": {"8": {"accuracy": 0.6}, "16": {"accuracy": 0.8}}, "single": {"8": {"accuracy": 0.65}}}
    merged = {"accuracy_by_depth": {"val": val}, "stamp": stamp()}
    assert judged("exp6_joint_gain", merged, tmp_path).measured == pytest.approx(5)


def test_profiles_count_settings_and_questions(tmp_path: Path) -> None:
    rows = [
        {"tier": tier, "top_k": k, "num_blocks": n, "num_samples": 300, "stamp": stamp()}
        for tier in ("low", "medium", "high")
        for k in (4, 6, 8, 10, 12)
        for n in (8, 10, 12, 14, 16)
    ]
    assert judged("exp7_settings_text_vqa", rows, tmp_path).met is True
    rows[3]["num_samples"] = 299
    assert judged("exp7_questions_text_vqa", rows, tmp_path).measured == pytest.approx(299)
    assert judged("exp7_settings_text_vqa", rows[1:], tmp_path).met is False
    rows[0]["stamp"] = None
    with pytest.raises(UserError, match="has no stamp"):
        judged("exp7_settings_text_vqa", rows, tmp_path)


def test_what_bench_and_the_pipeline_write_is_what_is_read(tmp_path: Path) -> None:
    stages = {"preprocess": 1.0, "control": 0.5, "vision_encoder": 4.0, "projector": 1.0, "prefill": 20.0}
    about: dict[str, Any] = {"dataset": "okvqa", "question_id": "1", "score": 1.0, "slower_existed": True}
    records = [
        Record(
            run="fixed" if budget_ms is None else "budget",
            image_id=str(i),
            budget_ms=budget_ms,
            knobs="high/k8/b16" if budget_ms is None else "low/k4/b8",
            feasible=True,
            timings_ms=stages | {"decode": 13.5, "total": 40.0},
            **about,
        )
        for i in range(3)
        for budget_ms in (60.0, 100.0, None)
    ]
    record = rounded(summarise(records)) | {"stamp": stamp(), "on_deadline": "finish"}
    assert judged("pocket_latency_native", record, tmp_path).measured == pytest.approx(40)
    assert judged("pocket_adherence_60ms", record, tmp_path).measured == pytest.approx(100)
    assert judged("pocket_utilisation_60ms", record, tmp_path).measured == pytest.approx(100 * 40 / 60, abs=0.01)
    assert judged("exp8_requests_cpu", record, tmp_path).measured == 3
    assert judged("exp8_utilisation_cpu", record, tmp_path).measured == pytest.approx(40)
    assert judged("exp8_control_cost_cpu", record, tmp_path).measured == pytest.approx(100 * 0.5 / 60)
