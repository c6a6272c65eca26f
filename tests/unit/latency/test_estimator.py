from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from estimator_fakes import GPU, RATES, SPACE, TABLE, make_rows

from tempovlm.core.cost import plan_cost
from tempovlm.core.errors import UserError
from tempovlm.core.knobs import KnobSpace
from tempovlm.core.plan import Plan, Ranking
from tempovlm.latency.conformal import conformal_quantile, conformal_rank, coverage, margins
from tempovlm.latency.cores import LEVELS, MlpCore, RooflineCore, fit_rates
from tempovlm.latency.estimator import Estimator, load_estimator
from tempovlm.latency.features import FEATURES, STAGES, Workload, count_crops
from tempovlm.latency.recalibration import Measurements, choose_measurements, recalibrate
from tempovlm.model.config import POCKET


def random_mlp(seed: int = 0) -> MlpCore:
    rng = np.random.default_rng(seed)
    sizes = (len(FEATURES), 8, len(STAGES) * len(LEVELS))
    layers = tuple(
        (rng.standard_normal((a, b)).astype(np.float32), rng.standard_normal(b).astype(np.float32))
        for a, b in pairwise(sizes)
    )
    load = make_rows(2).workload
    features = TABLE.features(load)
    return MlpCore(RATES, features.mean(axis=0), features.std(axis=0) + 1e-6, layers)


def median_error(estimator: Estimator, truth: Measurements) -> np.ndarray:
    return np.median(np.abs(estimator.predict(truth.workload).ms[..., 0] / truth.ms - 1), axis=0)


def test_costs_are_those_of_the_plan() -> None:
    rows = make_rows(2)
    ranking = Ranking.evenly_spaced(POCKET.num_blocks)
    (flops, moved), (step_flops, step_moved) = TABLE.prefill(rows.workload), TABLE.decode_step(rows.workload)
    for i in (0, 37, 74, 149):
        load = rows.workload.take(np.array([i]))
        plan = Plan.build(SPACE.settings[int(load.setting[0])], ranking, POCKET.shape)
        cost = plan_cost(
            plan, POCKET.shape, int(load.crops[0]), int(load.vision_tokens[0]), int(load.text_tokens[0]), 2
        )
        found = (flops[i], moved[i], step_flops[i], step_moved[i])
        expected = [cost.flops["prefill"], cost.bytes["prefill"], cost.flops["decode"], cost.bytes["decode"]]
        np.testing.assert_allclose(found, expected, rtol=1e-12)


def test_crops_of_a_tiling() -> None:
    assert count_crops(None) == (0, 0)
    assert count_crops((1, 1)) == (2, 1)
    assert count_crops((2, 3)) == (7, 7)


def test_rates_are_found_and_never_negative() -> None:
    rng = np.random.default_rng(0)
    terms = np.stack((np.ones(60), rng.random(60), rng.random(60)), axis=1)
    np.testing.assert_allclose(fit_rates(terms, terms @ [2.0, 3.0, 0.0]), [2, 3, 0], atol=1e-9)
    found = fit_rates(terms, 2 + 3 * terms[:, 1] - 0.5 * terms[:, 2])
    assert found.min() >= 0
    assert found[2] == pytest.approx(0)
    assert not fit_rates(terms, np.full(60, np.nan)).any()


def test_refitted_rates_are_not_moved_by_a_slow_spell() -> None:
    rng = np.random.default_rng(0)
    terms = np.stack((np.ones(25), rng.random(25), rng.random(25)), axis=1)
    times = terms @ [2.0, 3.0, 1.0]
    times[:6] *= 1.25
    squares, robust = (terms @ fit_rates(terms, times, rounds)[:, None] for rounds in (0, 8))
    exact = (terms @ [2.0, 3.0, 1.0])[:, None]
    assert np.median(np.abs(robust / exact - 1)) < 0.005 < 0.03 < np.median(np.abs(squares / exact - 1))


def test_no_other_rates_fit_better() -> None:
    """Kuhn and Tucker: no rate is negative, and the error falls neither by changing one nor by raising a zero."""
    rng = np.random.default_rng(1)
    for _ in range(50):
        terms, times = rng.random((12, 4)) * [1e-3, 1.0, 50.0, 0.0], rng.random(12) + 0.1
        rates, relative = fit_rates(terms, times), terms / times[:, None]
        gain = relative.T @ (1 - relative @ rates) / np.maximum(np.linalg.norm(relative, axis=0), 1e-9)
        assert rates.min() >= 0
        assert gain.max() < 1e-9
        np.testing.assert_allclose(gain[rates > 0], 0, atol=1e-9)


