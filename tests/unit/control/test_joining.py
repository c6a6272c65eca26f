"""What joining costs oneself and those who run: requests in flight add up their reading and share their steps."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

import tiny_model
from tempovlm.control.guard import Guard
from tempovlm.control.joining import (
    UNKNOWN_MS,
    Need,
    ahead_ms,
    ends_ms,
    in_turns,
    may_become,
    may_join,
    narrowest,
    slack_ms,
)
from tempovlm.control.margin import OnlineMargin
from tempovlm.control.policies import FixedPolicy
from tempovlm.control.policy import Sight
from tempovlm.core.request import Request
from tempovlm.latency.profile import Factor, SharedMeasurement, Sharing

SPACE = tiny_model.SPACE
ALWAYS = {share: Factor(1.0, share, 1.0, share) for share in (0.8, 1.5, 2.0)}
TWO, FOUR = Sharing(2, ALWAYS[0.8], ALWAYS[1.5], 1.0), Sharing(4, ALWAYS[0.8], ALWAYS[2.0], 1.0)
RUNNING = Need(0.0, 1.0, 10, 1030.0)
NATIVE = SPACE.index(SPACE.native)


def test_all_are_read_before_a_step_that_serves_all() -> None:
    needs = [RUNNING, Need(20.0, 3.0, 4)]
    assert ahead_ms(needs, TWO) == pytest.approx(16.0)
    assert ends_ms(needs, TWO, 1000.0) == pytest.approx([1016.0 + 10 * 4.5, 1016.0 + 4 * 4.5])
    wide = replace(TWO, spread=1.5)
    assert ends_ms(needs, wide, 1000.0) == pytest.approx([1000 + 1.5 * 61.0, 1000 + 1.5 * 34.0])
    assert ends_ms([], TWO, 1000.0) == []


def test_a_short_request_shares_by_its_own_factor_whatever_was_learned() -> None:
    uneven = Sharing(2, Factor(5.0, 0.4, 20.0, 1.0), Factor(1.0, 3.0, 2.0, 1.0), 1.0)
    short, long = Need(5.0, 1.0, 2), Need(20.0, 2.0, 2)
    assert ahead_ms([short, short], uneven) == pytest.approx(4.0)
    assert ahead_ms([short, long], uneven) == pytest.approx(22.0)
    assert ends_ms([short, long], uneven, 0.0) == pytest.approx([22.0 + 2 * 3.0] * 2), (
        "the dearest step serves all"
    )
    slow = replace(short, margin=2.0, crowding=1.5)
    assert ahead_ms([slow], uneven) == pytest.approx(3 * 2.0)
    assert ahead_ms([slow.calibrated], uneven) == pytest.approx(2 * 2.0)


@pytest.mark.parametrize(
    ("joiner", "may"),
    [
        (Need(5.0, 1.0, 2), True),  # 4 ms to be read, then 10 steps of 2 ms: 1024
        (Need(15.0, 1.0, 2), False),  # the running one ends at 1032
        (Need(5.0, 2.0, 2), False),  # its steps take twice as long for all: 1044
        (Need(5.0, 1.0, 2, 1008.0), True),
        (Need(5.0, 1.0, 3, 1008.0), False),  # it ends itself at 1010
    ],
)
def test_nobody_joins_who_is_late_or_makes_another_one_late(joiner: Need, may: bool) -> None:
    assert may_join([RUNNING], joiner, TWO, FOUR, 1000.0) is may


@pytest.mark.parametrize(
    ("wanted", "deadline_ms", "may"),
    [
        (Need(5.0, 2.0, 2), 1040.0, True),  # 4 ms to be read, then 10 steps of 3 ms: 1034
        (Need(5.0, 2.0, 2), 1033.0, False),
        (Need(15.0, 1.0, 2), 1026.0, False),  # 12 ms, then 10 steps of 1.5: 1027
        (Need(15.0, 1.0, 2), 1028.0, True),
        (Need(15.0, 9.0, 2), 1018.0, True),  # late as it is: 4 ms, then 10 steps of 1.5: 1019
    ],
)
def test_nobody_takes_more_by_which_another_one_is_late(wanted: Need, deadline_ms: float, may: bool) -> None:
    others = [replace(RUNNING, deadline_ms=deadline_ms)]
    assert may_become(others, Need(5.0, 1.0, 2), wanted, TWO, 1000.0) is may


def test_nobody_takes_more_by_which_it_is_late_itself() -> None:
    own = Need(5.0, 1.0, 2, 1008.0)
    assert may_become([], own, replace(own, reading_ms=6.0), TWO, 1000.0)
    assert not may_become([], own, replace(own, reading_ms=7.0), TWO, 1000.0)


def test_the_narrowest_of_requests_in_turn_are_those_with_the_least_time_each() -> None:
    assert narrowest([1100.0], 1000.0) == (1, pytest.approx(100.0))
    assert narrowest([1100.0] * 4, 1000.0) == (4, pytest.approx(100.0))
    assert narrowest([1100.0, 1100.0, 1900.0], 1000.0) == (2, pytest.approx(100.0))
    assert narrowest([1100.0, 1240.0, 1270.0], 1000.0) == (3, pytest.approx(270.0))
    assert narrowest([math.inf], 1000.0)[0] == 1


def test_those_in_turn_read_as_often_and_share_their_steps() -> None:
    once, thrice = TWO, in_turns(TWO, 3)
    assert thrice.reading.on(20.0) == pytest.approx(3 * once.reading.on(20.0))
    assert thrice.step == once.step


def test_one_that_is_late_anyway_keeps_nobody_out() -> None:
    late = replace(RUNNING, deadline_ms=1010.0)
    assert may_join([late], Need(15.0, 1.0, 2), TWO, FOUR, 1000.0)
    assert not may_join([late, RUNNING], Need(15.0, 1.0, 2), TWO, FOUR, 1000.0)


def test_beside_unknown_times_nobody_is_expected_in_time() -> None:
    unknown = Need(UNKNOWN_MS, UNKNOWN_MS, 3)
    assert not may_join([unknown], replace(RUNNING, reading_ms=1.0), TWO, FOUR, 1000.0)
    assert not may_join([RUNNING], unknown, TWO, FOUR, 1000.0)
    assert may_join([unknown], unknown, TWO, FOUR, 1000.0), "neither has a deadline"


def test_work_may_rest_until_the_first_would_be_late() -> None:
    assert slack_ms([RUNNING, Need(0.0, 1.0, 2, 1004.0)], TWO, 1000.0) == pytest.approx(1.0)
    assert slack_ms([Need(0.0, 1.0, 2)], TWO, 1000.0) == math.inf
    assert slack_ms([], TWO, 1000.0) == math.inf


def shared(in_flight: int, reading: float, step: float) -> SharedMeasurement:
    profile = tiny_model.make_profile()
    first_ms = reading * profile.p50_reading_ms(NATIVE)
    return SharedMeasurement(setting=NATIVE, in_flight=in_flight, first_ms=first_ms, step_ms=step * 0.5)


PROFILE = replace(
    tiny_model.make_profile(),
    shared=(shared(2, 0.9, 1.2), shared(2, 0.9, 1.2), shared(2, 1.08, 1.2), shared(4, 0.7, 3.0)),
)


def test_the_guard_predicts_an_answer_among_others_by_what_was_measured() -> None:
    guard = Guard.fixed(SPACE.native, SPACE, PROFILE)
    among, more = guard.among(2), guard.among(3)
    assert among is not None
    assert more is not None
    assert guard.among(5) is None, "more were never measured"
    assert Guard.fixed(SPACE.native, SPACE, tiny_model.make_profile()).among(1) is None
    request = Request(images=(), question="what?", budget_ms=1e6)
    found = []
    for one in (guard, among, more):
        tier = one.choose_tier(request, None, 5.0)
        found.append(one.choose_compute(request, tier, Sight(tier.tier, None, 0, 0), 5.0))
    alone, two, four = (one.predicted for one in found)
    assert alone is not None
    assert two is not None
    assert four is not None
    total_ms = tiny_model.nominal_ms(SPACE, NATIVE)
    rest_ms = total_ms / 2 - 3 * 0.5
    assert alone.p50_ms == pytest.approx(5 + rest_ms + 3 * 0.5)
    assert two.p50_ms == pytest.approx(5 + 0.9 * rest_ms + 3 * 0.6)
    assert four.p50_ms == pytest.approx(5 + 0.7 * rest_ms + 3 * 1.5)
    spread = two.upper_ms - 5, 0.9 * (alone.upper_ms - 5)
    assert spread[0] > 1.15 * spread[1], "the slowest burst was a fifth slower"


def test_what_an_answer_needs_is_at_the_margin_that_holds() -> None:
    margin = OnlineMargin()
    guard = replace(Guard.fixed(SPACE.native, SPACE, PROFILE), margin=margin)
    usual = guard.need(SPACE.native, 3, 50.0)
    assert usual.steps == 2
    assert usual.deadline_ms == pytest.approx(50.0)
    assert usual.reading_ms == pytest.approx(tiny_model.nominal_ms(SPACE, NATIVE) - 3 * 0.5 - 1.0)
    assert usual.step_ms == pytest.approx(0.5)
    assert guard.need(SPACE.native, 100, 50.0).steps == 3, "answers have at most 4 tokens"
    for _ in range(8):
        margin.observe(30.0, 10.0, 10.0)
    assert guard.need(SPACE.native, 3, 50.0).factor > 2 * usual.factor
    unknown = Guard.fixed(SPACE.native, SPACE).need(SPACE.native, 3, 50.0)
    assert unknown.reading_ms >= UNKNOWN_MS


@pytest.mark.parametrize("took_ms", [0.0, -0.5])
def test_an_answer_that_was_there_before_the_last_one_joined_tells_nothing(took_ms: float) -> None:
    guard = Guard.around(FixedPolicy(SPACE.native, SPACE), SPACE, PROFILE)
    before = guard.need(SPACE.native, 4, math.inf)
    guard.observe_among(took_ms, 20.0, 1.1)
    assert guard.need(SPACE.native, 4, math.inf) == before


def test_the_guard_learns_how_much_longer_answers_take_among_others() -> None:
    guard = Guard.around(FixedPolicy(SPACE.native, SPACE), SPACE, PROFILE)
    among = guard.among(2)
    assert among is not None
    alone_ms, among_ms = guard.budgets_ms()[NATIVE], among.budgets_ms()[NATIVE]
    before = guard.need(SPACE.native, 4, math.inf)
    request = Request(images=(), question="what?")

    def median_ms() -> float:
        tier = among.choose_tier(request, None, 0.0)
        predicted = among.choose_compute(request, tier, Sight(tier.tier, None, 0, 0), 0.0).predicted
        assert predicted is not None
        return predicted.p50_ms

    median_before_ms = median_ms()
    for _ in range(1000):
        guard.observe_among(30.0, 20.0, 1.1)
    assert guard.budgets_ms()[NATIVE] == pytest.approx(alone_ms), "alone nothing has changed"
    assert among.budgets_ms()[NATIVE] > 1.25 * among_ms
    assert median_ms() == pytest.approx(1.5 * median_before_ms)
    after = guard.need(SPACE.native, 4, math.inf)
    assert 1.5 / 1.1 < after.factor / before.factor < 1.8
    assert after.calibrated == before, "what was learned does not count twice"


def test_medians_among_others_are_learned_upon_the_margin_and_told_with_it() -> None:
    margin, crowd = OnlineMargin(), OnlineMargin()
    guard = replace(Guard.fixed(SPACE.native, SPACE, PROFILE), margin=margin, crowd=crowd)
    among = guard.among(2)
    assert among is not None
    for _ in range(400):  # the machine is slower by a quarter, with company and without
        margin.observe(1.25, 1.0, 1.0)
        need = guard.need(SPACE.native, 4, math.inf).calibrated
        known = Guard.fixed(SPACE.native, SPACE, PROFILE).need(SPACE.native, 4, math.inf)
        guard.observe_among(1.25 * known.step_ms, need.factor * need.step_ms, 1.0)
    assert margin.factor > 1.2
    assert among.middle == pytest.approx(1.25, rel=0.02)
    assert guard.middle == pytest.approx(1.0), "alone nothing was learned of it"
