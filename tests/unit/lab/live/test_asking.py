"""The client and the loops that ask a server, against small servers of the test."""

from __future__ import annotations

import asyncio
import json

import pytest

from tempovlm.core.errors import UserError
from tempovlm.lab.live.asking import open_loop
from tempovlm.lab.live.client import Client, Reply
from tempovlm.lab.live.server import client_of, stamp_of


def test_a_client_keeps_its_connection_until_the_server_closes_it() -> None:
    opened: list[int] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        opened.append(0)
        for _ in range(2):  # then it closes, as a server does whose keep-alive is over
            head = await reader.readuntil(b"\r\n\r\n")
            length = int(head.lower().split(b"content-length: ")[1].split(b"\r\n")[0])
            body = await reader.readexactly(length)
            lines = f"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
            writer.write(lines.encode() + body)
            await writer.drain()
        writer.close()

    async def run() -> list[Reply]:
        server = await asyncio.start_server(serve, "127.0.0.1", 0)
        client = Client("127.0.0.1", server.sockets[0].getsockname()[1])
        found = [await client.post("/", json.dumps({"number": i}).encode()) for i in range(3)]
        client.close()
        server.close()
        return found

    replies = asyncio.run(run())
    assert [(one.status, one.body) for one in replies] == [(200, {"number": i}) for i in range(3)]
    assert all(0 <= one.sent_ms <= one.took_ms for one in replies)
    assert len(opened) == 2


def test_an_open_loop_waits_for_no_answer() -> None:
    """The first answer comes once all three have been asked: a loop that waited for it would never end."""
    asked: list[int] = []

    async def run() -> list[Reply | None]:
        everybody = asyncio.Event()

        async def ask(number: int) -> Reply:
            asked.append(number)
            if number == 2:
                everybody.set()
            await everybody.wait()
            if number == 1:
                raise ConnectionResetError
            return Reply(200, {}, {"number": number}, 1.0, 1.0)

        calls = await asyncio.wait_for(open_loop(ask, [0.0, 1.0, 2.0]), 10)
        assert [call.sent_ms >= due_ms for call, due_ms in zip(calls, (0.0, 1.0, 2.0), strict=True)] == [True] * 3
        return [call.reply for call in calls]

    replies = asyncio.run(run())
    assert asked == [0, 1, 2]
    assert [None if one is None else one.body["number"] for one in replies] == [0, None, 2]


@pytest.mark.parametrize("url", ["127.0.0.1:8000", "https://a:1", "http://", "http://a:b", "http://a/v1"])
def test_a_wrong_url_is_one_line(url: str) -> None:
    with pytest.raises(UserError, match=f"--url {url}: give the address of a server"):
        client_of(url)


def test_a_url_names_host_and_port() -> None:
    client = client_of("http://example.com:8123/")
    assert (client.host, client.port) == ("example.com", 8123)
    assert client_of("http://example.com").port == 80


@pytest.mark.parametrize("core", [-1, 1 << 20])
def test_figures_on_cores_that_are_not_there_are_refused(core: int) -> None:
    with pytest.raises(UserError, match=f"--server_cores {core}: this machine has no such core"):
        stamp_of("pocket", "cpu", (0, core))
