"""Requests with a budget among others: they join if nobody is late by that, and are answered as alone."""

from __future__ import annotations

import io
import itertools
import threading
from dataclasses import replace
from typing import Any

import pytest
from PIL import Image

import tiny_model
from company_fakes import (
    Arrivals,
    asked,
    company_of,
    needed_ms,
    slower,
    together,
)
from tempovlm.control.guard import Guard
from tempovlm.control.joining import Forecast
from tempovlm.control.margin import OnlineMargin
from tempovlm.control.policies import FixedPolicy
from tempovlm.core.errors import UserError
from tempovlm.core.request import STAGES, Answer
from tempovlm.engine import calibration
from tempovlm.engine.company.ahead import MOST_PIXELS, Room
from tempovlm.engine.company.company import Company
from tempovlm.engine.company.member import Member, choose_among
from tempovlm.engine.company.seats import Seats
from tempovlm.engine.engine import Engine
from tempovlm.engine.transcript import Token
from tempovlm.latency.profile import LatencyProfile, OutputLength
from timings import stages_add_up


def test_budgets_join_and_are_answered_as_alone(
    engine: Engine, crowded: Engine, profile: LatencyProfile, monkeypatch: pytest.MonkeyPatch
) -> None:
    space = engine.space
    settings = (slower(engine), space.cheapest, slower(engine), space.cheapest)
    refusing: dict[str, Any] = {"on_deadline": "reject"}  # where they could not be in time
    pairs = [
        (asked(1e8 if i % 3 else None, i, **(refusing if i == 1 else {})), Guard.fixed(knobs, space, profile))
        for i, knobs in enumerate(settings)
    ]
    expected = [engine.answer(*pair) for pair in pairs]
    arrivals = Arrivals(crowded, monkeypatch)
    answers = arrivals.come(pairs)
    assert len(arrivals.joined) == len(pairs)
    assert [one.tokens for one in answers] == [one.tokens for one in expected]
    assert [one.budget_met for one in answers] == [None, True, True, None]


def test_the_predicted_time_is_that_among_others(
    engine: Engine, crowded: Engine, profile: LatencyProfile, monkeypatch: pytest.MonkeyPatch
) -> None:
    space = engine.space
    guard = Guard.fixed(slower(engine), space, profile)
    first, second = Arrivals(crowded, monkeypatch).come([(asked(1e8), guard), (asked(1e8, 1), guard)])
    reading_ms, steps_ms = needed_ms(profile, slower(engine))
    at_the_door_ms = profile.upper_total_ms(space.index(space.native))  # by who is inside, alone
    assert first.predicted.p50_ms == pytest.approx(at_the_door_ms + reading_ms + steps_ms, rel=0.01)
    assert second.predicted.p50_ms == pytest.approx(at_the_door_ms + 2 * reading_ms + steps_ms, rel=0.01)
    assert second.predicted.upper_ms >= second.predicted.p50_ms


def test_the_bound_among_others_is_of_the_picture_too(engine: Engine, profile: LatencyProfile) -> None:
    knobs = slower(engine)
    among = replace(Guard.fixed(knobs, engine.space, profile), spread=1.5)
    found = []
    for pictures in ((tiny_model.picture(0),), ()):
        request = replace(asked(1e8), images=pictures)
        choice = choose_among(among, request, among.choose_tier(request, None, 7.0), 7.0)
        assert choice.predicted is not None
        found.append(choice.predicted)
    picture_ms = profile.p50_picture_ms(engine.space.index(knobs))
    assert found[0].p50_ms - found[1].p50_ms == pytest.approx(picture_ms)
    assert found[0].upper_ms - found[1].upper_ms == pytest.approx(1.5 * picture_ms)


