"""Two replicas on a real Ray, one of which is killed: every request gets one reply, an answer or an error."""

from __future__ import annotations

import json
import os
import signal
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from asgi import CHAT, NEEDS, question

pytest.importorskip("fastapi", reason=NEEDS)
pytest.importorskip("ray", reason="a real Ray needs the extra: pip install 'tempovlm[ray]'")

import ray
from ray import serve

from tempovlm.core.errors import UserError
from tempovlm.serving import ray as fleet

PORT, BUDGET_MS, ASKED, AT_ONCE = 8765, 60_000.0, 60, 8
BASE = f"http://127.0.0.1:{PORT}"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Calibrations of the replicas, and the marks that they leave."""
    return tmp_path_factory.mktemp("fleet")


@pytest.fixture(scope="module")
def running(tiny_folder: Path, folder: Path) -> Iterator[None]:
    """Two replicas of the tiny model."""
    variables = {"TEMPOVLM_CACHE_DIR": str(folder), "PYTHONPATH": os.pathsep.join(["src", "tests"])}
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, runtime_env={"env_vars": variables})
    serve.start(http_options={"port": PORT})
    given = {"model": str(tiny_folder), "min_replicas": "2", "max_replicas": "2", "cores": "1"}
    serve.run(fleet.app(given), route_prefix="/")
    yield
    serve.shutdown()
    ray.shutdown()


def ask(path: str = CHAT, headers: dict[str, str] | None = None, **more: Any) -> tuple[int, dict[str, Any]]:
    body = json.dumps(question(**({"latency_budget_ms": BUDGET_MS} | more))).encode()
    request = urllib.request.Request(BASE + path, body, {"Content-Type": "application/json", **(headers or {})})
    try:
        with urllib.request.urlopen(request, timeout=120) as reply:
            return reply.status, json.load(reply)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


def replicas() -> list[int]:
    """The processes of the replicas."""
    found = [
        path for path in Path("/proc").glob("[0-9]*/cmdline") if b"ServeReplica:default:Replica" in _read(path)
    ]
    return [int(path.parent.name) for path in found]


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:
        return b""


@pytest.mark.usefixtures("running")
def test_a_request_passes_the_front_with_its_deadline() -> None:
    status, reply = ask(headers={"x-request-id": "mine"})
    assert (status, reply["tempovlm"]["request_id"]) == (200, "mine")
    assert (reply["tempovlm"]["budget_ms"], reply["tempovlm"]["deadline"]) == (BUDGET_MS, "met")
    status, reply = ask(latency_budget_ms=0.001)
    assert (status, reply["error"]["code"]) == (429, "budget_infeasible")
    status, reply = ask(latency_budget_ms=None, headers={"x-request-timeout-seconds": "30"})
    assert (reply["tempovlm"]["budget_ms"], reply["tempovlm"]["budget_source"]) == (
        30_000,
        "x-request-timeout-seconds",
    )
    with urllib.request.urlopen(BASE + "/v1/models", timeout=60) as found:
        assert json.load(found)["data"]


@pytest.mark.usefixtures("running")
def test_a_stream_passes_piece_by_piece() -> None:
    body = json.dumps(question(stream=True, latency_budget_ms=BUDGET_MS)).encode()
    request = urllib.request.Request(BASE + CHAT, body, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=120) as reply:
        assert reply.headers["content-type"].startswith("text/event-stream")
        lines = [line for line in reply.read().decode().split("\n") if line]
    assert json.loads(lines[-2].removeprefix("data: "))["tempovlm"]["deadline"] == "met"
    assert lines[-1] == "data: [DONE]"


@pytest.mark.usefixtures("running")
def test_a_killed_replica_costs_its_requests_an_error_and_nobody_an_answer() -> None:
    first, *_ = found = replicas()
    assert len(found) == 2
    names, ids = [f"r{number}" for number in range(ASKED)], list[str]()
    done = threading.Semaphore(0)

    def one(name: str) -> tuple[int, dict[str, Any]]:
        reply = ask(headers={"x-request-id": name}, max_tokens=16)
        done.release()
        return reply

    with ThreadPoolExecutor(AT_ONCE) as pool:
        replies = [pool.submit(one, name) for name in names]
        for _ in range(ASKED // 4):
            done.acquire()
        os.kill(first, signal.SIGKILL)
        told = [reply.result() for reply in replies]
    statuses = [status for status, _ in told]
    assert set(statuses) <= {200, 503}
    assert statuses.count(200) >= ASKED - AT_ONCE
    for name, (status, reply) in zip(names, told, strict=True):
        if status == 200:
            assert reply["tempovlm"]["request_id"] == name
            ids.append(reply["id"])
        else:
            assert reply["error"]["code"] == "replica_lost"
    assert len(set(ids)) == len(ids)
    nothing = threading.Event()
    assert any(len(replicas()) == 2 or nothing.wait(0.5) for _ in range(240)), "Ray starts another one"


def test_arguments_are_checked() -> None:
    found = fleet.arguments_of(
        {"model": "pocket", "max_replicas": "4", "default_budget_ms": "300", "api_keys": '["a"]'}
    )
    assert (found.max_replicas, found.options.default_budget_ms, found.options.api_keys) == (4, 300, ("a",))
    for wrong in ({"replicas": "3"}, {"max_replicas": "0"}, {"min_replicas": "2"}, {"max_queue": "none"}):
        with pytest.raises(UserError):
            fleet.arguments_of(wrong)


def test_replicas_follow_the_share_that_fails() -> None:
    assert fleet.wanted({"a": 0.0, "b": 0.1}, 2, 9) == 3
    assert fleet.wanted({"a": 0.0, "b": 0.01}, 2, 0) == 2
    assert fleet.wanted({"a": 0.0, "b": 0.0}, 2, 0) == 1
    assert fleet.wanted({"a": 0.0, "b": 0.0}, 2, 2) == 2
    assert fleet.wanted({}, 1, 0) == 1
