from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np
import pytest

import tiny_model
from tempovlm.control.guard import Choice, Guard
from tempovlm.control.policies import FixedPolicy, TablePolicy, prior_accuracy
from tempovlm.control.policy import Policy, Question, Sight
from tempovlm.control.price import FREE, LanePrice, Price
from tempovlm.control.select import Floats
from tempovlm.core.errors import UserError
from tempovlm.core.knobs import KnobConfig
from tempovlm.core.request import Request
from tempovlm.latency.profile import LatencyProfile, OutputLength
from timings import TICK_MS, Ticks

SPACE = tiny_model.SPACE
PROFILE = tiny_model.make_profile()
SIGHT = Sight("low", None, 10, 5)


def request(budget_ms: float | None, price_per_ms: float = 0.0) -> Request:
    return Request(images=(), question="what?", budget_ms=budget_ms, price_per_ms=price_per_ms)


@dataclass
class Greedy(Policy):
    """Scores later settings higher, up to a limit, and remembers what it was told."""

    limit: int = len(SPACE)
    name: str = "greedy"
    sees_picture = True
    told: list[float] = field(default_factory=list)

    def look(self, question: Question, left_ms: float) -> Floats:
        del question
        self.told.append(left_ms)
        return np.where(np.arange(len(SPACE)) < self.limit, np.arange(len(SPACE)), -1.0)

    def settle(self, question: Question, sight: Sight, left_ms: float) -> Floats:
        assert question.left_ms is not None
        assert sight.num_vision_tokens in (0, 10)
        return self.look(question, left_ms)


def guard_of(policy: Policy, **fields: object) -> Guard:
    guard = Guard(policy, SPACE, tuple(range(len(SPACE))), PROFILE)
    return replace(guard, **fields)  # type: ignore[arg-type]


def choose(
    guard: Guard,
    budget_ms: float | None,
    opened_ms: float = 1.0,
    looked_ms: float = 5.0,
    price_per_ms: float = 0.0,
) -> Choice:
    one = request(budget_ms, price_per_ms)
    tier = guard.choose_tier(one, (84, 112), opened_ms)
    return guard.choose_compute(one, tier, SIGHT, looked_ms)


@pytest.mark.parametrize("budget_ms", [28.0, 32.0, 40.0, 50.0])
def test_every_setting_let_through_fits_both_tables(budget_ms: float) -> None:
    greedy = Greedy()
    choice = choose(guard_of(greedy), budget_ms)
    assert greedy.told[0] == budget_ms
    last = max(i for i in range(len(SPACE)) if PROFILE.upper_total_ms(i) <= budget_ms)
    assert choice.knobs.tier == SPACE.settings[last].tier
    assert choice.feasible is True
    assert PROFILE.upper_remainder_ms(SPACE.index(choice.knobs)) <= budget_ms - 5.0
    assert choice.predicted.upper_ms == pytest.approx(5.0 + PROFILE.upper_remainder_ms(SPACE.index(choice.knobs)))
    assert choice.predicted.p50_ms <= choice.predicted.upper_ms


def test_nothing_fits_runs_the_cheapest_and_says_so() -> None:
    choice = choose(guard_of(Greedy()), 1.0)
    assert (choice.knobs, choice.feasible) == (SPACE.cheapest, False)


def test_a_slow_look_at_the_picture_lowers_the_second_choice() -> None:
    greedy = Greedy()
    prompt = choose(guard_of(greedy), 60.0, looked_ms=20.0)
    assert prompt.knobs == SPACE.largest
    late = choose(guard_of(greedy), 60.0, looked_ms=38.0)
    assert late.knobs.tier == "high"
    assert PROFILE.upper_remainder_ms(SPACE.index(late.knobs)) <= 22.0
    too_late = choose(guard_of(greedy), 60.0, looked_ms=59.0)
    assert (too_late.knobs, too_late.feasible) == (replace(SPACE.cheapest, tier="high"), False)


def test_only_unusual_opening_is_charged_to_the_first_choice() -> None:
    for beyond_ms in (0.0, 12.0, -PROFILE.open_ms):
        greedy = Greedy()
        choose(guard_of(greedy), 45.0, opened_ms=PROFILE.open_ms + beyond_ms)
        assert greedy.told[0] == pytest.approx(45.0 - beyond_ms)


@pytest.mark.usefixtures("ticks")
def test_the_policys_own_time_is_subtracted() -> None:
    greedy = Greedy()
    choose(guard_of(greedy, control_ms=4.0), 40.0)
    assert greedy.told == pytest.approx([36.0, 31.0])
    measured = Guard.around(greedy, SPACE, PROFILE)
    assert (measured.control_ms, measured.second_ms) == pytest.approx((2 * TICK_MS, TICK_MS))


