"""Time that requests lie in their sockets counts; replies' slowest ways out are kept free."""

from __future__ import annotations

import asyncio
import socket
from typing import Any

import pytest

from asgi import NEEDS, chat, get

pytest.importorskip("fastapi", reason=NEEDS)

from tempovlm.serving import waits
from tempovlm.serving.desk import USUAL, WayOut
from tempovlm.serving.gate import CAME
from tempovlm.serving.waits import Lag, WatchedLoop, ready_since_ms


def test_what_is_there_at_once_may_have_come_while_others_were_handled() -> None:
    lag = Lag(100.0)
    lag.looked(101.0, 130.0)
    assert lag.since_ms == pytest.approx(130.0), "it was waited for, and came then"
    lag.looked(150.0, 150.01)
    assert lag.since_ms == pytest.approx(130.0), "20 ms of handling what came before"
    lag.looked(151.0, 151.01)
    assert lag.since_ms == pytest.approx(150.01)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """A clock that goes on where a test says so."""
    time_ms = [0.0]
    monkeypatch.setattr(waits, "now_ms", lambda: time_ms[0])
    return time_ms


def test_a_loop_knows_what_came_while_it_was_busy(clock: list[float]) -> None:
    ours, theirs = socket.socketpair()
    ours.setblocking(False)

    async def talk() -> float:
        loop = asyncio.get_running_loop()
        found: asyncio.Future[float] = loop.create_future()

        def read() -> None:
            loop.remove_reader(ours)
            found.set_result(ready_since_ms(loop))

        loop.add_reader(ours, read)
        theirs.send(b"x")
        clock[0] = 50.0
        return await found

    with asyncio.Runner(loop_factory=WatchedLoop) as runner:
        assert runner.run(talk()) == pytest.approx(0.0)
    ours.close()
    theirs.close()


def test_a_loop_that_does_not_know_says_now(clock: list[float]) -> None:
    clock[0] = 7.0
    assert ready_since_ms(object()) == pytest.approx(7.0)


def test_time_in_the_socket_counts_for_the_budget(app: Any) -> None:
    assert chat(app, latency_budget_ms=60_000).status == 200
    kept = app.__call__

    async def late(scope: Any, receive: Any, send: Any) -> None:
        scope["state"] = {CAME: -1e12}
        await kept(scope, receive, send)

    reply = chat(late, latency_budget_ms=60_000)
    assert (reply.status, reply.code) == (429, "budget_infeasible")
    assert "had passed" in reply.json["error"]["message"]
    assert get(late, "/health").status == 200


def test_the_slowest_way_out_but_one_of_a_hundred_is_kept_free() -> None:
    out = WayOut()
    for took_ms in (*range(1, 100), 1e6):
        out.observe(took_ms)
    assert out.under_ms(0.99) == pytest.approx(99.0)
    assert out.under_ms(USUAL) == pytest.approx(50.0, abs=1.0)


def test_slow_replies_shut_nobody_out_of_an_idle_server(app: Any, part: dict[str, Any]) -> None:
    """Only replies tell that ways out have become shorter."""
    for took_ms in (*[1.0] * 10, *[30_000.0] * 5):
        app.state.desk.out.observe(took_ms)
    assert chat(app, part, latency_budget_ms=10_000).status == 200
