"""One training step: its loss, recorded steps against steps that run, and a run that is interrupted."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tempovlm.core.plan import Plan
from tempovlm.training import graphs
from tempovlm.training.elastic import read, see
from tempovlm.training.graphs import Graphs
from tempovlm.training.pictures import PictureBatch, Pictures
from tempovlm.training.pocket import Trainer
from tempovlm.training.recipes import Recipe
from tempovlm.training.step import compute, prepare
from tiny_model import TRAINED as TINY

CPU = torch.device("cpu")
RECIPE = Recipe(
    steps=8, decay_steps=2, vision_steps=2, batch=4, passes=2, warmup=2, elastic_after=4, questions=4,
    elastic_share=0.5, spread_weight=0.01,
)  # fmt: skip


def batch_of(trainer: Trainer) -> PictureBatch:
    return next(iter(Pictures(trainer.out / "tokenizer.json", "train", 4, 5, 0, 1, questions=4)))


def weights(trainer: Trainer) -> dict[str, Tensor]:
    return {name: one.clone() for name, one in trainer.pupil.state_dict().items()}


def same(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    for name, one in ours.items():
        torch.testing.assert_close(one, theirs[name], rtol=0, atol=1e-4)


def test_room_for_more_answers_changes_no_loss(tmp_path: Path) -> None:
    trainer = Trainer(tmp_path, RECIPE, TINY, CPU)
    batch, model = batch_of(trainer), trainer.model
    plan = Plan.build(replace(trainer.space.native, tier="low"), trainer.ranking, TINY.shape)
    work = prepare(model, batch, "low", plan, slice(1, None, 4), trainer.tokenizer)
    assert len(work.values["answers"]) > len(batch.answers)
    logits, targets, (balance, spread) = read(model, batch, see(model, batch, "low"), plan, trainer.tokenizer)
    result = compute(trainer.pupil, work, RECIPE)
    figures = dict(zip(result.names, result.figures.tolist(), strict=True))
    assert figures["answer"] == pytest.approx(F.cross_entropy(logits, targets).item(), rel=1e-5)
    assert figures["balance"] == pytest.approx(balance.item(), rel=1e-5)
    loss = figures["answer"] + RECIPE.dense_weight * (figures["patch"] + figures["pooled"])
    loss += RECIPE.balance_weight * balance.item() + RECIPE.spread_weight * spread.item()
    assert result.loss.item() == pytest.approx(loss, rel=1e-5)


def test_weights_of_skipped_blocks_have_no_gradient(tmp_path: Path) -> None:
    trainer = Trainer(tmp_path, RECIPE, TINY, CPU)
    plan = Plan.build(trainer.space.cheapest, trainer.ranking, TINY.shape)
    work = prepare(trainer.model, batch_of(trainer), "low", plan, slice(0, None, 4), trainer.tokenizer)
    trainer.gradients.show(trainer.gradients.take(trainer.compute(work).loss))
    runs = set(plan.blocks)
    assert 0 < len(runs) < TINY.num_blocks
    for i, block in enumerate(trainer.model.decoder.blocks):
        assert all((one.grad is not None) == (i in runs) for one in block.parameters())


def at_once(function: Callable[[], None], pool: Any) -> Callable[[], object]:
    """Stand in for a recording on a device: run, and give back what runs again."""
    assert pool == "pool"
    function()
    return function


def test_recorded_steps_learn_what_steps_that_run_do(tmp_path: Path) -> None:
    found = []
    for name in ("runs", "replays"):
        trainer = Trainer(tmp_path / name, replace(RECIPE, steps=100), TINY, CPU)
        if name == "replays":
            trainer.graphs = Graphs(trainer.compute, trainer.gradients, at_once, "pool")
        batch, sums = batch_of(trainer), {}
        other = replace(batch, images=255 - batch.images, tokens=batch.tokens.flip(0).contiguous())
        for step in range(24):
            trainer.advance(batch if step % 3 else other, sums)
        found.append((weights(trainer), sums))
        if trainer.graphs is not None:
            assert 2 <= len(trainer.graphs.recordings) < len(trainer.graphs.seen), "some kinds are rare"
            assert trainer.graphs.recordings.keys() <= {
                kind for kind, times in trainer.graphs.seen.items() if times > graphs.EAGER
            }
    same(found[0][0], found[1][0])
    assert found[0][1].keys() == found[1][1].keys()
    for names, values in found[0][1].items():
        torch.testing.assert_close(values, found[1][1][names], rtol=1e-3, atol=1e-3)


def test_no_more_is_recorded_than_there_is_room_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graphs, "MOST", 1)
    monkeypatch.setattr(graphs, "EAGER", 0)
    trainer = Trainer(tmp_path, replace(RECIPE, steps=100), TINY, CPU)
    trainer.graphs = Graphs(trainer.compute, trainer.gradients, at_once, "pool")
    batch, sums = batch_of(trainer), {}
    for _ in range(6):
        trainer.advance(batch, sums)
    assert len(trainer.graphs.recordings) == 1 < len(trainer.graphs.seen)


def test_an_interrupted_run_learns_what_a_whole_one_does(tmp_path: Path) -> None:
    whole = Trainer(tmp_path / "whole", RECIPE, TINY, CPU)
    assert whole.train(workers=0, max_minutes=1e9, log_every=50)
    while True:
        piece = Trainer(tmp_path / "pieces", RECIPE, TINY, CPU)
        if piece.train(workers=0, max_minutes=0.0, log_every=2):
            break
    same(weights(whole), weights(piece))
