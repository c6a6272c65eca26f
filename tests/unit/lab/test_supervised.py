"""Exp 2: the table that is learned, labels and metrics, resuming, and the seed document's settings."""

from __future__ import annotations

import inspect
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import stamps
import tiny_model
from tempovlm.control.checkpoint import load_controller
from tempovlm.control.learned.networks import SupervisedController
from tempovlm.core.errors import UserError
from tempovlm.lab import exp2_supervised as supervised
from tempovlm.lab.exp2_supervised import Labelled, SupervisedJob
from tempovlm.lab.fit import LAST
from tempovlm.lab.log import LOG
from tempovlm.lab.options import FitOptions
from tempovlm.lab.table import Table

SPACE = tiny_model.SPACE
STAMP = replace(stamps.STAMP, knob_space=SPACE.fingerprint).to_json()
FAST = FitOptions(num_epochs=3, batch_size=32, lr=3e-3, hidden_dim=16)


def records(**changes: Any) -> list[dict[str, Any]]:
    """Every setting; the dearer it is, the better, but for a plateau of the first tier."""
    rows = []
    for i, knobs in enumerate(SPACE):
        total = tiny_model.nominal_ms(SPACE, i)
        accuracy = 0.3 if knobs.tier == "low" else 0.3 + 0.01 * i
        values = {"tier": knobs.tier, "top_k": knobs.top_k, "num_blocks": knobs.num_blocks, "accuracy": accuracy}
        rows.append(
            {**values, "T_total": total, "T_total_p95": total, "num_samples": 10, "stamp": STAMP, **changes}
        )
    return rows


def write(folder: Path, rows: Any) -> Path:
    path = folder / "profiling_results.json"
    folder.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(rows))
    return path


def table() -> Table:
    rows = records()
    accuracy, latency_ms = (np.array([row[name] for row in rows]) for name in ("accuracy", "T_total"))
    return Table.of(SPACE, accuracy[None], latency_ms, stamp=STAMP)


def job(folder: Path, options: FitOptions = FAST, num_budgets: int = 400) -> SupervisedJob:
    path = write(folder / "in", records())
    return SupervisedJob(
        profiling_results=[path], output_dir=folder / "out", options=options, num_budgets=num_budgets
    )


def test_the_seed_documents_settings() -> None:
    options = FitOptions()
    assert (options.batch_size, options.num_epochs, options.lr, options.seed) == pytest.approx((64, 50, 1e-4, 42))
    assert SupervisedJob.__dataclass_fields__["train_split"].default == pytest.approx(0.8)
    assert inspect.signature(Table.split_by_picture).parameters["train_split"].default == pytest.approx(0.8)
    assert inspect.signature(Table.split_by_picture).parameters["seed"].default == 42
    assert SupervisedController().heads == (3, 5, 5)