@pytest.mark.parametrize(("second_ms", "is_rehearsed"), [(None, False), (0.1, True), (60.0, False)])
def test_a_quick_second_choice_is_rehearsed_without_a_picture(second_ms: float | None, is_rehearsed: bool) -> None:
    greedy = Greedy()
    guard, one = guard_of(greedy, second_ms=second_ms), request(100.0)
    tier = guard.choose_tier(one, (84, 112), 1.0)
    alone = guard.choose_compute(one, tier, SIGHT, 50.0)
    greedy.told.clear()
    guard.rehearse(one, tier)
    assert len(greedy.told) == is_rehearsed
    assert guard.choose_compute(one, tier, SIGHT, 50.0) == alone


@pytest.mark.parametrize("budget_ms", [None, 60.0])
def test_nothing_is_rehearsed_that_will_not_be_asked(budget_ms: float | None) -> None:
    greedy = Greedy()
    greedy.sees_picture = budget_ms is None
    guard, one = guard_of(greedy, second_ms=0.1), request(budget_ms)
    tier = guard.choose_tier(one, None, 1.0)
    greedy.told.clear()
    guard.rehearse(one, tier)
    assert not greedy.told


def test_a_policy_that_does_not_see_the_picture_is_asked_once() -> None:
    greedy = Greedy()
    greedy.sees_picture = False
    assert choose(guard_of(greedy), 60.0).knobs == SPACE.largest
    assert len(greedy.told) == 1


def test_a_price_of_time_is_weighed_when_the_policy_predicts_accuracy() -> None:
    guard = guard_of(TablePolicy(SPACE, {knobs: 0.1 + 0.01 * i for i, knobs in enumerate(SPACE)}))
    cost_ms = [PROFILE.p50_total_ms(i) for i in range(len(SPACE))]
    even = 0.01 * (len(SPACE) - 1) / (cost_ms[-1] - cost_ms[0])
    found = [choose(guard, 1e6, price_per_ms=price).knobs for price in (0.0, 0.1 * even, even, 50 * even)]
    costs_ms = [PROFILE.p50_total_ms(SPACE.index(knobs)) for knobs in found]
    assert found[0] == SPACE.largest
    assert found[-1] == SPACE.cheapest
    assert costs_ms == sorted(costs_ms, reverse=True)
    with pytest.raises(UserError, match=r"price_per_ms=0.01: policy greedy scores settings by logits"):
        choose(guard_of(Greedy()), 60.0, price_per_ms=0.01)
    assert choose(Guard.fixed(SPACE.native, SPACE, PROFILE), 60.0, price_per_ms=0.01).knobs == SPACE.native


def test_a_fixed_guard_is_ready_before_the_clock_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    guard = Guard.fixed(SPACE.native, SPACE, tiny_model.make_profile())
    monkeypatch.setattr(LatencyProfile, "_smooth", lambda *_: pytest.fail("a table is made within the answer"))
    assert choose(guard, 20.0).predicted is not None


def test_fixed_runs_its_setting_whatever_the_budget() -> None:
    for budget_ms, feasible in ((1.0, False), (1e6, True)):
        choice = choose(Guard.fixed(SPACE.native, SPACE, PROFILE), budget_ms)
        assert (choice.knobs, choice.feasible, choice.policy) == (SPACE.native, feasible, "fixed")
    with pytest.raises(UserError, match="num_blocks=99"):
        Guard.fixed(replace(SPACE.native, num_blocks=99), SPACE)


def test_no_budget_is_native() -> None:
    choice = choose(guard_of(Greedy(1)), None)
    assert (choice.knobs, choice.feasible, choice.policy) == (SPACE.native, None, "fixed")


def test_without_a_profile_nothing_is_masked() -> None:
    choice = choose(guard_of(Greedy(), profile=None), 1.0)
    assert (choice.knobs, choice.feasible, choice.predicted) == (SPACE.largest, None, None)


def test_fewer_settings() -> None:
    guard = guard_of(TablePolicy(SPACE, prior_accuracy(SPACE)))
    low = guard.only(i for i, knobs in enumerate(SPACE) if knobs.tier == "low" and knobs.top_k == 2)
    assert choose(low, 1e6).knobs == KnobConfig(tier="low", top_k=2, num_blocks=6)
    assert choose(low, 1.0).knobs == SPACE.cheapest


def test_the_first_answer_does_not_pay_for_the_tables(monkeypatch: pytest.MonkeyPatch) -> None:
    guard = Guard.around(FixedPolicy(SPACE.largest, SPACE), SPACE, tiny_model.make_profile(spread=0.2))

    def late(*_: object) -> None:
        raise AssertionError("a table is made within an answer")

    monkeypatch.setattr(np, "median", late)
    monkeypatch.setattr(np, "argsort", late)
    tier = guard.choose_tier(request(1e5), (84, 112), 1.0)
    assert guard.choose_compute(request(1e5), tier, SIGHT, 2.0).knobs == SPACE.largest


@pytest.fixture
def table(ticks: Ticks) -> Guard:
    del ticks  # the policy's own time is measured
    return replace(Guard.around(TablePolicy(SPACE, prior_accuracy(SPACE)), SPACE, PROFILE), control_ms=0.0)


