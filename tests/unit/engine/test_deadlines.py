"""Deadlines with company: requests that stop, are refused, wait for each other, or are cancelled."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from PIL import Image

import tiny_model
from tempovlm.api import TempoVLM
from tempovlm.control.guard import Guard
from tempovlm.control.margin import OnlineMargin
from tempovlm.control.policies import TablePolicy, prior_accuracy
from tempovlm.control.price import parse_price
from tempovlm.core.errors import UserError
from tempovlm.core.request import Answer, Request
from tempovlm.engine.batching import answer_batch
from tempovlm.engine.engine import Engine
from tempovlm.engine.watch import Interrupted, Pieces, Watch
from timings import TICK_MS, Ticks

SPACE = tiny_model.SPACE
PROFILE = tiny_model.make_profile(spread=0.1)
AMPLE_MS = 1.5 * PROFILE.upper_total_ms(len(SPACE) - 1)
"""In which everything fits."""


def request(**fields: Any) -> Request:
    return Request(images=(Image.fromarray(tiny_model.picture()),), question="what is the sign?", **fields)


@pytest.fixture
def guard(ticks: Ticks) -> Guard:
    del ticks  # the policy's own time is measured
    return replace(Guard.around(TablePolicy(SPACE, prior_accuracy(SPACE)), SPACE, PROFILE), margin=None)


def test_stop_ends_at_any_stage(engine: Engine, ticks: Ticks) -> None:
    del ticks
    stages: set[str | None] = set()
    for budget in range(1, 60):
        answer = engine.answer(request(budget_ms=budget * TICK_MS, on_deadline="stop", max_new_tokens=64))
        assert answer.finish_reason == "deadline"
        assert answer.budget_met == (bool(answer.tokens) and answer.timings_ms["total"] <= budget * TICK_MS)
        assert answer.timings_ms["total"] <= (budget + 8) * TICK_MS, "one piece and its borders"
        assert bool(answer.tokens) == (answer.stopped_at == "decode")
        assert answer.to_json()["stopped_at"] == answer.stopped_at
        stages.add(answer.stopped_at)
    assert stages >= {"queue", "preprocess", "vision_encoder", "prefill", "decode"}


def test_a_piece_that_is_known_to_end_after_the_deadline_does_not_begin() -> None:
    pieces, elapsed = Pieces(), [0.0]
    for took_ms in (12.0, 10.0, 30.0):
        pieces.add("projector", 7, took_ms)
    watch = Watch(request(budget_ms=100.0, on_deadline="stop"), 0.0, pieces)
    watch.go_by(lambda: elapsed[0])
    elapsed[0] = 91.0
    with watch.piece("projector", 13):
        elapsed[0] = 92.0
    with pytest.raises(Interrupted) as end, watch.piece("projector", 7):
        pytest.fail("it began")
    assert (end.value.reason, end.value.stage) == ("deadline", "projector")
    elapsed[0] = 89.0
    with watch.piece("projector", 7):
        elapsed[0] = 99.0


def test_blocks_end_when_the_next_one_would_be_late(ticks: Ticks) -> None:
    watch = Watch(request(budget_ms=100.0, on_deadline="stop"), 0.0, pieces := Pieces())
    elapsed_ms = [70.0]
    watch.go_by(lambda: elapsed_ms[0])
    tick = watch.ticks("prefill", 4)
    assert tick is not None
    tick()
    ticks.wait(20.0)
    elapsed_ms[0] = 90.0
    with pytest.raises(Interrupted):
        tick()
    assert pieces.least_ms("prefill block", 4) == pytest.approx(20.0, abs=2 * TICK_MS)
    assert Watch(request(budget_ms=100.0), 0.0, pieces).ticks("prefill", 4) is None


@pytest.mark.parametrize("is_cancelled", [False, True])
def test_a_request_that_waits_ends_on_time(engine: Engine, is_cancelled: bool) -> None:
    """While another one is inside, which ends only after it."""
    answers: list[Answer] = []

    def ask() -> None:
        asked = request(budget_ms=None if is_cancelled else 30.0, on_deadline="stop")
        *_, answer = engine.stream(asked, cancel=(lambda: True) if is_cancelled else None)
        answers.append(answer)

    with engine.door.enter(engine.line_up(request())):
        thread = threading.Thread(target=ask)
        thread.start()
        thread.join()
    assert answers[0].finish_reason == ("cancelled" if is_cancelled else "deadline")
    assert (answers[0].stopped_at, answers[0].tokens) == ("queue", ())
    assert engine.door.waiting == 0
    assert engine.answer(request()).finish_reason in ("stop", "length")


def test_cancel_ends_at_any_stage(engine: Engine) -> None:
    stages: set[str] = set()
    for number in range(64):
        asked = [0]

        def cancel(asked: list[int] = asked, number: int = number) -> bool:
            asked[0] += 1
            return asked[0] > number

        *_, answer = engine.stream(request(), cancel=cancel)
        assert isinstance(answer, Answer)
        if answer.finish_reason != "cancelled":
            break
        stages.add(str(answer.stopped_at))
    assert stages >= {"queue", "preprocess", "vision_encoder", "projector", "control", "prefill", "decode"}


def test_an_engine_answers_as_before_after_it_was_stopped(engine: Engine) -> None:
    before = engine.answer(request()).tokens
    engine.answer(request(budget_ms=0.01, on_deadline="stop"))
    assert engine.answer(request()).tokens == before


def test_what_cannot_fit_is_rejected_at_once(engine: Engine, guard: Guard) -> None:
    answer = engine.answer(request(budget_ms=5.0, on_deadline="reject"), guard)
    assert (answer.finish_reason, answer.text, answer.budget_met) == ("rejected", "", False)
    assert (answer.budget_feasible, answer.timings_ms["vision_encoder"]) == (False, pytest.approx(0.0))
    assert engine.answer(request(budget_ms=1e6, on_deadline="reject"), guard).finish_reason in ("stop", "length")


def test_a_machine_that_was_slow_is_tried_again_where_nobody_waits(
    engine: Engine, guard: Guard, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Were all refused, no answer would ever tell that it is fast again."""
    margin = OnlineMargin()
    slow = replace(guard, margin=margin)
    for _ in range(8):
        margin.observe(6.0, 1.0, 1.0)
    asked = request(budget_ms=AMPLE_MS, on_deadline="reject")
    assert slow.budgets_ms().min() > AMPLE_MS > guard.calibrated_ms()
    with monkeypatch.context() as patched:
        patched.setattr(type(engine.door), "waiting", 1)
        assert engine.answer(asked, slow).finish_reason == "rejected"
    for _ in range(40):
        assert engine.answer(asked, slow).finish_reason in ("stop", "length")
    assert slow.budgets_ms().min() < AMPLE_MS
    never = request(budget_ms=guard.calibrated_ms() / 2, on_deadline="reject")
    assert engine.answer(never, slow).finish_reason == "rejected"


