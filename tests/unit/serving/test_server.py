"""The server on a socket: its limits on connections, and its end."""

from __future__ import annotations

import http.client
import json
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from asgi import CHAT, NEEDS, question

pytest.importorskip("uvicorn", reason=NEEDS)

from running import SOON_S, Running
from tempovlm.api import TempoVLM
from tempovlm.core.errors import UserError
from tempovlm.serving import server


@pytest.fixture
def running(app_of: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> Iterator[Running]:
    monkeypatch.setattr(server, "HEADERS_MS", 50.0)
    with Running(app_of(), monkeypatch) as found:
        yield found


def post(client: http.client.HTTPConnection) -> http.client.HTTPResponse:
    client.request("POST", CHAT, json.dumps(question(latency_budget_ms=60_000)))
    return client.getresponse()


def test_a_connection_answers_again_and_again(running: Running) -> None:
    client = running.client()
    for _ in range(2):
        reply = post(client)
        assert (reply.status, json.load(reply)["tempovlm"]["deadline"]) == (200, "met")
        assert reply.getheader("server") is None


@pytest.mark.parametrize("said", [b"", b"POST /v1/chat/completions HTTP/1.1\r\nHost: a\r\nX-"])
def test_slow_headers_are_closed(running: Running, said: bytes) -> None:
    with running.connect() as connection:
        connection.sendall(said)
        assert connection.recv(100) == b""


def test_long_headers_are_refused(running: Running) -> None:
    """CVE-2025-48956: headers of any length were kept."""
    with running.connect() as connection:
        connection.sendall(b"GET /health HTTP/1.1\r\nHost: a\r\nX-Long: " + b"a" * (server.MOST_HEADER_BYTES + 1))
        assert b" 400 " in connection.recv(1000).splitlines()[0]


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


@pytest.mark.parametrize("root_path", ["", "/tempovlm", "/tempovlm/"])
def test_a_path_of_a_proxy_opens_no_lock(
    app_of: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, root_path: str
) -> None:
    with Running(app_of(api_keys=("secret",), root_path=root_path), monkeypatch) as running:
        found = {}
        for path in ("/", "/static/page.js", "/live", "/v1/models", f"{root_path}/v1/models", CHAT):
            client = running.client()
            client.request("POST" if path == CHAT else "GET", path)
            found[path] = client.getresponse().status
            client.close()
    assert (found["/"], found["/static/page.js"]) == (200, 200)
    assert (found["/live"], found["/v1/models"], found[CHAT]) == (401, 401, 401)
    assert found[f"{root_path}/v1/models"] in (401, 404)


def test_a_port_that_is_taken_is_an_error_of_one_line(running: Running) -> None:
    with pytest.raises(UserError, match="--port") as caught:
        server.bind(*running.address)
    assert "\n" not in str(caught.value)
    with pytest.raises(UserError) as caught:
        server.bind("127.0.0.1", 70_000)
    assert caught.value.flagged == "--port 70000: must be from 0 to 65535"