def test_a_setting_that_fits_only_without_the_picture_is_not_expected_in_time(
    engine: Engine, profile: LatencyProfile
) -> None:
    guard, index = Guard.fixed(slower(engine), engine.space, profile), engine.space.index(slower(engine))
    request, tier = asked(1e8), guard.choose_tier(asked(1e8), None, 0.0)
    rest_ms, picture_ms = profile.upper_remainder_ms(index), profile.p50_picture_ms(index)
    for left_ms, fits in ((rest_ms + 0.9 * picture_ms, False), (rest_ms + 1.1 * picture_ms, True)):
        assert choose_among(guard, request, tier, 1e8 - left_ms).feasible is fits


def test_who_is_at_the_door_is_expected_to_take_as_long_as_the_last_ones(
    engine: Engine, crowded: Engine, profile: LatencyProfile, monkeypatch: pytest.MonkeyPatch
) -> None:
    guard = Guard.fixed(slower(engine), engine.space, profile)
    assert crowded.answer(asked(None), guard).tokens
    (answer,) = Arrivals(crowded, monkeypatch).come([(asked(1e8), guard)])
    expected_ms = sum(needed_ms(profile, slower(engine)))
    assert answer.predicted.p50_ms == pytest.approx(expected_ms, rel=0.01), "it took next to nothing"