@pytest.mark.parametrize(("waited", "reason"), [(0.0, "rejected"), (0.2, "answered")])
def test_what_is_not_worth_its_time_is_rejected_at_once_or_answered(
    engine: Engine, guard: Guard, monkeypatch: pytest.MonkeyPatch, waited: float, reason: str
) -> None:
    real = Guard.choose_tier
    monkeypatch.setattr(
        Guard, "choose_tier", lambda *given, **more: replace(real(*given, **more), is_worth_it=False)
    )
    asked = request(budget_ms=1e6, waited_ms=waited * 1e6, on_deadline="reject")
    reasons = {"rejected"} if reason == "rejected" else {"stop", "length"}
    assert engine.answer(asked, guard).finish_reason in reasons


def test_waiting_is_a_part_of_the_total(engine: Engine, guard: Guard) -> None:
    waited_ms = 0.8 * AMPLE_MS
    waited = engine.answer(request(budget_ms=AMPLE_MS, waited_ms=waited_ms), guard)
    assert waited.timings_ms["queue"] >= waited_ms
    assert waited.timings_ms["total"] >= waited_ms
    ready = engine.answer(request(budget_ms=AMPLE_MS), guard)
    assert SPACE.index(waited.knobs) < SPACE.index(ready.knobs)
    with pytest.raises(UserError, match="waited_ms"):
        request(waited_ms=-1.0)


def test_who_waits_is_left_a_share(engine: Engine, guard: Guard) -> None:
    alone = engine.answer(request(budget_ms=AMPLE_MS), guard)
    waiting = engine.line_up(request(budget_ms=AMPLE_MS))
    try:
        before_another = engine.answer(request(budget_ms=AMPLE_MS), guard)
    finally:
        engine.door.leave([waiting])
    hopeless = engine.line_up(request(budget_ms=3.0))
    try:
        beside = engine.answer(request(budget_ms=AMPLE_MS), guard)
    finally:
        engine.door.leave([hopeless])
    assert SPACE.index(before_another.knobs) < SPACE.index(alone.knobs)
    assert beside.budget_feasible is True, "what cannot be kept for others is not kept"


def test_who_waits_is_left_the_time_to_open_its_picture(engine: Engine, guard: Guard) -> None:
    """Bounds hold from the opened picture on."""
    assert PROFILE.open_ms > 0
    blind = Request(images=(), question="what is it?", budget_ms=AMPLE_MS)
    seeing, seeing_nothing = (engine.line_up(one, guard=guard) for one in (request(budget_ms=AMPLE_MS), blind))
    engine.door.leave([seeing, seeing_nothing])
    assert seeing_nothing.need_ms == pytest.approx(guard.least_ms())
    assert seeing.need_ms == pytest.approx(guard.least_ms() + PROFILE.open_ms)


def answered_beside(engine: Engine, guard: Guard, waits_ms: float, **fields: Any) -> Answer:
    """The answer of a request while another one waits, which has so much time."""
    ample = request(budget_ms=AMPLE_MS, **fields)
    waiting = engine.line_up(request(budget_ms=waits_ms, on_deadline="stop"), guard=guard)
    try:
        return engine.answer(ample, guard)
    finally:
        engine.door.leave([waiting])


