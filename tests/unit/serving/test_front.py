"""The front before several servers, without Ray: what it passes on, and whom it chooses."""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import AsyncIterator
from typing import Any

import pytest

from asgi import CHAT, NEEDS, ask, chat, get, post, question

pytest.importorskip("fastapi", reason=NEEDS)

from tempovlm.control.queue import Discipline
from tempovlm.serving.front import INSIDE, Front, LostError, Routes, Task, answered
from tempovlm.serving.options import Options

STREAM = {"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/event-stream")]}
PIECE = {"type": "http.response.body", "body": b"data: {}\n\n", "more_body": True}


def before(app: Any, **options: Any) -> Front:
    """A front before one server."""
    return Front(lambda task: answered(app, task), Options(**options))


def test_replies_pass_unchanged(app: Any) -> None:
    front = before(app)
    for more in ({}, {"stream": True}, {"latency_budget_ms": 1}, {"max_tokens": 0}):
        direct, passed = chat(app, **more), chat(front, **more)
        assert passed.status == direct.status
        assert passed.headers["content-type"] == direct.headers["content-type"]
    assert passed.json == direct.json
    assert get(front, "/v1/models").json == get(app, "/v1/models").json


def test_the_clock_starts_at_the_front(app: Any) -> None:
    waited_ms = 30_000.0

    def late(task: Task) -> AsyncIterator[Any]:
        return answered(app, Task(task.scope, task.body, waited_ms, task.budget_ms))

    front = Front(late, Options())
    assert chat(front, latency_budget_ms=60_000).json["tempovlm"]["timings_ms"]["queue"] >= waited_ms
    assert chat(front, latency_budget_ms=20_000).code == "budget_infeasible"


def test_the_front_finds_the_budget_where_a_server_does() -> None:
    found = list[float | None]()

    async def took(task: Task) -> AsyncIterator[Any]:
        found.append(task.budget_ms)
        yield {INSIDE: 0.0}

    front = Front(took, Options(default_budget_ms=70.0))
    chat(front, latency_budget_ms=50)
    chat(front, headers={"x-request-timeout-seconds": "2"})
    chat(front, model="pocket@90ms")
    chat(front)
    post(front, CHAT, b"{")
    assert found == pytest.approx([50.0, 2000.0, 90.0, 70.0, None], nan_ok=True)


def test_strangers_and_large_bodies_stop_at_the_front() -> None:
    front = Front(lambda _: pytest.fail("a replica was asked"), Options(api_keys=("right",), max_body_mb=0.001))
    assert chat(front).code == "invalid_api_key"
    large = asyncio.run(ask(front, CHAT, [b" " * 2000], {"authorization": "Bearer right"}))
    assert (large.status, large.code) == (413, "request_too_large")


def test_a_lost_replica_is_an_error_of_the_api() -> None:
    async def lost(*messages: dict[str, Any]) -> AsyncIterator[Any]:
        for message in messages:
            yield message
        raise LostError

    told = chat(Front(lambda _: lost(), Options()))
    assert (told.status, told.code) == (503, "replica_lost")
    assert "retry-after" in told.headers
    told = chat(Front(lambda _: lost(STREAM, PIECE), Options()))
    assert told.events[-1]["error"]["code"] == "replica_lost"
    with pytest.raises(LostError):
        chat(Front(lambda _: lost({**STREAM, "headers": []}, PIECE), Options()))


def test_an_answer_ends_when_the_client_leaves_the_front(app: Any) -> None:
    async def leave() -> None:
        body = json.dumps(question(stream=True, max_tokens=16)).encode()
        await ask(before(app), CHAT, [body], leave_at=b"data: ")
        await app.state.desk.drained(0.0)

    asyncio.run(leave())
    assert 'finished_reason="abort"' in get(app, "/metrics").body.decode()


def task(budget_ms: float | None, waited_ms: float = 0.0) -> Task:
    return Task({}, b"", waited_ms, budget_ms)


def test_a_request_goes_where_it_ends_in_time() -> None:
    routes = Routes()
    routes.tell(["a", "b"], {"a": {"need_ms": 10.0}, "b": {"need_ms": 10.0}})
    firsts = [routes.ranked(str(number), task(100.0), 0.0)[0] for number in range(4)]
    assert firsts.count("a") == firsts.count("b") == 2
    assert routes.ranked("4", task(5.0), 0.0)[0] in ("a", "b"), "some replica has to refuse it"
    routes.ended("0", 10.0)
    assert routes.ranked("5", task(100.0), 10.0)[0] == firsts[0]


@pytest.mark.parametrize(("discipline", "is_let_in"), [("edf", True), ("fcfs", False)])
def test_a_replicas_queue_is_followed_in_its_own_order(discipline: Discipline, is_let_in: bool) -> None:
    routes = Routes(discipline)
    routes.tell(["a", "b"], {"a": {"need_ms": 10.0}, "b": {"need_ms": 10.0}})
    for number in range(4):  # of each replica one begins and one waits
        routes.ranked(str(number), task(None), 0.0)
    first = routes.ranked("urgent", task(25.0), 0.0)[0]
    then = routes.ranked("after", task(None), 0.0)[0]
    assert (then != first) is is_let_in, "one that is not expected there is no load"


def test_a_slower_replica_gets_those_that_have_time() -> None:
    routes = Routes()
    routes.tell(["slow", "fast"], {"slow": {"need_ms": 80.0}, "fast": {"need_ms": 10.0}})
    assert routes.ranked("0", task(50.0), 0.0)[0] == "fast"
    assert routes.ranked("1", task(math.inf), 0.0)[0] == "slow"
    routes.tell(["fast"], {})
    assert routes.ranked("2", task(50.0), 0.0) == ["fast"]
    assert routes.ranked("2", task(50.0, 45.0), 0.0) == ["fast"], "asked again it takes one place"
