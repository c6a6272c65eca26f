"""Time that requests lie in their sockets counts; replies' slowest ways out are kept free."""

from __future__ import annotations

import asyncio
import socket
from typing import Any

import pytest

from asgi import NEEDS, chat, get

pytest.importorskip("fastapi", reason=NEEDS)

from tempovlm.core.units import now_ms
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


def test_a_loop_knows_what_came_while_it_was_busy() -> None:
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    found: list[float] = []

    async def talk() -> float:
        loop = asyncio.get_running_loop()
        came = asyncio.Event()

        def read() -> None:
            found.append(ready_since_ms(loop))
            loop.remove_reader(ours)
            came.set()

        loop.add_reader(ours, read)
        await asyncio.sleep(0)
        busy_ms = now_ms()
        theirs.send(b"x")
        while now_ms() < busy_ms + 5.0:
            pass
        await came.wait()
        return busy_ms

    with asyncio.Runner(loop_factory=WatchedLoop) as runner:
        busy_ms = runner.run(talk())
    assert found[0] <= busy_ms
    ours.close()
    theirs.close()


def test_a_loop_that_does_not_know_says_now() -> None:
    before_ms = now_ms()
    assert ready_since_ms(object()) >= before_ms


def test_time_in_the_socket_counts_for_the_budget(app: Any) -> None:
    assert chat(app, latency_budget_ms=60_000).status == 200
    kept = app.__call__

    async def late(scope: Any, receive: Any, send: Any) -> None:
        scope["state"] = {CAME: now_ms() - 70_000.0}
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
