"""The benchmark of the server: what it makes of replies."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

from serving import Reply, overhead, quantile, row_of


def answered(text: str, deadline: str = "met", took_ms: float = 50.0) -> Reply:
    told = {"deadline": deadline, "knobs": {"a": "low", "b": 4}, "timings_ms": {"total": 48.0, "queue": 1.0}}
    return Reply(200, {"choices": [{"message": {"content": text}}], "tempovlm": told}, took_ms)


def test_a_row() -> None:
    refused = Reply(429, {"error": {"code": "queue_full"}}, 2.0)
    replies = [answered("yes"), answered("no"), answered("yes", "cut"), refused]
    row = row_of([None] * 4, replies, lambda _, text: float(text == "yes"))
    assert (row["num"], row["admitted"], row["refused"]) == (4, 3, {"queue_full": 1})
    assert row["on_time"] == pytest.approx(2 / 3, abs=1e-4)
    assert row["right_and_on_time"] == pytest.approx(0.25), "one of four was right and in time"
    assert row["deadlines"] == {"met": 2, "cut": 1}
    assert row["refusal_p99_ms"] == pytest.approx(2.0)
    assert row["settings"] == {"low/4": 3}
    nothing: dict[str, Any] = row_of([None], [refused], lambda *_: 1.0)
    assert (nothing["on_time"], nothing["right_and_on_time"]) == (None, 0)


def test_the_servers_own_time() -> None:
    found = overhead([answered("yes", took_ms=took_ms) for took_ms in (49.0, 50.0, 58.0)])
    assert found == pytest.approx({"p50_ms": 3.0, "p99_ms": 11.0})
    assert quantile([], 0.5) is None