def test_first_decode_steps_weigh_more_in_short_answers() -> None:
    short, long = (Workload.of_request(SPACE, [72, 176, 288], 30, [(1, 1), (2, 2), (3, 3)], k) for k in (1, 16))
    estimator = Estimator(TABLE, RATES)
    one, other = (estimator.predict(load).stage_ms("decode_per_token") for load in (short, long))
    blocks = np.array([knobs.num_blocks for knobs in SPACE])
    longer_context = 0.0001 * blocks * 7.5
    np.testing.assert_allclose(one - other, (0.3 + 0.02 * blocks) * 15 / 16 - longer_context)
    none = Workload.of_request(SPACE, [72, 176, 288], 30, [(1, 1), (2, 2), (3, 3)], 0)
    np.testing.assert_allclose(TABLE.features(none), TABLE.features(short))


def test_measurements_are_spread_over_pictures() -> None:
    rows = make_rows(6)
    chosen = choose_measurements(TABLE, rows.workload, 15, 0, rows.images)
    assert len(set(chosen)) == 15
    assert sorted(np.unique(rows.images[chosen], return_counts=True)[1]) == [2, 2, 2, 3, 3, 3]
    assert len(set(choose_measurements(TABLE, rows.workload, 900, 0, rows.images))) == len(rows)


def test_the_roofline_is_recovered_from_noisy_rows() -> None:
    rows, truth = make_rows(12), make_rows(3, noise=0.0, seed=9)
    estimator = Estimator(TABLE, RooflineCore.fit(TABLE, rows.workload, rows.ms))
    assert median_error(estimator, truth).max() < 0.005


def test_quantiles_do_not_cross_whatever_the_weights_and_margins() -> None:
    load = make_rows(3).workload
    for seed in range(5):
        rng = np.random.default_rng(seed)
        estimator = Estimator(TABLE, random_mlp(seed), rng.standard_normal((len(STAGES), len(LEVELS))))
        assert (np.diff(estimator.predict(load).ms, axis=-1) >= 0).all()


def test_no_picture_takes_no_vision_time() -> None:
    load = Workload.of_request(SPACE, [0, 0, 0], 20, [None, None, None])
    times = Estimator(TABLE, RATES).predict(load)
    assert not times.stage_ms("vision_encoder").any()
    assert not times.stage_ms("projector").any()
    assert (times.stage_ms("prefill") > 0).all()


def test_totals_are_composed_of_stages_and_steps() -> None:
    times = Estimator(TABLE, RATES).predict(make_rows(1).workload)
    parts = sum(times.stage_ms(stage) for stage in STAGES[:3])
    np.testing.assert_allclose(times.total_ms(4.0), parts + 4 * times.stage_ms("decode_per_token"))
    raised = replace(times, total_margins=np.array([0.0, 0.1, 0.2]))
    np.testing.assert_allclose(raised.total_ms(4.0, 0.99), times.total_ms(4.0) * np.exp(0.2))


@pytest.mark.parametrize(
    ("count", "level", "rank"), [(9, 0.9, 9), (8, 0.9, None), (99, 0.99, 99), (999, 0.99, 990), (1, 0.5, 1)]
)
def test_finite_sample_rank(count: int, level: float, rank: int | None) -> None:
    assert conformal_rank(count, level) == rank


def test_conformal_coverage_holds_on_fresh_values() -> None:
    rng = np.random.default_rng(1)
    held = []
    for _ in range(200):
        scores, fresh = rng.exponential(size=49), rng.exponential(size=200)
        held.append((fresh <= conformal_quantile(scores, 0.9)).mean())
    assert 0.89 < np.mean(held) < 0.92
    assert conformal_quantile(np.ones(3), 0.99) == np.inf


def test_margins_make_a_bad_quantile_good() -> None:
    rng = np.random.default_rng(2)
    observed, fresh = rng.standard_normal((5000, 1)), rng.standard_normal((5000, 1))
    wrong = np.tile([3.0, -1.0, 0.0], (5000, 1, 1))
    found = coverage(fresh, wrong + margins(observed, wrong, LEVELS))[0]
    np.testing.assert_allclose(found, LEVELS, atol=0.02)
    assert not margins(np.full((4, 1), np.nan), wrong[:4], LEVELS).any()
    assert np.isnan(coverage(np.full((4, 1), np.nan), wrong[:4])).all()


@pytest.mark.parametrize("count", [5, 10, 25])
def test_recalibration_moves_to_a_device_that_is_bound_by_something_else(count: int) -> None:
    old = Estimator(TABLE, RATES)
    pool, truth = make_rows(6, GPU, seed=3), make_rows(4, GPU, noise=0.0, seed=4)
    chosen = choose_measurements(TABLE, pool.workload, count)
    assert len(set(chosen)) == count
    moved = recalibrate(old, pool.take(chosen), stamp={"hardware": "another"})
    before, after = median_error(old, truth), median_error(moved, truth)
    assert (after < before / 2).all()
    if count == 25:
        assert after.max() < 0.05
    assert moved.stamp == {"hardware": "another"}
    assert (np.diff(moved.predict(truth.workload).ms, axis=-1) >= 0).all()


