"""Successive halving over the settings: what is ruled out, what is estimated, and that it goes on where it was."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

import tiny_model
from tempovlm.control.select import best
from tempovlm.lab import tune
from tempovlm.lab.statistics import wilson_interval

SPACE = tiny_model.SPACE
COSTS_MS = np.array([tiny_model.nominal_ms(SPACE, i) for i in range(len(SPACE))])


def answers(count: int, seed: int = 0) -> np.ndarray:
    """(N, K) answers that get better with the tier and, up to three quarters of the blocks, with depth."""
    rng = np.random.default_rng(seed)
    enough = SPACE.block_counts[-2]
    chance = [0.4 + 0.2 * SPACE.tiers.index(k.tier) + 0.04 * min(k.num_blocks, enough) for k in SPACE]
    return (rng.random((count, 1)) < np.array(chance)).astype(float)


def run(accuracy: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return tune.race(lambda asked, left: accuracy[np.ix_(asked, left)], len(accuracy), SPACE, COSTS_MS)


def test_rounds_end_with_all_questions() -> None:
    assert tune.rounds(100) == [12, 25, 50, 100]
    assert tune.rounds(12) == [12]
    assert tune.rounds(230) == [12, 25, 50, 100, 200, 230]


def test_most_settings_are_ruled_out_early_and_what_is_chosen_is_as_good_as_after_asking_everything() -> None:
    regrets, work = [], []
    for seed in range(4):
        accuracy = answers(100, seed)
        found, kept = run(accuracy)
        estimates, means = tune.estimates(found, kept, SPACE), accuracy.mean(axis=0)
        work.append((~np.isnan(found)).mean())
        for budget_ms in (16.0, 20.0, 27.0, 36.0, 60.0):
            fits = budget_ms >= COSTS_MS
            chosen = int(best(estimates, fits, COSTS_MS, tie=0.0025))
            regrets.append(means[int(best(means, fits, COSTS_MS, tie=0.0025))] - means[chosen])
    assert np.mean(work) < 0.6
    assert np.mean(regrets) < 0.01


def test_the_frontier_answered_every_question() -> None:
    found, kept = run(answers(60))
    result = tune.summarise(found, np.arange(60), kept, SPACE, COSTS_MS)
    assert set(result.frontier) <= set(kept.tolist())
    assert result.frontier[0] == 0
    assert np.isin(result.asked, tune.rounds(60)).all()
    rows = result.rows(SPACE)
    assert [row["ruled_out"] for row in rows] == [i not in set(kept.tolist()) for i in range(len(SPACE))]
    assert all(row["interval"][0] <= row["accuracy"] <= row["interval"][1] for row in rows)
    assert all(0 <= row["accuracy"] <= 1 for row in rows)


def test_a_dozen_questions_that_all_settings_answer_alike_do_not_rule_out_the_dearer_tiers() -> None:
    everything, rng = np.arange(len(SPACE)), np.random.default_rng(0)
    left = tune.worth_running(np.ones((12, len(SPACE))), everything, SPACE, COSTS_MS, 45, rng)
    assert {SPACE.settings[i].tier for i in left} == set(SPACE.tiers)
    assert 0 in left
    assert len(left) < len(SPACE)


def test_a_tier_that_many_questions_do_not_need_is_ruled_out() -> None:
    accuracy = np.zeros((400, len(SPACE)))
    accuracy[::2] = 1.0
    accuracy[:, [knobs.tier == "high" for knobs in SPACE]] = 0.0
    everything, rng = np.arange(len(SPACE)), np.random.default_rng(0)
    left = tune.worth_running(accuracy, everything, SPACE, COSTS_MS, 45, rng)
    assert "high" not in {SPACE.settings[i].tier for i in left}


def test_questions_that_were_easier_do_not_flatter_a_setting_that_answered_them_alone() -> None:
    accuracy = answers(100)
    accuracy[:12], accuracy[12:] = 1.0, accuracy[12:] * 0.5
    kept = np.array([0, len(SPACE) - 1])
    found = np.full_like(accuracy, np.nan)
    found[:, kept], found[:12] = accuracy[:, kept], accuracy[:12]
    estimates = tune.estimates(found, kept, SPACE)
    assert estimates[kept] == pytest.approx(accuracy[:, kept].mean(axis=0))
    assert estimates.max() <= accuracy[:, kept].mean(axis=0).max() + 0.02


def test_failed_questions_count_for_none() -> None:
    accuracy = answers(60)
    accuracy[3] = np.nan
    found, kept = run(accuracy)
    whole = ~np.isnan(found[:, kept]).any(axis=1)
    assert whole.sum() == 59
    result = tune.summarise(found[whole], np.arange(59), kept, SPACE, COSTS_MS)
    assert result.num_questions == 59
    assert np.isfinite(result.accuracy).all()


def test_a_few_pictures_with_many_questions_widen_the_interval() -> None:
    values = np.repeat(np.arange(10) % 2, 10).astype(float)
    alone = tune.interval(values, np.arange(100), 0.5)
    shared = tune.interval(values, np.repeat(np.arange(10), 10), 0.5)
    assert shared[1] - shared[0] > 2 * (alone[1] - alone[0])


def test_questions_with_a_picture_each_have_wilsons_interval() -> None:
    """Also where their number is small, so that it does not matter whether all are right or not."""
    for right in (0, 1, 5, 12):
        values = (np.arange(12) < right).astype(float)
        assert tune.interval(values, np.arange(12), right / 12) == pytest.approx(wilson_interval(right, 12))


def test_stored_regret_keeps_the_target(repo_root: Path) -> None:
    record = json.loads((repo_root / "benchmarks" / "results" / "tune.json").read_text())
    assert len(record["budgets"]) == 5
    assert all(row["regret_points"] <= 1 for row in record["budgets"])
    assert all(row["held_out_regret_points"] <= 1 for row in record["budgets"])
