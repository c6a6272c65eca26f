from __future__ import annotations

import math
from typing import Literal

import numpy as np
import pytest

from tempovlm.lab import statistics as st


def test_wilson_interval_by_hand() -> None:
    # 8 of 10 with z = 2: p = 0.8, middle 0.8 + 4/20 = 1, half 2 sqrt(0.016 + 4/400) = 2 sqrt(0.026), scale 1.4.
    low, high = st.wilson_interval(8, 10, z=2.0)
    assert low == pytest.approx((1 - 2 * math.sqrt(0.026)) / 1.4)
    assert high == pytest.approx((1 + 2 * math.sqrt(0.026)) / 1.4)


def test_wilson_interval_at_the_ends() -> None:
    # All of n: the lower end is n / (n + z²), the upper one is 1.
    low, high = st.wilson_interval(200, 200)
    assert low == pytest.approx(200 / (200 + st.Z_95**2))
    assert high == pytest.approx(1.0)
    assert st.wilson_interval(0, 5)[0] == pytest.approx(0.0)
    with pytest.raises(ValueError, match="not a share"):
        st.wilson_interval(3, 2)


def test_the_target_of_97_percent_is_reached_by_190_of_200() -> None:
    # Published tables: 190 of 200 has the interval 0.910 to 0.973.
    low, high = st.wilson_interval(190, 200)
    assert (round(low, 3), round(high, 3)) == pytest.approx((0.910, 0.973))


def test_quantile_interpolates() -> None:
    assert st.quantile([10, 20, 30, 40, 50], 0.5) == pytest.approx(30)
    assert st.quantile([0, 100], 0.95) == pytest.approx(95)


def test_utilisation_leaves_out_the_slowest_setting() -> None:
    totals_ms, budgets_ms = [50.0, 90.0, 100.0], [100.0, 100.0, 400.0]
    assert st.utilisation(totals_ms, budgets_ms, [True, True, False]) == pytest.approx(0.7)
    assert st.utilisation(totals_ms, budgets_ms, [False] * 3) is None


def test_bootstrap_draws_whole_clusters() -> None:
    # One cluster: every draw is the whole sample.
    assert st.clustered_bootstrap([1.0, 0.0, 1.0, 1.0], ["a"] * 4) == pytest.approx((0.75, 0.75))
    # Two clusters of two equal values: a draw's mean is 0, 0.5 or 1 with probabilities 1/4, 1/2, 1/4.
    assert st.clustered_bootstrap([1.0, 1.0, 0.0, 0.0], ["a", "a", "b", "b"]) == pytest.approx((0.0, 1.0))
    low, high = st.clustered_bootstrap([1.0, 1.0, 0.0, 0.0], ["a", "a", "b", "b"], level=0.4)
    assert (low, high) == pytest.approx((0.5, 0.5))


