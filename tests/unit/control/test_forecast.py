"""A forecast says what came after similar moments, and nothing before it has seen some."""

from __future__ import annotations

import numpy as np
import pytest

from tempovlm.control.forecast import FOLLOWING, LEAST_SCENARIOS, MOMENTS, SCENARIOS, Forecast
from tempovlm.control.price import Envelope, Price
from tempovlm.control.queue import Door, Schedule, Stay

BUDGET_MS = 100.0


def pairs(forecast: Forecast, count: int, apart_ms: float = 1000.0, then_ms: float = 10.0) -> float:
    """Let pairs of requests come; returns the time after the last one's budget."""
    for number in range(count):
        at_ms = number * apart_ms
        forecast.came(at_ms, at_ms + BUDGET_MS)
        forecast.began(at_ms)
        forecast.came(at_ms + then_ms, at_ms + then_ms + BUDGET_MS)
    return count * apart_ms


def test_nobody_is_expected_before_enough_was_seen() -> None:
    forecast = Forecast()
    assert forecast.shares_ms(3, 0.0).tolist() == [np.inf]
    end_ms = pairs(forecast, LEAST_SCENARIOS - 1)
    forecast.began(end_ms)
    assert forecast.shares_ms(0, end_ms).tolist() == [np.inf]


def test_who_came_after_similar_moments_gets_as_much() -> None:
    forecast = Forecast()
    end_ms = pairs(forecast, 20)
    forecast.came(end_ms, end_ms + BUDGET_MS)
    forecast.began(end_ms)
    shares_ms = forecast.shares_ms(0, end_ms)
    assert shares_ms == pytest.approx(np.full(LEAST_SCENARIOS, 110.0 / 2)), "two until the second one's deadline"
    assert forecast.shares_ms(1, end_ms) == pytest.approx(np.full(LEAST_SCENARIOS, 110.0 / 3)), (
        "behind one that waits"
    )
    assert forecast.shares_ms(1, end_ms, lanes=2) == pytest.approx(np.full(LEAST_SCENARIOS, 110.0 / 2))


def test_who_comes_when_the_lane_is_idle_again_binds_nobody() -> None:
    forecast = Forecast()
    end_ms = pairs(forecast, 20, then_ms=90.0)
    forecast.came(end_ms, end_ms + BUDGET_MS)
    forecast.began(end_ms)
    assert forecast.shares_ms(0, end_ms) == pytest.approx(np.full(LEAST_SCENARIOS, 95.0)), (
        "190 / 2, and not 90 alone"
    )
    assert (forecast.shares_ms(0, end_ms) >= 90.0).all()


def test_of_moments_that_are_alike_the_places_decide() -> None:
    forecast = Forecast()
    for number in range(400):  # all begin alike, and what follows takes turns
        at_ms = number * 1000.0
        forecast.came(at_ms, at_ms + BUDGET_MS)
        forecast.began(at_ms)
        then_ms = at_ms + 10.0 + number % 80
        forecast.came(then_ms, then_ms + BUDGET_MS)
    forecast.came(400_000.0, 400_100.0)
    forecast.began(400_000.0)
    expected = (BUDGET_MS + 10.0 + np.arange(SCENARIOS)) / 2
    assert forecast.shares_ms(0, 400_000.0) == pytest.approx(expected), "those of the first places"


def test_moments_are_told_apart_by_who_came_before() -> None:
    forecast = Forecast()
    for number in range(200):  # a lone request is followed by none, and one of three by more of them
        at_ms, is_burst = number * 1000.0, number % 2 == 0
        for place in range(6 if is_burst else 1):
            came_ms = at_ms + 5.0 * place
            forecast.came(came_ms, came_ms + BUDGET_MS)
            if place in (0, 2):
                forecast.began(came_ms)
    at_ms = 200_000.0
    forecast.came(at_ms, at_ms + BUDGET_MS)
    forecast.began(at_ms)
    alone_ms = forecast.shares_ms(0, at_ms)
    for place in (1, 2):
        forecast.came(at_ms + 5.0 * place, at_ms + 5.0 * place + BUDGET_MS)
    third_ms = forecast.shares_ms(0, at_ms + 10.0)
    assert np.isinf(alone_ms).any()
    assert not np.isinf(third_ms).any()


