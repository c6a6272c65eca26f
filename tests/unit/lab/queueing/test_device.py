"""Requests that share a device in a simulation: readings add up, steps serve all, and who waits chooses later."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import numpy as np
import pytest
from decision_worlds import COST_MS, SPACE, K
from queue_worlds import traffic, world

from tempovlm.control.forecast import Forecast
from tempovlm.control.price import Price
from tempovlm.control.queue.schedule import Schedule
from tempovlm.lab.queueing import choosers
from tempovlm.lab.queueing.device import Lanes, Shared, SharedTimes
from tempovlm.lab.queueing.simulate import Outcome, simulate
from tempovlm.latency.profile import Sharing

TWO, EIGHT = Sharing(2, 0.9, 1.2, 1.05), Sharing(8, 0.65, 2.5, 1.08)
TIMES = SharedTimes((TWO, EIGHT), np.full(K, 0.25), steps=4)
CHEAPEST_MS, NATIVE_MS = float(COST_MS.min()), float(COST_MS[SPACE.index(SPACE.native)])


def test_who_is_alone_takes_what_was_measured_alone() -> None:
    device = Shared(TIMES)
    device.begin(7, 0, 20.0, 100.0)
    assert device.next_ms == pytest.approx(120.0)
    assert device.end() == (pytest.approx(120.0), 7)
    assert device.next_ms == float("inf")


def test_who_joins_is_read_before_the_next_step_of_the_others() -> None:
    device = Shared(TIMES)
    device.begin(0, 0, 20.0, 0.0)  # 15 ms of reading, then 4 steps of 1.25
    device.begin(1, 0, 20.0, 5.0)
    # 10 ms and 15 ms are left to be read, at 0.9; then 4 steps of 1.5 ms for both
    assert device.next_ms == pytest.approx(5.0 + 0.9 * 25.0 + 4 * 1.25 * 1.2)
    first_ms, _ = device.end()
    assert device.next_ms == pytest.approx(first_ms), "equal answers end together"


def test_lanes_do_not_touch_each_other() -> None:
    lanes = Lanes()
    lanes.begin(0, 0, 20.0, 0.0)
    lanes.begin(1, 0, 10.0, 5.0)
    assert lanes.end() == (pytest.approx(15.0), 1)
    assert lanes.end() == (pytest.approx(20.0), 0)


def run(times: SharedTimes, policy: str, rate: float, counted: SharedTimes | None, seed: int = 0) -> Outcome:
    """Poisson arrivals at a rate per native time; the schedule counts what is `counted`."""
    shared = replace(world(spread=0.04), shared=times)
    arrival_ms = np.cumsum(np.random.default_rng(seed).exponential(NATIVE_MS / rate, 500))
    asked = traffic(shared, arrival_ms, budget_ms=2.5 * NATIVE_MS, seed=seed)
    device = None if counted is None else counted.device
    make = partial(Schedule, 1, 10**6, 10**6, price=Price(), forecast=Forecast(), device=device)
    return simulate(shared, asked, choosers.named(policy, shared), make)


@pytest.mark.parametrize("rate", [1.0, 2.0, 4.0])
def test_whoever_is_admitted_to_a_shared_device_is_in_time(rate: float) -> None:
    outcome = run(TIMES, "table", rate, TIMES)
    admitted = outcome.on_time | outcome.late
    assert outcome.on_time.sum() >= 0.99 * admitted.sum()


def test_few_in_flight_who_pay_serve_more_than_many_who_choose_freely() -> None:
    many = replace(TIMES, seats=8)
    freely, paid = run(many, "greedy", 2.0, many), run(TIMES, "table", 2.0, TIMES)
    assert paid.on_time.mean() > 1.3 * freely.on_time.mean()
    assert paid.right_on_time.sum() > freely.right_on_time.sum()


@pytest.mark.parametrize("policy", ["table", "greedy", "native_sheds"])
def test_a_device_that_was_not_measured_changes_nothing(policy: str) -> None:
    plain = world(spread=0.04)
    arrival_ms = np.cumsum(np.random.default_rng(1).exponential(NATIVE_MS / 1.7, 300))
    asked, chooser = traffic(plain, arrival_ms, budget_ms=2 * NATIVE_MS), choosers.named(policy, plain)
    unknown = replace(TIMES.device, sharing=lambda _: None)
    outcomes = [
        simulate(plain, asked, chooser, partial(Schedule, forecast=Forecast(), device=device))
        for device in (None, unknown)
    ]
    assert (outcomes[0].setting == outcomes[1].setting).all()
    assert outcomes[0].end_ms.tolist() == outcomes[1].end_ms.tolist()
