"""Rows of a core experiment that nobody ran, for results that tests make up."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from tempovlm.core.knobs import KnobConfig
from tempovlm.core.records import SweepRow
from tempovlm.lab.core_exp.batched import blank_row
from tempovlm.tasks.base import Sample


def answered(sample: Sample, knobs: KnobConfig, accuracy: float, **fields: Any) -> SweepRow:
    """The row of a question at a setting; without times unless given, and every picture looks alike."""
    given: dict[str, Any] = {
        "tiling": (1, 1),
        "vision_tokens": 100,
        "text_tokens": 12,
        "output_tokens": 2,
    } | fields
    return replace(blank_row(sample, knobs), accuracy=accuracy, prediction="dog", **given)
