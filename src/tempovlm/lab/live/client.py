"""A light HTTP client: one process, kept connections, times by the client's clock."""

from __future__ import annotations

import asyncio
import json
from dataclasses import dataclass, field
from typing import Any

from tempovlm.core.units import now_ms


@dataclass(frozen=True, slots=True)
class Reply:
    """A whole response.

    Attributes:
        status: of HTTP. headers: by their names in small letters. body: parsed, empty if it is no JSON.
        took_ms: from the first byte sent to the last one read. sent_ms: from the last byte sent.
    """

    status: int
    headers: dict[str, str]
    body: dict[str, Any]
    took_ms: float
    sent_ms: float


@dataclass(slots=True)
class Client:
    """Asks one server; an idle connection is used again, and one is opened where there is none."""

    host: str
    port: int
    _idle: list[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = field(default_factory=list)

    async def post(self, path: str, body: bytes, headers: dict[str, str] | None = None) -> Reply:
        """Send a JSON body and read the response.

        Raises:
            ConnectionError: the server closed a new connection.
        """
        begin_ms = now_ms()
        lines = [
            f"POST {path} HTTP/1.1",
            f"Host: {self.host}:{self.port}",
            "Content-Type: application/json",
            f"Content-Length: {len(body)}",
            *(f"{name}: {value}" for name, value in (headers or {}).items()),
        ]
        while True:
            is_kept = bool(self._idle)
            reader, writer = self._idle.pop() if is_kept else await asyncio.open_connection(self.host, self.port)
            try:
                writer.write("\r\n".join(lines).encode() + b"\r\n\r\n" + body)
                await writer.drain()
                sent_ms = now_ms()
                status, found, payload = await self._read(reader)
            except (ConnectionError, asyncio.IncompleteReadError):
                writer.close()
                if is_kept:  # the server closed it while it was idle
                    continue
                raise ConnectionError(f"{self.host}:{self.port} closed the connection") from None
            break
        end_ms = now_ms()
        if found.get("connection") == "close":
            writer.close()
        else:
            self._idle.append((reader, writer))
        is_json = found.get("content-type", "").startswith("application/json")
        parsed = json.loads(payload) if is_json else {}
        return Reply(status, found, parsed, end_ms - begin_ms, end_ms - sent_ms)

    @staticmethod
    async def _read(reader: asyncio.StreamReader) -> tuple[int, dict[str, str], bytes]:
        head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
        pairs = (line.split(":", 1) for line in head[1:] if ":" in line)
        headers = {name.lower(): value.strip() for name, value in pairs}
        payload = await reader.readexactly(int(headers.get("content-length", 0)))
        return int(head[0].split(" ", 2)[1]), headers, payload

    def close(self) -> None:
        """Close all connections."""
        for _, writer in self._idle:
            writer.close()
        self._idle.clear()
