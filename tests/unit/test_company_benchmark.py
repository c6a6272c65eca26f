"""The benchmark of company, as short as it gets, beside itself as the baseline."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from preloaded import Preloaded

SCRIPT = Path("benchmarks", "company.py")


def test_random_weights(repo_root: Path, tmp_path: Path, preloaded: Preloaded) -> None:
    words = ["--model", "pocket", "--random_weights", "--device", "cpu", "--names", "cheapest", "--in_flight", "1"]
    done = preloaded.run(repo_root / SCRIPT, *words, "--batches", "--seconds", "0.1", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    record = json.loads(done.stdout)
    assert record["stamp"]["weights"] == "random"
    assert [(row["name"], row["in_flight"]) for row in record["rows"]] == [("cheapest", 1)]


def test_rows_beside_a_baseline(repo_root: Path, tiny_folder: Path, tmp_path: Path, preloaded: Preloaded) -> None:
    out = tmp_path / "company.json"
    words = ["--model", str(tiny_folder), "--device", "cpu", "--names", "cheapest", "mixed"]
    words += ["--in_flight", "1", "2", "--batches", "2", "--seconds", "0.1", "--json", str(out)]
    done = preloaded.run(repo_root / SCRIPT, *words, "--baseline", repo_root, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    record = json.loads(out.read_text())
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


def test_wrong_flags_are_named(repo_root: Path, tmp_path: Path, preloaded: Preloaded) -> None:
    for words, said in (
        (["--baseline", str(tmp_path)], "no checkout of this repository"),
        (["--random_weights", "--model", "none"], "must be one of"),
    ):
        done = preloaded.run(repo_root / SCRIPT, *words, cwd=tmp_path)
        assert done.returncode == 2
        assert said in done.stderr