def test_the_guard_learns_how_long_answers_take_after_the_last_one_joined(
    engine: Engine, crowded: Engine, profile: LatencyProfile, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = list[tuple[float, float]]()
    observe = Guard.observe_among

    def observing(guard: Guard, took_ms: float, expected_ms: float, spread: float) -> None:
        observe(guard, took_ms, expected_ms, spread)
        seen.append((took_ms, expected_ms))

    monkeypatch.setattr(Guard, "observe_among", observing)
    guard = Guard.around(FixedPolicy(slower(engine), engine.space), engine.space, profile)
    Arrivals(crowded, monkeypatch).come([(asked(1e8, 0), guard), (asked(None, 1), guard), (asked(1e8, 2), guard)])
    own_ms, (native_ms, steps_ms) = needed_ms(profile, slower(engine))[0], needed_ms(profile, engine.space.native)
    assert len(seen) == 2, "one without a deadline may have been put off"
    for took_ms, expected_ms in seen:
        assert expected_ms == pytest.approx(2 * own_ms + native_ms + steps_ms)
        assert 0 < took_ms < expected_ms
    assert guard.crowd is not None
    assert guard.margin is not None
    assert guard.crowd.factor < guard.margin.factor == 1, "they took next to nothing"


def test_what_is_learned_while_an_answer_is_on_its_way_does_not_count_twice(
    engine: Engine, crowded: Engine, profile: LatencyProfile, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Several that were foreseen together end one after the other, and each of them moves the factor."""
    seen, observe = list[float](), OnlineMargin.observe

    def observing(margin: OnlineMargin, _took_ms: float, _bound_ms: float, expected_ms: float) -> None:
        observe(margin, 1.0, 1.0, 1.0)
        margin.factor *= 1.5
        seen.append(expected_ms)

    monkeypatch.setattr(OnlineMargin, "observe", observing)
    guard = Guard.around(FixedPolicy(slower(engine), engine.space), engine.space, profile)
    assert guard.crowd is not None
    guard.crowd.factor = 2.0  # by answers before these
    Arrivals(crowded, monkeypatch).come([(asked(1e8, i), guard) for i in range(3)])
    reading_ms, steps_ms = needed_ms(profile, slower(engine))
    assert seen == [pytest.approx(3 * reading_ms + steps_ms)] * 3


def test_beside_one_whose_times_are_unknown_nothing_is_learned(
    engine: Engine, crowded: Engine, profile: LatencyProfile, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Guard, "observe_among", lambda *_: pytest.fail("nobody knew how long the other one takes"))
    guard = Guard.around(FixedPolicy(slower(engine), engine.space), engine.space, profile)
    unknown = Guard.fixed(slower(engine), engine.space)
    for last in (unknown, Guard.fixed(slower(engine), engine.space, profile)):
        pairs = [(asked(1e8, 0), guard), (asked(None, 1), unknown), (asked(None, 2), last)]
        arrivals = Arrivals(crowded, monkeypatch)
        assert all(one.tokens for one in arrivals.come(pairs))
        assert "request 0" in arrivals.joined


def test_one_who_joins_between_the_last_token_and_the_end_tells_nothing_and_fails_nobody(
    engine: Engine, crowded: Engine, profile: LatencyProfile, monkeypatch: pytest.MonkeyPatch
) -> None:
    finish = Member.finish

    def finishing(member: Member, ended_ms: float) -> None:
        member.expect(Forecast(at_ms=ended_ms + 1.0, reading_ms=1.0, step_ms=1.0, spread=1.0))
        finish(member, ended_ms)

    monkeypatch.setattr(Member, "finish", finishing)
    monkeypatch.setattr(Guard, "observe_among", lambda *_: pytest.fail("it waited for nobody"))
    guard = Guard.around(FixedPolicy(slower(engine), engine.space), engine.space, profile)
    answers = Arrivals(crowded, monkeypatch).come([(asked(1e8, i), guard) for i in range(2)])
    assert all(one.tokens for one in answers)


@pytest.mark.parametrize(("spare", "joins"), [(1.2, True), (0.8, False)])
def test_one_that_would_make_a_running_request_late_stays_alone(
    engine: Engine,
    crowded: Engine,
    profile: LatencyProfile,
    monkeypatch: pytest.MonkeyPatch,
    spare: float,
    joins: bool,
) -> None:
    space = engine.space
    cheap, native = (Guard.fixed(one, space, profile) for one in (space.cheapest, slower(engine)))
    (cheap_ms, cheap_steps_ms), (native_ms, native_steps_ms) = (
        needed_ms(profile, one) for one in (space.cheapest, slower(engine))
    )
    budget_ms = cheap_ms + max(native_steps_ms, cheap_steps_ms) + spare * native_ms
    pairs = [(asked(budget_ms), cheap), (asked(1e9, 1), native)]
    expected = [engine.answer(*pair).tokens for pair in pairs]
    arrivals = Arrivals(crowded, monkeypatch)
    monkeypatch.setattr(type(crowded.door), "strangers", lambda *_: 0)
    answers = arrivals.come(pairs)
    assert ("request 1" in arrivals.joined) is joins
    assert ("request 1" in arrivals.alone) is not joins
    assert [one.tokens for one in answers] == expected


def test_one_without_a_budget_waits_while_it_would_make_another_one_late(
    engine: Engine, crowded: Engine, profile: LatencyProfile, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every step that takes less than was expected gains time for it."""
    space, order, made = engine.space, list[str | None](), list[int]()
    join = Seats.join

    def joining(seats: Seats, taken: Any, *rest: Any) -> None:
        order.extend([one.member.request.request_id for one in taken])
        made.extend([len(one.transcript.tokens) for one in seats.members])
        join(seats, taken, *rest)

    monkeypatch.setattr(Seats, "join", joining)
    monkeypatch.setattr(type(crowded.door), "strangers", lambda *_: 0)
    cheap, native = (Guard.fixed(one, space, profile) for one in (space.cheapest, slower(engine)))
    budget_ms = sum(needed_ms(profile, space.cheapest)) + 0.5 * needed_ms(profile, slower(engine))[0]
    pairs = [(asked(None, 1), native), (asked(budget_ms), cheap)]
    expected = [engine.answer(*pair).tokens for pair in pairs]
    monkeypatch.setattr("tempovlm.engine.company.company.FEW", 0)
    answers = Arrivals(crowded, monkeypatch).come(pairs)
    assert order == ["request 0", "request 1"]
    assert made, "the other one is still there"
    assert made[0] > 0, "and has its first token"
    assert [one.tokens for one in answers] == expected


@pytest.mark.parametrize(
    ("options", "is_calibrated", "budget_ms"),
    [
        ({"temperature": 1.0}, True, 1e8),
        ({}, False, 1e8),
        ({}, True, 10.0),
        ({"on_deadline": "reject"}, True, 10.0),
    ],
)
def test_those_whose_time_among_others_is_not_known_stay_alone(
    engine: Engine,
    crowded: Engine,
    profile: LatencyProfile,
    monkeypatch: pytest.MonkeyPatch,
    options: dict[str, Any],
    is_calibrated: bool,
    budget_ms: float,
) -> None:
    guard = Guard.fixed(engine.space.native, engine.space, profile if is_calibrated else None)
    arrivals = Arrivals(crowded, monkeypatch)
    answers = arrivals.come([(asked(budget_ms, **options), guard)])
    assert isinstance(answers[0], Answer)
    assert (len(arrivals.joined), len(arrivals.alone)) == (0, 1)


def looks(monkeypatch: pytest.MonkeyPatch, most: int) -> None:
    """Let the deadline pass when a request has looked at the clock so many times."""
    count = itertools.count()
    monkeypatch.setattr("tempovlm.engine.watch.now_ms", lambda: 0.0 if next(count) < most else 1e12)


@pytest.mark.parametrize("tokens", [0, 1, 3])
@pytest.mark.parametrize("reason", ["deadline", "cancelled"])
def test_an_answer_among_others_ends_between_two_tokens(
    engine: Engine,
    crowded: Engine,
    profile: LatencyProfile,
    monkeypatch: pytest.MonkeyPatch,
    reason: str,
    tokens: int,
) -> None:
    """The first look is taken when the request's turn comes, and then one after each token."""
    guard, said, count = Guard.fixed(slower(engine), engine.space, profile), list[Token](), itertools.count()
    other = asked(1e8, 1), guard
    expected = engine.answer(*other), engine.answer(asked(None), guard)
    cancel = None
    if reason == "deadline":
        looks(monkeypatch, tokens)
    else:
        cancel = lambda: next(count) >= tokens  # noqa: E731
    options = {"on_deadline": "stop"} if reason == "deadline" else {}
    arrivals = Arrivals(crowded, monkeypatch)
    whole, cut = arrivals.come([other, (asked(1e8, **options), guard, cancel, said.append)])
    assert len(arrivals.joined) == 2
    assert whole.tokens == expected[0].tokens
    assert cut.tokens == expected[1].tokens[:tokens]
    assert "".join(one.text for one in said) == cut.text
    assert (cut.finish_reason, cut.stopped_at) == (reason, "decode" if tokens else "queue")


def test_tokens_among_others_come_one_after_the_other(
    engine: Engine, crowded: Engine, profile: LatencyProfile, monkeypatch: pytest.MonkeyPatch
) -> None:
    guard = Guard.fixed(slower(engine), engine.space, profile)
    said: list[Token] = []
    expected = engine.answer(asked(None), guard)
    arrivals = Arrivals(crowded, monkeypatch)
    _, answer = arrivals.come([(asked(None, 1), guard), (asked(None), guard, None, said.append)])
    assert len(arrivals.joined) == 2
    assert answer.tokens == expected.tokens
    assert "".join(one.text for one in said) == answer.text


@pytest.mark.parametrize("place", [0, 2])
def test_a_caller_who_fails_to_say_ends_alone(
    engine: Engine, crowded: Engine, profile: LatencyProfile, monkeypatch: pytest.MonkeyPatch, place: int
) -> None:
    guard, count = Guard.fixed(slower(engine), engine.space, profile), itertools.count()
    expected = engine.answer(asked(None, 1), guard)

    def cancel() -> bool:
        if next(count) >= place:
            raise UserError("nobody knows")
        return False

    whole, failed = Arrivals(crowded, monkeypatch).come([(asked(1e8, 1), guard), (asked(1e8), guard, cancel)])
    assert whole.tokens == expected.tokens
    assert isinstance(failed, UserError)


def test_a_calibration_measures_requests_at_once(
    engine: Engine, crowded: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(calibration, "SHARED_BURSTS", 1)
    output = OutputLength.exactly(3)
    found = calibration.measure_shared(crowded, output)
    space = engine.space
    cheapest, native = space.index(space.cheapest), space.index(space.native)
    assert [(one.setting, one.in_flight) for one in found] == [
        (i, n) for i in (cheapest, native) for n in (2, 4, 8, 16)
    ]
    assert all(one.first_ms > 0 for one in found)
    assert calibration.measure_shared(engine, output) == ()
    profile = replace(tiny_model.make_profile(space, output), shared=found)
    assert profile.sharing(16) is not None


def file_of(seed: int) -> bytes:
    """A picture as a file."""
    file = io.BytesIO()
    Image.fromarray(tiny_model.picture(seed)).save(file, "PNG")
    return file.getvalue()


@pytest.mark.parametrize(("most", "in_turn"), [(MOST_PIXELS, [False, False]), (10, [False, True])])
def test_one_that_stays_alone_has_its_picture_opened_before_its_turn_if_there_is_room(
    engine: Engine,
    crowded: Engine,
    profile: LatencyProfile,
    monkeypatch: pytest.MonkeyPatch,
    most: int,
    in_turn: list[bool],
) -> None:
    joins, stays = (Guard.fixed(slower(engine), engine.space, one) for one in (profile, None))
    pairs = [(replace(asked(1e8, i), images=(file_of(i),)), guard) for i, guard in enumerate((joins, stays))]
    expected = [engine.answer(*pair).tokens for pair in pairs]
    company_of(crowded).room = room = Room(most)
    arrivals = Arrivals(crowded, monkeypatch)
    answers = arrivals.come(pairs)
    assert (arrivals.joined, arrivals.alone) == (["request 0"], ["request 1"])
    assert arrivals.opened == in_turn
    assert room.take(most), "and it is given back"
    assert [one.tokens for one in answers] == expected
    for one in answers:
        assert min(one.timings_ms[stage] for stage in STAGES) >= 0
        assert stages_add_up(one.timings_ms)


def test_one_that_would_make_others_late_opens_its_picture_once(
    engine: Engine, crowded: Engine, profile: LatencyProfile, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was prepared for company, and what it waits for at the door is only its turn."""
    monkeypatch.setattr(Company, "_admit", lambda *_: False)
    arrivals = Arrivals(crowded, monkeypatch)
    request = replace(asked(1e8), images=(file_of(0),))
    (answer,) = arrivals.come([(request, Guard.fixed(slower(engine), engine.space, profile))])
    assert (arrivals.joined, arrivals.alone) == ([], ["request 0"])
    assert answer.tokens
    assert arrivals.opened == [False]


@pytest.mark.parametrize("is_calibrated", [True, False])
def test_a_damaged_picture_is_told_by_the_same_words_and_leaves_room(
    engine: Engine,
    crowded: Engine,
    profile: LatencyProfile,
    *,
    is_calibrated: bool,
) -> None:
    request = replace(asked(1e8), images=(file_of(0)[:-40],))
    guard = Guard.fixed(slower(engine), engine.space, profile if is_calibrated else None)
    with pytest.raises(UserError) as alone:
        engine.answer(request, guard)
    company_of(crowded).room = room = Room(MOST_PIXELS)
    failed: list[Any] = []
    with crowded.door.enter(crowded.door.line_up(0.0)):
        thread = threading.Thread(target=lambda: failed.extend(together([lambda: crowded.answer(request, guard)])))
        thread.start()
        thread.join()
    assert [str(one) for one in failed] == [str(alone.value)]
    assert room.take(MOST_PIXELS)
    assert not crowded.door.is_busy


def test_the_picture_of_one_that_is_late_already_is_not_opened(
    engine: Engine, crowded: Engine, profile: LatencyProfile
) -> None:
    damaged = file_of(0)[:-40]
    request = replace(asked(50.0), images=(damaged,), waited_ms=100.0, on_deadline="stop")
    guard = Guard.fixed(slower(engine), engine.space, profile)
    found: list[Any] = []
    with crowded.door.enter(crowded.door.line_up(0.0)):
        thread = threading.Thread(target=lambda: found.extend(together([lambda: crowded.answer(request, guard)])))
        thread.start()
    thread.join()
    assert [one.finish_reason for one in found] == ["deadline"]
