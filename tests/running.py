"""A server on a socket, in a thread of this process."""

from __future__ import annotations

import http.client
import signal
import socket
import threading
from typing import Any

import pytest

from tempovlm.serving import server

SOON_S = 10.0
"""Seconds that nothing here takes unless it hangs."""


class Running:
    """A server in a thread, which gets signals by calls."""

    def __init__(self, app: Any, patch: pytest.MonkeyPatch) -> None:
        self.started, made = threading.Event(), []

        class Kept(server.Server):
            def __init__(self, *given: Any) -> None:
                super().__init__(*given)
                made.append(self)

            async def startup(self, sockets: Any = None) -> None:
                self.loop = server.asyncio.get_running_loop()
                await super().startup(sockets)

        patch.setattr(server, "Server", Kept)
        self._port = server.bind("127.0.0.1", 0)
        self.address = self._port.getsockname()
        started = lambda _: self.started.set()  # noqa: E731 - one line
        self.thread = threading.Thread(target=server.run, args=(app, self._port, started), daemon=True)
        self.thread.start()
        assert self.started.wait(SOON_S)
        (self.server,) = made

    def signal(self) -> None:
        self.server.loop.call_soon_threadsafe(self.server.handle_exit, signal.SIGTERM, None)

    def connect(self) -> socket.socket:
        return socket.create_connection(self.address, SOON_S)

    def client(self) -> http.client.HTTPConnection:
        return http.client.HTTPConnection(*self.address, timeout=SOON_S)

    def __enter__(self) -> Running:
        return self

    def __exit__(self, *_: object) -> None:
        if self.thread.is_alive():
            self.signal()
        self.thread.join()
