"""The benchmark of company, as short as it gets, beside itself as the baseline."""

from __future__ import annotations

import importlib
import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

import tiny_model
from company_fakes import PlainRows, company_of
from preloaded import Preloaded
from tempovlm.core.request import Request
from tempovlm.engine.company.company import Company
from tempovlm.engine.company.seats import Seats
from tempovlm.engine.engine import Engine
from tempovlm.latency.profile import LatencyProfile, OutputLength

SCRIPT = Path("benchmarks", "company.py")


def test_random_weights(repo_root: Path, tmp_path: Path, preloaded: Preloaded) -> None:
    words = ["--model", "pocket", "--random_weights", "--device", "cpu", "--names", "cheapest", "--in_flight", "1"]
    done = preloaded.run(repo_root / SCRIPT, *words, "--batches", "--seconds", "0.02", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    record = json.loads(done.stdout)
    assert record["stamp"]["weights"] == "random"
    assert [(row["name"], row["in_flight"]) for row in record["rows"]] == [("cheapest", 1)]
    assert record["rows"][0]["predicted_over_taken"] is None, "nobody is answered among others on a CPU"


def test_rows_beside_a_baseline(repo_root: Path, tiny_folder: Path, tmp_path: Path, preloaded: Preloaded) -> None:
    out = tmp_path / "company.json"
    words = ["--model", str(tiny_folder), "--device", "cpu", "--names", "cheapest", "mixed"]
    words += ["--in_flight", "1", "2", "--batches", "2", "--seconds", "0.02", "--json", str(out)]
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
    assert not any("predicted_over_taken" in row for row in record["baseline"]["rows"])
    assert [(one["name"], one["size"]) for one in record["batches"]] == [("cheapest", 2), ("mixed", 2)]


def test_wrong_flags_are_named(repo_root: Path, tmp_path: Path, preloaded: Preloaded) -> None:
    for words, said in (
        (["--baseline", str(tmp_path)], "no checkout of this repository"),
        (["--random_weights", "--model", "none"], "must be one of"),
    ):
        done = preloaded.run(repo_root / SCRIPT, *words, cwd=tmp_path)
        assert done.returncode == 2
        assert said in done.stderr


@pytest.fixture(scope="module")
def foreseen(repo_root: Path) -> Iterator[ModuleType]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(repo_root / "benchmarks"))
        yield importlib.import_module("company_predictions")


@pytest.fixture
def crowded(engine: Engine) -> Engine:
    """An engine whose company has rows although it is on a CPU."""
    other = Engine(engine.runner.model, engine.runner.tokenizer, name="crowded")
    other.company = Company(other)
    other.company._seats = Seats(PlainRows(other.runner))  # type: ignore[arg-type]
    return other


def profile_of(engine: Engine, scale: float) -> LatencyProfile:
    """Of answers of six tokens that take `scale` times as long as the tiny model is said to take."""
    return tiny_model.shared_profile(engine.space, OutputLength.exactly(6), scale, (0.8, 0.8, 1.2))


def asked_at_once(engine: Engine, predictions: Any, count: int) -> None:
    """Ask from several threads, none of which is answered before the last one waits."""
    company = company_of(engine)
    options: dict[str, Any] = {"question": "stop", "max_new_tokens": 6}
    requests = [Request(images=(tiny_model.picture(i),), **options) for i in range(count)]
    with ThreadPoolExecutor(count) as pool:
        with engine.door.enter(engine.door.line_up(0.0)):
            calls = [pool.submit(predictions.answer, one, engine.space.cheapest) for one in requests]
            while len(company._pending) < count and not any(one.done() for one in calls):
                pass
        assert all(one.result().tokens for one in calls)


@pytest.mark.parametrize(("scale", "is_long"), [(1e5, True), (1e-6, False)])
def test_predictions_among_others_are_compared_with_the_clock(
    foreseen: ModuleType, crowded: Engine, monkeypatch: pytest.MonkeyPatch, scale: float, is_long: bool
) -> None:
    """Said to take far longer, or far shorter, than it takes anywhere; what is learned moves it little."""
    monkeypatch.setattr(type(crowded.door), "strangers", lambda *_: 0)
    predictions = foreseen.Predictions(crowded, profile_of(crowded, scale))
    asked_at_once(crowded, predictions, 4)
    found = predictions.summary()
    assert (found["num"], found["share"]) == (4, pytest.approx(1.0))
    for part in ("at_joining", "after_the_last_joined"):
        of_part = found[part]
        assert of_part["within_bound"] == pytest.approx(float(is_long))
        for name in ("median", "bound"):
            assert 0 < of_part[name]["p10"] <= of_part[name]["p50"] <= of_part[name]["p90"]
            assert (of_part[name]["p10"] > 1) is is_long
        assert of_part["bound"]["p50"] > of_part["median"]["p50"], "one of three bursts was half as slow again"
    assert found["after_the_last_joined"]["calibrated"]["p50"] > 0
    assert (found["learned"]["factor"] < 1) is is_long


def test_nobody_joined_says_nothing(foreseen: ModuleType, crowded: Engine) -> None:
    predictions = foreseen.Predictions(crowded, profile_of(crowded, 1.0))
    assert predictions.answer(Request(images=(), question="stop", max_new_tokens=2), crowded.space.cheapest).tokens
    assert predictions.summary() is None


def test_ratios_are_those_before_the_answer_taught(foreseen: ModuleType) -> None:
    predictions = foreseen.Predictions(SimpleNamespace(space=tiny_model.SPACE), tiny_model.make_profile())
    guard = predictions._guard(tiny_model.SPACE.native)
    guard.observe_among(20.0, 10.0, 1.2)
    assert guard.ratios == {
        "calibrated": [pytest.approx(0.5)],
        "median": [pytest.approx(0.5)],
        "bound": [pytest.approx(0.6)],
    }
    assert guard.crowd.factor > 1
    guard.ratios.clear()
    guard.observe_among(0.0, 10.0, 1.2)
    assert not guard.ratios


def test_a_calibration_for_predictions_is_of_answers_alone_and_together(
    foreseen: ModuleType, engine: Engine, crowded: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured, asked = tiny_model.make_profile().measurements, list[Any]()
    monkeypatch.setattr(foreseen, "measure", lambda *given, **_: asked.append(given[1]) or measured)
    monkeypatch.setattr("tempovlm.engine.calibration.SHARED_BURSTS", 1)
    monkeypatch.setattr("tempovlm.engine.calibration.IN_FLIGHT", (2, 3))
    assert foreseen.calibrated(engine, 3, []) is None
    profile = foreseen.calibrated(crowded, 3, [tiny_model.picture()])
    assert asked == [OutputLength.exactly(3)] == [profile.output]
    assert profile.measurements == measured
    assert [one.in_flight for one in profile.shared] == [2, 3] * 2
