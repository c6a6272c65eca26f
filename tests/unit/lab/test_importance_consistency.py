from __future__ import annotations

import numpy as np
import pytest

from tempovlm.lab.exp6_importance.consistency import Importance, correlate, cross_dataset, pearson, spearman

NUM_BLOCKS = 8


def drops(values: np.ndarray, questions: int, noise: float, seed: int) -> tuple[np.ndarray, list[str]]:
    """Score differences around known importances, two questions a picture."""
    rng = np.random.default_rng(seed)
    return values + noise * rng.standard_normal((questions, len(values))), [f"p{i // 2}" for i in range(questions)]


def importance(values: np.ndarray, noise: float = 0.05, questions: int = 400, seed: int = 0) -> Importance:
    return Importance.of(*drops(values, questions, noise, seed), draws=300, seed=seed)


def test_correlations_by_hand() -> None:
    assert pearson(np.array([1.0, 2.0, 3.0]), np.array([2.0, 4.0, 6.0])) == pytest.approx(1)
    assert pearson(np.array([1.0, 2.0, 3.0]), np.array([1.0, 0.0, 2.0])) == pytest.approx(0.5)
    assert spearman(np.array([1.0, 10.0, 100.0, 1000.0]), np.array([1.0, 2.0, 4.0, 3.0])) == pytest.approx(0.8)
    # Ranks 3.5, 2, 3.5, 1 and 4, 2, 3, 1: equal values share the mean of theirs.
    assert spearman(np.array([5.0, 1.0, 5.0, 0.0]), np.array([9.0, 2.0, 3.0, 1.0])) == pytest.approx(0.9486833)
    assert np.isnan(pearson(np.ones(3), np.arange(3.0)))
    assert np.isnan(pearson(np.ones(1), np.ones(1)))
    rows = np.array([[1.0, 2.0, 3.0], [3.0, 2.0, 1.0]])
    np.testing.assert_allclose(pearson(rows, rows[:1]), [1, -1])


def test_the_bootstrap_by_hand() -> None:
    """Two pictures with opposite differences: a draw is one of them (1/4 each) or their mean (1/2)."""
    table = np.array([[0.0, 1.0, 2.0, 3.0, 0.0], [0.0, 3.0, 2.0, 1.0, 0.0]])
    found = Importance.of(table, ["a", "b"], draws=4000)
    np.testing.assert_allclose(found.values, [0, 2, 2, 2, 0])
    kinds, counts = np.unique(found.draws[:, 1].round(9), return_counts=True)
    np.testing.assert_allclose(kinds, [1, 2, 3])
    np.testing.assert_allclose(counts / 4000, [0.25, 0.5, 0.25], atol=0.03)
    low, high = found.interval()
    assert (low[1], high[1]) == pytest.approx((1, 3))
    fixed = Importance(np.array([0.0, 1.0, 2.0, 3.0, 0.0]), np.tile([0.0, 1.0, 2.0, 3.0, 0.0], (4000, 1)), 1.0)
    cell = correlate(found, fixed)["pearson_inner_blocks"]
    # A draw of the mean does not vary and has no correlation; the others have 1 and -1.
    assert (cell["estimate"], cell["low"], cell["high"]) == (None, pytest.approx(-1), pytest.approx(1))


def test_questions_of_a_picture_are_drawn_together() -> None:
    table = np.array([[1.0, 0.0, 0.0], [0.0, 0.0, 0.0], [0.0, 0.0, 0.0]])
    found = Importance.of(table, ["a", "a", "b"], draws=500)
    assert set(np.round(np.unique(found.draws[:, 0]), 6)) <= {0.0, round(1 / 3, 6), 0.5}


def test_reliability_falls_with_noise() -> None:
    values = np.linspace(0, 0.3, NUM_BLOCKS)
    clean, noisy = importance(values, noise=0.02), importance(values, noise=3.0)
    assert clean.reliability > 0.99
    assert noisy.reliability < 0.8
    record = correlate(clean, noisy)
    assert record["noise_ceiling"] is None or record["noise_ceiling"] < 0.95


def test_the_verdict_falls_either_way() -> None:
    rng = np.random.default_rng(3)
    one, other = rng.permutation(np.linspace(0, 0.3, 16)), rng.permutation(np.linspace(0, 0.3, 16))
    names = ("text_vqa", "coco_2014_vqa", "okvqa")
    alike = {name: importance(one, seed=i) for i, name in enumerate(names)}
    found = cross_dataset({**alike, "science_qa_img": importance(other, seed=9)})
    assert found["verdict"]["data_agnostic"] == "yes"
    assert found["verdict"]["task_dependent"] == "yes"
    assert len(found["pairwise"]) == 6
    same = cross_dataset({**alike, "science_qa_img": importance(one, seed=9)})
    assert same["verdict"]["task_dependent"] == "no"
    mixed = {name: importance(rng.permutation(one), seed=i) for i, name in enumerate(names)}
    assert cross_dataset(mixed)["verdict"]["data_agnostic"] == "no"
    noisy = {name: importance(one, noise=20.0, seed=i) for i, name in enumerate(names)}
    assert cross_dataset(noisy)["verdict"]["data_agnostic"] == "undecided"


def test_one_kind_of_task_leaves_the_other_half_undecided() -> None:
    found = cross_dataset({"text_vqa": importance(np.linspace(0, 1, NUM_BLOCKS))})
    assert found["verdict"] == {
        "data_agnostic": "undecided",
        "task_dependent": "undecided",
        "text": "Data-agnostic among VQA data sets: undecided. Task-dependent: undecided.",
    }
    assert found["summary"]["within_vqa"] is None
