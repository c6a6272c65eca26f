"""The headroom of kinds of questions, on tables whose best settings are known."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import numpy as np
import pandas as pd
import pytest

from preloaded import Preloaded
from tempovlm.core.errors import UserError
from tempovlm.core.knobs import KnobSpace
from tempovlm.lab.judge.headroom import Scored, budgets_up_to, headroom_at
from tempovlm.lab.table import Table
from tempovlm.model.config import POCKET

SPACE = KnobSpace.for_model(POCKET.shape)


@pytest.fixture
def headroom(monkeypatch: pytest.MonkeyPatch, repo_root: Path) -> ModuleType:
    monkeypatch.syspath_prepend(str(repo_root / "benchmarks"))
    import headroom

    return headroom


def scored(kinds: list[str], best: dict[str, int]) -> Scored:
    """Questions that only the best setting of their kind answers, beside setting 0, which answers half of them."""
    accuracy = np.zeros((len(kinds), len(SPACE)))
    for row, kind in enumerate(kinds):
        accuracy[row, best[kind]] = 1.0
        accuracy[row, 0] = row // 2 % 2
    return Scored(accuracy, np.full(len(kinds), "okvqa"), np.array(kinds))


UPPER_MS = np.arange(len(SPACE), dtype=float)
BOTH = ["a", "b"] * 100
NUMBERS = [str(number) for number in range(len(BOTH))]


def test_each_kind_gets_its_own_setting_within_the_budget(headroom: ModuleType) -> None:
    one = scored(BOTH, {"a": 3, "b": 7})
    row = headroom.row_of(one, one, NUMBERS, SPACE, 10.0, UPPER_MS)
    assert row["settings"] == 11
    assert row["accuracy_by_kind"] == pytest.approx(100)
    assert row["accuracy_single"] == pytest.approx(50)
    assert row["headroom"] == pytest.approx(50)
    assert row["interval"][0] > 30
    assert row["chosen"] == {"a": str(SPACE.settings[3]), "b": str(SPACE.settings[7])}
    tight = headroom.row_of(one, one, NUMBERS, SPACE, 2.0, UPPER_MS)
    assert tight["headroom"] == pytest.approx(0)
    assert tight["single"] == str(SPACE.settings[0])


def test_choices_are_made_on_training_questions() -> None:
    train, test = scored(BOTH, {"a": 3, "b": 7}), scored(BOTH, {"a": 7, "b": 3})
    found = headroom_at(train, test, UPPER_MS <= 10.0)
    assert test.mean(found.settings) == pytest.approx(0)
    assert found.gains.mean() == pytest.approx(-50)
    rare = Scored(train.accuracy, train.datasets, np.array(["a"] * 199 + ["c"]))
    assert headroom_at(rare, test, UPPER_MS <= 10.0).chosen["c"] != 7, "one question chooses nothing against all"


def test_data_sets_count_alike() -> None:
    one = Scored(np.array([[1.0], [1.0], [0.0], [0.0]]), np.array(["x", "x", "x", "y"]), np.array(["k"] * 4))
    assert one.weights.tolist() == pytest.approx([2 / 3, 2 / 3, 2 / 3, 2])
    assert one.mean(0) == pytest.approx(100 / 3)


def test_budgets_end_at_the_native_setting() -> None:
    budgets = budgets_up_to(np.arange(101.0), 50.0)
    assert budgets == pytest.approx([5, 15, 25, 35, 45])


def test_kinds_are_data_sets_or_templates(headroom: ModuleType) -> None:
    one = Table.of(SPACE, np.zeros((2, len(SPACE))), UPPER_MS)
    frame = pd.DataFrame({"dataset": ["okvqa"] * 2, "question_id": ["q0000", "q0001"], "template": ["s", "t"]})
    assert headroom.kinds_of(frame, one, "dataset").tolist() == ["okvqa", "okvqa"]
    assert headroom.kinds_of(frame, one, "template").tolist() == ["okvqa/s", "okvqa/t"]
    with pytest.raises(UserError, match="questions without a template"):
        headroom.kinds_of(frame.assign(template=""), one, "template")


def test_missing_results_are_told_in_a_line(repo_root: Path, tmp_path: Path, preloaded: Preloaded) -> None:
    words = "--results_dir", tmp_path / "none"
    done = preloaded.run(repo_root / "benchmarks" / "headroom.py", *words, cwd=tmp_path)
    assert done.returncode == 1
    assert done.stderr.strip() == f"error: {tmp_path / 'none'}: no such results directory"
