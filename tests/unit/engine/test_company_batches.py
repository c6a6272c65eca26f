"""Batches with budgets among others: they join where nobody is late, leave each other time, and are as alone."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from company_fakes import Arrivals, asked, company_of, needed_ms, slower, steep
from tempovlm.control.guard import Guard
from tempovlm.control.policies import TablePolicy, prior_accuracy
from tempovlm.core.errors import UserError
from tempovlm.core.request import Answer, Request
from tempovlm.engine.batching import answer_batch
from tempovlm.engine.company.ahead import Room
from tempovlm.engine.company.batch import soonest_ms
from tempovlm.engine.company.member import Member
from tempovlm.engine.engine import Engine
from tempovlm.latency.profile import LatencyProfile


def by_request(pairs: list[tuple[Request, Guard]]) -> Any:
    guards = {id(request): guard for request, guard in pairs}
    return lambda request: guards[id(request)]


def batch(engine: Engine, pairs: list[tuple[Request, Guard]]) -> list[Answer]:
    return answer_batch(engine, [request for request, _ in pairs], by_request(pairs))


def table(engine: Engine, profile: LatencyProfile, tiers: int = 1) -> Guard:
    """Chooses among settings of the lowest tiers by accuracies that more compute raises."""
    space = engine.space
    guard = Guard(TablePolicy(space, prior_accuracy(space)), space, tuple(range(len(space))), profile)
    return guard.only(i for i, one in enumerate(space) if one.tier in space.tiers[:tiers])


def test_those_with_a_budget_join_by_deadline_and_all_answers_are_those_alone(
    engine: Engine, crowded: Engine, profile: LatencyProfile, monkeypatch: pytest.MonkeyPatch
) -> None:
    space = engine.space
    settings, budgets_ms = (slower(engine), space.cheapest), (3e8, None, 1e8, 2e8, None, 4e8, 5e8, 6e8)
    pairs = [
        (asked(budget_ms, i), Guard.fixed(settings[i % 2], space, profile))
        for i, budget_ms in enumerate(budgets_ms)
    ]
    expected = [engine.answer(*pair).tokens for pair in pairs]
    arrivals = Arrivals(crowded, monkeypatch)
    answers = batch(crowded, pairs)
    assert [one.tokens for one in answers] == expected
    assert [one.budget_met for one in answers] == [None if one is None else True for one in budgets_ms]
    assert arrivals.joined == [f"request {i}" for i in (2, 3, 0, 5, 6, 7, 1, 4)]
    assert not arrivals.alone
    assert not crowded.door.is_busy
    assert company_of(crowded).callers == 0


def test_each_leaves_those_behind_it_the_time_for_the_same_setting(
    engine: Engine, crowded: Engine, profile: LatencyProfile, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One after the other there were no time for that: steps are made for all at once."""
    profile, space, count = steep(profile), engine.space, 4
    guard, scores = table(engine, profile), prior_accuracy(space)
    times_ms = {space.settings[i]: needed_ms(profile, space.settings[i]) for i in guard.choices}
    reading_ms, steps_ms = times_ms[replace(slower(engine), num_blocks=space.block_counts[1])]
    budget_ms = 1.02 * (count * reading_ms + steps_ms)
    fitting = [one for one, (first_ms, later_ms) in times_ms.items() if count * first_ms + later_ms <= budget_ms]
    expected = max(fitting, key=lambda one: scores[one])
    assert count * sum(times_ms[expected]) > 1.2 * budget_ms
    arrivals = Arrivals(crowded, monkeypatch)
    (alone,) = batch(crowded, [(asked(budget_ms), guard)])
    answers = batch(crowded, [(asked(budget_ms, 1 + i), guard) for i in range(count)])
    assert (len(arrivals.joined), arrivals.alone) == (count, ["request 0"]), "one alone joins nobody"
    assert answers[0].knobs == expected
    assert scores[alone.knobs] > scores[expected], "alone it takes more"
    assert all(scores[one.knobs] >= scores[expected] for one in answers)
    assert all(one.budget_feasible and one.budget_met for one in answers)


