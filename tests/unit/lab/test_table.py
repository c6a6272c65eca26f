"""The table of questions by settings: order, completeness, latencies, the split by picture, budgets."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import decision_worlds
import numpy as np
import pandas as pd
import pytest
from decision_worlds import COST_MS
from estimator_fakes import RATES, TABLE

import stamps
from tempovlm.core.errors import UserError
from tempovlm.core.knobs import KnobSpace
from tempovlm.core.records import COLUMNS, SweepRow
from tempovlm.lab.core_exp.store import write_rows
from tempovlm.lab.table import PARTS, Table, answered_space, budget_range, draw_budgets, read_table, table_of
from tempovlm.latency.estimator import Estimator
from tempovlm.model.config import POCKET

SPACE = KnobSpace.for_model(POCKET.shape)


def rows(question: str, *, image: str = "i", dataset: str = "okvqa") -> list[SweepRow]:
    """A row of every setting; accuracy and output length tell the setting's index."""
    return [
        SweepRow(
            dataset=dataset,
            split="val",
            question_id=question,
            image_id=image,
            template="t",
            tier=knobs.tier,
            top_k=knobs.top_k,
            num_blocks=knobs.num_blocks,
            tiling=(2, 2 + SPACE.tiers.index(knobs.tier)),
            vision_tokens=100 * (1 + SPACE.tiers.index(knobs.tier)),
            text_tokens=12,
            output_tokens=1 + i % 5,
            accuracy=i / 100,
            prediction="yes",
        )
        for i, knobs in enumerate(SPACE)
    ]


def frame(records: list[SweepRow]) -> pd.DataFrame:
    table = pd.DataFrame([{name: getattr(row, name) for name in COLUMNS} for row in records])
    table["T_total"] = table["T_total"].astype(float)
    return table.assign(source="here")


def test_rows_in_any_order_come_out_by_question_and_setting() -> None:
    records = rows("q2", image="b") + rows("q1", image="a")
    shuffled = frame(records).sample(frac=1, random_state=1)
    table = table_of(shuffled, SPACE, "val")
    assert table.question_id.tolist() == ["q1", "q2"]
    assert table.image_id.tolist() == ["a", "b"]
    np.testing.assert_allclose(table.accuracy[1], np.arange(len(SPACE)) / 100)
    assert table.output_tokens[0, 7] == pytest.approx(3)
    assert table.vision_tokens.tolist() == [pytest.approx([100, 200, 300])] * 2
    assert table.crops[0].tolist() == [[2, 2], [2, 3], [2, 4]]
    assert np.isnan(table.measured_ms).all()
    assert len(table.take(np.array([1]))) == 1
    assert table.take(table.question_id == "q2").image_id.tolist() == ["b"]


def test_a_question_with_a_gap_is_left_out_and_counted() -> None:
    whole, gap = rows("q1"), rows("q2")
    gap[3] = replace(gap[3], accuracy=None, error="failed")
    table = table_of(frame(whole + gap), SPACE, "val")
    assert len(table) == 1
    assert table.left_out == 1
    with pytest.raises(UserError, match="no question of split val"):
        table_of(frame(gap), SPACE, "val")


def test_latencies_of_another_directory_join_the_accuracies() -> None:
    timed = [replace(row, accuracy=None, T_total=10.0 + i) for i, row in enumerate(rows("q1"))]
    again = [replace(row, T_total=(row.T_total or 0) + 2) for row in timed]
    table = table_of(frame(rows("q1") + rows("q2") + timed + again), SPACE, "val")
    np.testing.assert_allclose(table.measured_ms[0], 11.0 + np.arange(len(SPACE)))
    assert np.isnan(table.measured_ms[1]).all()
    np.testing.assert_allclose(table.usual_ms(), 11.0 + np.arange(len(SPACE)))
    np.testing.assert_allclose(table.usual_ms(0.9), 11.0 + np.arange(len(SPACE)))
    with pytest.raises(UserError, match=r"no measured latency .* at low/k"):
        table_of(frame(rows("q1") + timed[1:]), SPACE, "val").usual_ms()
    # Questions of another split were timed.
    other = [replace(row, split="train") for row in timed + again]
    np.testing.assert_allclose(table_of(frame(rows("q1") + other), SPACE, "val").usual_ms(), table.usual_ms())


def test_the_same_question_id_in_two_data_sets_stays_two_questions() -> None:
    table = table_of(frame(rows("q1") + rows("q1", dataset="text_vqa")), SPACE, "val")
    assert table.dataset.tolist() == ["okvqa", "text_vqa"]