def test_bootstrap_is_wider_where_questions_share_images() -> None:
    values = [float(i % 2 == 0) for i in range(40) for _ in range(5)]
    alone = st.clustered_bootstrap(values, [str(i) for i in range(200)])
    shared = st.clustered_bootstrap(values, [str(i // 5) for i in range(200)])
    # A five-fold repetition widens a standard error by the square root of five.
    assert (shared[1] - shared[0]) / (alone[1] - alone[0]) == pytest.approx(math.sqrt(5), rel=0.15)


def test_bootstrap_agrees_with_the_normal_approximation() -> None:
    values = [1.0] * 150 + [0.0] * 50
    low, high = st.clustered_bootstrap(values, [str(i) for i in range(200)], draws=4000)
    half = st.Z_95 * math.sqrt(0.75 * 0.25 / 200)
    assert low == pytest.approx(0.75 - half, abs=0.01)
    assert high == pytest.approx(0.75 + half, abs=0.01)


@pytest.mark.parametrize("by", ["picks", "counts"])
def test_resampled_means_of_columns_are_paired_and_leave_gaps_out(by: Literal["picks", "counts"]) -> None:
    """Three pictures with one, one and two questions; the third column has a value of the last picture only."""
    values = np.array([[1.0, 2.0, np.nan], [0.0, 0.0, np.nan], [0.5, 1.0, 4.0], [0.5, 1.0, np.nan]])
    means = st.Resamples(["a", "b", "c", "c"], draws=4000, seed=1, by=by).means(values)
    assert means.shape == (4001, 3)
    np.testing.assert_allclose(means[0], [0.5, 1.0, 4.0])
    np.testing.assert_allclose(means[:, 1], 2 * means[:, 0])
    # No draw holds the last picture with probability (2/3)³; else the one value is the mean.
    assert np.isnan(means[1:, 2]).mean() == pytest.approx(8 / 27, abs=0.03)
    assert np.nanmax(means[:, 2]) == pytest.approx(np.nanmin(means[:, 2])) == pytest.approx(4)
    # Only the first picture three times gives 1.
    assert (means[1:, 0] > 0.999).mean() == pytest.approx(1 / 27, abs=0.01)
    low, high = st.percentile_interval(means[1:], 0.9)
    assert high[0] == pytest.approx(np.quantile(means[1:, 0], 0.95))
    assert low[2] == pytest.approx(4)


def test_p_value_counts_the_smaller_side_and_one_more() -> None:
    # 36 of 39 resamples above zero, 3 below: 2 (3 + 1) / 40.
    differences = np.array([0.1] * 36 + [-0.1] * 3)
    assert st.bootstrap_p_value(differences) == pytest.approx(0.2)
    assert st.bootstrap_p_value(-differences) == pytest.approx(0.2)
    assert st.bootstrap_p_value(np.full(39, 0.1)) == pytest.approx(2 / 40)
    # A resample without a difference speaks for zero on either side.
    assert st.bootstrap_p_value(np.array([0.1] * 36 + [0.0] * 3)) == pytest.approx(0.2)
    assert st.bootstrap_p_value(np.zeros(39)) == pytest.approx(1.0)
    assert st.bootstrap_p_value(np.array([-1.0, 1.0])) == pytest.approx(1.0)


def test_p_value_is_at_most_5_percent_where_the_interval_excludes_zero() -> None:
    draws = np.random.default_rng(0).normal(size=1999)
    for shift in np.arange(1.5, 2.5, 0.05):
        low = np.quantile(draws + shift, 0.025)
        if abs(low) > 0.01:
            assert (st.bootstrap_p_value(draws + shift) <= 0.05) == (low > 0)


def test_holm_by_hand() -> None:
    # In order 0.005, 0.01, 0.03, 0.04: times 4, 3, 2 and 1 that is 0.02, 0.03, 0.06 and 0.04, raised to 0.06.
    assert st.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert st.holm([0.6, 0.7]) == pytest.approx([1.0, 1.0])
    assert st.holm([0.02, 0.02, 0.02]) == pytest.approx([0.06] * 3)
    assert st.holm([0.04]) == pytest.approx([0.04])
    assert st.holm([]) == []


def test_shares_and_marginals() -> None:
    settings = st.shares(["low/k4/b8", "high/k8/b16", "low/k4/b8", "low/k8/b8"])
    assert settings == pytest.approx({"low/k4/b8": 0.5, "high/k8/b16": 0.25, "low/k8/b8": 0.25})
    tiers, top_ks, blocks = st.marginals(settings)
    assert tiers == pytest.approx({"low": 0.75, "high": 0.25})
    assert top_ks == pytest.approx({"k4": 0.5, "k8": 0.5})
    assert blocks == pytest.approx({"b8": 0.75, "b16": 0.25})
    assert next(iter(settings)) == "low/k4/b8"


def test_mean_of_nothing() -> None:
    assert st.mean([]) is None
    assert st.mean([1.0, 2.0]) == pytest.approx(1.5)