def test_where_time_is_short_the_first_ones_take_the_cheapest_setting(
    engine: Engine, crowded: Engine, profile: LatencyProfile, monkeypatch: pytest.MonkeyPatch
) -> None:
    guard = table(engine, profile, tiers=2)
    reading_ms, steps_ms = needed_ms(profile, engine.space.cheapest)
    arrivals = Arrivals(crowded, monkeypatch)
    pairs = [(asked(1.2 * (2 * reading_ms + steps_ms), i), guard) for i in range(4)]
    answers = batch(crowded, pairs)
    assert [one.knobs for one in answers[:2]] == [engine.space.cheapest] * 2
    assert [one.budget_feasible for one in answers[:2]] == [True, True]
    assert arrivals.joined[:2] == ["request 0", "request 1"]
    assert all(one.tokens for one in answers)


def test_one_that_would_make_another_one_late_joins_when_that_one_has_ended(
    engine: Engine, crowded: Engine, profile: LatencyProfile, monkeypatch: pytest.MonkeyPatch
) -> None:
    joined_before, finish = list[int](), Member.finish

    def finishing(member: Member, ended_ms: float) -> None:
        joined_before.append(len(arrivals.joined))
        finish(member, ended_ms)

    monkeypatch.setattr(Member, "finish", finishing)
    guard = Guard.fixed(slower(engine), engine.space, profile)
    reading_ms, steps_ms = needed_ms(profile, slower(engine))
    pairs = [(asked(reading_ms + 1.1 * steps_ms), guard), (asked(1e9, 1), guard), (asked(2e9, 2), guard)]
    expected = [engine.answer(*pair).tokens for pair in pairs]
    arrivals = Arrivals(crowded, monkeypatch)
    answers = batch(crowded, pairs)
    assert arrivals.joined == ["request 0", "request 1", "request 2"]
    assert not arrivals.alone
    assert joined_before[0] == 1, "nobody joined the first one"
    assert [one.tokens for one in answers] == expected
    assert all(one.budget_met for one in answers)


def test_more_than_there_are_rows_join_as_rows_become_free(
    engine: Engine, crowded: Engine, profile: LatencyProfile, monkeypatch: pytest.MonkeyPatch
) -> None:
    guard = Guard.fixed(slower(engine), engine.space, profile)
    pairs = [(asked(1e9, i, max_new_tokens=2 + i % 5), guard) for i in range(11)]
    expected = [engine.answer(*pair).tokens for pair in pairs]
    arrivals = Arrivals(crowded, monkeypatch)
    assert [one.tokens for one in batch(crowded, pairs)] == expected
    assert (len(arrivals.joined), arrivals.alone) == (len(pairs), [])


@pytest.mark.parametrize(("options", "is_calibrated"), [({"temperature": 1.0}, True), ({}, False)])
def test_those_whose_time_among_others_is_not_known_are_answered_alone_in_the_same_batch(
    engine: Engine,
    crowded: Engine,
    profile: LatencyProfile,
    monkeypatch: pytest.MonkeyPatch,
    options: dict[str, Any],
    is_calibrated: bool,
) -> None:
    joins = Guard.fixed(slower(engine), engine.space, profile)
    stays = Guard.fixed(slower(engine), engine.space, profile if is_calibrated else None)
    pairs = [(asked(1e9, 0), joins), (asked(2e9, 1, **options), stays), (asked(3e9, 2), joins)]
    expected = [engine.answer(*pair).tokens for pair in pairs]
    arrivals = Arrivals(crowded, monkeypatch)
    assert [one.tokens for one in batch(crowded, pairs)] == expected
    assert arrivals.joined == ["request 0", "request 2"]
    assert sorted(set(arrivals.alone)) == ["request 1", "request 2"], (
        "and who comes after it is at the door meanwhile"
    )
    assert not crowded.door.is_busy


