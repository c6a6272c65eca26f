"""Bounds that follow a machine: how often they are exceeded, and what the guard makes of it."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

import tiny_model
from tempovlm.control.guard import Guard
from tempovlm.control.margin import LEAST, MISS_RATE, MOST, STEP, OnlineMargin
from tempovlm.control.policies import FixedPolicy, TablePolicy, prior_accuracy
from tempovlm.control.policy import Sight
from tempovlm.core.knobs import KnobConfig
from tempovlm.core.request import Answer, Request
from tempovlm.engine.engine import Engine

SPACE = tiny_model.SPACE
PROFILE = tiny_model.make_profile(spread=0.1)

# What a policy takes itself is measured: here by a clock that no machine drives.
pytestmark = pytest.mark.usefixtures("ticks")


@pytest.mark.parametrize("slower", [0.8, 1.0, 1.15, 1.4])
def test_bounds_are_exceeded_as_often_as_allowed_whatever_the_machine_does(slower: float) -> None:
    margin, rng = OnlineMargin(), np.random.default_rng(0)
    missed = []
    for took in slower * rng.lognormal(sigma=0.05, size=4000):
        missed.append(took > 1.12 * margin.factor)
        margin.observe(float(took), 1.12)
    assert np.mean(missed) <= MISS_RATE + 0.005
    assert margin.factor == pytest.approx(slower, rel=0.07)


def test_one_miss_by_hand() -> None:
    margin = OnlineMargin()
    margin.observe(9.0, 10.0)
    assert margin.factor == pytest.approx(np.exp(-STEP * MISS_RATE))
    margin.observe(11.0, 10.0)
    assert margin.factor == pytest.approx(np.exp(STEP * (1 - 2 * MISS_RATE)))
    margin.observe(10.2, 10.0)
    assert margin.factor == pytest.approx(np.exp(STEP * (1 - 3 * MISS_RATE)))
    for took_ms, factor in ((1e6, MOST), (1.0, LEAST)):
        for _ in range(4000):
            margin.observe(took_ms, 10.0)
        assert margin.factor == pytest.approx(factor)


def test_the_guard_lets_less_through_after_answers_beyond_their_bounds(engine: Engine) -> None:
    guard = Guard.around(TablePolicy(SPACE, prior_accuracy(SPACE)), SPACE, PROFILE)
    assert guard.margin is not None
    request = Request(images=(), question="what?", budget_ms=60.0)
    before = guard.choose_tier(request, None, 0.0).index
    answer = engine.answer(Request(images=(), question="what?", max_new_tokens=2))
    usual_ms = PROFILE.upper_total_ms(SPACE.index(answer.knobs))

    def took(total_ms: float, **fields: object) -> Answer:
        timings_ms = {**answer.timings_ms, "control": 0.0, "total": total_ms}
        return replace(answer, timings_ms=timings_ms, **fields)  # type: ignore[arg-type]

    guard.observe(took(0.9 * usual_ms), 0.0)
    guard.observe(took(9 * usual_ms, finish_reason="deadline"), 0.0)
    guard.observe(took(1.5 * usual_ms), 0.6 * usual_ms)  # what opening took is not the machine's pace
    assert 0.99 < guard.margin.factor < 1
    for _ in range(8):
        guard.observe(took(2 * usual_ms), 0.0)
    after = guard.choose_tier(request, None, 0.0).index
    assert guard.margin.factor > 1.3
    assert PROFILE.upper_total_ms(after) < PROFILE.upper_total_ms(before)
    assert guard.only(range(3)).margin is guard.margin


def test_an_engine_tells_its_guard(engine: Engine) -> None:
    told: list[float] = []

    class Listening(OnlineMargin):
        def observe(self, took_ms: float, bound_ms: float) -> None:  # noqa: ARG002 - the base's
            told.append(took_ms)

    guard = replace(Guard.around(FixedPolicy(SPACE.cheapest, SPACE), SPACE, PROFILE), margin=Listening())
    answer = engine.answer(Request(images=(), question="what?", max_new_tokens=2), guard)
    assert len(told) == 1
    assert 0 < told[0] <= answer.timings_ms["total"]


def test_a_machine_that_is_faster_than_calibrated_is_used() -> None:
    guard = Guard.around(TablePolicy(SPACE, prior_accuracy(SPACE)), SPACE, PROFILE)
    assert guard.margin is not None
    bound_ms = PROFILE.upper_total_ms(SPACE.index(SPACE.native))
    request = Request(images=(), question="what?", budget_ms=0.9 * bound_ms)

    def chosen() -> KnobConfig:
        tier = guard.choose_tier(request, None, 0.0)
        return guard.choose_compute(request, tier, Sight(tier.tier, None, 0, 0), 0.0).knobs

    assert chosen() != SPACE.native
    for _ in range(1000):
        guard.margin.observe(0.5 * bound_ms, bound_ms)
    assert chosen() == SPACE.native
