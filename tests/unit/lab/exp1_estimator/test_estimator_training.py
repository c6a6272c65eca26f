from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from estimator_fakes import GPU, RATES, SPACE, TABLE, make_rows

from tempovlm.core.errors import UserError
from tempovlm.core.records import SweepRow
from tempovlm.lab.exp1_estimator.baselines import ComparedCore, benchmark_ms, choose, fit_boosting, fit_nearest
from tempovlm.lab.exp1_estimator.data import Rows, rows_from_frame, split_rows, thin
from tempovlm.lab.exp1_estimator.report import Source, _coverage_noise, transfer_curve
from tempovlm.lab.exp1_estimator.train import (
    Candidate,
    calibrated,
    cross_fit,
    error_metrics,
    stage_metrics,
    train_mlp,
)
from tempovlm.lab.options import EstimatorOptions
from tempovlm.latency.conformal import coverage
from tempovlm.latency.cores import MlpCore, RooflineCore
from tempovlm.latency.estimator import Estimator
from tempovlm.latency.features import STAGES, Workload
from tempovlm.model.config import POCKET
from timings import TICK_MS, Ticks

FEW = EstimatorOptions(num_epochs=8, hidden_dim=16, batch_size=256)


def median_ape(estimator: Any, rows: Any) -> list[float]:
    found = stage_metrics(rows.ms, estimator.predict(rows.workload).ms[..., 0])
    return [float(found[stage]["median_ape"] or 0.0) for stage in STAGES]


@pytest.mark.parametrize("loss", ["log", "mse"])
def test_the_network_recovers_the_roofline_and_its_spread(loss: str) -> None:
    split = split_rows(make_rows(20), SPACE)
    log: list[Any] = []
    options = EstimatorOptions(num_epochs=12, hidden_dim=16, batch_size=256, loss=loss)
    estimator = train_mlp(TABLE, split, options, log.append, {}).estimator
    assert max(median_ape(estimator, make_rows(4, noise=0.0, seed=8))) < 0.01
    assert [record["epoch"] for record in log] == list(range(1, 13))
    assert all(np.isfinite(record["val_loss"]) for record in log)
    fresh = make_rows(10, seed=11).single
    found = coverage(fresh.ms, estimator.predict(fresh.workload).ms)
    assert (np.abs(found - [0.5, 0.9, 0.99]) <= [0.04, 0.03, 0.01]).all(), found