def test_a_question_about_the_future_changes_nothing() -> None:
    forecast = Forecast()
    end_ms = pairs(forecast, 20)
    before = [forecast.shares_ms(0, end_ms + at).tolist() for at in range(3)]
    assert [forecast.shares_ms(0, end_ms + at).tolist() for at in range(3)] == before


def test_a_request_without_a_deadline_binds_nobody() -> None:
    forecast = Forecast()
    for number in range(50):
        forecast.came(number * 10.0, np.inf)
        forecast.began(number * 10.0)
    assert forecast.shares_ms(0, 500.0).tolist() == [np.inf]


def test_it_forgets_what_it_needs_no_more() -> None:
    forecast = Forecast()
    for number in range(2 * MOMENTS):
        forecast.came(number * 20.0, number * 20.0 + BUDGET_MS)
        forecast.began(number * 20.0)
    kept = vars(forecast)["_arrivals_ms"]
    assert len(kept) <= 2 * FOLLOWING


def test_the_price_of_scenarios_is_the_mean_of_theirs() -> None:
    envelope = Envelope.of(np.array([0.5, 0.8]), np.array([10.0, 40.0]))
    shares_ms = np.array([5.0, 20.0, np.inf, 40.0])
    each = [Price().of(envelope, share) for share in shares_ms.tolist()]
    assert each == pytest.approx([0.05, 0.01, 0.0, 0.0])
    assert Price().of(envelope, shares_ms) == pytest.approx(np.mean(each))
    assert Price(is_derived=False, per_ms=0.3).of(envelope, shares_ms) == pytest.approx(0.3)


def test_a_schedule_prices_by_who_may_come_and_counts_the_refused_too() -> None:
    envelope = Envelope.of(np.array([0.5, 0.8]), np.array([10.0, 60.0]))
    forecast = Forecast()
    schedule = Schedule(price=Price(), forecast=forecast, most_waiting=0)
    for number in range(20):
        at_ms = number * 1000.0
        first, second = (
            Stay(at_ms + later_ms, at_ms + later_ms + BUDGET_MS, 10.0, gains=envelope, usual=envelope)
            for later_ms in (0.0, 10.0)
        )
        assert not schedule.admit(first, at_ms), "none may wait"
        forecast.began(at_ms)
        assert not schedule.admit(second, at_ms + 10.0)
    last = Stay(20_000.0, 20_000.0 + BUDGET_MS, 10.0, gains=envelope, usual=envelope)
    forecast.came(last.accepted_ms, last.deadline_ms)
    shares_ms = schedule.lane_price(20_000.0, last).share_ms
    assert shares_ms == pytest.approx(np.full(LEAST_SCENARIOS, 110.0 / 2))
    assert schedule.lane_price(20_000.0, last).per_ms(envelope) == pytest.approx(0.3 / 50)


def test_who_gains_less_than_those_who_may_come_is_refused_on_arrival() -> None:
    """After 20 pairs a third one is expected: what gains little with the lane's time is told so, and not later."""
    usual, poor = Envelope.of([0.5, 0.8], [10.0, 60.0]), Envelope.of([0.04], [20.0])
    for has_forecast in (False, True):
        forecast = Forecast() if has_forecast else None
        schedule = Schedule(price=Price(), forecast=forecast)
        end_ms = pairs(forecast, 20) if forecast is not None else 20_000.0
        one = Stay(end_ms, end_ms + BUDGET_MS, 20.0, gains=poor, usual=usual)
        assert schedule.admit(one, end_ms) is not has_forecast


def test_a_door_asks_the_forecast_that_a_server_gives_it() -> None:
    door, forecast = Door(), Forecast()
    assert door.shares_ms(0.0) == np.inf
    end_ms = pairs(forecast, 20)
    forecast.came(end_ms, end_ms + BUDGET_MS)
    door.forecast = forecast
    assert door.shares_ms(end_ms) == pytest.approx(np.full(LEAST_SCENARIOS, 110.0 / 2))