def test_budgets_are_log_uniform_over_what_is_feasible() -> None:
    latency_ms = np.array([[10.0, 100.0], [20.0, 200.0], [30.0, 1000.0]])
    limits_ms = budget_range(latency_ms)
    assert limits_ms == pytest.approx((20.0, 200.0))
    drawn = draw_budgets(np.random.default_rng(0), 4000, limits_ms)
    assert drawn.min() >= 20.0
    assert drawn.max() <= 200.0
    middle = np.sqrt(20.0 * 200.0)
    assert abs((drawn < middle).mean() - 0.5) < 0.03
    again = draw_budgets(np.random.default_rng(0), 4000, limits_ms)
    np.testing.assert_allclose(again, drawn)


def pictures(images: np.ndarray) -> Table:
    return decision_worlds.table(np.zeros((len(images), decision_worlds.K)), image_id=images)


def test_questions_of_one_picture_stay_together() -> None:
    images = np.array([f"i{i // 3}" for i in range(60)])
    table = pictures(images)
    split = table.split_by_picture(0.8, 42)
    assert set(split.part) == set(PARTS)
    parts = [set(split.image_id[split.rows(name)]) for name in PARTS]
    assert all(parts[i].isdisjoint(parts[j]) for i, j in ((0, 1), (0, 2), (1, 2)))
    assert [len(part) for part in parts] == [16, 2, 2]
    assert not np.array_equal(split.part, table.split_by_picture(0.8, 7).part)
    with pytest.raises(UserError, match="--train_split 1"):
        table.split_by_picture(1.0)
    with pytest.raises(UserError, match="needs 3"):
        pictures(images[:6]).split_by_picture()


def test_more_questions_are_for_the_test_alone() -> None:
    first = decision_worlds.table(np.zeros((8, decision_worlds.K)))
    more = replace(
        first.take(np.arange(3)), image_id=np.array(["x", "y", "y"]), accuracy=np.ones((3, decision_worlds.K))
    )
    split = first.split_by_picture(0.5, 0)
    table = split.with_test(more)
    for name in ("train", "validation"):
        assert table.rows(name).tolist() == split.rows(name).tolist()
    assert table.rows("test").tolist() == [*split.rows("test"), 8, 9, 10]
    assert table.accuracy.mean(axis=1).tolist() == pytest.approx([0.0] * 8 + [1.0] * 3)
    assert np.isnan(table.measured_ms).all(axis=1).tolist() == [False] * 8 + [True] * 3
    seen = replace(more, image_id=np.array(["x", "y", first.image_id[5]]))
    with pytest.raises(UserError, match=f"--test_results_dir: picture {first.image_id[5]} is in --results_dir"):
        split.with_test(seen)


def stage_rows(question: str, tier_ms: float) -> list[SweepRow]:
    """Timed rows without answers."""
    times = {tier: tier_ms * (1 + place) for place, tier in enumerate(SPACE.tiers)}
    timed = [replace(row, accuracy=None, T_total=50.0) for row in rows(question)]
    return [replace(row, T_preprocess=times[row.tier]) for row in timed]


def test_preparing_a_picture_counts_where_it_was_timed_on_the_same_device() -> None:
    here, there = frame(rows("q1") + stage_rows("q2", 1.0)), frame(stage_rows("q2", 9.0)).assign(source="there")
    both = pd.concat([here, there], ignore_index=True)
    x, y = ({"hardware": name, "device": "cpu", "threads": 1} for name in "xy")
    both.attrs["stamps"] = {"here/okvqa.parquet": x, "there/okvqa.parquet": y, "else/okvqa.parquet": None}
    table = table_of(both, SPACE, "val")
    assert table.stages_ms(["T_preprocess"], x).tolist() == pytest.approx([1.0, 2.0, 3.0])
    assert table.stages_ms(["T_preprocess"], y).tolist() == pytest.approx([9.0, 18.0, 27.0])
    assert table.stages_ms(["T_preprocess"], {**x, "device": "mps"}).tolist() == pytest.approx([0.0] * 3)
    assert table.stages_ms(["T_preprocess"]).tolist() == pytest.approx([5.0, 10.0, 15.0])
    assert table.stages_ms(["T_preprocess", "T_projector"])[0] == pytest.approx(5.0), (
        "what is unmeasured adds nothing"
    )
    assert table.stamp == x
    with pytest.raises(UserError, match=r"field hardware of the timed results differs \(x, y\)"):
        table.for_training(None)