def at_price(guard: Guard, lane: LanePrice, budget_ms: float = 1e4, price_per_ms: float = 0.0) -> float:
    """Expected time of the setting that a price chooses."""
    one = request(budget_ms, price_per_ms)
    tier = guard.choose_tier(one, (84, 112), 1.0, lane=lane)
    choice = guard.choose_compute(one, tier, SIGHT, 5.0, lane=lane)
    return PROFILE.p50_total_ms(SPACE.index(choice.knobs))


def test_who_pays_the_derived_price_stays_within_its_share(table: Guard) -> None:
    assert table.usual is not None
    shares_ms = 1.01 * table.usual.envelope.lane_ms[1:]
    assert at_price(table, LanePrice(Price())) == at_price(table, FREE)
    took = [at_price(table, LanePrice(Price(), share_ms)) for share_ms in shares_ms]
    assert len(took) > 1
    for took_ms, share_ms in zip(took, shares_ms, strict=True):
        assert took_ms <= share_ms
    assert took == sorted(took)
    assert took[0] < took[-1]
    assert at_price(table, LanePrice(Price(is_derived=False, per_ms=0.0), 1.0)) == at_price(table, FREE)


def test_no_request_can_lower_the_price_of_the_time_of_others(table: Guard) -> None:
    """Neither by a price of its own, nor by fewer settings, nor by longer answers."""
    assert table.usual is not None
    lane = LanePrice(Price(), 1.01 * float(table.usual.envelope.lane_ms[1]))
    took_ms = at_price(table, lane)
    for own in (0.0, 1e-6, 0.01):
        assert at_price(table, lane, price_per_ms=own) <= took_ms
    high = [i for i, knobs in enumerate(SPACE) if knobs.tier == "high"]
    longer = table.for_lengths(OutputLength((0,) * 39 + (1,)))
    for other in (table.only(high), longer):
        assert other.usual is table.usual
        (own, usual), (_, before) = other.worths(), table.worths()
        assert usual.steepest == pytest.approx(before.steepest)
        assert own.steepest < before.steepest, "what gains less is refused first"


class Knowing(TablePolicy):
    """Expects something of hard questions before it has seen their pictures."""

    sees_picture = True

    def look(self, question: Question, left_ms: float) -> Floats:
        return super().look(question, left_ms) * (0.5 if question.text == "hard?" else 1.0)


@pytest.mark.parametrize(("first_ms", "is_asked"), [(0.9, True), (1.1, False)])
def test_the_door_asks_what_a_question_may_gain_where_that_is_quick(first_ms: float, is_asked: bool) -> None:
    """However long the second choice takes."""
    guard = Guard.around(Knowing(SPACE, prior_accuracy(SPACE)), SPACE, PROFILE)
    guard = replace(guard, control_ms=first_ms + 3.0, second_ms=3.0)
    easy, hard = guard.worths(Question(text="easy?")), guard.worths(Question(text="hard?"))
    assert easy is not None
    assert hard is not None
    assert easy[0].steepest == pytest.approx(easy[1].steepest)
    assert hard[0].steepest == pytest.approx(easy[1].steepest * (0.5 if is_asked else 1.0))


def test_a_weight_divides_the_price(table: Guard) -> None:
    even = LanePrice(Price(is_derived=False, per_ms=0.015))
    dear = LanePrice(Price(is_derived=False, per_ms=0.03))
    assert at_price(table, replace(dear, weight=2.0)) == at_price(table, even)
    assert at_price(table, dear) < at_price(table, even), "the slopes are 0.037 and 0.017 per ms"


def test_time_costs_nothing_where_scores_are_not_accuracies() -> None:
    guard = guard_of(Greedy())
    assert not guard.has_price
    assert guard.worths() is None
    assert guard.expected_ms() < guard.least_ms()
    lane = LanePrice(Price(), 1.0)
    tier = guard.choose_tier(request(1e4), (84, 112), 1.0, lane=lane)
    assert guard.choose_compute(request(1e4), tier, SIGHT, 5.0, lane=lane).knobs == SPACE.largest


@dataclass(frozen=True)
class Hopeless(TablePolicy):
    """Expects less of a question than is usual."""

    def look(self, question: Question, left_ms: float) -> Floats:
        return 0.1 * super().look(question, left_ms)


@pytest.mark.usefixtures("ticks")
def test_a_question_that_gains_less_than_its_time_is_worth_says_so() -> None:
    guard = Guard.around(Hopeless(SPACE, prior_accuracy(SPACE)), SPACE, PROFILE)
    crowded = LanePrice(Price(), 1e-3)
    assert not guard.choose_tier(request(1e4), (84, 112), 1.0, lane=crowded).is_worth_it
    assert guard.choose_tier(request(1e4), (84, 112), 1.0).is_worth_it
    usual = Guard.around(TablePolicy(SPACE, prior_accuracy(SPACE)), SPACE, PROFILE)
    assert usual.choose_tier(request(1e4), (84, 112), 1.0, lane=crowded).is_worth_it
