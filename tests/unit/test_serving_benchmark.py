"""The benchmark of the server: arrivals, the client, and shares of all requests."""

from __future__ import annotations

import importlib
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
    times_ms = serving.arrivals_ms("poisson", 20.0, 4000)
    assert times_ms == sorted(times_ms)
    assert len(times_ms) / times_ms[-1] * 1000 == pytest.approx(20.0, rel=0.1)
    trace = tmp_path / "trace.csv"
    lines = [f"2023-11-16 18:{i // 60:02}:{i % 60:02}.{i:06}0,1,1" for i in range(200)]
    trace.write_text("TIMESTAMP,ContextTokens,GeneratedTokens\n" + "\n".join(lines) + "\n")
    half_ms = serving.arrivals_ms(str(trace), 5.0, 60)
    assert half_ms[0] == 0
    assert len(half_ms) == 60
    assert len(half_ms) / half_ms[-1] * 1000 == pytest.approx(5.0)
    assert np.diff(half_ms).std() < 10, "even, as the trace"


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


def test_a_missing_trace_is_named(repo_root: Path, tmp_path: Path, preloaded: Preloaded) -> None:
    script = repo_root / "benchmarks" / "serving.py"
    done = preloaded.run(script, "--trace", "none.csv", cwd=tmp_path)
    assert done.returncode == 2
    assert "--trace none.csv: no such file" in done.stderr