def test_several_data_sets_are_averaged_by_their_questions(tmp_path: Path) -> None:
    one = write(tmp_path / "a", records(accuracy=0.2, num_samples=30))
    two = write(tmp_path / "b", records(accuracy=0.6, num_samples=10, T_total_p95=100.0))
    found = supervised.read_profile_table([one, two])
    assert found.space == SPACE
    np.testing.assert_allclose(found.accuracy, 0.3)
    assert found.latency_ms[0, 0] == pytest.approx(0.75 * tiny_model.nominal_ms(SPACE, 0) + 25.0)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "no list of settings"),
        (records()[1:], "which its settings do not make|setting low/k2/b3 is missing"),
        (records(accuracy=None), "field accuracy of a setting is missing"),
        (records(T_total_p95=-1.0), "T_total -1.0"),
        (records(accuracy=1.5), "accuracy 1.5"),
        (records(accuracy="high"), "accuracy high"),
        (records(T_total_p95=None), "T_total None"),
        (records(tier=["low"]), r"field tier of a setting is \['low'\]"),
        (records(top_k=2.5), "field top_k of a setting is 2.5"),
        (records(stamp=3), "field stamp of a setting is 3"),
        ([*records(), *records(stamp={**STAMP, "weights": "x"})], "field weights of its stamp"),
    ],
)
def test_bad_tables_are_named(tmp_path: Path, rows: Any, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        supervised.read_profile_table([write(tmp_path, rows)])
    assert "profiling_results.json" in str(caught.value)


def test_a_half_written_file_or_another_machine(tmp_path: Path) -> None:
    path = write(tmp_path / "a", records())
    other = write(tmp_path / "b", records(stamp={**STAMP, "hardware": "another"}))
    with pytest.raises(UserError, match=r"b/profiling_results\.json: field hardware"):
        supervised.read_profile_table([path, other])
    path.write_text(path.read_text()[:100])
    with pytest.raises(UserError, match="not valid JSON"):
        supervised.read_profile_table([path])
    with pytest.raises(UserError, match=r"absent\.json: missing; profiling_with_importance"):
        supervised.read_profile_table([tmp_path / "absent.json"])
    with pytest.raises(UserError, match="--latency_quantile p42"):
        supervised.read_profile_table([other], "p42")


def test_labels_are_indices_of_the_knobs() -> None:
    dearest = table().latency_ms.max()
    rows = Labelled.of(table(), np.array([1.0, dearest]))
    assert rows.knobs[0].tolist() == [0, 0, 0]
    assert rows.knobs[1].tolist() == [len(SPACE.tiers) - 1, len(SPACE.top_ks) - 1, len(SPACE.block_counts) - 1]


def test_metrics_of_a_controller_that_always_says_the_same() -> None:
    net = SupervisedController(8, len(SPACE.tiers), len(SPACE.top_ks), len(SPACE.block_counts))
    with torch.no_grad():
        net.trunk[-1].weight.zero_()
        net.trunk[-1].bias.zero_()
        net.trunk[-1].bias[len(SPACE.tiers) - 1] = 1.0
    cheap = Labelled.of(table(), np.array([5.0, 1000.0]))
    found = supervised.measure(net, table(), cheap)
    assert (found["tier"], found["overall"]) == pytest.approx((0.5, 0.0))
    # As served it runs the cheapest where nothing fits, and the first of the high tier where all do.
    first_high = table().accuracy[0, 2 * len(SPACE) // 3]
    assert found["served"] == pytest.approx(0.5)
    assert found["regret_points"] == pytest.approx(100 * (table().accuracy[0, -1] - first_high) / 2)


def test_it_learns_the_staircase_and_reports(tmp_path: Path) -> None:
    report = supervised.run_job(job(tmp_path, replace(FAST, num_epochs=25), 2000))
    assert report["validation"]["overall"] > 0.7
    assert report["validation"]["regret_points"] < 1.0
    assert sum(row["budgets"] for row in report["by_budget"]) == report["budgets"]["validation"] == 400
    saved = load_controller(tmp_path / "out" / supervised.CHECKPOINT, SPACE, STAMP["weights"])
    rows = Labelled.of(table(), np.geomspace(15, 40, 50))
    net = saved.networks["controller"]
    assert isinstance(net, SupervisedController)
    assert supervised.measure(net, table(), rows)["tier"] > 0.7
    assert "regret" in supervised.render(report)
    assert json.loads((tmp_path / "out" / "report.json").read_text()) == report


def test_a_training_that_diverges_is_told(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"--lr 1e\+30: the training diverged in epoch 1"):
        supervised.run_job(job(tmp_path, replace(FAST, lr=1e30)))
    assert not (tmp_path / "out" / supervised.CHECKPOINT).exists()


def test_an_interrupted_training_ends_as_if_it_had_not_been(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = supervised.run_job(job(tmp_path / "a"))
    calls: list[int] = []
    judge = supervised.BudgetObjective.validate

    def fail_in_the_second(self: supervised.BudgetObjective) -> Any:
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return judge(self)

    with monkeypatch.context() as patch:
        patch.setattr(supervised.BudgetObjective, "validate", fail_in_the_second)
        with pytest.raises(KeyboardInterrupt):
            supervised.run_job(job(tmp_path / "b"))
    assert (tmp_path / "b" / "out" / LAST).is_file()
    again = supervised.run_job(job(tmp_path / "b"))
    assert again["validation"] == whole["validation"]
    logs = [[json.loads(line) for line in (tmp_path / x / "out" / LOG).read_text().splitlines()] for x in "ab"]
    assert logs[0] == logs[1]
    assert [record["epoch"] for record in logs[0]] == [1, 2, 3]


def test_other_options_start_anew(tmp_path: Path) -> None:
    supervised.run_job(job(tmp_path))
    supervised.run_job(job(tmp_path, replace(FAST, num_epochs=1)))
    assert len((tmp_path / "out" / LOG).read_text().splitlines()) == 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lr": 0.0}, "--lr 0.0"),
        ({"lr": float("nan")}, "--lr nan"),
        ({"batch_size": 0}, "--batch_size 0"),
        ({"grad_accum": 0}, "--grad_accum 0"),
        ({"lr_schedule": "linear"}, "--lr_schedule linear"),
    ],
)
def test_wrong_options_are_named(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        supervised.run_job(job(tmp_path, replace(FAST, **changes)))