def test_the_network_learns_what_the_roofline_cannot_say(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = make_rows(12)
    wave = 1 + 0.3 * np.tanh((rows.workload.vision_tokens - 250) / 80)
    for times in (rows.ms, rows.repeats):
        times[..., 2] *= wave if times.ndim == 2 else wave[:, None]
    split = split_rows(rows, SPACE)
    options = EstimatorOptions(num_epochs=20, hidden_dim=32, batch_size=128, lr=3e-3)
    found = {
        "mlp": train_mlp(TABLE, split, options, lambda _: None, {}),
        "roofline": cross_fit(TABLE, split, lambda some: RooflineCore.fit(TABLE, some.workload, some.ms), {}),
    }
    errors = {name: median_ape(one.estimator, split.held_out)[2] for name, one in found.items()}
    assert errors["mlp"] < 0.03 < errors["roofline"]
    costs_ms = {"mlp": 0.19, "roofline": 0.01}
    patch = "tempovlm.lab.exp1_estimator.baselines.benchmark_ms"
    monkeypatch.setattr(patch, lambda estimator, _: costs_ms[estimator.name])
    winner, judged = choose(found, split)
    assert (winner, judged["mlp"]["is_fast"], judged["roofline"]["is_fast"]) == ("mlp", True, True)
    costs_ms["mlp"] = 0.21
    winner, judged = choose(found, split)
    assert (winner, judged["mlp"]["is_fast"]) == ("roofline", False), (
        "it predicts more slowly than a choice may take"
    )
    costs_ms["roofline"] = 9.0
    assert choose(found, split)[0] == "mlp", "where none is fast, the error alone decides"


def test_a_model_that_a_checkpoint_cannot_hold_is_judged_but_never_wins(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("tempovlm.lab.exp1_estimator.baselines.benchmark_ms", lambda *_: 0.01)
    split = split_rows(make_rows(6), SPACE)
    perfect = ComparedCore("nearest", lambda costs, load: RATES.log_ms(costs, load)[..., 0])
    slow = RooflineCore({stage: 2 * rates for stage, rates in RATES.rates.items()})
    found = {core.kind: cross_fit(TABLE, split, lambda _, core=core: core, {}) for core in (perfect, slow)}
    # The margins of the median would make the slow one as good.
    found["roofline"] = replace(found["roofline"], estimator=Estimator(TABLE, slow))
    winner, judged = choose(found, split)
    assert judged["nearest"]["error"] < judged["roofline"]["error"]
    assert winner == "roofline"
    with pytest.raises(TypeError, match="cannot hold a core of kind nearest"):
        found["nearest"].estimator.save(tmp_path / "nearest.pt")


def test_training_repeats() -> None:
    split = split_rows(make_rows(6), SPACE)
    one, other = (train_mlp(TABLE, split, FEW, lambda _: None, {}).estimator.core for _ in range(2))
    assert isinstance(one, MlpCore)
    assert isinstance(other, MlpCore)
    for (weight, bias), (same, too) in zip(one.layers, other.layers, strict=True):
        np.testing.assert_allclose(same, weight)
        np.testing.assert_allclose(too, bias)


def test_boosting_learns_what_the_roofline_cannot_say(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempovlm.lab.exp1_estimator.baselines.TREES", 50)
    rows, truth = make_rows(4), make_rows(4, noise=0.0)
    for some in (rows, truth):
        some.ms[:, 2] *= np.where(some.workload.text_tokens > 30, 1.3, 1.0)
    rows.ms[::7, 3] = np.nan
    roofline = RooflineCore.fit(TABLE, rows.workload, rows.ms)
    trees, line = (median_ape(Estimator(TABLE, core), truth) for core in (fit_boosting(TABLE, rows, 0), roofline))
    assert max(trees) < 0.03 < line[2]


def test_a_stage_that_one_row_has_is_left_to_the_roofline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempovlm.lab.exp1_estimator.baselines.TREES", 5)
    rows = make_rows(2)
    rows.ms[1:, 3] = np.nan
    core = fit_boosting(TABLE, rows, seed=0)
    roofline = RooflineCore.fit(TABLE, rows.workload, rows.ms)
    found, expected = (one.log_ms(TABLE, rows.workload)[:, 3] for one in (core, roofline))
    np.testing.assert_allclose(found, expected)


def test_a_network_that_diverges_is_told() -> None:
    split = split_rows(make_rows(6), SPACE)
    with pytest.raises(UserError, match=r"--lr 1e\+30: the training diverged in epoch 1"):
        train_mlp(TABLE, split, replace(FEW, lr=1e30, batch_size=16), lambda _: None, {})


def test_the_nearest_row_answers_for_itself() -> None:
    rows = make_rows(3, noise=0.0)
    exact = np.exp(RooflineCore.fit(TABLE, rows.workload, rows.ms).log_ms(TABLE, rows.workload)[..., 0])
    times = rows.ms.copy()
    rows.ms[0, 3] = np.nan
    found = np.exp(fit_nearest(TABLE, rows, neighbours=1).log_ms(TABLE, rows.workload)[..., 0])
    np.testing.assert_allclose(found[1:], times[1:], rtol=1e-6)
    np.testing.assert_allclose(found[0, 3], exact[0, 3], rtol=1e-3)


def test_neighbours_answer_with_their_geometric_mean() -> None:
    rows = make_rows(1).take(np.array([0, 0, 0]))
    rows.ms[:, 2] = 1.0, 10.0, 100.0
    found = np.exp(fit_nearest(TABLE, rows).log_ms(TABLE, rows.workload)[..., 0])
    np.testing.assert_allclose(found[:, 2], 10.0)


def test_no_picture_is_on_two_sides_of_the_split() -> None:
    split = split_rows(make_rows(20), SPACE, seed=5)
    pictures = {name: set(rows.images) for name, rows in split.parts.items()}
    assert not pictures["train"] & (pictures["test"] | pictures["held_out"])
    assert (len(pictures["train"]), len(pictures["test"])) == (16, 4)
    settings = {name: set(rows.workload.setting.tolist()) for name, rows in split.parts.items()}
    held_out, choice = set(split.held_out_settings), set(split.choice_settings)
    assert len(held_out) == 9
    assert len(choice) == 6
    assert settings["held_out"] == held_out
    assert not held_out & (settings["train"] | settings["test"])
    assert choice < settings["train"]


def test_every_training_row_is_judged_once_by_who_has_not_seen_it() -> None:
    split = split_rows(make_rows(12), SPACE, seed=5)
    rows = split.train
    assert (sum(fold.judged.astype(int) for fold in split.folds) == 1).all()
    for fold in split.folds:
        assert not set(rows.images[fold.fitted]) & set(rows.images[fold.judged])
        assert not set(rows.workload.setting[fold.fitted].tolist()) & set(split.choice_settings)
    seen: list[set[str]] = []

    def fit(some: Rows) -> RooflineCore:
        seen.append(set(some.images))
        return RATES

    found = cross_fit(TABLE, split, fit, {})
    assert seen.count(set(rows.images)) == 1
    assert len(seen) == len(split.folds) + 1
    np.testing.assert_allclose(found.left_out[..., :1], RATES.log_ms(TABLE, rows.workload))


def test_pictures_that_drift_are_covered_by_the_margins_of_left_out_pictures() -> None:
    """In-sample margins are too narrow where a model can tell pictures apart; those of folds are not."""
    rows = make_rows(40, noise=0.01)
    drift = np.exp(0.1 * np.random.default_rng(3).standard_normal(40))[:, None].repeat(75, axis=1).ravel()
    slow = replace(rows, ms=rows.ms * drift[:, None], repeats=rows.repeats * drift[:, None, None])
    split = split_rows(slow, SPACE, train_split=0.5)
    noise = np.log(split.train.ms[:, None] / np.exp(RATES.log_ms(TABLE, split.train.workload)[:, None, :, 0]))
    assert noise.std() > 0.05
    honest = calibrated(TABLE, RATES, split.train, {}, np.repeat(RATES.log_ms(TABLE, split.train.workload), 3, 2))
    vain = calibrated(TABLE, RATES, split.train, {}, np.repeat(np.log(split.train.ms)[..., None], 3, 2))
    single = split.test.single
    wide, narrow = (coverage(single.ms, one.predict(single.workload).ms)[2] for one in (honest, vain))
    assert wide[1] > narrow[1] + 0.1
    assert wide[2] > 0.9


def test_noise_of_coverage_is_that_of_pictures() -> None:
    rows = make_rows(10, noise=0.01)
    drift = np.exp(0.2 * np.where(np.arange(10) % 2, 1, -1)).repeat(75)
    slow = replace(rows, ms=rows.ms * drift[:, None], repeats=rows.repeats * drift[:, None, None])
    split = split_rows(slow, SPACE)
    left_out = np.repeat(RATES.log_ms(TABLE, split.train.workload), 3, axis=2)
    found = _coverage_noise(Candidate(calibrated(TABLE, RATES, split.train, {}, left_out), left_out), split)
    assert found["pictures"] == {"train": 8, "test": 2}
    cell = found["stages"]["prefill"]["0.5"]
    assert 0.3 < cell["sd_of_pictures"] < 0.6
    assert cell["standard_error"] == pytest.approx(cell["sd_of_pictures"] * (1 / 8 + 1 / 2) ** 0.5, abs=1e-4)


@pytest.mark.parametrize(("pictures", "share", "message"), [(2, 0.8, "needs 3"), (4, 1.0, "--train_split 1.0")])
def test_what_cannot_be_split(pictures: int, share: float, message: str) -> None:
    with pytest.raises(UserError, match=message):
        split_rows(make_rows(pictures), SPACE, train_split=share)


def test_thinning_keeps_order_and_count() -> None:
    rows = make_rows(2)
    assert thin(rows, None, 0) is rows
    assert len(thin(rows, 10, 0)) == 10


def frame_of(some: list[SweepRow]) -> Any:
    pd = pytest.importorskip("pandas")
    return pd.DataFrame([row.to_json() for row in some])


def sweep_row(**changes: Any) -> SweepRow:
    values: dict[str, Any] = {
        "dataset": "text_vqa",
        "split": "val",
        "question_id": "1",
        "image_id": "a",
        "template": "",
        "tier": "low",
        "top_k": 4,
        "num_blocks": 8,
        "tiling": (1, 1),
        "vision_tokens": 72,
        "text_tokens": 20,
        "output_tokens": 3,
        "accuracy": 1.0,
        "T_preprocess": 1.0,
        "T_vision_encoder": 5.0,
        "T_projector": 1.0,
        "T_LLM_prefill": 20.0,
        "T_LLM_decode": 6.0,
        "T_decode_per_token": 3.0,
        "T_total": 33.0,
        "repeats": {
            "T_vision_encoder": (4.0, 6.0),
            "T_projector": (1.0, 1.0),
            "T_LLM_prefill": (19.0, 21.0),
            "T_LLM_decode": (5.0, 7.0),
        },
    }
    return SweepRow(**values | changes)


def test_rows_of_a_results_file() -> None:
    one_token = {"question_id": "2", "output_tokens": 1, "T_LLM_decode": 0.0, "T_decode_per_token": None}
    blind = {"question_id": "3", "tiling": None, "vision_tokens": 0, "T_vision_encoder": 0.0, "T_projector": 0.0}
    untimed = {"question_id": "4", "T_total": None}
    some = [sweep_row(), sweep_row(**one_token, repeats=None), sweep_row(**blind), sweep_row(**untimed)]
    rows = rows_from_frame(frame_of(some), SPACE, POCKET.shape)
    assert len(rows) == 3
    np.testing.assert_array_equal(rows.steps, [2, 0, 2])
    np.testing.assert_allclose(rows.ms[0], [5, 1, 20, 3])
    np.testing.assert_allclose(rows.ms[1], [5, 1, 20, np.nan])
    np.testing.assert_allclose(rows.ms[2], [np.nan, np.nan, 20, 3])
    np.testing.assert_allclose(rows.repeats[0], [[4, 1, 19, 2.5], [6, 1, 21, 3.5]])
    np.testing.assert_array_equal(rows.workload.crops, [2, 2, 0])
    np.testing.assert_array_equal(rows.workload.distinct_crops, [1, 1, 0])
    np.testing.assert_allclose(rows.total_ms, [32, 26, 26])
    assert len(rows.single) == 5


def test_rows_that_cannot_be_used() -> None:
    with pytest.raises(UserError, match="no row has a measured latency"):
        rows_from_frame(frame_of([sweep_row(T_total=None)]), SPACE, POCKET.shape)
    with pytest.raises(UserError, match="T_projector is negative"):
        rows_from_frame(frame_of([sweep_row(T_projector=-1.0)]), SPACE, POCKET.shape)
    with pytest.raises(UserError, match="top_k=5"):
        rows_from_frame(frame_of([sweep_row(top_k=5)]), SPACE, POCKET.shape)


@pytest.mark.parametrize(
    ("field", "value"),
    [("lr", 0.0), ("num_epochs", 0), ("loss", "l1"), ("lr_schedule", "step"), ("grad_accum", 0)],
)
def test_options_that_make_no_sense(field: str, value: Any) -> None:
    with pytest.raises(UserError, match=f"--{field} {value}"):
        EstimatorOptions(**{field: value}).check()


def test_metrics_by_hand() -> None:
    found = error_metrics(np.array([1.0, 2.0, 3.0]), np.array([1.0, 2.0, 4.0]))
    assert found["mae_ms"] == pytest.approx(1 / 3)
    assert found["rmse_ms"] == pytest.approx((1 / 3) ** 0.5)
    assert found["r2"] == pytest.approx(0.5)
    assert found["median_ape"] == pytest.approx(0.0)
    assert error_metrics(np.empty(0), np.empty(0)) == {
        "count": 0,
        "mae_ms": None,
        "rmse_ms": None,
        "r2": None,
        "median_ape": None,
        "p95_ape": None,
    }


def test_more_measurements_move_the_estimator_better() -> None:
    estimator = calibrated(TABLE, RATES, make_rows(4), {})
    curve = transfer_curve(estimator, Source(make_rows(6, GPU, seed=2), TABLE, {}), (0, 5, 25), seeds=2)
    errors = [row["median_ape"]["prefill"]["median"] for row in curve]
    assert errors[0] > 0.3 > errors[1]
    assert errors[2] < 0.05


def test_the_cost_of_a_prediction_is_the_median_after_a_warm_up(monkeypatch: pytest.MonkeyPatch) -> None:
    ticks = Ticks()
    monkeypatch.setattr("tempovlm.lab.exp1_estimator.baselines.now_ms", ticks)
    took_ms = iter([50.0, 3.0, 9.0, 3.0, 3.0, 70.0, 3.0, 3.0, 3.0, 3.0, 3.0])

    class Timed:
        def predict(self, _: Workload) -> None:
            ticks.wait(next(took_ms))

    estimator, workload = Timed(), make_rows(1).workload
    assert benchmark_ms(estimator, workload, repeats=10) == pytest.approx(3.0 + TICK_MS)  # type: ignore[arg-type]
    assert next(took_ms, None) is None