def test_one_that_is_answered_alone_leaves_those_behind_it_their_shares(
    engine: Engine, crowded: Engine, profile: LatencyProfile, monkeypatch: pytest.MonkeyPatch
) -> None:
    guard, lefts_ms, choose = table(engine, profile), list[float](), Guard.choose_tier

    def choosing(guard: Guard, request: Request, size: Any, elapsed_ms: float, *rest: Any, **named: Any) -> Any:
        lefts_ms.append(budget_ms - elapsed_ms)
        return choose(guard, request, size, elapsed_ms, *rest, **named)

    monkeypatch.setattr(Guard, "choose_tier", choosing)
    budget_ms = 6 * profile.upper_total_ms(engine.space.index(slower(engine)))
    answers = batch(crowded, [(asked(budget_ms, i, temperature=1.0), guard) for i in range(3)])
    assert lefts_ms == [pytest.approx(budget_ms / share, rel=0.05) for share in (3, 2, 1)]
    assert all(one.budget_feasible for one in answers)
    assert not crowded.door.is_busy


def test_what_fits_nothing_runs_the_cheapest_and_says_so(
    engine: Engine, crowded: Engine, profile: LatencyProfile
) -> None:
    guard = table(engine, profile)
    answers = batch(crowded, [(asked(10.0, i), guard) for i in range(3)])
    assert [one.budget_feasible for one in answers] == [False] * 3
    assert {one.knobs for one in answers} == {engine.space.cheapest}
    refused = batch(crowded, [(asked(10.0, i, on_deadline="reject"), guard) for i in range(2)])
    assert [one.finish_reason for one in refused] == ["rejected"] * 2


def test_a_picture_that_cannot_be_opened_fails_the_batch_and_leaves_room(
    engine: Engine, crowded: Engine, profile: LatencyProfile
) -> None:
    guard = Guard.fixed(slower(engine), engine.space, profile)
    broken = replace(asked(2e9, 1), images=(b"no picture",))
    company_of(crowded).room = room = Room(1 << 20)
    with pytest.raises(UserError):
        batch(crowded, [(asked(1e9), guard), (broken, guard)])
    again = asked(1e9, 2)
    assert batch(crowded, [(again, guard)])[0].tokens == engine.answer(again, guard).tokens
    assert room.take(1 << 20)
    assert company_of(crowded).callers == 0


def test_too_many_are_refused_before_any_is_answered(
    engine: Engine, crowded: Engine, profile: LatencyProfile, monkeypatch: pytest.MonkeyPatch
) -> None:
    arrivals = Arrivals(crowded, monkeypatch)
    guard = Guard.fixed(slower(engine), engine.space, profile)
    with pytest.raises(UserError, match="256 requests wait"):
        batch(crowded, [(asked(1e9, i % 4), guard) for i in range(257)])
    assert (arrivals.joined, arrivals.alone) == ([], [])


def test_a_batch_is_said_to_be_late_by_the_times_among_others(
    engine: Engine, crowded: Engine, profile: LatencyProfile, caplog: pytest.LogCaptureFixture
) -> None:
    guard = table(engine, profile)
    reading_ms, steps_ms = needed_ms(profile, engine.space.cheapest)
    alone, together = (soonest_ms([guard] * 3, together=one) for one in (False, True))
    assert alone == pytest.approx([one * guard.least_ms() for one in (1, 2, 3)])
    assert together[2] == pytest.approx(3 * reading_ms + steps_ms, rel=1e-3)
    assert together[2] < alone[2]
    batch(crowded, [(asked(0.5 * (together[2] + alone[2]), i), guard) for i in range(3)])
    assert not caplog.text
    batch(crowded, [(asked(0.9 * together[2], i), guard) for i in range(3)])
    assert "1 of 3 requests of this batch are not expected within their budgets" in caplog.text
