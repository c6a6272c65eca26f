"""Check the rows of a results file; an error names file, row and field in one line.

Works on whole columns, because a results directory may have a million rows.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from tempovlm.core.errors import UserError
from tempovlm.core.knobs import KNOBS, KnobSpace, spell
from tempovlm.core.records import STAGE_FIELDS, TIME_FIELDS

if TYPE_CHECKING:
    import pandas as pd

_NEEDED = tuple(name for name in STAGE_FIELDS.values() if name != "T_preprocess")
"""Fields that every measured row has."""

Problem = tuple[str, "pd.Series[bool]", str]
"""A field, the rows in which it is wrong, and the fault."""


def check_rows(frame: pd.DataFrame, path: Path, dataset: str, space: KnobSpace | None) -> None:
    """Raise a `UserError` for the first invalid row.

    Args:
        frame: the columns of `SweepRow`.
        path: their source, for the message.
        dataset: the data set that they must belong to.
        space: legal settings; None allows all.
    """
    for field, wrong, why in _problems(frame, dataset, space):
        if wrong.any():
            place = int(wrong.to_numpy().argmax())
            row = frame.iloc[place]
            setting = spell(row[name] for name in KNOBS)
            value = row[field]
            where = f"{path}: row {place} (question {row['question_id']}, {setting})"
            raise UserError(f"{where}: field {field} {why}, got {value!s}")


def _problems(frame: pd.DataFrame, dataset: str, space: KnobSpace | None) -> Iterator[Problem]:
    yield "dataset", frame["dataset"] != dataset, f"must be {dataset}, as the file's name says"
    for field in ("question_id", "image_id", *KNOBS):
        yield field, frame[field].isna(), "is missing"
    yield "split", ~frame["split"].isin(("train", "val")), "must be train or val"
    yield "tiling", frame["tiling"].map(_no_tiling), "must be rows and columns of at least 1 each"
    if space is not None:
        for field, legal in space.axes.items():
            choices = ", ".join(map(str, legal))
            yield field, ~frame[field].isin(legal), f"is outside this model's knob space ({choices})"
    yield "accuracy", ~(frame["accuracy"].isna() | frame["accuracy"].between(0, 1)), "must be between 0 and 1"
    yield from _times(frame)
    key = ["split", "question_id", *KNOBS]
    yield "question_id", frame.duplicated(key), "occurs twice at this setting"


def _times(frame: pd.DataFrame) -> Iterator[Problem]:
    for field in TIME_FIELDS:
        yield field, frame[field] < 0, "is a negative time"
        yield field, frame[field] == float("inf"), "is not a finite time"
    measured = frame[list(TIME_FIELDS)].notna().any(axis=1)
    for field in _NEEDED:
        yield field, measured & frame[field].isna(), "is missing beside other times: half a measurement"
    for field in ("vision_tokens", "text_tokens", "output_tokens"):
        yield field, measured & frame[field].isna(), "is missing beside times: half a measurement"
        yield field, frame[field] < 0, "is negative"
    stepped = measured & (frame["output_tokens"] > 1)
    for field in ("T_LLM_decode", "T_decode_per_token"):
        why = "must be positive where two or more tokens came out: half a measurement"
        yield field, stepped & ~(frame[field] > 0), why
    yield "repeats", frame["repeats"].map(_uneven), "must hold equally many values of each stage"
    yield "repeats", frame["repeats"].map(_has_no_time), "holds a time that is negative or not finite"


def _no_tiling(tiling: tuple[int, ...] | None) -> bool:
    return isinstance(tiling, tuple) and (len(tiling) != 2 or min(tiling) < 1)


def _uneven(repeats: dict[str, tuple[float, ...]] | None) -> bool:
    if not isinstance(repeats, dict):
        return False
    return not repeats.keys() >= set(_NEEDED) or len({len(laps) for laps in repeats.values()}) > 1


def _has_no_time(repeats: dict[str, tuple[float, ...]] | None) -> bool:
    return isinstance(repeats, dict) and not all(0 <= lap < math.inf for laps in repeats.values() for lap in laps)
