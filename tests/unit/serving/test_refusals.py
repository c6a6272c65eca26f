"""Refusals: who is told what, when, and at which cost; and answers that nobody waits for any more."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from PIL import Image

from asgi import CHAT, NEEDS, Reply, ask, chat, encoded, get, question

pytest.importorskip("fastapi", reason=NEEDS)

from tempovlm.api import TempoVLM
from tempovlm.control.guard import Guard
from tempovlm.control.policy import Question
from tempovlm.control.price import Envelope, Price
from tempovlm.control.queue import End
from tempovlm.serving import desk
from tempovlm.serving.intake.pictures import OpeningTimes, look, readable

SOON_S = 10.0
"""Seconds that nothing here takes unless it hangs."""


@pytest.fixture
def nothing_is_decoded(served: TempoVLM, part: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    assert part  # is made before

    readable()  # importing the readers draws a picture

    def fail(*_: Any, **__: Any) -> None:
        pytest.fail("a pixel was decoded, or the model asked")

    monkeypatch.setattr(Image.Image, "load", fail)
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", fail)
    monkeypatch.setattr(served, "answer", fail)


class Gate:
    """Keeps the model from answering until it is opened.

    Attributes:
        looks: whether a question ends before that if nobody wants its answer.
    """

    looks = True

    def __init__(self, served: TempoVLM, patch: pytest.MonkeyPatch) -> None:
        self.opened, self.entered = threading.Event(), threading.Semaphore(0)
        real = served.answer

        def answer(*given: Any, cancel: Callable[[], bool], **options: Any) -> Any:
            self.entered.release()
            while not (self.opened.wait(0.001) or (self.looks and cancel())):
                pass
            return real(*given, cancel=cancel, **options)

        patch.setattr(served, "answer", answer)

    async def inside(self, count: int = 1) -> None:
        """Wait until so many requests have come to the model."""
        for _ in range(count):
            await asyncio.to_thread(self.entered.acquire, timeout=SOON_S)


@pytest.fixture
def gate(served: TempoVLM, monkeypatch: pytest.MonkeyPatch) -> Iterator[Gate]:
    found = Gate(served, monkeypatch)
    yield found
    found.opened.set()


def send(app: Any, key: str = "", **more: Any) -> asyncio.Task[Reply]:
    headers = {"authorization": f"Bearer {key}"} if key else None
    return asyncio.create_task(ask(app, CHAT, [json.dumps(question(**more)).encode()], headers))


@pytest.mark.usefixtures("nothing_is_decoded")
def test_a_budget_that_nothing_fits_is_refused_at_once(app: Any, part: dict[str, Any]) -> None:
    reply = chat(app, part, latency_budget_ms=5)
    assert (reply.status, reply.code) == (429, "budget_infeasible")
    assert reply.headers["x-should-retry"] == "false"
    assert "retry-after" not in reply.headers
    assert "no setting fits 5 ms" in reply.json["error"]["message"]
    fixed = {"type": "image_url", "image_url": part["image_url"] | {"detail": "high"}}
    assert chat(app, fixed, latency_budget_ms=25).code == "budget_infeasible", "the high tier takes longer"


@pytest.mark.parametrize(
    ("options", "headers", "more", "place"),
    [
        ({}, {}, {"latency_budget_ms": 5}, "latency_budget_ms"),
        ({}, {"x-tempovlm-budget-ms": "5"}, {}, "x-tempovlm-budget-ms"),
        ({}, {}, {"model": "tiny@5ms"}, "model"),
        ({"default_budget_ms": 5.0}, {}, {}, None),
    ],
)
def test_the_refusal_names_the_place_of_the_budget(
    app_of: Callable[..., Any], options: dict[str, Any], headers: dict[str, str], more: dict[str, Any], place: str
) -> None:
    reply = chat(app_of(**options), headers=headers, **more)
    assert (reply.code, reply.json["error"]["param"]) == ("budget_infeasible", place)


@pytest.mark.usefixtures("nothing_is_decoded")
def test_a_picture_that_takes_the_budget_is_refused(
    app_of: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, part: dict[str, Any]
) -> None:
    app = app_of()
    monkeypatch.setattr(app.state.desk, "_opening", SimpleNamespace(of=lambda one: 1e4 * one.megapixels))
    reply = chat(app, part, latency_budget_ms=60)
    assert reply.code == "budget_infeasible"
    assert "to open the picture" in reply.json["error"]["message"]


def test_larger_pictures_are_expected_to_open_later() -> None:
    times = OpeningTimes()
    small, large = (look(encoded(Image.new("RGB", (side, side)), "JPEG"), "") for side in (200, 2000))
    assert 0 < times.of(small) < times.of(large)
    assert times.of(None) == 0
    expected_ms = times.of(large)
    times.observe(small, 1e6)
    assert times.of(large) == pytest.approx(expected_ms), "small ones say little"
    for _ in range(3):
        times.observe(large, 3 * expected_ms)
    assert times.of(large) == pytest.approx(3 * expected_ms)


def test_a_full_queue_says_when_to_come_back(app_of: Callable[..., Any], gate: Gate) -> None:
    app = app_of(max_queue=1)

    async def talk() -> None:
        first = send(app)
        await gate.inside()
        second = send(app)
        await gate.inside()
        assert (app.state.desk.schedule.running, app.state.desk.schedule.waiting) == (1, 1)
        refused = await send(app)
        assert (refused.status, refused.code) == (429, "queue_full")
        assert int(refused.headers["retry-after"]) >= 1
        assert float(refused.headers["retry-after-ms"]) > 0
        assert "x-should-retry" not in refused.headers
        gate.opened.set()
        assert [(await one).status for one in (first, second)] == [200, 200]
        assert len(app.state.desk.schedule) == 0

    asyncio.run(talk())


def test_who_would_be_late_is_not_let_in(app: Any, gate: Gate, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("least_ms", "calibrated_ms"):
        monkeypatch.setattr(Guard, name, lambda *_: 20_000.0)

    async def talk() -> None:
        first = send(app)
        await gate.inside()
        refused = await send(app, latency_budget_ms=35_000)
        assert (refused.status, refused.code) == (429, "queue_full"), "20 s behind 20 of the one inside"
        patient = send(app, latency_budget_ms=60_000)
        await gate.inside()
        gate.opened.set()
        assert [(await one).status for one in (first, patient)] == [200, 200]

    asyncio.run(talk())


def test_a_key_takes_its_share_of_the_places(app_of: Callable[..., Any], gate: Gate) -> None:
    app = app_of(max_queue=2, api_keys=("mine", "yours"))

    async def talk() -> None:
        tasks = [send(app, "mine")]
        await gate.inside()
        tasks.append(send(app, "mine"))
        await gate.inside()
        assert (await send(app, "mine")).code == "queue_full"
        tasks.append(send(app, "yours"))
        await gate.inside()
        gate.opened.set()
        assert [(await one).status for one in tasks] == [200] * 3

    asyncio.run(talk())


def test_one_that_gains_more_is_answered_instead_of_one_that_waits(
    app: Any, gate: Gate, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a policy expects decides, not who came first; each gets one reply, whatever its thread is at."""
    gate.looks = False
    for name in ("least_ms", "calibrated_ms", "expected_ms"):
        monkeypatch.setattr(Guard, name, lambda *_: 20_000.0)
    usual = Envelope.of([0.5], [20_000.0])

    def worths(_: Guard, asked: Question) -> tuple[Envelope, Envelope]:
        return Envelope.of([{"hopeless": 0.1, "easy": 0.9}[asked.text]], [20_000.0]), usual

    monkeypatch.setattr(Guard, "worths", worths)
    hopeless, easy = (
        {"messages": [{"role": "user", "content": text}], "latency_budget_ms": 50_000}
        for text in ("hopeless", "easy")
    )

    async def talk() -> None:
        first = send(app, **easy)
        await gate.inside()
        waits = send(app, **hopeless)
        await gate.inside()
        assert (await send(app, **hopeless)).code == "queue_full"
        better = send(app, **easy)
        refused = await asyncio.wait_for(waits, SOON_S)
        assert (refused.status, refused.code) == (429, "queue_full")
        assert float(refused.headers["retry-after-ms"]) > 0
        await gate.inside()
        gate.opened.set()
        assert [(await one).status for one in (first, better)] == [200, 200]
        assert len(app.state.desk.schedule) == 0
        assert not app.state.desk._answering

    asyncio.run(talk())


