"""Reads a file of block importances in any of the known forms. Knows no model and runs nothing."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tempovlm.core.errors import UserError
from tempovlm.core.plan import Ranking

SCORE_KEYS = ("merged_scores", "merged", "train_scores", "importance_scores", "scores")
"""Where the scores are, the first that is there; otherwise the object itself holds them."""


def read_ranking(path: Path, num_blocks: int) -> Ranking:
    """The blocks by importance.

    A list `ranking` in the file wins, because a joint ranking need not be that of single scores; otherwise blocks
    go by score, ties to the earlier one. The two ends may be left out: they run at every depth.

    Raises:
        UserError: missing, damaged, or of a model with another number of blocks; names file and field.
    """
    record = _read(path)
    order = record.get("ranking")
    if isinstance(order, list) and order and all(type(block) is int for block in order):
        return _ranking(order, num_blocks, f"{path}: field ranking")
    key = next((name for name in SCORE_KEYS if isinstance(record.get(name), Mapping)), None)
    scores = record if key is None else record[key]
    where = f"{path}: field {key}" if key else str(path)
    values = {_block(name, num_blocks, where): _score(name, value, where) for name, value in scores.items()}
    return _ranking(sorted(values, key=lambda block: (-values[block], block)), num_blocks, where)


def _read(path: Path) -> Mapping[str, Any]:
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"--importance_scores_file {path}: no such file; Exp 6 writes one") from None
    except (OSError, ValueError) as error:
        raise UserError(f"--importance_scores_file {path}: damaged or no JSON file ({error})") from None
    if not isinstance(record, Mapping) or not record:
        raise UserError(f"--importance_scores_file {path}: not a JSON object of scores")
    return record


def _block(name: str, num_blocks: int, where: str) -> int:
    if not name.isdigit() or int(name) >= num_blocks:
        raise UserError(f"{where}: {name!r} is no block; expected the numbers 0 to {num_blocks - 1}")
    return int(name)


def _score(name: str, value: Any, where: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise UserError(f"{where}: the score of block {name} is {value!r}, not a finite number")
    return float(value)


def _ranking(order: list[int], num_blocks: int, where: str) -> Ranking:
    ends = [block for block in (0, num_blocks - 1) if block not in order]
    whole = [*ends, *order]
    if sorted(whole) != list(range(num_blocks)):
        raise UserError(f"{where}: must name each of the model's {num_blocks} blocks once, ends may be left out")
    return Ranking(tuple(whole))
