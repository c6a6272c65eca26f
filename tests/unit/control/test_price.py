"""The price of lane time: the envelope, and the derived price against the optimum that it stands for."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from tempovlm.control.price import Envelope, Price, derived_price, parse_price
from tempovlm.control.shares import common_share_ms
from tempovlm.core.errors import UserError

STEPS = Envelope.of([0.5, 0.7, 0.6, 0.8], [50.0, 100.0, 90.0, 200.0])
"""Slopes of 0.01, 0.004 and 0.001 per ms."""


def drawn_envelope(rng: np.random.Generator, count: int = 12) -> tuple[Envelope, np.ndarray, np.ndarray]:
    accuracy, lane_ms = rng.uniform(0.1, 0.9, count), rng.uniform(20, 200, count)
    return Envelope.of(accuracy, lane_ms), accuracy, lane_ms


def test_no_setting_lies_above_the_envelope_and_its_vertices_are_settings() -> None:
    rng = np.random.default_rng(0)
    for _ in range(50):
        envelope, accuracy, lane_ms = drawn_envelope(rng)
        assert np.all(np.interp(lane_ms, envelope.lane_ms, envelope.accuracy) >= accuracy - 1e-12)
        assert np.all(np.diff(envelope.slopes) < 0), "concave"
        assert envelope.slopes[-1] > 0
        assert envelope.steepest == pytest.approx((accuracy / lane_ms).max())
        vertices = set(zip(envelope.lane_ms[1:].tolist(), envelope.accuracy[1:].tolist(), strict=True))
        assert vertices <= set(zip(lane_ms.tolist(), accuracy.tolist(), strict=True))


def test_slopes_are_those_to_the_right() -> None:
    assert STEPS.lane_ms.tolist() == [0, 50, 100, 200]
    shares_ms = (0.0, 49.0, 50.0, 99.0, 100.0, 199.0, 200.0, 1e9)
    slopes = [STEPS.slope(share_ms) for share_ms in shares_ms]
    assert slopes == pytest.approx([0.01, 0.01, 0.004, 0.004, 0.001, 0.001, 0.0, 0.0])
    assert STEPS.at(75.0) == pytest.approx(0.6)
    assert (STEPS.worth(0.0), STEPS.worth(0.004), STEPS.worth(1.0)) == pytest.approx((0.8, 0.3, 0.0))


def test_settings_that_cannot_run_or_gain_nothing_do_not_count() -> None:
    envelope = Envelope.of([0.5, 0.9, 0.0, -0.1], [50.0, math.inf, 10.0, 5.0])
    assert envelope.lane_ms.tolist() == [0, 50]
    nothing = Envelope.of([0.9], [math.inf])
    assert (nothing.steepest, nothing.slope(10.0), nothing.worth(0.5)) == pytest.approx((0.0, 0.0, 0.0))


def optimum(envelope: Envelope, left_ms: list[float], step_ms: float) -> tuple[float, list[float]]:
    """The best total accuracy over a grid of lane times, and the least first one that reaches it."""
    grid = np.arange(0.0, max(left_ms) + step_ms / 2, step_ms)
    best, firsts = -1.0, list[float]()
    for times in itertools.product(grid, repeat=len(left_ms)):
        if np.any(np.cumsum(times) > np.array(left_ms) + 1e-9):
            continue
        total = sum(envelope.at(one) for one in times)
        if total > best + 1e-9:
            best, firsts = total, []
        if total > best - 1e-9:
            firsts.append(times[0])
    return best, firsts


@pytest.mark.parametrize(
    "left_ms", [[60.0, 80.0, 140.0], [120.0, 120.0, 120.0], [40.0, 200.0, 210.0], [150.0, 60.0]]
)
def test_the_common_share_reaches_the_optimum_and_its_price_asks_for_no_more(left_ms: list[float]) -> None:
    common_ms = common_share_ms([10.0 + one for one in left_ms], 10.0)
    share_ms = min(common_ms, left_ms[0])
    best, _ = optimum(STEPS, left_ms, 10.0)
    rest = [later - share_ms for later in left_ms[1:]]
    beside, _ = optimum(STEPS, rest, 10.0)
    assert STEPS.at(share_ms) + beside == pytest.approx(best, abs=1e-6)
    worth = STEPS.accuracy - derived_price(STEPS, common_ms) * STEPS.lane_ms
    least_ms = STEPS.lane_ms[worth >= worth.max() - 1e-9].min()
    assert least_ms <= common_ms + 1e-9, "who pays the price spends no more than the share"


def test_the_price_is_a_multiplier_of_the_optimisation() -> None:
    """KKT: with the multipliers of the even shares, no other lane times gain more at the price."""
    rng = np.random.default_rng(1)
    for _ in range(30):
        envelope, *_ = drawn_envelope(rng)
        left_ms = np.sort(rng.uniform(30, 800, 5))
        shares, begin, done = np.empty(5), 0, 0.0
        while begin < 5:  # the even shares: again and again the tightest of the remaining constraints
            ratios = (left_ms[begin:] - done) / np.arange(1, 6 - begin)
            end = begin + int(ratios.argmin()) + 1
            shares[begin:end], begin, done = ratios.min(), end, left_ms[end - 1]
        prices = np.array([envelope.slope(one) for one in shares])
        assert shares[0] == pytest.approx(min(common_share_ms([*left_ms], 0.0), left_ms[0]))
        assert np.all(np.diff(prices) <= 1e-12), "multipliers are not negative: who is served later pays no more"
        for one, price in zip(shares, prices, strict=True):
            assert envelope.at(one) - price * one == pytest.approx(envelope.worth(price))


def test_time_is_free_where_nobody_waits() -> None:
    assert common_share_ms([50.0], 0.0) == math.inf
    assert derived_price(STEPS, math.inf) == pytest.approx(0.0)
    assert derived_price(STEPS, common_share_ms([50.0, math.inf], 0.0)) == pytest.approx(0.0), (
        "nor where no deadline waits"
    )


def test_it_costs_at_most_the_steepest_slope() -> None:
    assert derived_price(STEPS, common_share_ms([1.0, *[2.0] * 30], 0.0)) == pytest.approx(STEPS.steepest)


def test_more_who_wait_never_lower_the_price() -> None:
    rng = np.random.default_rng(2)
    for _ in range(50):
        envelope, *_ = drawn_envelope(rng)
        waiting = [*np.sort(rng.uniform(20, 500, 5))]
        more = [*np.sort([*waiting, rng.uniform(20, 500)])]
        before, after = (derived_price(envelope, common_share_ms([900.0, *who], 0.0)) for who in (waiting, more))
        assert after >= before


def test_those_that_can_no_longer_be_served_do_not_count() -> None:
    deadlines = [300.0, 30.0, 300.0]
    assert common_share_ms(deadlines, 0.0) == pytest.approx(15.0)
    assert common_share_ms(deadlines, 0.0, least_ms=40.0) == pytest.approx(150.0)
    assert common_share_ms(deadlines, 40.0) == pytest.approx(130.0)
    assert common_share_ms(deadlines, 290.0, least_ms=40.0) == math.inf


def test_several_lanes_serve_in_turns() -> None:
    deadlines = [300.0] * 4
    shares = [common_share_ms(deadlines, 0.0, lanes) for lanes in (1, 2, 3, 4)]
    assert shares == pytest.approx([75.0, 150.0, 150.0, 300.0])
    assert common_share_ms(deadlines, 0.0, 2, others=1) == pytest.approx(100.0), "five in three turns"


def test_prices_are_parsed() -> None:
    assert parse_price("derived") == Price()
    assert [parse_price(one) for one in ("0", "0.0005", 0.25)] == [
        Price(False, one) for one in (0.0, 0.0005, 0.25)
    ]
    assert [str(parse_price(one)) for one in ("derived", "0", "0.0005")] == ["derived", "0", "0.0005"]
    for wrong in ("cheap", "-1", "nan", "inf", None, True):
        with pytest.raises(UserError, match="must be derived, 0, or accuracy per ms"):
            parse_price(wrong)


def test_a_number_counts_whoever_waits() -> None:
    assert parse_price("0.002").of(STEPS, math.inf) == pytest.approx(0.002)
    assert parse_price("derived").of(STEPS, 75.0) == pytest.approx(0.004)