def test_a_price_leaves_more_than_the_least_to_those_who_wait(engine: Engine, guard: Guard) -> None:
    """At no price the request takes its equal share; at the derived one no more than that."""
    engine.price = parse_price("0")
    equal = answered_beside(engine, guard, AMPLE_MS)
    engine.price = parse_price("derived")
    priced = answered_beside(engine, guard, AMPLE_MS)
    assert PROFILE.p50_total_ms(SPACE.index(priced.knobs)) <= 0.5 * AMPLE_MS
    assert SPACE.index(equal.knobs) < SPACE.index(engine.answer(request(budget_ms=AMPLE_MS), guard).knobs)


def test_who_weighs_more_takes_more_of_the_time(engine: Engine, guard: Guard) -> None:
    priced = answered_beside(engine, guard, AMPLE_MS)
    heavy = answered_beside(engine, guard, AMPLE_MS, weight=1e6)
    assert SPACE.index(heavy.knobs) > SPACE.index(priced.knobs)


def test_a_price_without_accuracies_leaves_equal_shares(engine: Engine, guard: Guard) -> None:
    plain = replace(guard, usual=None)
    chosen = []
    for text in ("derived", "0", "0.5"):
        engine.price = parse_price(text)
        chosen.append(answered_beside(engine, plain, AMPLE_MS).knobs)
    assert len(set(chosen)) == 1


def test_a_batch_runs_by_deadline_and_answers_in_order(engine: Engine, guard: Guard) -> None:
    texts = ["one", "two", "three", "four"]
    budgets_ms = [None, 400.0, 150.0, None]
    asked = [
        Request(images=(), question=text, budget_ms=budget_ms)
        for text, budget_ms in zip(texts, budgets_ms, strict=True)
    ]
    answers = answer_batch(engine, asked, guard)
    assert [answer.budget_ms for answer in answers] == budgets_ms
    assert answers[1].timings_ms["queue"] > answers[2].timings_ms["queue"], "the earlier deadline went first"
    alone = [engine.answer(Request(images=(), question=text), guard).text for text in texts]
    assert [answers[0].text, answers[3].text] == [alone[0], alone[3]]
    assert engine.door.waiting == 0


def test_a_batch_says_before_it_runs_that_it_will_be_late(
    engine: Engine, guard: Guard, caplog: pytest.LogCaptureFixture
) -> None:
    least_ms = guard.least_ms()
    answer_batch(engine, [request(budget_ms=2.5 * least_ms) for _ in range(4)], guard)
    assert "2 of 4 requests of this batch are not expected within their budgets" in caplog.text
    caplog.clear()
    answer_batch(engine, [request(budget_ms=5 * least_ms) for _ in range(4)], guard)
    assert not caplog.text


def together(calls: list[Callable[[], Answer]]) -> list[Answer]:
    """What calls return that are made by threads at once."""
    answers: dict[int, Answer] = {}
    gate = threading.Barrier(len(calls))

    def run(place: int) -> None:
        gate.wait()
        answers[place] = calls[place]()

    threads = [threading.Thread(target=run, args=(place,)) for place in range(len(calls))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return [answers[place] for place in range(len(calls))]


def test_threads_pass_one_at_a_time(engine: Engine) -> None:
    alone = engine.answer(request())
    inside: list[int] = []
    prepare = engine.runner.model.prefill

    def watched(*args: Any, **named: Any) -> Any:
        inside.append(1)
        assert len(inside) == 1
        try:
            return prepare(*args, **named)
        finally:
            inside.pop()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(engine.runner.model), "prefill", lambda _, *args, **named: watched(*args, **named))
        answers = together([lambda: engine.answer(request())] * 4)
    assert {answer.tokens for answer in answers} == {alone.tokens}


def test_streams_take_turns(engine: Engine) -> None:
    one, other = (engine.stream(request(max_new_tokens=6)) for _ in range(2))
    next(one), next(other)
    assert engine.answer(request(max_new_tokens=6)).tokens == list(one)[-1].tokens == list(other)[-1].tokens  # type: ignore[union-attr]


def wait_for(is_so: Callable[[], bool]) -> None:
    """Return when something is so."""
    while not is_so():
        pass


def test_an_event_loop_asks_several_and_their_waiting_counts(model: TempoVLM, ticks: Ticks) -> None:
    picture, door = Image.fromarray(tiny_model.picture()), model.engine.door

    async def ask() -> list[Answer]:
        with door.enter(door.line_up(0.0)):
            tasks = [asyncio.create_task(model.answer_async(picture, "what?", max_new_tokens=3)) for _ in range(3)]
            await asyncio.to_thread(wait_for, lambda: door.waiting == len(tasks))
            assert not any(task.done() for task in tasks)
            ticks.wait(500.0)
        return await asyncio.gather(*tasks)

    answers = asyncio.run(ask())
    assert len({answer.tokens for answer in answers}) == 1
    assert min(answer.timings_ms["queue"] for answer in answers) >= 500.0
