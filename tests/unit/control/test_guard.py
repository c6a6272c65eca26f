from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np
import pytest

import tiny_model
from tempovlm.control.guard import Choice, Guard
from tempovlm.control.policies import FixedPolicy, TablePolicy, prior_accuracy
from tempovlm.control.policy import Features, Policy, Question, Sight
from tempovlm.core.errors import UserError
from tempovlm.core.knobs import KnobConfig
from tempovlm.core.request import Request
from timings import TICK_MS

SPACE = tiny_model.SPACE
PROFILE = tiny_model.make_profile()
SIGHT = Sight(None, 10, 5)


def request(budget_ms: float | None) -> Request:
    return Request(images=(), question="what?", budget_ms=budget_ms)


@dataclass
class Wilful:
    """Wants the same setting whatever it is told, and remembers what it was told."""

    knobs: KnobConfig
    name: str = "wilful"
    told: list[object] = field(default_factory=list)

    def choose_tier(self, question: Question, budget_ms: float) -> str:
        self.told.append((question.choices, budget_ms))
        return self.knobs.tier

    def choose_compute(self, features: Features | None, tier: str, budget_ms: float) -> tuple[int, int]:
        self.told.append((features, tier, budget_ms))
        return self.knobs.top_k, self.knobs.num_blocks


def guard_of(policy: Policy, **fields: object) -> Guard:
    guard = Guard(policy, SPACE, tuple(range(len(SPACE))), PROFILE)
    return replace(guard, **fields)  # type: ignore[arg-type]


def choose(guard: Guard, budget_ms: float | None, opened_ms: float = 1.0, looked_ms: float = 5.0) -> Choice:
    one = request(budget_ms)
    tier = guard.choose_tier(one, (84, 112), opened_ms)
    return guard.choose_compute(one, tier, SIGHT, looked_ms)


def test_policies_meet_the_protocol() -> None:
    assert isinstance(FixedPolicy(SPACE.native), Policy)
    assert isinstance(TablePolicy(PROFILE, prior_accuracy(SPACE)), Policy)


@pytest.mark.parametrize("budget_ms", [28.0, 32.0, 40.0, 50.0])
def test_every_setting_let_through_fits_both_tables(budget_ms: float) -> None:
    wilful = Wilful(SPACE.largest)
    choice = choose(guard_of(wilful), budget_ms)
    (first, left_ms), *_ = wilful.told
    assert left_ms == budget_ms
    assert {SPACE.index(k) for k in first} == {
        i for i in range(len(SPACE)) if PROFILE.upper_total_ms(i) <= left_ms
    }
    assert choice.feasible is True
    assert PROFILE.upper_remainder_ms(SPACE.index(choice.knobs)) <= budget_ms - 5.0
    assert choice.predicted.upper_ms == pytest.approx(5.0 + PROFILE.upper_remainder_ms(SPACE.index(choice.knobs)))
    assert choice.predicted.p50_ms <= choice.predicted.upper_ms


def test_nothing_fits_runs_the_cheapest_and_says_so() -> None:
    choice = choose(guard_of(Wilful(SPACE.largest)), 1.0)
    assert (choice.knobs, choice.feasible) == (SPACE.cheapest, False)


def test_a_slow_look_at_the_picture_lowers_the_second_choice() -> None:
    wilful = Wilful(SPACE.largest)
    prompt = choose(guard_of(wilful), 60.0, looked_ms=20.0)
    assert prompt.knobs == SPACE.largest
    late = choose(guard_of(wilful), 60.0, looked_ms=38.0)
    assert late.knobs.tier == "high"
    assert PROFILE.upper_remainder_ms(SPACE.index(late.knobs)) <= 22.0
    too_late = choose(guard_of(wilful), 60.0, looked_ms=59.0)
    assert (too_late.knobs, too_late.feasible) == (replace(SPACE.cheapest, tier="high"), False)


def test_only_unusual_opening_is_charged_to_the_first_choice() -> None:
    for beyond_ms in (0.0, 12.0, -PROFILE.open_ms):
        wilful = Wilful(SPACE.largest)
        choose(guard_of(wilful), 45.0, opened_ms=PROFILE.open_ms + beyond_ms)
        assert wilful.told[0][1] == pytest.approx(45.0 - beyond_ms)  # type: ignore[index]


@pytest.mark.usefixtures("ticks")
def test_the_policys_own_time_is_subtracted() -> None:
    wilful = Wilful(SPACE.largest)
    choose(guard_of(wilful, control_ms=4.0), 40.0)
    assert wilful.told[0][1] == pytest.approx(36.0)  # type: ignore[index]
    assert wilful.told[1][2] == pytest.approx(31.0)  # type: ignore[index]
    measured = Guard.around(wilful, SPACE, PROFILE)
    assert (measured.control_ms, measured.second_ms) == pytest.approx((2 * TICK_MS, TICK_MS))


def test_a_policy_outside_the_space_is_corrected() -> None:
    stray = Wilful(KnobConfig(tier="huge", top_k=99, num_blocks=99))
    assert choose(guard_of(stray), 1e6).knobs == replace(SPACE.largest, tier="low")
    small = Wilful(KnobConfig(tier="medium", top_k=0, num_blocks=0))
    assert choose(guard_of(small), 1e6).knobs == replace(SPACE.cheapest, tier="medium")


def test_fixed_runs_its_setting_whatever_the_budget() -> None:
    for budget_ms, feasible in ((1.0, False), (1e6, True)):
        choice = choose(Guard.fixed(SPACE.native, SPACE, PROFILE), budget_ms)
        assert (choice.knobs, choice.feasible, choice.policy) == (SPACE.native, feasible, "fixed")
    with pytest.raises(UserError, match="--num_blocks 99"):
        Guard.fixed(replace(SPACE.native, num_blocks=99), SPACE)


def test_no_budget_is_native() -> None:
    choice = choose(guard_of(Wilful(SPACE.cheapest)), None)
    assert (choice.knobs, choice.feasible, choice.policy) == (SPACE.native, None, "fixed")


def test_without_a_profile_nothing_is_masked() -> None:
    choice = choose(guard_of(Wilful(SPACE.largest), profile=None), 1.0)
    assert (choice.knobs, choice.feasible, choice.predicted) == (SPACE.largest, None, None)


def test_fewer_settings() -> None:
    guard = guard_of(TablePolicy(PROFILE, prior_accuracy(SPACE)))
    low = guard.only(i for i, knobs in enumerate(SPACE) if knobs.tier == "low" and knobs.top_k == 2)
    assert choose(low, 1e6).knobs == KnobConfig(tier="low", top_k=2, num_blocks=6)
    assert choose(low, 1.0).knobs == SPACE.cheapest


def test_the_first_answer_does_not_pay_for_the_tables(monkeypatch: pytest.MonkeyPatch) -> None:
    guard = Guard.around(FixedPolicy(SPACE.largest), SPACE, tiny_model.make_profile(spread=0.2))

    def late(*_: object) -> None:
        raise AssertionError("a table is made within an answer")

    monkeypatch.setattr(np, "median", late)
    monkeypatch.setattr(np, "argsort", late)
    tier = guard.choose_tier(request(1e5), (84, 112), 1.0)
    assert guard.choose_compute(request(1e5), tier, SIGHT, 2.0).knobs == SPACE.largest
