"""A training on CUDA, where a bfloat16 copy computes: it is measured and exported as on a CPU."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tempovlm.model.weights import load_model
from tempovlm.training.pictures import Pictures
from tempovlm.training.pocket import Trainer
from tempovlm.training.recipes import Recipe
from tempovlm.training.report import make_report
from tiny_model import TRAINED as TINY

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]

RECIPE = Recipe(
    steps=8, decay_steps=2, vision_steps=2, batch=4, passes=2, warmup=2, elastic_after=2, questions=6,
    taught_weight=1.0, elastic_share=0.5, spread_weight=0.01, validation_batches=6,
)  # fmt: skip


def test_recorded_steps_learn_what_steps_that_run_do(tmp_path: Path) -> None:
    found = []
    for name in ("runs", "replays"):
        options = {"taught_weight": 0.0, "steps": 100, "elastic_after": 100, "vision_steps": 0}
        trainer = Trainer(tmp_path / name, replace(RECIPE, **options), TINY, torch.device("cuda", 0))
        assert trainer.graphs is not None
        recorded = trainer.graphs.recordings
        if name == "runs":
            trainer.graphs = None
        pictures = Pictures(trainer.out / "tokenizer.json", "train", 4, 5, 0, 1, questions=6)
        batch, sums = next(iter(pictures)).to(trainer.device), {}
        for _ in range(30):
            trainer.advance(batch, sums)
        found.append(torch.cat([values for _, values in sorted(sums.items())]))
    assert recorded
    torch.testing.assert_close(found[0], found[1], rtol=0.05, atol=0.05)


def test_a_run_is_measured_and_exported(tmp_path: Path) -> None:
    trainer = Trainer(tmp_path, RECIPE, TINY, torch.device("cuda", 0))
    assert trainer.train(workers=0, max_minutes=1e9, log_every=4)
    same = Trainer(tmp_path / "cpu", RECIPE, TINY, torch.device("cpu"))
    asked = same.answered([trainer.space.native], RECIPE.validation_batches)
    assert make_report(trainer, done=True)["questions"] == sum(len(one.right) for one in asked)
    trainer.export()
    model = load_model(tmp_path / "pocket", torch.device("cpu"), torch.float32)
    assert model.config == trainer.config