def test_a_request_that_has_chosen_is_waited_for(app: Any, gate: Gate) -> None:
    desk = app.state.desk

    async def talk() -> None:
        first = send(app, latency_budget_ms=60_000)
        await gate.inside()
        (answering,) = desk._answering.values()
        door = desk._model.engine.door
        door._ends[answering.thread] = End(*[answering.stay.accepted_ms + 30_000] * 2)
        assert (await send(app, latency_budget_ms=29_000)).code == "queue_full"
        second = send(app, latency_budget_ms=60_000)
        await gate.inside()
        gate.opened.set()
        assert [(await one).status for one in (first, second)] == [200, 200]
        assert door.ends() == {}

    asyncio.run(talk())


def test_only_the_operator_weighs_keys(app_of: Callable[..., Any], gate: Gate) -> None:
    app = app_of(api_keys=("mine", "yours"), key_weights=(1.0, 4.0))
    schedule = app.state.desk.schedule

    async def talk() -> None:
        own = {"weight": 100.0, "key_weights": [9.0], "price": 0, "price_per_ms": 0.0, "latency_budget_ms": 60_000}
        tasks = []
        for key in ("mine", "yours"):
            tasks.append(send(app, key, **own))
            await gate.inside()
        assert [one.weight for one in schedule._stays] == pytest.approx([1.0, 4.0])
        assert schedule.lane_price(0.0, schedule.inside[0]).price == Price()
        gate.opened.set()
        assert [(await one).status for one in tasks] == [200, 200]

    asyncio.run(talk())


