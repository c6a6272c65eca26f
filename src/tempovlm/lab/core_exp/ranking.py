"""Read the ranking of the blocks: from a file of block importances in any known form, or from results."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from tempovlm.core.errors import UserError
from tempovlm.core.knobs import KnobSpace
from tempovlm.core.paths import read_json
from tempovlm.core.plan import Ranking
from tempovlm.lab.core_exp.questions import MANIFEST, read_manifest
from tempovlm.model.weights import read_config

SCORE_KEYS = ("merged_scores", "merged", "train_scores", "importance_scores", "scores")
"""Names of the field with the scores, in order of preference; without one the object itself is the scores."""


def read_ranking(path: Path, num_blocks: int) -> Ranking:
    """Read the blocks by importance.

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
    record = read_json(path, "give --importance_scores_file a file that Exp 6 writes")
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


def stored_ranking(folder: Path) -> Ranking | None:
    """Read the ranking by which a results directory ran; None if unknown.

    Raises:
        UserError: its manifest is damaged.
    """
    record = read_manifest(folder)
    try:
        return None if record is None else Ranking(tuple(record["ranking"]))
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{folder / MANIFEST}: half-written or damaged, field ranking ({error!r})") from None


def ranking_of(folders: Iterable[Path], scores: Path | None, model: Path) -> tuple[Ranking, KnobSpace]:
    """Find the ranking by which some results ran, and the knob space of their model.

    Args:
        folders: results directories; those in the older layout do not say.
        scores: file of importances that the ranking must match; None takes the directories' ranking.
        model: folder of the model.

    Raises:
        UserError: the directories used another ranking than the file's, several, or none is known.
    """
    shape = read_config(model).shape
    found = None if scores is None else read_ranking(scores, shape.num_blocks)
    for folder in folders:
        if not folder.is_dir():
            raise UserError(f"--results_dir {folder}: no such results directory")
        ranking = stored_ranking(folder)
        if ranking is not None and found is not None and ranking != found:
            other = scores or "the other results directory"
            raise UserError(
                f"{folder / MANIFEST}: field ranking is not that of {other}: other blocks ran; measure anew"
            )
        found = ranking or found
    if found is None:
        raise UserError("--importance_scores_file: needed, because the results do not tell which blocks ran")
    return found, KnobSpace.for_model(shape)
