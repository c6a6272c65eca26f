"""The simulated company, as short as it gets, and the benchmark of the real one without a model."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from tempovlm.core.knobs import KnobConfig


@pytest.fixture(scope="module")
def simulated(repo_root: Path) -> Iterator[ModuleType]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(repo_root / "benchmarks"))
        yield importlib.import_module("company_simulated")


def test_a_simulation_repeats(simulated: ModuleType) -> None:
    pocket, world = simulated.Pocket(), simulated.World(slower=1.7)
    rows = [simulated.rows_of(simulated.Bench(pocket, world, seed), 20) for seed in (0, 0, 1)]
    assert rows[0] == rows[1]
    assert rows[0] != rows[2]


@pytest.mark.parametrize(
    ("world", "least"),
    [
        ({}, 0.985),
        ({"slower": 1.7, "pace": 3.0}, 0.97),
        ({"slower": 2.3, "pace": 3.0}, 0.96),
        ({"slower": 2.3, "calibration": 1.7}, 0.96),
    ],
)
def test_the_guard_keeps_budgets_in_company_that_comes_and_goes(
    simulated: ModuleType, world: dict[str, float], least: float
) -> None:
    bench = simulated.Bench(simulated.Pocket(), simulated.World(**world))
    native_ms, met, accuracy = bench.native_ms(), [], []
    for share in (0.8, 1.0, 1.5):
        answers = [bench.ask(share * native_ms) for _ in range(400)]
        met += [bool(a.budget_met) for a in answers]
        accuracy += [bench.pocket.accuracy[a.knobs] for a in answers]
    assert sum(met) / len(met) >= least
    cheapest = bench.pocket.accuracy[bench.pocket.space.cheapest]
    assert sum(accuracy) / len(accuracy) >= cheapest + 0.08, "not by running the cheapest setting all the time"


def test_after_a_burst_the_tier_is_as_before_within_thirty_answers(simulated: ModuleType) -> None:
    pocket = simulated.Pocket()
    bench, burst = simulated.Bench(pocket, simulated.World()), simulated.World(slower=2.0)
    budget_ms = 1.1 * float(bench.guard.budgets_ms()[pocket.space.index(pocket.space.native)])
    usual = {bench.ask(budget_ms).knobs.tier for _ in range(100)}
    alone, bench.machine = bench.machine, simulated.Machine(burst, 1, spell_ms=1e9)
    during = [bench.ask(budget_ms).knobs.tier for _ in range(24)]
    bench.machine = alone
    after = [bench.ask(budget_ms).knobs.tier for _ in range(100)]
    assert usual == {"high"}
    assert set(during[4:]) - usual
    assert set(after[30:]) == usual


@dataclass
class _Answers:
    """Stands in for a model: every answer takes as long as the question's number."""

    asked: list[tuple[float | None, str]] = field(default_factory=list)

    def answer(
        self, _: object, question: str, budget_ms: float | None, *, style: str, knobs: KnobConfig | None
    ) -> Any:
        self.asked.append((budget_ms, style))
        knobs = knobs or KnobConfig(tier="low", top_k=4, num_blocks=8)
        return _Answer({"total": float(question)}, "yes", knobs, float(question) < 15)


@dataclass
class _Answer:
    timings_ms: dict[str, float]
    text: str
    knobs: KnobConfig
    budget_feasible: bool


@dataclass
class _Sample:
    question: str
    image_path: str = "a.png"
    style: str = "vqa2"


@pytest.mark.usefixtures("simulated")
def test_a_row_counts_what_came_late() -> None:
    bench, model = importlib.import_module("company_cpu"), _Answers()
    row = bench.row_of(model, [_Sample("5"), _Sample("10"), _Sample("20")], lambda *_: 0.5, 0, 0.5, 20.0)
    assert model.asked == [(pytest.approx(10.0), "vqa2")] * 3
    assert row["budget_ms"] == pytest.approx(10.0)
    assert (row["num"], row["infeasible"]) == (3, 1)
    assert row["on_time"] == pytest.approx(2 / 3, abs=1e-4)
    assert row["right"] == pytest.approx(0.5)
    assert row["p50_ms"] == pytest.approx(10.0)
    assert row["late_by"] == [pytest.approx(2.0)]
    assert (row["num_beside"], row["late_beside"]) == (0, 0)
    assert row["settings"] == {"low/k4/b8": 3}


@pytest.mark.usefixtures("simulated")
def test_a_row_of_the_cheapest_setting_asks_no_policy() -> None:
    bench, knobs = importlib.import_module("company_cpu"), KnobConfig(tier="high", top_k=8, num_blocks=16)
    row = bench.row_of(_Answers(), [_Sample("5"), _Sample("10")], lambda *_: 0.5, 0, 0.5, 20.0, knobs)
    assert row["settings"] == {"high/k8/b16": 2}


def test_a_run_at_the_cheapest_setting_continues_no_other(repo_root: Path, tmp_path: Path) -> None:
    path, flags = tmp_path / "rows.json", {"model": "pocket", "backend": None, "policy": "auto", "threads": None}
    flags |= {"num_samples": 4, "busy_calibration": 0, "cpus": None}
    for made, given in ((flags, ["--cheapest"]), (flags | {"cheapest": True}, [])):
        path.write_text(json.dumps({"flags": made, "rows": []}))
        command = [sys.executable, str(repo_root / "benchmarks" / "company_cpu.py"), *given]
        command += ["--num_samples", "4", "--json", str(path)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode != 0
        assert f"{path}: made with other flags" in done.stderr
        assert json.loads(path.read_text())["rows"] == []