def unmeasured(count: int, settings: int = decision_worlds.K) -> np.ndarray:
    return np.full((count, settings), np.nan)


def test_judged_questions_are_charged_what_was_measured() -> None:
    train_ms = np.outer(np.linspace(1.0, 2.0, 11), COST_MS)
    train = decision_worlds.table(np.zeros((11, decision_worlds.K)), train_ms)
    found = decision_worlds.content_world(4).for_judging(train, None, 0.9)
    np.testing.assert_allclose(found.upper_ms, np.tile(1.9 * COST_MS, (4, 1)))
    np.testing.assert_allclose(found.latency_ms, np.tile(COST_MS, (4, 1)))
    assert found.latency_source.startswith("measured")


def test_others_are_charged_the_median_of_the_setting() -> None:
    judged = decision_worlds.table(np.zeros((3, decision_worlds.K)), unmeasured(3))
    train = decision_worlds.table(np.zeros((5, decision_worlds.K)), np.outer(np.arange(1.0, 6.0), COST_MS))
    found = judged.for_judging(train, None, 0.5)
    np.testing.assert_allclose(found.latency_ms, np.tile(3 * COST_MS, (3, 1)))
    assert found.latency_source.startswith("median")
    with pytest.raises(UserError, match="give --latency_estimator_path"):
        judged.for_judging(judged, None, 0.5)


def test_an_estimator_of_all_settings_predicts_a_subset() -> None:
    few = SPACE.subset({"tier": ["medium", "high"], "num_blocks": [SPACE.block_counts[1]]})
    places = [SPACE.index(knobs) for knobs in few]
    results = frame(rows("q1") + rows("q2", image="b"))
    assert answered_space(results, SPACE, "val") == SPACE
    assert answered_space(results[results["tier"] != "low"], SPACE, "val").tiers == ("medium", "high")
    whole, part = table_of(results, SPACE, "val"), table_of(results, few, "val")
    assert np.array_equal(part.accuracy, whole.accuracy[:, places])
    estimator = Estimator(TABLE, RATES, total_margins=np.log([1.0, 1.1, 1.3]))
    for level in (0.5, 0.9):
        expected_ms = whole.predicted_ms(estimator, level)[:, places]
        assert part.predicted_ms(estimator, level) == pytest.approx(expected_ms)


def test_an_estimator_is_raised_by_preparing_the_picture_which_it_leaves_out() -> None:
    estimator = Estimator(TABLE, RATES, total_margins=np.log([1.0, 1.1, 1.3]))
    made = Table.of(TABLE.space, np.zeros((4, 75)), unmeasured(4, 75))
    bare = made.for_judging(made, estimator, 0.9)
    np.testing.assert_allclose(bare.upper_ms, 1.1 * bare.latency_ms)
    times = pd.DataFrame(
        [{"tier": tier, "T_preprocess": ms} for tier, ms in zip(SPACE.tiers, (1.0, 2.0, 4.0), strict=True)]
    )
    timed = replace(made, times=times.assign(T_vision_encoder=10.0, T_projector=None))
    for prepared in (timed.for_judging(made, estimator, 0.9), made.for_judging(timed, estimator, 0.9)):
        added_ms = prepared.latency_ms - bare.latency_ms
        for tier, ms in enumerate((1.0, 2.0, 4.0)):
            np.testing.assert_allclose(added_ms[:, 25 * tier : 25 * (tier + 1)], ms)
        assert prepared.look_ms.tolist() == [pytest.approx([11.0, 12.0, 14.0])] * 4
        assert "latency estimator" in prepared.upper_source


def test_the_door_reads_the_training_questions_of_one_model(tmp_path: Path) -> None:
    stamp = replace(stamps.STAMP, knob_space=SPACE.fingerprint)
    write_rows(tmp_path / "val", "okvqa", rows("q1"), stamp)
    write_rows(tmp_path / "train", "okvqa", [replace(row, split="train") for row in rows("q2")], stamp)
    both = [tmp_path / "val", tmp_path / "train"]
    assert read_table(both, SPACE).question_id.tolist() == ["q2"]
    assert read_table(both, SPACE, split="val", weights_hash=stamp.weights).question_id.tolist() == ["q1"]
    assert read_table(both[:1], SPACE).split == "val"
    with pytest.raises(UserError, match=f"val/okvqa.parquet: field weights is {stamp.weights}"):
        read_table(both, SPACE, weights_hash="another")
