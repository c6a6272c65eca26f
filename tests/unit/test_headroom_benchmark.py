"""The headroom of kinds of questions, on tables whose best settings are known."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np
import pandas as pd
import pytest

from tempovlm.core.errors import UserError
from tempovlm.core.knobs import KnobSpace
from tempovlm.lab.table import Table
from tempovlm.model.config import POCKET

SPACE = KnobSpace.for_model(POCKET.shape)


@pytest.fixture
def headroom(monkeypatch: pytest.MonkeyPatch, repo_root: Path) -> ModuleType:
    monkeypatch.syspath_prepend(str(repo_root / "benchmarks"))
    import headroom

    return headroom


def table(kinds: list[str], best: dict[str, int]) -> Table:
    """Questions that only the best setting of their kind answers, beside setting 0, which half of them need."""
    accuracy = np.zeros((len(kinds), len(SPACE)))
    for row, kind in enumerate(kinds):
        accuracy[row, best[kind]] = 1.0
        accuracy[row, 0] = row // 2 % 2
    return Table.of(SPACE, accuracy, np.arange(len(SPACE), dtype=float))


def test_each_kind_gets_its_own_setting_within_the_budget(headroom: ModuleType) -> None:
    kinds = ["a", "b"] * 100
    one = table(kinds, {"a": 3, "b": 7})
    names = np.array(kinds)
    upper_ms = np.arange(len(SPACE), dtype=float)
    row = headroom.row_of(one, one, (names, names), 10.0, upper_ms)
    assert row["settings"] == 11
    assert row["accuracy_by_kind"] == pytest.approx(100)
    assert row["accuracy_single"] == pytest.approx(50)
    assert row["headroom"] == pytest.approx(50)
    assert row["interval"][0] > 30
    assert row["chosen"] == {"a": str(SPACE.settings[3]), "b": str(SPACE.settings[7])}
    tight = headroom.row_of(one, one, (names, names), 2.0, upper_ms)
    assert tight["headroom"] == pytest.approx(0)
    assert tight["single"] == str(SPACE.settings[0])


def test_choices_are_made_on_training_questions(headroom: ModuleType) -> None:
    kinds = ["a", "b"] * 100
    names, upper_ms = np.array(kinds), np.arange(len(SPACE), dtype=float)
    train, test = table(kinds, {"a": 3, "b": 7}), table(kinds, {"a": 7, "b": 3})
    row = headroom.row_of(train, test, (names, names), 10.0, upper_ms)
    assert row["accuracy_by_kind"] == pytest.approx(0)
    assert row["headroom"] <= 0
    rare = np.array(["a"] * 199 + ["c"])
    _, chosen = headroom.choose(train, rare, upper_ms <= 10.0)
    assert chosen["c"] != 7, "one question chooses nothing against all others"


def test_data_sets_count_alike(headroom: ModuleType) -> None:
    one = table(["a"] * 4, {"a": 1})
    weights = headroom.weights_of(Table.of(SPACE, one.accuracy, 1.0, dataset=np.array(["x", "x", "x", "y"])))
    assert weights.tolist() == pytest.approx([2 / 3, 2 / 3, 2 / 3, 2])


def test_kinds_are_data_sets_or_templates(headroom: ModuleType) -> None:
    one = table(["a", "a"], {"a": 1})
    frame = pd.DataFrame({"dataset": ["okvqa"] * 2, "question_id": ["q0000", "q0001"], "template": ["s", "t"]})
    assert headroom.kinds_of(frame, one, "dataset").tolist() == ["okvqa", "okvqa"]
    assert headroom.kinds_of(frame, one, "template").tolist() == ["okvqa/s", "okvqa/t"]
    with pytest.raises(UserError, match="questions without a template"):
        headroom.kinds_of(frame.assign(template=""), one, "template")


def test_missing_results_are_told_in_a_line(repo_root: Path, tmp_path: Path) -> None:
    run: Callable[..., subprocess.CompletedProcess[str]] = subprocess.run
    words = [
        sys.executable,
        str(repo_root / "benchmarks" / "headroom.py"),
        "--results_dir",
        str(tmp_path / "none"),
    ]
    done = run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.strip() == f"error: {tmp_path / 'none'}: no such results directory"
