"""The outermost layer: starts a request's clock, names it, checks its key, and writes the access log."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import json
import logging
import re
import uuid
from collections.abc import Awaitable, Callable, Mapping, MutableMapping, Sequence
from typing import Any

from starlette.responses import JSONResponse

from tempovlm.core.checks import shown
from tempovlm.core.request import Answer
from tempovlm.core.units import now_ms
from tempovlm.serving.errors import ApiError, later
from tempovlm.serving.intake.asks import Ask
from tempovlm.serving.intake.body import Receive, discard
from tempovlm.serving.options import Options

ARRIVED, OWNER, REQUEST_ID, HEADERS = "arrived_ms", "owner", "request_id", "headers"
ASK, ANSWER, CODE, ENDED, CAME, WAITED = "ask", "answer", "code", "ended_ms", "came_ms", "waited_ms"
"""Names in a request's state: set here are the first four, and by those who answer it the others;
`CAME` is set before by the protocol, which knows when the headers came, and `WAITED` by whoever has kept the
request, in this process."""

OPEN = ("/health", "/ready", "/version", "/metrics", "/openapi.json", "/")
"""Paths that need no key, as the page's files; every other one does, known or not."""

_NAME = re.compile(r"[\w.:/+=-]{1,128}", re.ASCII)

Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
App = Callable[[MutableMapping[str, Any], Receive, Send], Awaitable[None]]

_log, _server_log = logging.getLogger("tempovlm.access"), logging.getLogger("tempovlm.serving")


def error_response(error: ApiError) -> JSONResponse:
    """Return an error as a response."""
    return JSONResponse(error.body(), error.status, error.headers)


def headers_of(scope: Mapping[str, Any]) -> dict[str, str]:
    """Return the headers by their names in small letters; of several with one name the first."""
    found: dict[str, str] = {}
    for name, value in scope["headers"]:
        found.setdefault(name.decode("latin-1").lower(), value.decode("latin-1"))
    return found


class Keys:
    """The keys that are let in, compared in constant time."""

    def __init__(self, keys: Sequence[str]) -> None:
        self._digests = [_digest(key) for key in keys]

    def owner(self, headers: Mapping[str, str]) -> str | None:
        """Return the number of a request's key, empty where none is needed; None for a wrong one."""
        if not self._digests:
            return ""
        kind, _, key = headers.get("authorization", "").partition(" ")
        given = _digest(key.strip() if kind.lower() == "bearer" else "")
        same = [hmac.compare_digest(given, one) for one in self._digests]  # all of them, whichever is right
        return str(same.index(True)) if any(same) else None


def _path(scope: Mapping[str, Any]) -> str:
    """Return the path below the one under which a proxy shows the server."""
    path: str = scope["path"]
    return path.removeprefix(scope.get("root_path", ""))


def is_open(path: str) -> bool:
    """Whether a path needs no key."""
    return path in OPEN or path.startswith("/static/")


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode()).digest()


