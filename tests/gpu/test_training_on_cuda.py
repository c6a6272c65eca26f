"""A training on CUDA, where a bfloat16 copy computes: it is measured and exported as on a CPU."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tempovlm.model.weights import load_model
from tempovlm.training.pocket import Trainer
from tempovlm.training.recipes import Recipe
from tempovlm.training.report import make_report
from tiny_model import TRAINED as TINY

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]

RECIPE = Recipe(
    steps=8, decay_steps=2, vision_steps=2, batch=4, passes=2, warmup=2, elastic_after=2, edition=2, questions=6,
    taught_weight=1.0, elastic_share=0.5, spread_weight=0.01, validation_batches=6,
)  # fmt: skip


def test_a_run_is_measured_and_exported(tmp_path: Path) -> None:
    trainer = Trainer(tmp_path, RECIPE, TINY, torch.device("cuda", 0))
    assert trainer.train(workers=0, max_minutes=1e9, log_every=4)
    same = Trainer(tmp_path / "cpu", RECIPE, TINY, torch.device("cpu"))
    asked = same.answered([trainer.space.native], RECIPE.validation_batches)
    assert make_report(trainer, done=True)["questions"] == sum(len(one.right) for one in asked)
    trainer.export()
    model = load_model(tmp_path / "pocket", torch.device("cpu"), torch.float32)
    assert model.config == trainer.config