@pytest.mark.parametrize("discipline", ["edf", "fcfs"])
def test_door_and_schedule_have_the_same_discipline(app_of: Callable[..., Any], discipline: str) -> None:
    desk = app_of(discipline=discipline, price="0.25").state.desk
    model = desk._model
    assert model.engine.door.discipline == discipline
    assert str(model.engine.price) == str(desk.schedule.price) == "0.25"
    app_of()
    assert (model.engine.door.discipline, str(model.engine.price)) == ("edf", "derived")


@pytest.mark.parametrize("budget", [{"latency_budget_ms": 60_000}, None], ids=["a budget", "none"])
def test_draining_refuses_and_ends_what_it_has(app: Any, gate: Gate, budget: dict[str, int] | None) -> None:
    """One without a deadline is waited for, however long it takes."""

    async def talk() -> None:
        first = send(app, **(budget or {}))
        await gate.inside()
        app.state.desk.is_draining = True
        ending = asyncio.create_task(app.state.desk.drained(1e5 if budget else 0.0))
        refused = await send(app)
        assert (refused.status, refused.code) == (503, "draining")
        assert "retry-after" in refused.headers
        assert not ending.done()
        gate.opened.set()
        assert (await first).status == 200
        await ending

    asyncio.run(talk())
    assert (get(app, "/ready").status, get(app, "/health").status) == (503, 200)


def test_an_answer_ends_when_its_client_goes(app: Any, gate: Gate) -> None:
    async def talk() -> Reply:
        leave = asyncio.Event()
        task = asyncio.create_task(ask(app, CHAT, [json.dumps(question()).encode()], leave=leave))
        await gate.inside()
        leave.set()
        return await task

    assert asyncio.run(talk()).status == 499
    assert 'finished_reason="abort"' in get(app, "/metrics").body.decode()
    assert len(app.state.desk.schedule) == 0


def test_a_stream_ends_within_a_token_of_its_client(app: Any) -> None:
    body = json.dumps(question(stream=True, temperature=2.0, seed=1) | {"max_tokens": 300}).encode()
    whole = asyncio.run(ask(app, CHAT, [body]))
    assert len(whole.events) > 20
    left = asyncio.run(ask(app, CHAT, [body], leave_at=b'"role"'))
    assert left.events[-1]["tempovlm"]["stopped_at"] == "decode"
    assert len(left.events) < len(whole.events)


def test_what_does_not_fit_after_waiting_can_be_refused(
    app: Any, served: TempoVLM, monkeypatch: pytest.MonkeyPatch, part: dict[str, Any]
) -> None:
    real = served.answer
    monkeypatch.setattr(served, "answer", lambda *given, **more: real(*given, **more | {"waited_ms": 1e6}))
    reply = chat(app, part, latency_budget_ms=1000, on_deadline="reject")
    assert (reply.status, reply.code) == (429, "queue_full")


def test_a_body_that_comes_too_late_is_refused(app: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(desk, "now_ms", lambda: 1e15)
    reply = chat(app, latency_budget_ms=1000)
    assert (reply.status, reply.code) == (429, "budget_infeasible")
    assert "when the body was whole" in reply.json["error"]["message"]


def test_a_body_that_was_read_late_beside_others_may_come_again(
    app: Any, gate: Gate, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def talk() -> None:
        first = send(app)
        await gate.inside()
        with monkeypatch.context() as late:
            late.setattr(desk, "now_ms", lambda: 1e15)
            refused = await send(app, latency_budget_ms=1000)
        assert (refused.status, refused.code) == (429, "queue_full")
        assert "x-should-retry" not in refused.headers
        assert float(refused.headers["retry-after-ms"]) > 0
        gate.opened.set()
        assert (await first).status == 200

    asyncio.run(talk())


def test_a_failure_tells_no_more_than_that(
    app: Any, served: TempoVLM, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("secret at /srv/models/tiny")

    monkeypatch.setattr(served, "answer", fail)
    reply = chat(app)
    assert (reply.status, reply.code) == (500, "internal_error")
    assert b"secret" not in reply.body
    assert "secret" in caplog.text
    assert len(app.state.desk.schedule) == 0


def test_an_idle_server_lets_one_in_that_is_late_only_by_the_margin(
    app: Any, gate: Gate, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise a server that was slow once would refuse everybody for good: only answers say that it is over."""
    monkeypatch.setattr(Guard, "least_ms", lambda *_: 1e6)

    async def talk() -> None:
        first = send(app, latency_budget_ms=60_000)
        await gate.inside()
        assert (await send(app, latency_budget_ms=60_000)).code == "queue_full"
        gate.opened.set()
        assert (await first).status == 200

    asyncio.run(talk())
