"""Runs an app on uvicorn: closes connections that send slowly, and drains before it ends."""

from __future__ import annotations

import asyncio
import gc
import json
import logging
import signal
import socket
import sys
from collections.abc import Callable
from types import FrameType
from typing import Any

import h11
import uvicorn
from fastapi import FastAPI
from uvicorn.protocols.http.h11_impl import H11Protocol

from tempovlm.core.checks import checked_integer, wrong_argument
from tempovlm.core.errors import UserError
from tempovlm.core.units import s_from_ms
from tempovlm.serving.desk import Desk
from tempovlm.serving.errors import ApiError
from tempovlm.serving.gate import CAME
from tempovlm.serving.intake.pictures import limit_text
from tempovlm.serving.memory import share_arenas
from tempovlm.serving.waits import WatchedLoop, ready_since_ms

HEADERS_MS = 10_000.0
"""The most time for a request's headers, from the connection or from their first byte on."""

IDLE_S = 65
"""Seconds that a connection may be idle: longer than the minute after which usual proxies close theirs."""

MOST_HEADER_BYTES = 1 << 16
MOST_PORT = 65_535
SWITCH_S = 0.0005
"""Time after which a thread of Python lets another one on: by default ten times as long, in which a request would
wait to be read while another one is answered."""

GRACE_MS = 2_000.0
"""Time after the last deadline for a response to be sent."""

_STATUS = tuple(b"HTTP/1.1 %d" % kind for kind in (2, 3, 4, 5))
"""Beginnings of headers that a body follows."""

_log = logging.getLogger("tempovlm.serving")


class Joined:
    """A transport that sends the headers of an answer with its first bytes, in one call to the system.

    Each call takes as long as much of an answer's JSON, and wakes the client.
    """

    def __init__(self, transport: Any, call_soon: Callable[[Callable[[], None]], object]) -> None:
        self._transport, self._call_soon, self._held = transport, call_soon, b""

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)

    def write(self, data: bytes) -> None:
        """Send bytes; headers wait for what follows in this turn of the loop."""
        if not self._held and data.startswith(_STATUS):
            self._held = data
            self._call_soon(self._flush)
            return
        self._held, held = b"", self._held
        self._transport.write(held + data if held else data)

    def close(self) -> None:
        """Close after all that was written."""
        self._flush()
        self._transport.close()

    def _flush(self) -> None:
        if self._held:
            self.write(b"")


class Protocol(H11Protocol):
    """HTTP/1.1 with a limit on the time of a request's headers, which uvicorn lacks; says when these came."""

    _timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        """Begin to wait for headers."""
        joined: Any = Joined(transport, self.loop.call_soon)
        super().connection_made(joined)
        self._watch_headers()

    def data_received(self, data: bytes) -> None:
        """Take bytes; wait for the rest of the headers where they are not whole."""
        if self.conn.their_state in (h11.IDLE, h11.DONE):  # a request may begin in them
            self.app_state = self.app_state | {CAME: ready_since_ms(self.loop)}
        super().data_received(data)
        if self.conn.their_state is not h11.IDLE:
            self._forget()
        elif self._timer is None:
            self._watch_headers()

    def connection_lost(self, exc: Exception | None) -> None:
        """Forget the timer."""
        self._forget()
        super().connection_lost(exc)

    def send_400_response(self, msg: str) -> None:
        """Refuse what is no HTTP in the form of the API's errors, unless a response has begun; then close."""
        if self.conn.our_state not in (h11.IDLE, h11.SEND_RESPONSE):
            self.transport.close()
            return
        body = json.dumps(ApiError(400, "invalid_http", msg).body()).encode()
        size = (b"content-length", str(len(body)).encode())
        headers = [(b"content-type", b"application/json"), size, (b"connection", b"close")]
        begin = h11.Response(status_code=400, headers=headers, reason=b"Bad Request")
        for part in (begin, h11.Data(data=body), h11.EndOfMessage()):
            self.transport.write(self.conn.send(part) or b"")
        self.transport.close()

    def _watch_headers(self) -> None:
        self._timer = self.loop.call_later(s_from_ms(HEADERS_MS), self._close_slow)

    def _forget(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer = None

    def _close_slow(self) -> None:
        self._timer = None
        if self.conn.their_state is h11.IDLE and not self.transport.is_closing():
            self.transport.close()


class Server(uvicorn.Server):
    """On the first signal it refuses new requests and ends when the admitted ones have; a second one ends it."""

    def __init__(self, config: uvicorn.Config, desk: Desk, on_start: Callable[[], None]) -> None:
        super().__init__(config)
        self._desk, self._on_start = desk, on_start
        self._drain: asyncio.Task[None] | None = None
        self._tend: asyncio.Task[None] | None = None

    async def startup(self, sockets: Any = None) -> None:
        """Open the port, and say where."""
        await super().startup(sockets)
        if self.started:
            self._tend = asyncio.create_task(self._desk.tend())
            self._on_start()

    def handle_exit(self, sig: int, _frame: FrameType | None) -> None:
        """Drain, or end at once where that has begun."""
        if self._drain is None:
            self._desk.is_draining = True
            self._drain = asyncio.get_running_loop().create_task(self._end_drained())
            if sig == signal.SIGINT:
                self._captured_signals.append(sig)
        else:
            self.should_exit = self.force_exit = True

    async def _end_drained(self) -> None:
        waiting = len(self._desk.schedule)
        _log.info("ending: %d requests are answered first, new ones are refused", waiting)
        await self._desk.drained(GRACE_MS)
        self.should_exit = True


def bind(host: str, port: int) -> socket.socket:
    """Take a port, which nobody can connect to before the server listens.

    Raises:
        UserError: it is taken, or not of this machine.
    """
    checked_integer("port", port, 0, MOST_PORT)  # the look-up would take a larger one for its remainder
    try:
        kind, way, number, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        found = socket.socket(kind, way, number)
        found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        found.bind(address)
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise UserError(
            f"--host {host} --port {port}: {reason}; choose another port, or 0 for a free one"
        ) from None
    return found


def check_root_path(path: str) -> None:
    """Raise a `UserError` unless the path under which a proxy shows the server is empty or begins with a slash."""
    if path and not path.startswith("/"):
        raise wrong_argument("root_path", path, "must begin with a slash, such as /tempovlm")


def run(app: FastAPI, port: socket.socket, on_start: Callable[[str], None], root_path: str = "") -> None:
    """Serve an app until a signal ends it.

    Args:
        app: with its desk at `app.state.desk`.
        port: bound, and not listened at.
        on_start: called with the address once the port is open.
        root_path: path under which a proxy shows the server, and which it takes off.
    """
    check_root_path(root_path)
    config = uvicorn.Config(
        app,
        http=Protocol,
        loop=f"{WatchedLoop.__module__}:{WatchedLoop.__name__}",
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        root_path=root_path,
        timeout_keep_alive=IDLE_S,
        timeout_graceful_shutdown=int(s_from_ms(GRACE_MS)),
        h11_max_incomplete_event_size=MOST_HEADER_BYTES,
    )
    host, number = port.getsockname()[:2]
    address = f"http://{f'[{host}]' if ':' in host else host}:{number}"
    sys.setswitchinterval(SWITCH_S)
    limit_text()
    gc.collect()
    gc.freeze()  # the model and its libraries live as long as the server; to look through them takes 100 ms
    share_arenas()
    Server(config, app.state.desk, lambda: on_start(address)).run([port])
