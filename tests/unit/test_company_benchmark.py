"""The benchmark of company on a pocket of random weights, as short as it gets, beside itself as the baseline."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest


def run(repo_root: Path, *words: str) -> subprocess.CompletedProcess[str]:
    script = repo_root / "benchmarks" / "company.py"
    return subprocess.run([sys.executable, str(script), *words], capture_output=True, text=True, check=False)


def test_rows_beside_a_baseline(repo_root: Path, tmp_path: Path) -> None:
    out = tmp_path / "company.json"
    words = ["--model", "pocket", "--random_weights", "--device", "cpu", "--names", "cheapest", "mixed"]
    words += ["--in_flight", "1", "2", "--batches", "2", "--seconds", "0.1", "--json", str(out)]
    done = run(repo_root, *words, "--baseline", str(repo_root))
    assert done.returncode == 0, done.stderr
    record = json.loads(out.read_text())
    assert record["stamp"]["weights"] == "random"
    assert [(row["name"], row["in_flight"]) for row in record["rows"]] == [
        ("cheapest", 1),
        ("cheapest", 2),
        ("mixed", 1),
        ("mixed", 2),
    ]
    alone = {row["name"]: row["answers_per_s"] for row in record["baseline"]["rows"] if row["in_flight"] == 1}
    for row in record["rows"]:
        assert row["answers_per_s"] > 0
        assert 0 < row["p50_ms"] <= row["p99_ms"] <= row["max_ms"]
        assert row["baseline_answers_per_s"] == pytest.approx(alone[row["name"]])
    assert [(one["name"], one["size"]) for one in record["batches"]] == [("cheapest", 2), ("mixed", 2)]


def test_wrong_flags_are_named(repo_root: Path, tmp_path: Path) -> None:
    for words, said in (
        (["--baseline", str(tmp_path)], "no checkout of this repository"),
        (["--random_weights", "--model", "none"], "must be one of"),
    ):
        done = run(repo_root, *words)
        assert done.returncode == 2
        assert said in done.stderr
