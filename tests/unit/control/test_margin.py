"""Bounds that follow a machine: how often they are exceeded, and what the guard makes of it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from PIL import Image

import tiny_model
from tempovlm.control.guard import Choice, Guard, TierChoice
from tempovlm.control.margin import (
    FORGET,
    HEADROOM,
    HEADROOM_MISS_RATE,
    LEAST,
    MISS_RATE,
    MOST,
    MOST_COMPANY,
    NARROW,
    RECURS,
    STEP,
    SUSPECT,
    SUSPECTS,
    SUSPICIOUS,
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
    tail = np.exp(STEP * (1 - 2 * MISS_RATE))
    assert margin.factor == pytest.approx(tail)
    assert not margin.has_company
    margin.observe(16.0, 10.0, 8.0)
    assert margin.has_company
    assert margin.factor == pytest.approx(np.exp(HEADROOM) * 1.6 / tail)
    for _ in range(FORGET + SUSPECTS):
        margin.observe(9.0, 10.0, 8.0)
    assert not margin.has_company
    assert margin.factor < 1.1
    for took_ms, factor in ((1e6, MOST * MOST_COMPANY), (1.0, LEAST)):
        for _ in range(4000):
            margin.observe(took_ms, 10.0, 8.0)
        assert margin.factor == pytest.approx(factor)


def spell(margin: OnlineMargin) -> None:
    """Company that comes and goes."""
    for took_ms in (16.0, 16.0, *[8.0] * (2 * FORGET)):
        margin.observe(took_ms, 10.0, 8.0)
    assert not margin.has_company


def test_one_slow_half_makes_one_answer_careful_where_company_comes_again_and_again() -> None:
    margin = OnlineMargin()
    spell(margin)
    margin.observe(9.0, 10.0, 8.0, 1.5)
    assert margin.factor < 1.01, "company came once: a stall"
    spell(margin)
    usual = margin.factor
    margin.observe(9.0, 10.0, 8.0, 1.5)
    assert margin.factor > 1.5
    margin.observe(9.0, 10.0, 8.0, 0.9)
    assert margin.factor == pytest.approx(usual, rel=0.01)
    margin.observe(9.0, 10.0, 8.0, usual * (1 + SUSPICIOUS / 2))
    assert margin.factor == pytest.approx(usual, rel=0.01), "one in fifty is as slow"
    for _ in range(RECURS):
        margin.observe(9.0, 10.0, 8.0, 0.9)
    usual = margin.factor
    margin.observe(9.0, 10.0, 8.0, 1.5)
    assert margin.factor == pytest.approx(usual, rel=0.01), "it has been away for long"


def test_company_that_returns_is_taken_to_be_as_slow_as_before() -> None:
    margin = OnlineMargin()
    for took_ms in (16.0, 30.0, *[8.0] * (2 * FORGET)):
        margin.observe(took_ms, 10.0, 8.0)
    assert not margin.has_company
    assert margin.factor < 1.1
    margin.observe(12.0, 10.0, 8.0)
    assert margin.factor < 1.4
    margin.observe(12.0, 10.0, 8.0)
    assert margin.factor > 2.8


def test_bounds_in_company_keep_up_with_a_wide_spread() -> None:
    rng = np.random.default_rng(0)
    margin, missed = OnlineMargin(), []
    for took in 2.0 * rng.lognormal(sigma=0.3, size=3000):
        missed.append(took > BOUND * margin.factor)
        margin.observe(float(took), BOUND, 1.0)
    assert np.mean(missed[1000:]) <= HEADROOM_MISS_RATE + 0.005
    assert margin.has_company


def test_what_a_picture_took_tells_how_fast_the_machine_is() -> None:
    margin = OnlineMargin()
    assert margin.rest_factor(1.1, 1.2) == pytest.approx(1.0)
    assert margin.rest_factor(1.9, 1.2) == pytest.approx(1.9), "company came within the answer"
    assert margin.rest_factor(1e9, 1.2) == pytest.approx(MOST_COMPANY)
    for took_ms in (25.0, 25.0):
        margin.observe(took_ms, 10.0, 8.0)
    company = margin.factor
    assert company == pytest.approx(2.5 * np.exp(HEADROOM))
    assert margin.rest_factor(1.0, 1.2) == pytest.approx(np.exp(NARROW)), "it left"
    assert margin.rest_factor(1.15, 1.2) == pytest.approx(1.15 * np.exp(NARROW))
    assert margin.rest_factor(4.0, 1.2) == pytest.approx(4.0)
    assert margin.rest_factor(0.1, 1.2) == pytest.approx(company), "a cached picture tells nothing"


def test_the_second_choice_goes_by_what_the_picture_took() -> None:
    guard = Guard.around(TablePolicy(SPACE, prior_accuracy(SPACE)), SPACE, PROFILE)
    assert guard.margin is not None
    usual_ms = PROFILE.p50_picture_ms(SPACE.index(SPACE.native))
    budget_ms = 2 * usual_ms + 1.3 * PROFILE.upper_remainder_ms(SPACE.index(SPACE.native))
    request = Request(images=(), question="what?", budget_ms=budget_ms)

    def chosen(slower: float | None, tier: TierChoice) -> Choice:
        picture_ms = None if slower is None else slower * usual_ms
        return guard.choose_compute(request, tier, Sight(tier.tier, None, 0, 0), 2 * usual_ms, picture_ms)

    tier = guard.choose_tier(request, None, 0.0)
    assert tier.tier == SPACE.native.tier
    most, least = chosen(1.0, tier), chosen(2.0, tier)
    assert chosen(None, tier) == most
    assert PROFILE.p50_remainder_ms(SPACE.index(least.knobs)) < PROFILE.p50_remainder_ms(SPACE.index(most.knobs))
    assert least.knobs.tier == most.knobs.tier
    assert least.predicted is not None
    upper_ms = PROFILE.upper_remainder_ms(SPACE.index(least.knobs))
    assert least.predicted.upper_ms == pytest.approx(2 * usual_ms + 2 * upper_ms)
    for _ in range(2):
        guard.margin.observe(2.0, 1.0, 1.0)
    assert PROFILE.p50_remainder_ms(SPACE.index(chosen(1.0, tier).knobs)) > PROFILE.p50_remainder_ms(
        SPACE.index(chosen(None, tier).knobs)
    )


def test_an_engine_says_what_the_picture_took(engine: Engine, picture: Image.Image) -> None:
    told: list[float | None] = []

    class Telling(Guard):
        def choose_compute(self, *args: Any, **more: Any) -> Choice:
            told.append(args[4])
            return super().choose_compute(*args, **more)

    policy = FixedPolicy(SPACE.cheapest, SPACE)
    guard = Telling(policy, SPACE, tuple(range(len(SPACE))), PROFILE)
    answers = [engine.answer(Request(images=some, question="what?"), guard) for some in ((), (picture,))]
    assert told[0] is None
    assert told[1] is not None
    times_ms = answers[1].timings_ms
    assert (
        0
        < told[1]
        <= times_ms["preprocess"] + times_ms["vision_encoder"] + times_ms["projector"] + times_ms["control"]
    )


def test_the_guard_lets_less_through_after_answers_beyond_their_bounds(engine: Engine) -> None:
    guard = Guard.around(TablePolicy(SPACE, prior_accuracy(SPACE)), SPACE, PROFILE)
    assert guard.margin is not None
    request = Request(images=(), question="what?", budget_ms=60.0)
    before = guard.choose_tier(request, None, 0.0).index
    answer = engine.answer(Request(images=(), question="what?", max_new_tokens=2))
    usual_ms = PROFILE.upper_total_ms(SPACE.index(answer.knobs))

    def took(total_ms: float, opened_ms: float = 0.0, **fields: object) -> Answer:
        half_ms = (total_ms - opened_ms) / 2  # as in the profile
        stages_ms = {
            "queue": 3.0,
            "control": 2.0,
            "preprocess": opened_ms,
            "vision_encoder": half_ms,
            "prefill": half_ms,
        }
        timings_ms = {**dict.fromkeys(answer.timings_ms, 0.0), **stages_ms, "total": total_ms + 5.0}
        return replace(answer, timings_ms=timings_ms, **fields)  # type: ignore[arg-type]

    guard.observe(took(0.9 * usual_ms), 0.0)
    guard.observe(took(9 * usual_ms, finish_reason="deadline", stopped_at="decode"), 0.0)
    guard.observe(
        took(1.5 * usual_ms, 0.6 * usual_ms), 0.6 * usual_ms
    )  # what opening took is not the machine's pace
    assert 0.99 < guard.margin.factor < 1
    cut = {"finish_reason": "deadline", "stopped_at": "vision_encoder", "budget_ms": 3 * usual_ms}
    for _ in range(3):
        guard.observe(took(0.5 * usual_ms, **cut, budget_feasible=False), 0.0)
    assert 0.99 < guard.margin.factor < 1, "nothing was expected to fit"
    for _ in range(3):
        guard.observe(took(0.5 * usual_ms, **cut, budget_feasible=True), 0.0)
    assert guard.margin.factor > 2, "each would have taken more than three times as long"
    for _ in range(30):
        guard.observe(took(0.9 * usual_ms), 0.0)
    for _ in range(8):
        guard.observe(took(2 * usual_ms), 0.0)
    after = guard.choose_tier(request, None, 0.0).index
    assert guard.margin.factor > 1.3
    assert PROFILE.upper_total_ms(after) < PROFILE.upper_total_ms(before)
    assert guard.only(range(3)).margin is guard.margin


def test_an_engine_tells_its_guard(engine: Engine) -> None:
    told: list[float] = []

    class Listening(OnlineMargin):
        def observe(self, took_ms: float, *others: float) -> None:  # noqa: ARG002 - the base's
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
