"""Rankings of the blocks: every form of a file, and every wrong one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tempovlm.core.errors import UserError
from tempovlm.core.plan import Ranking, find_ranking, read_ranking


@pytest.mark.parametrize(
    ("record", "order"),
    [
        ([3, 0, 2, 1], (3, 0, 2, 1)),
        ([2, 1], (0, 3, 2, 1)),
        ({"0": 0.5, "1": 0.1, "2": 0.3, "3": 0.9}, (3, 0, 2, 1)),
        ({"1": 0.1, "2": 0.3}, (0, 3, 2, 1)),
        ({"ranking": [3, 0, 1, 2]}, (3, 0, 1, 2)),
        ({"merged_scores": {"1": 0.1, "2": 0.3}, "ranking": [3, 0, 1, 2]}, (3, 0, 1, 2)),
        ({"merged_scores": {"1": 0.1, "2": 0.3}, "train_scores": {"1": 9, "2": 3}}, (0, 3, 2, 1)),
        ({"train_scores": {"1": 9, "2": 3}, "validation_scores": {"1": 1, "2": 3}}, (0, 3, 1, 2)),
        ({"importance_scores": {"1": 0.2, "2": 0.2}, "baseline_accuracy": 0.7}, (0, 3, 1, 2)),
    ],
)
def test_every_form_of_a_file(record: Any, order: tuple[int, ...], tmp_path: Path) -> None:
    path = tmp_path / "scores.json"
    path.write_text(json.dumps(record))
    assert read_ranking(path, 4).order == order
    assert find_ranking(str(path), 4) == find_ranking(path, 4) == Ranking(order)


def test_blocks_by_themselves() -> None:
    for given in ([2, 1], (2, 1), np.array([2, 1]), Ranking((0, 3, 2, 1))):
        assert find_ranking(given, 4) == Ranking((0, 3, 2, 1))  # type: ignore[arg-type]
    for wrong in (5, None, {"1": 2}):
        with pytest.raises(UserError, match=r"ranking .*: give blocks, the most important first, or the path"):
            find_ranking(wrong, 4)  # type: ignore[arg-type]
    with pytest.raises(UserError, match="ranking: block 1 stands at places 1 and 3"):
        find_ranking([1, 2, 1], 4)


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("{", "not valid JSON .* give a JSON list of blocks"),
        ("[]", "block 1 is missing; name each of the model's 4 blocks once"),
        ("{}", "holds no ranking"),
        ("3", "holds no ranking"),
        ('{"0": 1, "2": 1, "3": 1}', "block 1 is missing"),
        ('{"4": 1}', "'4' is no block; expected 0 to 3"),
        ('{"01": 1}', "'01' is no block"),
        ('{"1": 1, "1": 2}', "field '1' stands there twice"),
        ('{"merged_scores": {"1": "high"}}', "field merged_scores: the score of block 1 is 'high'"),
        ('{"1": NaN, "2": 1}', "not a finite number"),
        ('{"ranking": [0, 0, 1, 2]}', "field ranking: block 0 stands at places 1 and 2; name it once"),
        ("[0, 1, 4, 2]", "4 at place 3 is no block of this model; expected 0 to 3"),
        ("[0, -1, 1, 2]", "-1 at place 2 is no block"),
        ('[0, "1", 2]', "'1' at place 2 is no block"),
        ("[0, 1.0, 2]", "1.0 at place 2 is no block"),
    ],
)
def test_a_wrong_file_is_told_with_the_place(text: str, named: str, tmp_path: Path) -> None:
    path = tmp_path / "scores.json"
    path.write_text(text)
    with pytest.raises(UserError, match=named) as told:
        read_ranking(path, 4)
    assert str(told.value).startswith(f"{path}: ")
    with pytest.raises(UserError, match=r"absent\.json: missing; give a JSON list of blocks"):
        read_ranking(tmp_path / "absent.json", 4)
