"""Find the ranking of the blocks by which results ran."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from tempovlm.core.errors import UserError
from tempovlm.core.knobs import KnobSpace
from tempovlm.core.paths import expanded
from tempovlm.core.plan import Ranking, read_ranking
from tempovlm.lab.core_exp.questions import MANIFEST, read_manifest
from tempovlm.model.weights import read_config


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
    found = common_ranking(folders, scores, shape.num_blocks)
    if found is None:
        raise UserError("--importance_scores_file: needed, because the results do not tell which blocks ran")
    return found, KnobSpace.for_model(shape)


def common_ranking(folders: Iterable[Path], scores: Path | None, num_blocks: int) -> Ranking | None:
    """Find the ranking by which some results ran; None if neither they nor a file tell.

    Raises:
        UserError: the directories used another ranking than the file's, or several.
    """
    found = None if scores is None else read_ranking(expanded(scores), num_blocks)
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
    return found
