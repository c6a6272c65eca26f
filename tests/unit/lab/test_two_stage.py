"""Exp 3 on a made-up world in which the question says which tier it needs."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from stage1_toy import FAST, LATENCY_MS, PER_TIER, SPACE, job, world
from tempovlm.control.checkpoint import load_controller
from tempovlm.control.learned.networks import Knob1PredictorBudgetLanguageGlance
from tempovlm.core.errors import UserError
from tempovlm.lab.exp3_first_stage import report as stage1_report
from tempovlm.lab.exp3_first_stage import train as two_stage
from tempovlm.lab.exp3_first_stage.data import draw_rows, label, limits_ms
from tempovlm.lab.exp3_first_stage.expected import smoothed
from tempovlm.lab.exp3_first_stage.report import confusion, lost_points, render, served_tier, worth
from tempovlm.lab.exp3_first_stage.train import Stage1Job
from tempovlm.lab.features import FeatureTable
from tempovlm.lab.log import LOG
from tempovlm.lab.table import Table


def test_the_seed_documents_settings() -> None:
    options = Stage1Job.__dataclass_fields__
    assert options["train_split"].default == pytest.approx(0.8)
    assert (options["knob1_variant"].default, options["knob1_loss"].default) == ("language", "label")
    assert options["knob1_label"].default == "smoothed"
    assert two_stage.CHECKPOINT == "best_stage1_checkpoint.pt"


def test_labels_and_values_by_hand() -> None:
    (data, _), high_ms = world(), float(LATENCY_MS[2 * PER_TIER])
    rows = label(data, np.array([0, 1, 1]), np.array([1e3, 1e3, high_ms - 0.1]))
    # Question 1 is right at the high tier alone; where that does not fit, nothing is, and the cheapest ties.
    assert rows.tier.tolist() == [0, 2, 0]
    assert rows.value.tolist() == [pytest.approx([1, 1, 0]), pytest.approx([0, 0, 1]), pytest.approx([0, 0, 0])]
    # Half of the questions are right at any setting of a tier, so the first of its settings, the cheapest, counts.
    first_ms = LATENCY_MS[::PER_TIER]
    np.testing.assert_allclose(rows.share[1], first_ms / 1e3)
    assert rows.share[2, 2] == pytest.approx(1)  # of what does not fit


def lucky_world(share: float = 0.3) -> tuple[Table, FeatureTable]:
    """`world` where a share of the questions that need the high tier are right at the low one by luck.

    All of the language tells which questions need it.
    """
    data, features = world(360)
    rng = np.random.default_rng(7)
    features.language[:] = features.language[:, 2:3] + 0.1 * features.language
    lucky = (np.arange(len(data)) % 2 == 1) & (rng.random(len(data)) < share)
    accuracy = data.accuracy.copy()
    accuracy[lucky, :PER_TIER] = 1.0
    return replace(data, accuracy=accuracy), features


def test_a_smoothed_label_is_free_of_a_questions_luck() -> None:
    data, features = lucky_world()
    expected = smoothed(data, features.language, 0)
    rows = np.arange(len(data))
    budget_ms = np.full(len(rows), 1e3)
    literal, smooth = (label(data, rows, budget_ms, expected=one).tier for one in (None, expected.accuracy))
    needs = rows % 2 == 1
    assert 0.2 < (literal[needs] == 0).mean() < 0.4
    assert set(smooth[needs]) == {2}
    assert set(smooth[~needs]) == {0}
    # Of a budget that fits no high setting the label is the cheapest tier, whatever is expected.
    tight = label(data, rows[:2], np.full(2, float(LATENCY_MS[PER_TIER]) - 0.1), expected=expected.accuracy)
    assert tight.tier.tolist() == [0, 0]


def test_what_is_expected_of_a_training_question_does_not_depend_on_its_own_answers() -> None:
    data, features = lucky_world()
    row = int(data.rows("train")[0])
    other = data.accuracy.copy()
    other[data.image_id == data.image_id[row]] = 0.5
    changed = replace(data, accuracy=other)
    before, after = (smoothed(one, features.language, 0) for one in (data, changed))
    assert after.neighbours == before.neighbours
    assert after.usual == before.usual
    np.testing.assert_allclose(after.accuracy[row], before.accuracy[row])


def test_few_questions_are_smoothed_too() -> None:
    data, features = world(6)
    found = smoothed(data, features.language, 0)
    assert found.accuracy.shape == data.accuracy.shape
    assert np.isfinite(found.accuracy).all()
    assert (found.accuracy >= 0).all()
    assert (found.accuracy <= 1).all()


def test_the_smoothed_label_serves_better_and_the_literal_one_is_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stage1_report, "TREES", 2)
    reports = {
        name: two_stage.train_stage1(replace(job(tmp_path / name), knob1_label=name), *lucky_world(0.7))
        for name in two_stage.LABELS
    }
    smooth, literal = reports["smoothed"], reports["literal"]
    assert smooth["accuracy"] > 0.9
    assert literal["accuracy"] == pytest.approx(literal["literal_accuracy"])
    assert smooth["literal_accuracy"] < smooth["accuracy"] - 0.1
    assert smooth["worth"]["accuracy"] > literal["worth"]["accuracy"] + 0.05
    assert (smooth["smoothing"]["neighbours"] > 1, literal["smoothing"]) == (True, None)
    for name, report in reports.items():
        said = render(report)
        assert f"on {name} labels, {report['literal_accuracy']:.1%} on literal ones" in said
        saved = load_controller(tmp_path / name / "stage1" / two_stage.CHECKPOINT, SPACE, "abc")
        assert saved.options["knob1_label"] == name


def test_a_price_of_time_prefers_a_tiers_cheaper_setting() -> None:
    data, _ = world()
    better = data.accuracy.copy()
    better[:, 0] -= 0.1
    priced = replace(data, accuracy=better)
    question, budget_ms = np.array([0]), np.array([100.0])
    dear, cheap = (label(priced, question, budget_ms, price) for price in (0.0, 50.0))
    assert (dear.value[0, 0], cheap.value[0, 0]) == pytest.approx((1.0, 0.9))
    assert (dear.share[0, 0], cheap.share[0, 0]) == pytest.approx((LATENCY_MS[1] / 100, LATENCY_MS[0] / 100))


def test_budgets_of_every_question() -> None:
    data, _ = world()
    rows = draw_rows(data, "validation", 3, np.random.default_rng(0))
    assert sorted(set(rows.question)) == data.rows("validation").tolist()
    assert len(rows) == 3 * len(data.rows("validation"))
    assert (limits_ms(data)[0] <= rows.budget_ms).all()
    assert (rows.budget_ms <= limits_ms(data)[1]).all()


@pytest.mark.parametrize("loss", ["label", "value"])
def test_the_question_is_used(tmp_path: Path, loss: str) -> None:
    report = two_stage.train_stage1(job(tmp_path, loss=loss), *world())
    blind = two_stage.train_stage1(job(tmp_path / "blind", "budget", loss), *world())
    assert report["worth"]["interval_points"][0] > 5
    assert abs(blind["worth"]["ahead_points"]) < 10
    if loss == "label":
        assert report["accuracy"] > 0.9 > blind["accuracy"]
        assert report["budget_only"]["interval_points"][0] > 0
        assert abs(report["gradient_boosting"]["ahead_points"]) < 5
    assert report["lost_points"] < 5 < blind["lost_points"]
    total = sum(sum(row.values()) for row in report["confusion"].values())
    assert total == sum(row["rows"] for row in report["tier_by_budget"])
    assert set(report["by_dataset"]) == {"okvqa", "text_vqa"}
    assert json.loads((tmp_path / "stage1" / "report.json").read_text()) == json.loads(json.dumps(report))
    assert "gradient boosting" in render(report)
    logged = [json.loads(line) for line in (tmp_path / "stage1" / LOG).read_text().splitlines()]
    assert [record["epoch"] for record in logged] == list(range(1, FAST.num_epochs + 1))


def test_a_checkpoint_with_its_inputs_standardised(tmp_path: Path) -> None:
    data, features = world()
    two_stage.train_stage1(job(tmp_path, "glance", options=replace(FAST, num_epochs=1)), data, features)
    saved = load_controller(tmp_path / "stage1" / two_stage.CHECKPOINT, SPACE, "abc")
    net = saved.networks["knob1"]
    assert saved.kind == "two_stage_stage1"
    assert isinstance(net, Knob1PredictorBudgetLanguageGlance)
    seen = features.take(data.rows("train"))
    np.testing.assert_allclose(net.language.standard.mean.numpy(), seen.language.mean(axis=0), atol=1e-5)
    np.testing.assert_allclose(net.glance.standard.mean.numpy(), seen.glance.mean(axis=0), atol=1e-5)
    assert saved.options["knob1_variant"] == "glance"


def test_metrics_by_hand() -> None:
    data, _ = world()
    rows = label(data, np.array([0, 1, 1]), np.array([1e3, 1e3, 15.0]))
    chosen = np.array([0, 0, 2])
    assert confusion(data, rows.tier, chosen)["high"] == {"low": 1, "medium": 0, "high": 0}
    # 15 ms lets the low tier through only, whatever the logits say.
    logits = np.array([[0.0, 1.0, 2.0]] * 3)
    assert served_tier(data, rows, logits).tolist() == [2, 2, 0]
    assert lost_points(data, rows, np.array([0, 0, 0])) == pytest.approx(100 / 3)
    images = data.image_id[rows.question].tolist()
    assert worth(data, rows, np.array([0, 0, 0]), images, 0)["by_budget_alone"] == pytest.approx(1 / 3)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"knob1_variant": "taste"}, "--knob1_variant taste"),
        ({"knob1_loss": "mse"}, "--knob1_loss mse"),
        ({"knob1_label": "lucky"}, "--knob1_label lucky: choose from smoothed, literal"),
        ({"budgets_per_question": 0}, "--budgets_per_question 0"),
        ({"knob1_loss": "value", "time_price": -0.1}, "--time_price -0.1"),
        ({"time_price": 0.2}, "--time_price: a label has no price"),
        ({"options": replace(FAST, hidden_dim=0)}, "--hidden_dim 0"),
    ],
)
def test_wrong_flags_are_named(tmp_path: Path, changes: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        replace(job(tmp_path), **changes).check()  # type: ignore[arg-type]
