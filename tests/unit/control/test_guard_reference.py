"""The guard and the table choose as their rules say, written out plainly here, whatever the numbers."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

import tiny_model
from tempovlm.control.guard import Guard
from tempovlm.control.margin import OnlineMargin
from tempovlm.control.policies import TablePolicy
from tempovlm.control.policy import Policy, Question, Sight
from tempovlm.control.select import TIE, Floats
from tempovlm.core.knobs import KnobConfig
from tempovlm.core.request import Request
from tempovlm.latency.profile import LatencyProfile

SPACE = tiny_model.SPACE
ORDER = {knobs: i for i, knobs in enumerate(SPACE)}


class Drawn(Policy):
    """Scores settings at random and keeps the scores."""

    name = "drawn"
    sees_picture = True

    def __init__(self, rng: np.random.Generator) -> None:
        self.rng = rng
        self.scores: list[Floats] = []

    def look(self, question: Question, left_ms: float) -> Floats:
        del question, left_ms
        self.scores.append(self.rng.random(len(SPACE)))
        return self.scores[-1]

    def settle(self, question: Question, sight: Sight, left_ms: float) -> Floats:
        del sight
        return self.look(question, left_ms)


class DrawnAtOnce(Drawn):
    """Scores settings once."""

    sees_picture = False


def drawn_profile(rng: np.random.Generator) -> LatencyProfile:
    """Totals, prefixes and opening times that follow no order."""
    profile = tiny_model.make_profile(spread=rng.uniform(0.05, 0.4))
    factors = rng.uniform(0.6, 1.6, (len(profile.measurements), 3)).tolist()
    measurements = tuple(
        replace(m, total_ms=m.total_ms * f, prefix_ms=m.prefix_ms * f * g, open_ms=1.0 + h)
        for m, (f, g, h) in zip(profile.measurements, factors, strict=True)
    )
    return replace(profile, measurements=measurements)


def drawn_guard(rng: np.random.Generator, policy: Policy, profile: LatencyProfile) -> Guard:
    margin = OnlineMargin(step=0.3)
    for _ in range(rng.integers(3)):
        margin.observe(2.0, 1.0, 1.0)
    some = np.flatnonzero(rng.random(len(SPACE)) < rng.choice([0.1, 0.6, 1.1]))
    guard = Guard(policy, SPACE, tuple(range(len(SPACE))), profile, rng.uniform(0, 2), rng.choice([None, 0.5]))
    split_ms = {"medium": rng.uniform(0, 3), "high": rng.uniform(0, 6)}
    return replace(guard, margin=margin, split_ms=split_ms).only(map(int, some) if len(some) else [7])


def fits_first(guard: Guard, budget_ms: float, opened_ms: float, *, glanced: bool) -> list[KnobConfig]:
    profile, factor = guard.profile, 1.0 if guard.margin is None else guard.margin.factor
    assert profile is not None
    usual_ms = min(opened_ms, profile.p50_prefix_ms(0)) if glanced else profile.open_ms
    left_ms = budget_ms - opened_ms - guard.control_ms + usual_ms - profile.open_ms
    split_ms = guard.split_ms if glanced else {}
    return [
        knobs
        for i, knobs in enumerate(SPACE)
        if i in guard.choices
        and factor * (profile.upper_total_ms(i) - profile.open_ms + split_ms.get(knobs.tier, 0.0)) <= left_ms
    ]


def fits_second(guard: Guard, tier: str, budget_ms: float, looked_ms: float) -> list[KnobConfig]:
    profile, factor = guard.profile, 1.0 if guard.margin is None else guard.margin.factor
    assert profile is not None
    left_ms = budget_ms - looked_ms - (guard.control_ms if guard.second_ms is None else guard.second_ms)
    return [
        SPACE.settings[i]
        for i in guard.choices
        if SPACE.settings[i].tier == tier and factor * profile.upper_remainder_ms(i) <= left_ms
    ]


def highest(scores: Floats, choices: list[KnobConfig]) -> KnobConfig:
    return max(choices, key=lambda knobs: float(scores[ORDER[knobs]]))


@pytest.mark.parametrize("kind", [Drawn, DrawnAtOnce])
@pytest.mark.parametrize("seed", range(12))
def test_both_choices_are_those_of_the_rules(seed: int, kind: type[Drawn]) -> None:
    rng = np.random.default_rng(seed)
    profile, outcomes = drawn_profile(rng), set()
    for _ in range(25):
        policy = kind(rng)
        guard = drawn_guard(rng, policy, profile)
        budget_ms, opened_ms, glanced = rng.uniform(2, 110), rng.uniform(0, 6), bool(rng.integers(2))
        request = Request(images=(), question="what?", budget_ms=budget_ms)
        tier = guard.choose_tier(request, (84, 112), opened_ms, "seen" if glanced else None)
        first = fits_first(guard, budget_ms, opened_ms, glanced=glanced)
        cheapest = SPACE.settings[min(guard.choices, key=profile.p50_total_ms)]
        offered = first or [cheapest]
        at_once = kind is DrawnAtOnce
        is_open = len(offered if at_once else {knobs.tier for knobs in offered}) > 1
        assert len(policy.scores) == is_open
        wanted = highest(policy.scores[-1], offered) if is_open else offered[0]
        assert (tier.tier, tier.feasible) == (wanted.tier, bool(first))

        looked_ms = opened_ms + rng.uniform(0, 30)
        choice = guard.choose_compute(request, tier, Sight(tier.tier, None, 0, 0), looked_ms)
        second = fits_second(guard, tier.tier, budget_ms, looked_ms)
        of_tier = [SPACE.settings[i] for i in guard.choices if SPACE.settings[i].tier == tier.tier]
        lowest = min(of_tier, key=lambda knobs: profile.p50_total_ms(ORDER[knobs]))
        assert len(policy.scores) == is_open + (len(second) > 1 and not (at_once and is_open))
        assert choice.knobs == (highest(policy.scores[-1], second) if len(second) > 1 else (second or [lowest])[0])
        assert choice.feasible == bool(first and second)
        outcomes.add((choice.feasible, is_open, len(second) > 1))
    assert len(outcomes) > 1


@pytest.mark.parametrize("seed", range(6))
def test_the_table_is_that_of_its_rules(seed: int) -> None:
    rng = np.random.default_rng(seed)
    profile = drawn_profile(rng)
    accuracy = {knobs: float(rng.choice([0.3, 0.5, 0.501, 0.504])) for knobs in SPACE}
    guard = Guard(TablePolicy(SPACE, accuracy), SPACE, tuple(range(len(SPACE))), profile)

    def best(choices: list[KnobConfig]) -> KnobConfig:
        top = max(accuracy[k] for k in choices)
        return min((k for k in choices if accuracy[k] >= top - TIE), key=lambda k: profile.p50_total_ms(ORDER[k]))

    for _ in range(40):
        budget_ms = float(rng.uniform(10, 110))
        request = Request(images=(), question="what?", budget_ms=budget_ms)
        first = fits_first(guard, budget_ms, profile.open_ms, glanced=False)
        tier = guard.choose_tier(request, None, profile.open_ms)
        if first:
            assert tier.tier == best(first).tier
        second = fits_second(guard, tier.tier, budget_ms, 5.0)
        if second:
            choice = guard.choose_compute(request, tier, Sight(tier.tier, None, 0, 0), 5.0)
            assert choice.knobs == best(second)
