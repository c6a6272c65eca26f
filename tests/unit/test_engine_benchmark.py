"""The engine's benchmark on the pocket, as short as it gets: every row that the issue names, with its floor."""

from __future__ import annotations

import importlib
import json
import math
from pathlib import Path

import pytest

from preloaded import Preloaded

NAMES = (
    "decode_k8_b16_ctx700",
    "decode_k4_b8_ctx700",
    "prefill_t336_k8_b16",
    "prefill_t1250_k8_b16",
    "prefill_t2030_k8_b16",
    "vision_c1",
    "vision_c7",
    "vision_c13",
    "preprocess_1080p_high",
    "answer_1080p_high_k8_b16_n10",
    "answer_low_k4_b8_n3",
    "setting_low_k4_b8",
    "setting_high_k8_b16",
    "setting_high_k12_b16",
)


def test_quick_run_on_the_pocket(repo_root: Path, tmp_path: Path, preloaded: Preloaded) -> None:
    script, out = repo_root / "benchmarks" / "engine.py", tmp_path / "engine.json"
    words = ["--model", "pocket", "--device", "cpu", "--quick", "--random-weights", "--json", str(out)]
    done = preloaded.run(script, *words, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    record = json.loads(out.read_text())
    assert record["stamp"]["weights"] == "random"
    assert tuple(row["name"] for row in record["rows"]) == NAMES
    for row in record["rows"]:
        if row["ms_median"] is None:
            assert "context" in row["reason"]
            continue
        assert row["ms_p10"] <= row["ms_median"] <= row["ms_p90"]
        assert row["floor_ms"] >= 0
        assert (row["bytes"] > 0) == (row["name"] != "preprocess_1080p_high")
    first = record["rows"][0]
    assert {"eager", "loop"} <= first["peers"].keys()
    tokens = {row["name"]: row["tokens"] for row in record["rows"] if "tokens" in row}
    assert tokens["answer_1080p_high_k8_b16_n10"] == 10
    assert tokens["answer_low_k4_b8_n3"] == 3
    for name in NAMES:
        assert name in done.stdout


def test_rows_that_time_leaves_out_say_so(repo_root: Path, tmp_path: Path, preloaded: Preloaded) -> None:
    script, out = repo_root / "benchmarks" / "engine.py", tmp_path / "engine.json"
    words = ["--device", "cpu", "--quick", "--random-weights", "--peers", "--max_minutes", "0", "--json", str(out)]
    done = preloaded.run(script, *words, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    record = json.loads(out.read_text())
    assert tuple(row["name"] for row in record["rows"]) == NAMES
    assert all("--max_minutes" in row["reason"] for row in record["rows"])
    assert record["failures"] == []
    assert record["transformers"]["note"]


def test_a_row_that_fails_leaves_the_others(repo_root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(repo_root / "benchmarks"))
    bench = object.__new__(importlib.import_module("engine_rows").Bench)
    bench.end_ms, bench.rows = math.inf, []

    def half() -> None:
        bench.add("kept", [1.0, 2.0, 3.0], {"floor_ms": 0.5})
        raise RuntimeError("no\nroom")

    bench.attempt(["kept", "lost"], half)
    kept, lost = bench.rows
    assert kept["ms_median"] == pytest.approx(2.0)
    assert kept["failure"] == lost["reason"] == "failed: RuntimeError: no room"
    assert bench.failures == ["kept", "lost"]


def test_other_models_have_no_weights_of_their_own(repo_root: Path, tmp_path: Path, preloaded: Preloaded) -> None:
    script = repo_root / "benchmarks" / "engine.py"
    done = preloaded.run(script, "--model", "molmoe-1b", cwd=tmp_path)
    assert done.returncode == 2
    assert "--random-weights" in done.stderr
