"""A server that is killed loses what ran, and nothing else: the next one begins where it began."""

from __future__ import annotations

import http.client
import json
import os
import re
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from asgi import CHAT, NEEDS, question

pytest.importorskip("uvicorn", reason=NEEDS)

STALLED = b"POST /v1/chat/completions HTTP/1.1\r\nHost: a\r\nContent-Length: 100\r\n\r\n{"
SOON_S = 60.0
FEW = ("--tiers", "low", "--top_k", "4")
"""Settings that are measured in a moment."""


@contextmanager
def serving(model: Path, cache: Path) -> Iterator[tuple[subprocess.Popen[str], tuple[str, int], str]]:
    """A server as a process, its address, and its log until it listened."""
    command = [sys.executable, "-m", "tempovlm.cli.main", "serve", "--model", str(model), "--port", "0", *FEW]
    env = os.environ | {"TEMPOVLM_CACHE_DIR": str(cache)}
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=env) as process:
        try:
            assert process.stderr is not None
            log, found = "", None
            while found is None:
                line = process.stderr.readline()
                assert line, log
                log, found = log + line, re.search(r"http://127\.0\.0\.1:(\d+) serves", line)
            yield process, ("127.0.0.1", int(found[1])), log
        finally:
            process.kill()


def status_of(address: tuple[str, int]) -> int:
    """Ask a question."""
    client = http.client.HTTPConnection(*address, timeout=SOON_S)
    client.request("POST", CHAT, json.dumps(question(latency_budget_ms=60_000)))
    status = client.getresponse().status
    client.close()
    return status


def test_a_killed_server_begins_again_as_it_was(tiny_folder: Path, tmp_path: Path) -> None:
    measuring = "measuring what each setting takes"
    with serving(tiny_folder, tmp_path) as (process, address, log):
        assert measuring in log
        assert status_of(address) == 200
        with socket.create_connection(address, SOON_S) as connection:
            connection.sendall(STALLED)
            process.kill()
            with suppress(ConnectionResetError):
                assert connection.recv(100) == b"", "who still sent is told by the connection's end"
    with serving(tiny_folder, tmp_path) as (process, address, log):
        assert measuring not in log
        assert status_of(address) == 200
        process.terminate()
        assert process.wait(SOON_S) == 0
