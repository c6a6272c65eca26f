"""The benchmark of the server: arrivals, the client, and shares of all requests."""

from __future__ import annotations

import asyncio
import importlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from preloaded import Preloaded
from tempovlm.data.sample import Sample


@pytest.fixture
def serving(repo_root: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(repo_root / "benchmarks"))
    return importlib.import_module("serving")


def sample_of(answer: str) -> Sample:
    fields: dict[str, Any] = {
        "question_id": "1",
        "image_id": "1",
        "image_path": Path("1.png"),
        "question": "what?",
    }
    return Sample(**fields, answers=(answer,) * 10, style="vqa2", dataset="own", split="val")


def test_arrivals_have_the_rate_that_is_asked(serving: Any, tmp_path: Path) -> None:
    times = serving.poisson(20.0, 4000)
    assert times == sorted(times)
    assert len(times) / times[-1] == pytest.approx(20.0, rel=0.1)
    trace = tmp_path / "trace.csv"
    lines = [f"2023-11-16 18:{i // 60:02}:{i % 60:02}.{i:06}0,1,1" for i in range(200)]
    trace.write_text("TIMESTAMP,ContextTokens,GeneratedTokens\n" + "\n".join(lines) + "\n")
    half = serving.traced(trace, 5.0, 60)
    assert half[0] == 0
    assert len(half) == 60
    assert 59 / half[-1] == pytest.approx(5.0)
    assert np.diff(half).std() < 0.01, "even, as the trace"


def test_a_request_counts_once(serving: Any) -> None:
    def reply(status: int, took_ms: float, text: str = "") -> Any:
        body = {"choices": [{"message": {"content": text}}]}
        return serving.Reply(status, {}, body, took_ms, took_ms)

    replies = [
        reply(200, 90, "cat"),
        reply(200, 90, "dog"),
        reply(200, 120, "cat"),
        reply(429, 5),
        reply(429, 50),
        None,
    ]
    found = serving.summary(replies, [sample_of("cat")], 100.0)
    assert found["requests"] == 6
    assert found["right_on_time"] == pytest.approx(1 / 6)
    assert found["on_time_of_admitted"] == pytest.approx(2 / 3)
    assert found["refused"] == pytest.approx(2 / 6)
    assert found["refused_late"] == pytest.approx(1 / 6)
    assert found["failed"] == pytest.approx(1 / 6)


def test_a_client_keeps_its_connection_until_the_server_closes_it(serving: Any) -> None:
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

    async def run() -> list[Any]:
        server = await asyncio.start_server(serve, "127.0.0.1", 0)
        client = serving.Client("127.0.0.1", server.sockets[0].getsockname()[1])
        found = [await client.post("/", json.dumps({"number": i}).encode()) for i in range(3)]
        client.close()
        server.close()
        return found

    replies = asyncio.run(run())
    assert [(one.status, one.body) for one in replies] == [(200, {"number": i}) for i in range(3)]
    assert all(0 <= one.sent_ms <= one.took_ms for one in replies)
    assert len(opened) == 2


def test_a_missing_trace_is_named(repo_root: Path, tmp_path: Path, preloaded: Preloaded) -> None:
    script = repo_root / "benchmarks" / "serving.py"
    done = preloaded.run(script, "--trace", "none.csv", cwd=tmp_path)
    assert done.returncode == 2
    assert "--trace none.csv: no such file" in done.stderr