def test_recalibration_by_a_factor_needs_few_measurements() -> None:
    slow = RooflineCore({stage: 3 * rates for stage, rates in RATES.rates.items()})
    pool = make_rows(3, slow, noise=0.01)
    moved = recalibrate(Estimator(TABLE, RATES), pool.take(choose_measurements(TABLE, pool.workload, 3)))
    assert median_error(moved, make_rows(3, slow, noise=0.0, seed=5)).max() < 0.02


def test_no_measurements_change_nothing_but_the_stamp() -> None:
    old, pool = Estimator(TABLE, RATES), make_rows(1)
    moved = recalibrate(old, pool.take(np.arange(0)), stamp={"hardware": "b"})
    np.testing.assert_allclose(moved.predict(pool.workload).ms, old.predict(pool.workload).ms)


def test_recalibration_refuses_another_knob_space() -> None:
    other = KnobSpace(SPACE.tiers, (2, 4), (8, 16), 4)
    with pytest.raises(UserError, match="another knob space"):
        recalibrate(Estimator(TABLE, RATES), make_rows(1), table=type(TABLE)(other, POCKET.shape))


@pytest.mark.parametrize("is_moved", [False, True])
def test_save_and_load(tmp_path: Path, is_moved: bool) -> None:
    path, load = tmp_path / "deep" / "best.pt", make_rows(2).workload
    saved = Estimator(TABLE, random_mlp(), np.ones((4, 3)), np.array([0.0, 0.1, 0.2]), stamp={"hardware": "x"})
    if is_moved:
        pool = make_rows(3, GPU)
        saved = recalibrate(saved, pool.take(np.arange(0, 200, 8)))
    saved.save(path)
    loaded = load_estimator(path, SPACE)
    np.testing.assert_allclose(loaded.predict(load).ms, saved.predict(load).ms)
    np.testing.assert_allclose(loaded.predict(load).total_ms(3.0, 0.99), saved.predict(load).total_ms(3.0, 0.99))
    assert (loaded.name, loaded.stamp, loaded.space) == ("mlp", saved.stamp, SPACE)
    assert list(path.parent.iterdir()) == [path]


def damaged(record: dict[str, object], change: str) -> None:
    if change == "arrays":
        del record["arrays"]["centre"]  # type: ignore[attr-defined]
    elif change == "missing":
        del record["stamp"]
    elif change == "features":
        record["features"] = ["tier"]
    elif change == "knob_space":
        record["knob_space"] = "000000000000"
    elif change == "shape":
        record["shape"] = {"num_blocks": 3}
    elif change == "schema":
        record["schema"] = "tempovlm.latency_estimator/0"


@pytest.mark.parametrize("kind", ["boosting", "nearest"])
def test_a_checkpoint_of_a_model_that_is_not_served_names_the_remedy(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "best.pt"
    Estimator(TABLE, RATES).save(path)
    record = torch.load(path, weights_only=True)
    torch.save(record | {"kind": kind}, path)
    with pytest.raises(UserError, match=f"best.pt: field kind is {kind}.*train again with") as caught:
        load_estimator(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("change", ["arrays", "missing", "features", "knob_space", "shape", "schema"])
def test_a_damaged_checkpoint_is_one_line(tmp_path: Path, change: str) -> None:
    path = tmp_path / "best.pt"
    Estimator(TABLE, random_mlp()).save(path)
    record = torch.load(path, weights_only=True)
    damaged(record, change)
    torch.save(record, path)
    with pytest.raises(UserError, match=r"best\.pt.*field") as caught:
        load_estimator(path)
    assert "\n" not in str(caught.value)


def test_files_that_are_no_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "best.pt"
    with pytest.raises(UserError, match="no such file"):
        load_estimator(path)
    Estimator(TABLE, RATES).save(path)
    whole = path.read_bytes()
    for data in (b"", b"not a checkpoint", whole[: len(whole) // 2]):
        path.write_bytes(data)
        with pytest.raises(UserError, match="damaged"):
            load_estimator(path)
    torch.save(Path("x"), path)
    with pytest.raises(UserError, match="damaged"):
        load_estimator(path)
    path.write_bytes(whole)
    with pytest.raises(UserError, match="made for other settings"):
        load_estimator(path, KnobSpace(SPACE.tiers, (2, 4), (8, 16), 4))
