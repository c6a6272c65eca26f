"""Rows of a core experiment that nobody ran, for results that tests make up."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

import stamps
import tiny_model
from tempovlm.core.knobs import KnobConfig, KnobSpace
from tempovlm.core.records import SweepRow
from tempovlm.data.catalog import load_samples
from tempovlm.data.sample import Sample
from tempovlm.lab.core_exp.batched import blank_row
from tempovlm.lab.core_exp.store import write_rows

SPACE = tiny_model.SPACE
DATASET = "text_vqa"


def answered(sample: Sample, knobs: KnobConfig, accuracy: float, **fields: Any) -> SweepRow:
    """The row of a question at a setting; without times unless given, and every picture looks alike."""
    given: dict[str, Any] = {
        "tiling": (1, 1),
        "vision_tokens": 100,
        "text_tokens": 12,
        "output_tokens": 2,
    } | fields
    return replace(blank_row(sample, knobs), accuracy=accuracy, prediction="dog", **given)


def write_results(
    folder: Path,
    bed: Path | None,
    split: str,
    weights_hash: str = "0123456789ab",
    *,
    measured: bool = True,
    seed: int = 0,
    dataset: str = DATASET,
    space: KnobSpace = SPACE,
) -> Path:
    """Results of the tiny model in which dearer settings are right more often and take longer."""
    rng = np.random.default_rng(seed)
    rows = []
    for sample in load_samples(dataset, split, data_dir=bed):
        for knobs in space:
            total_ms = tiny_model.nominal_ms(SPACE, SPACE.index(knobs))
            times = ("T_preprocess", "T_vision_encoder", "T_projector", "T_LLM_prefill", "T_LLM_decode", "T_total")
            parts = dict(zip(times, (1.0, 2.0, 1.0, total_ms - 5.0, 1.0, total_ms), strict=True))
            rows.append(
                answered(
                    sample,
                    knobs,
                    float(rng.random() < total_ms / 50),
                    tiling=(1, 1 + SPACE.tiers.index(knobs.tier)),
                    vision_tokens=50 * (1 + SPACE.tiers.index(knobs.tier)),
                    T_decode_per_token=1.0 if measured else None,
                    repeats={**{name: (value,) for name, value in parts.items()}, "T_control": (0.0,)}
                    if measured
                    else None,
                    step_ms=((1.0,),) if measured else None,
                    **(parts if measured else {}),
                )
            )
    stamp = replace(stamps.STAMP, knob_space=SPACE.fingerprint, weights=weights_hash)
    write_rows(folder, rows[0].dataset, rows, stamp)
    return folder
