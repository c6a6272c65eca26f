"""Bounds that follow a machine: how often they are exceeded, and what the guard makes of it."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

import tiny_model
from tempovlm.control.guard import Guard
from tempovlm.control.margin import (
    FORGET,
    HEADROOM,
    LEAST,
    MISS_RATE,
    MOST,
    MOST_COMPANY,
    STEP,
    SUSPECT,
    SUSPECTS,
    OnlineMargin,
)
from tempovlm.control.policies import FixedPolicy, TablePolicy, prior_accuracy
from tempovlm.control.policy import Sight
from tempovlm.core.knobs import KnobConfig
from tempovlm.core.request import Answer, Request
from tempovlm.engine.engine import Engine

SPACE = tiny_model.SPACE
PROFILE = tiny_model.make_profile(spread=0.1)

# What a policy takes itself is measured: here by a clock that no machine drives.
pytestmark = pytest.mark.usefixtures("ticks")


BOUND = 1.12
"""Of the simulated answers, which are expected to take 1 and spread by a twentieth."""


def drive(margin: OnlineMargin, slower: np.ndarray, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Answers on a machine so many times slower than calibrated: which exceed their bounds, and the factors."""
    rng = np.random.default_rng(seed)
    missed, factors = [], []
    for took in slower * rng.lognormal(sigma=0.05, size=len(slower)):
        factors.append(margin.factor)
        missed.append(took > BOUND * margin.factor)
        margin.observe(float(took), BOUND, 1.0)
    return np.array(missed), np.array(factors)


@pytest.mark.parametrize("slower", [0.8, 1.0, 1.15, 1.4, 1.9])
def test_bounds_are_exceeded_as_often_as_allowed_whatever_the_machine_does(slower: float) -> None:
    margin = OnlineMargin()
    missed, _ = drive(margin, np.full(4000, slower))
    assert missed.mean() <= MISS_RATE + 0.005
    assert margin.factor == pytest.approx(slower, rel=0.07)


def test_a_burst_is_covered_at_once_and_forgotten() -> None:
    slower = np.ones(400)
    slower[200:224] = 2.0
    missed, factors = drive(OnlineMargin(), slower)
    assert missed[200:224].sum() <= SUSPECT + 1
    assert factors[204:224].min() > 2 / BOUND
    assert factors[224 + 30] == pytest.approx(factors[200], rel=0.05), "within 30 answers of its end"


@pytest.mark.parametrize("slower", [1.5, 4.0])
def test_company_that_stays_is_covered_beyond_the_limits_of_drift(slower: float) -> None:
    margin = OnlineMargin()
    missed, factors = drive(margin, np.concatenate((np.ones(100), np.full(400, slower))))
    assert missed[110:].mean() <= 0.03
    assert factors[-1] == pytest.approx(slower, rel=0.15)


def test_company_that_comes_and_goes() -> None:
    slower = np.where(np.arange(2000) // 50 % 2, 1.7, 1.0)
    missed, _ = drive(OnlineMargin(), slower)
    assert missed.mean() <= 0.04, "two answers of each spell tell that it began"


def test_one_miss_by_hand() -> None:
    margin = OnlineMargin()
    margin.observe(9.0, 10.0, 8.0)
    assert margin.factor == pytest.approx(np.exp(-STEP * MISS_RATE))
    margin.observe(11.0, 10.0, 8.0)
    assert margin.factor == pytest.approx(np.exp(STEP * (1 - 2 * MISS_RATE)))
    assert not margin.has_company
    margin.observe(16.0, 10.0, 8.0)
    assert margin.has_company
    assert margin.factor == pytest.approx(np.exp(HEADROOM) * 1.6 / np.exp(STEP * (1 - 2 * MISS_RATE)))
    for _ in range(FORGET + SUSPECTS):
        margin.observe(9.0, 10.0, 8.0)
    assert not margin.has_company
    assert margin.factor < 1.1
    for took_ms, factor in ((1e6, MOST * MOST_COMPANY), (1.0, LEAST)):
        for _ in range(4000):
            margin.observe(took_ms, 10.0, 8.0)
        assert margin.factor == pytest.approx(factor)


def test_the_guard_lets_less_through_after_answers_beyond_their_bounds(engine: Engine) -> None:
    guard = Guard.around(TablePolicy(SPACE, prior_accuracy(SPACE)), SPACE, PROFILE)
    assert guard.margin is not None
    request = Request(images=(), question="what?", budget_ms=60.0)
    before = guard.choose_tier(request, None, 0.0).index
    answer = engine.answer(Request(images=(), question="what?", max_new_tokens=2))
    usual_ms = PROFILE.upper_total_ms(SPACE.index(answer.knobs))

    def took(total_ms: float, opened_ms: float = 0.0, **fields: object) -> Answer:
        stages_ms = {"queue": 3.0, "control": 2.0, "preprocess": opened_ms, "prefill": total_ms - opened_ms}
        timings_ms = {**dict.fromkeys(answer.timings_ms, 0.0), **stages_ms, "total": total_ms + 5.0}
        return replace(answer, timings_ms=timings_ms, **fields)  # type: ignore[arg-type]

    guard.observe(took(0.9 * usual_ms), 0.0)
    guard.observe(took(9 * usual_ms, finish_reason="deadline", stopped_at="decode"), 0.0)
    guard.observe(
        took(1.5 * usual_ms, 0.6 * usual_ms), 0.6 * usual_ms
    )  # what opening took is not the machine's pace
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
        def observe(self, took_ms: float, bound_ms: float, expected_ms: float) -> None:  # noqa: ARG002 - the base's
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
        guard.margin.observe(0.5 * bound_ms, bound_ms, 0.9 * bound_ms)
    assert chosen() == SPACE.native
