"""A row of the core experiment: one question at one setting, with its answer and times.

Field names are those of the seed document's files, so times are milliseconds although their names have no
unit. `lab.core_exp.store` has the file format.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

from tempovlm.core.errors import UserError
from tempovlm.core.knobs import KNOBS, KnobConfig

STAGE_FIELDS = {
    "preprocess": "T_preprocess",
    "vision_encoder": "T_vision_encoder",
    "projector": "T_projector",
    "prefill": "T_LLM_prefill",
    "decode": "T_LLM_decode",
    "total": "T_total",
}
"""Stage of an answer → the field that holds its time."""

CONTROL_FIELD = "T_control"
"""Only among the repeats: time of the choice, which is almost nothing for a fixed setting."""

REPEAT_FIELDS = (*STAGE_FIELDS.values(), CONTROL_FIELD)
"""The lists of `SweepRow.repeats`; the six stages without the total add up to the total."""

TIME_FIELDS = (*STAGE_FIELDS.values(), "T_decode_per_token")

Key = tuple[str | int, ...]
"""question_id and the value of each knob, unique within a data set and split."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SweepRow:
    """One question of a data set at one setting.

    Every T_ field is the median of the repeats in milliseconds, None where latency was not measured. A measured
    row has all of them, with two exceptions: `T_decode_per_token` is None where one token came out (it is the
    decode time / (output_tokens - 1), because the first token belongs to the prefill), and files of older
    sweeps have no `T_preprocess` and include the projector's time in `T_vision_encoder`.

    Attributes:
        dataset: name of the data set. split: `train` or `val`. template: kind of question, if known.
        tiling: rows and columns of the crops without the global one; None without a picture.
        vision_tokens: image features in the prompt. text_tokens: all its other tokens.
        output_tokens: generated tokens, the end token included.
        accuracy: from 0 to 1; None if it was not scored. prediction: the answer's text.
        repeats: for each of `REPEAT_FIELDS` the single measurements; None if latency was not measured.
        step_ms: for each repeat its single decode steps.
        error: one line, if the sample failed at this setting; fields that were found before are kept.
    """

    dataset: str
    split: str
    question_id: str
    image_id: str
    template: str
    tier: str
    top_k: int
    num_blocks: int
    tiling: tuple[int, int] | None = None
    vision_tokens: int | None = None
    text_tokens: int | None = None
    output_tokens: int | None = None
    accuracy: float | None = None
    prediction: str | None = None
    T_preprocess: float | None = None
    T_vision_encoder: float | None = None
    T_projector: float | None = None
    T_LLM_prefill: float | None = None
    T_LLM_decode: float | None = None
    T_decode_per_token: float | None = None
    T_total: float | None = None
    repeats: Mapping[str, tuple[float, ...]] | None = None
    step_ms: tuple[tuple[float, ...], ...] | None = None
    error: str | None = None

    @property
    def knobs(self) -> KnobConfig:
        """The setting."""
        return KnobConfig.from_values(self.key[1:])

    @property
    def key(self) -> Key:
        """Key of the row, unique within its data set and split."""
        return self.question_id, *(getattr(self, name) for name in KNOBS)

    @property
    def is_measured(self) -> bool:
        """Whether latency was measured."""
        return self.T_total is not None

    @property
    def is_answered(self) -> bool:
        """Whether an answer is known, even if timing it failed later."""
        return self.error is None or self.prediction is not None

    @property
    def num_repeats(self) -> int:
        """Number of timed answers; 0 also if only medians are known."""
        return len(self.repeats["T_total"]) if self.repeats else 0

    def to_json(self) -> dict[str, Any]:
        """Return a JSON object with one field for each attribute; its lists are the row's own."""
        # `asdict`, which copies them, takes ten times as long.
        return {name: getattr(self, name) for name in COLUMNS}

    @classmethod
    def from_json(cls, record: Mapping[str, Any], source: str = "the row") -> SweepRow:
        """Return the row of a stored record.

        Raises:
            UserError: a field is missing; names `source` and the field.
        """
        missing = [name for name in COLUMNS if name not in record]
        if missing:
            raise UserError(f"{source}: no field {missing[0]}")
        tiling, repeats, steps = record["tiling"], record["repeats"], record["step_ms"]
        values = {name: record[name] for name in COLUMNS} | {
            "tiling": None if tiling is None else (int(tiling[0]), int(tiling[1])),
            "repeats": None if repeats is None else {name: tuple(laps) for name, laps in repeats.items()},
            "step_ms": None if steps is None else tuple(tuple(laps) for laps in steps),
        }
        return cls(**values)


COLUMNS = tuple(field.name for field in fields(SweepRow))
"""The columns of a results file, in order."""


def better(one: SweepRow, other: SweepRow) -> SweepRow:
    """Return the better of two rows of one key: the one with more repeats, which includes those of the other.

    A sweep only adds repeats to a row, so reading a row twice duplicates nothing. Of equally many repeats, a row
    with an answer wins; of two answers the one without an error, with the other's error added if that has one,
    because an answer is timed after it is known.
    """
    sizes = [(row.is_measured, row.num_repeats) for row in (one, other)]
    if sizes[0] != sizes[1]:
        return one if sizes[0] > sizes[1] else other
    if one.is_answered != other.is_answered:
        return one if one.is_answered else other
    kept, rest = (one, other) if one.error is None or other.error is not None else (other, one)
    if kept.error is None and rest.error is not None:
        return replace(kept, error=rest.error)
    return kept
