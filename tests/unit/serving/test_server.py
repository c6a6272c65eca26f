"""The server on a socket: its limits on connections, and its end."""

from __future__ import annotations

import http.client
import json
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from asgi import CHAT, NEEDS, question

pytest.importorskip("uvicorn", reason=NEEDS)

from tempovlm.api import TempoVLM
from tempovlm.core.errors import UserError
from tempovlm.serving import app as app_module
from tempovlm.serving import server

SOON_S = 10.0
"""Seconds that nothing here takes unless it hangs."""


class Running:
    """A server in a thread, which gets signals by calls."""

    def __init__(self, app: Any, patch: pytest.MonkeyPatch, root_path: str = "") -> None:
        self.started, made = threading.Event(), []

        class Kept(server.Server):
            def __init__(self, *given: Any) -> None:
                super().__init__(*given)
                made.append(self)

            async def startup(self, sockets: Any = None) -> None:
                self.loop = server.asyncio.get_running_loop()
                await super().startup(sockets)

        patch.setattr(server, "Server", Kept)
        patch.setattr(server.sys, "setswitchinterval", lambda _: None)  # of the whole process, as the next
        patch.setattr(server, "share_arenas", lambda: None)
        self._port = server.bind("127.0.0.1", 0)
        self.address = self._port.getsockname()
        started = lambda _: self.started.set()  # noqa: E731 - one line
        self.thread = threading.Thread(target=server.run, args=(app, self._port, started, root_path), daemon=True)
        self.thread.start()
        assert self.started.wait(SOON_S)
        (self.server,) = made

    def signal(self) -> None:
        self.server.loop.call_soon_threadsafe(self.server.handle_exit, signal.SIGTERM, None)

    def connect(self) -> socket.socket:
        return socket.create_connection(self.address, SOON_S)

    def client(self) -> http.client.HTTPConnection:
        return http.client.HTTPConnection(*self.address, timeout=SOON_S)


