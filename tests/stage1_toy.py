"""A made-up world in which the question says which tier it needs, and the job of training a first stage on it."""

from __future__ import annotations

from pathlib import Path
from typing import cast

import numpy as np

import tiny_model
from tempovlm.engine.engine import Engine
from tempovlm.lab.exp3_first_stage.train import Stage1Job
from tempovlm.lab.features import FeatureTable
from tempovlm.lab.options import FitOptions
from tempovlm.lab.table import Table

SPACE = tiny_model.SPACE
PER_TIER = len(SPACE) // 3
LATENCY_MS = np.geomspace(10.0, 100.0, len(SPACE))
FAST = FitOptions(num_epochs=6, batch_size=32, lr=5e-3, hidden_dim=16)


def world(questions: int = 180) -> tuple[Table, FeatureTable]:
    """Odd questions need the high tier and even ones suffer from it; their language says which is which."""
    rng = np.random.default_rng(0)
    needs = np.arange(questions) % 2 == 1
    accuracy = np.ones((questions, len(SPACE)))
    accuracy[needs, : 2 * PER_TIER] = 0.0
    accuracy[~needs, 2 * PER_TIER :] = 0.0
    language = rng.standard_normal((questions, 6)).astype(np.float32)
    language[:, 2] = np.where(needs, 2.0, -2.0)
    images = np.array([f"i{i // 2}" for i in range(questions)])
    table = Table.of(
        SPACE,
        accuracy,
        LATENCY_MS,
        split="train",
        dataset=np.array(["okvqa", "text_vqa", "okvqa"] * (questions // 3)),
        question_id=np.array([f"q{i}" for i in range(questions)]),
        image_id=images,
        stamp={"hardware": "x"},
    )
    glance = rng.standard_normal((questions, 4)).astype(np.float32)
    features = FeatureTable(language, glance, np.stack([glance] * 3, axis=1))
    return table.split_by_picture(0.6, 1), features


def job(folder: Path, variant: str = "language", loss: str = "label", options: FitOptions = FAST) -> Stage1Job:
    return Stage1Job(
        engine=cast("Engine", None),
        weights_hash="abc",
        results_dirs=[],
        datasets=[],
        output_dir=folder,
        options=options,
        knob1_variant=variant,
        knob1_loss=loss,
    )
