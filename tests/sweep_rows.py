"""Rows of a core experiment that nobody ran, for results that tests make up."""

from __future__ import annotations

from typing import Any

from tempovlm.core.knobs import KnobConfig
from tempovlm.core.records import SweepRow
from tempovlm.tasks.base import Sample


def answered(sample: Sample, knobs: KnobConfig, accuracy: float, **fields: Any) -> SweepRow:
    """The row of a question at a setting; without times unless given, and every picture looks alike."""
    given: dict[str, Any] = {
        "tiling": (1, 1),
        "vision_tokens": 100,
        "text_tokens": 12,
        "output_tokens": 2,
    } | fields
    return SweepRow(
        dataset=sample.dataset,
        split=sample.split,
        question_id=str(sample.question_id),
        image_id=str(sample.image_id),
        template=sample.template,
        tier=knobs.tier,
        top_k=knobs.top_k,
        num_blocks=knobs.num_blocks,
        accuracy=accuracy,
        prediction="dog",
        **given,
    )
