"""The decision rule on hand-computed cases."""

from __future__ import annotations

import numpy as np
import pytest

from tempovlm.control.select import TIE, best


def chosen(scores: list[float], cost_ms: list[float], budget_ms: float, **rule: float) -> int:
    costs_ms = np.array(cost_ms)
    return int(best(np.array(scores), costs_ms <= budget_ms, costs_ms, **rule))


@pytest.mark.parametrize(("budget_ms", "index"), [(100.0, 2), (40.0, 2), (39.9, 1), (5.0, 0)])
def test_the_highest_score_that_fits_and_the_cheapest_where_none_does(budget_ms: float, index: int) -> None:
    assert chosen([0.2, 0.5, 0.9], [10.0, 20.0, 40.0], budget_ms) == index


def test_the_cheapest_is_told_by_cost_not_by_place() -> None:
    assert chosen([0.2, 0.5, 0.9], [10.0, 8.0, 40.0], 5.0) == 1


def test_a_tie_goes_to_the_cheaper() -> None:
    assert chosen([0.5, 0.5 + 0.9 * TIE, 0.1], [30.0, 40.0, 5.0], 100.0, tie=TIE) == 0
    assert chosen([0.5, 0.5 - 0.9 * TIE, 0.1], [30.0, 20.0, 5.0], 100.0, tie=TIE) == 1
    assert chosen([0.5, 0.5 + 1.1 * TIE, 0.1], [30.0, 40.0, 5.0], 100.0, tie=TIE) == 1
    assert chosen([0.5, 0.5, 0.5], [30.0, 20.0, 20.0], 100.0) == 1


def test_a_price_leaves_what_a_gain_does_not_pay_for() -> None:
    scores, cost_ms = [0.5, 0.6], [10.0, 30.0]
    assert chosen(scores, cost_ms, 100.0, price_per_ms=0.0049) == 1
    assert chosen(scores, cost_ms, 100.0, price_per_ms=0.0051) == 0


def test_logits_far_below_zero_are_scores_too() -> None:
    assert chosen([-1e9, -1e9 + 64], [10.0, 30.0], 100.0) == 1


def test_rows_are_chosen_by_themselves_and_a_missing_setting_never() -> None:
    scores = np.array([[0.5, 0.9, 0.1], [0.5, 0.1, 0.9]])
    cost_ms = np.array([10.0, 20.0, np.inf])
    budgets_ms, price_per_ms = np.array([[15.0], [50.0]]), np.array([[0.0], [0.001]])
    assert best(scores, cost_ms <= budgets_ms, cost_ms, price_per_ms).tolist() == [0, 0]
    assert best(scores[0], cost_ms <= budgets_ms, cost_ms).tolist() == [0, 1]