@pytest.fixture
def running(app_of: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> Iterator[Running]:
    found = Running(app_of(), monkeypatch)
    yield found
    if found.thread.is_alive():
        found.signal()
    found.thread.join()


def post(client: http.client.HTTPConnection) -> http.client.HTTPResponse:
    client.request("POST", CHAT, json.dumps(question(latency_budget_ms=60_000)))
    return client.getresponse()


def test_a_connection_answers_again_and_again(running: Running) -> None:
    client = running.client()
    for _ in range(2):
        reply = post(client)
        assert (reply.status, json.load(reply)["tempovlm"]["deadline"]) == (200, "met")
        assert reply.getheader("server") is None


def test_keys_are_asked_for_below_the_path_of_a_proxy(
    app_of: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    running = Running(app_of(api_keys=("right",)), monkeypatch, "/tempovlm")
    statuses = list[int]()
    for headers in ({}, {"Authorization": "Bearer right"}):
        for path in ("/v1/models", "/health"):
            client = running.client()
            client.request("GET", path, headers=headers)
            statuses.append(client.getresponse().status)
            client.close()
    running.signal()
    running.thread.join()
    assert statuses == [401, 200, 200, 200]
    with pytest.raises(UserError, match="must begin with a slash"):
        server.check_root_path("tempovlm")


@pytest.mark.parametrize("said", [b"", b"POST /v1/chat/completions HTTP/1.1\r\nHost: a\r\nX-"])
def test_slow_headers_are_closed(running: Running, monkeypatch: pytest.MonkeyPatch, said: bytes) -> None:
    monkeypatch.setattr(server, "HEADERS_MS", 20.0)
    with running.connect() as connection:
        connection.sendall(said)
        assert connection.recv(100) == b""


def test_long_headers_are_refused(running: Running) -> None:
    """CVE-2025-48956: headers of any length were kept."""
    with running.connect() as connection:
        connection.sendall(b"GET /health HTTP/1.1\r\nHost: a\r\nX-Long: " + b"a" * (server.MOST_HEADER_BYTES + 1))
        assert b" 400 " in connection.recv(1000).splitlines()[0]


HEAD = b"POST /v1/chat/completions HTTP/1.1\r\nHost: a\r\n"


@pytest.mark.parametrize(
    "said",
    [
        b"what?\r\n\r\n",
        HEAD + b"Content-Length: three\r\n\r\n",
        HEAD + b"Transfer-Encoding: gzip\r\n\r\n",
        HEAD + b"Transfer-Encoding: chunked\r\n\r\nno size\r\n",
    ],
)
def test_what_is_no_http_gets_an_error_of_the_api(running: Running, said: bytes) -> None:
    with running.connect() as connection:
        connection.sendall(said)
        reply = http.client.HTTPResponse(connection)
        reply.begin()
        assert (reply.status, reply.getheader("content-type")) == (400, "application/json")
        error = json.load(reply)["error"]
        assert (error["type"], error["code"], error["param"]) == ("invalid_request_error", "invalid_http", None)
        assert connection.recv(100) == b""


def test_what_is_no_http_amid_a_response_closes_the_connection(
    running: Running, caplog: pytest.LogCaptureFixture
) -> None:
    """The response to an unknown path begins before the body is whole, which then turns out to be none."""
    with running.connect() as connection:
        connection.sendall(b"POST /nowhere HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n")
        received = b""
        while b"not_found" not in received:
            received += connection.recv(1000)
        connection.sendall(b"no size\r\n")
        assert connection.recv(1000) == b""
    assert not [one for one in caplog.records if one.exc_info], "a failure of the protocol is logged as one"


def test_on_a_signal_it_answers_what_it_has_and_ends(
    running: Running, served: TempoVLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    entered, opened, real = threading.Event(), threading.Event(), served.answer

    def answer(*given: Any, **options: Any) -> Any:
        entered.set()
        opened.wait(SOON_S)
        return real(*given, **options)

    monkeypatch.setattr(served, "answer", answer)
    first, second = running.client(), running.client()
    first.request("POST", CHAT, json.dumps(question(latency_budget_ms=60_000)))
    assert entered.wait(SOON_S)
    running.signal()
    refused = post(second)
    assert (refused.status, json.load(refused)["error"]["code"]) == (503, "draining")
    assert running.thread.is_alive()
    opened.set()
    assert first.getresponse().status == 200
    first.close()
    second.close()
    running.thread.join()


def refused(connection: socket.socket) -> None:
    """The connection gets a refusal of the API's own, and is closed."""
    reply = http.client.HTTPResponse(connection)
    reply.begin()
    assert (reply.status, json.load(reply)["error"]["code"]) == (503, "draining")
    assert (reply.getheader("content-type"), reply.getheader("connection")) == ("application/json", "close")


STALLED = b"POST /v1/chat/completions HTTP/1.1\r\nHost: a\r\nContent-Length: 100\r\n\r\n{"


@pytest.mark.parametrize("signals", [1, 2])
def test_who_still_sends_when_the_server_ends_is_told(
    app_of: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, signals: int
) -> None:
    monkeypatch.setattr(server, "GRACE_MS", 100.0 if signals == 1 else 60_000.0)
    running, reading, real = Running(app_of(), monkeypatch), threading.Event(), app_module.read_body
    monkeypatch.setattr(app_module, "read_body", lambda *given: reading.set() or real(*given))
    with running.connect() as connection:
        connection.sendall(STALLED)
        assert reading.wait(SOON_S)
        for _ in range(signals):
            running.signal()
        refused(connection)
    running.thread.join()


def test_who_waits_for_a_measurement_when_the_server_ends_is_told(
    app_of: Callable[..., Any], served: TempoVLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server, "GRACE_MS", 100.0)
    running, entered, opened = (
        Running(app_of(allow_calibrate=True), monkeypatch),
        threading.Event(),
        threading.Event(),
    )
    monkeypatch.setattr(served, "calibrate", lambda **_: entered.set() or opened.wait(SOON_S))
    with running.connect() as connection:
        connection.sendall(b"POST /calibrate HTTP/1.1\r\nHost: a\r\nContent-Length: 0\r\n\r\n")
        assert entered.wait(SOON_S)
        running.signal()
        refused(connection)
        opened.set()
    running.thread.join()


def test_a_port_that_is_taken_is_an_error_of_one_line(running: Running) -> None:
    with pytest.raises(UserError, match="--port") as caught:
        server.bind(*running.address)
    assert "\n" not in str(caught.value)
    with pytest.raises(UserError) as caught:
        server.bind("127.0.0.1", 70_000)
    assert caught.value.flagged == "--port 70000: must be from 0 to 65535"


class Wire:
    """A transport that keeps what is written."""

    def __init__(self) -> None:
        self.writes, self.is_closed = list[bytes](), False

    def write(self, data: bytes) -> None:
        self.writes.append(data)

    def close(self) -> None:
        self.is_closed = True


def test_headers_go_with_the_body_in_one_write() -> None:
    wire, turns, head = Wire(), list[Callable[[], None]](), b"HTTP/1.1 200 OK\r\n\r\n"
    joined: Any = server.Joined(wire, turns.append)
    joined.write(head)
    assert not wire.writes, "the body comes in the same turn"
    joined.write(b"{}")
    joined.write(b"")
    turns.pop()()
    assert wire.writes == [head + b"{}", b""]
    joined.write(b"HTTP/1.1 100 Continue\r\n\r\n")
    assert len(wire.writes) == 3, "a client waits for it before it sends its body"
    joined.write(head)
    turns.pop()()
    assert wire.writes[3:] == [head], "the body of a stream may come later"
    joined.write(head)
    joined.close()
    assert (wire.writes[4:], wire.is_closed) == ([head], True)