class Gate:
    """ASGI middleware around everything that is served."""

    def __init__(
        self, app: App, options: Options, refused: Callable[[str], None], out: Callable[[float], None]
    ) -> None:
        """Wrap an app; `refused` gets the codes of errors, `out` the time from an answer's end to its reply's."""
        self._app, self._options, self._refused, self._out = app, options, refused, out
        self._keys = Keys(options.api_keys)

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        """Pass a request on, or refuse it before its body is read."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers, state = headers_of(scope), scope.setdefault("state", {})
        given = headers.get("x-request-id", "")
        state[ARRIVED] = state.get(CAME, now_ms()) - state.get(WAITED, 0.0)
        state[REQUEST_ID] = given if _NAME.fullmatch(given) else uuid.uuid4().hex
        state[OWNER], state[HEADERS] = self._keys.owner(headers), headers
        exchange = _Exchange(scope, headers, receive, send)
        try:
            if state[OWNER] is None and not is_open(_path(scope)):
                error = ApiError(401, "invalid_api_key", "the key in the header Authorization is missing or wrong")
                state[CODE] = error.code
                await error_response(error)(scope, exchange.receive, exchange.send)
            else:
                await self._app(scope, exchange.receive, exchange.send)
        except asyncio.CancelledError:  # the server ends, and waits no longer
            await self._end(scope, exchange)
        except Exception as failure:  # noqa: BLE001 - whatever it is, the client is told
            await self._fail(scope, exchange, failure)
        finally:
            if CODE in state:
                self._refused(state[CODE])
            elif ENDED in state:
                self._out(now_ms() - state[ENDED])
            self._write(scope, exchange.status)
            state.pop(ASK, None)  # an idle connection keeps the state of its last request, and would its picture

    async def _end(self, scope: MutableMapping[str, Any], exchange: _Exchange) -> None:
        """Tell a client that has no response yet that the server ends.

        Raises:
            CancelledError: part of the response is on its way; its connection closes.
        """
        if exchange.has_begun:
            raise asyncio.CancelledError
        error = later(503, "draining", "this server ends; ask another one", 0.0, closes=True)
        scope["state"][CODE] = error.code
        exchange.forget_body()
        await error_response(error)(scope, exchange.receive, exchange.send)

    async def _fail(self, scope: MutableMapping[str, Any], exchange: _Exchange, failure: Exception) -> None:
        """Tell a client that has no response yet that the server failed; the cause goes to the log alone.

        Raises:
            Exception: part of the response is on its way; its connection closes.
        """
        error = ApiError(500, "internal_error", "the server failed")
        scope["state"][CODE] = error.code
        if exchange.has_begun:
            raise failure
        _server_log.error("%s: the server failed", scope["state"][REQUEST_ID], exc_info=failure)
        await error_response(error)(scope, exchange.receive, exchange.send)

    def _write(self, scope: Mapping[str, Any], status: int) -> None:
        if not _log.isEnabledFor(logging.INFO):
            return
        record = access_record(scope, status)
        if self._options.log_json:
            line = json.dumps(record)
        else:
            line = " ".join(f"{name}={_plain(value)}" for name, value in record.items() if value is not None)
        _log.info("%s", line, extra={"access": record})


class _Exchange:
    """One request and its response: names the response; lets a client that is refused end its sending."""

    def __init__(self, scope: Mapping[str, Any], headers: Mapping[str, str], receive: Receive, send: Send) -> None:
        self.status, self.has_begun = 499, False  # as proxies call it: the client left before there was a response
        self._receive, self._send = receive, send
        self._name = ("x-request-id", scope["state"][REQUEST_ID])
        self._has_body = scope["method"] not in ("GET", "HEAD", "OPTIONS") and "expect" not in headers

    def forget_body(self) -> None:
        """Wait no more for the rest of the client's body."""
        self._has_body = False

    async def receive(self) -> MutableMapping[str, Any]:
        """Return the next message of the client."""
        message = await self._receive()
        self._has_body = self._has_body and message["type"] == "http.request" and message.get("more_body", False)
        return message

    async def send(self, message: MutableMapping[str, Any]) -> None:
        """Send a message to the client."""
        if message["type"] == "http.response.start":
            self.status, self.has_begun = message["status"], True
            name, value = self._name
            message["headers"] = [*message.get("headers", ()), (name.encode(), value.encode())]
            self._has_body = self._has_body and self.status != 408
        elif self._has_body and self.status >= 400 and not message.get("more_body", False):
            await self._send({**message, "more_body": True})
            await discard(self.receive)
            message = {"type": "http.response.body", "body": b""}
        await self._send(message)


def access_record(scope: Mapping[str, Any], status: int) -> dict[str, Any]:
    """Return a request's line in the access log, as an object; texts of users are left out."""
    state = scope["state"]
    ask: Ask | None = state.get(ASK)
    answer: Answer | None = state.get(ANSWER)
    record: dict[str, Any] = {
        "request_id": state[REQUEST_ID],
        "method": scope["method"],
        "path": _visible(shown(scope["path"])),
        "status": status,
        "code": state.get(CODE),
        "took_ms": round(now_ms() - state[ARRIVED], 3),
    }
    if ask is not None:
        record |= {"model": ask.model, "budget_ms": ask.budget.budget_ms, "budget_from": ask.budget.source or None}
    if answer is not None:
        record |= {
            "setting": str(answer.knobs),
            "verdict": answer.outcome,
            "stages_ms": {name: round(value, 1) for name, value in answer.timings_ms.items() if name != "total"},
            "tokens": answer.num_output_tokens,
        }
    return record


def _visible(text: str) -> str:
    """Return a text with its control characters escaped, which could else write lines of their own in a log."""
    return text if text.isprintable() else text.encode("unicode_escape").decode()


def _plain(value: Any) -> str:
    if isinstance(value, dict):
        return ",".join(f"{name}:{one:g}" for name, one in value.items())
    text = _visible(f"{value:g}" if isinstance(value, float) else str(value))
    return json.dumps(text) if " " in text else text
