"""The pocket model's accuracy at every knob setting: the table of its model card.

An answer counts if every one of its tokens is the model's first choice given those before it, so that greedy
decoding would write exactly the canonical answer. One vision pass serves all settings of a tier.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tempovlm.core.knobs import KnobConfig, KnobSpace
from tempovlm.core.plan import Plan, Ranking
from tempovlm.data.registry import GENERATED
from tempovlm.model.prompt import Tokenizer
from tempovlm.model.vlm import Molmo
from tempovlm.training.elastic import read, see
from tempovlm.training.pictures import PictureBatch, Pictures


@dataclass(frozen=True, slots=True)
class Outcome:
    """Answers of one batch at one setting: data set index, template, and right or wrong of each question."""

    knobs: KnobConfig
    datasets: Tensor
    templates: list[str]
    right: Tensor


def validation_batches(pictures: Pictures, count: int, device: torch.device) -> Iterator[PictureBatch]:
    """Return `count` batches, made here and moved to the device; the same ones at every call."""
    tokenizer = Tokenizer.load(pictures.tokenizer)
    for index in range(count):
        yield pictures.make(index, tokenizer).to(device)


@torch.no_grad()
def outcomes(
    model: Molmo,
    batches: Iterable[PictureBatch],
    settings: Iterable[KnobConfig],
    ranking: Ranking,
    tokenizer: Tokenizer,
) -> Iterator[Outcome]:
    """Run every setting over every batch."""
    by_tier = defaultdict(list)
    for knobs in settings:
        by_tier[knobs.tier].append(knobs)
    for batch in batches:
        for tier, choices in by_tier.items():
            seen = see(model, batch, tier)
            for knobs in choices:
                plan = Plan.build(knobs, ranking, model.config.shape)
                logits, targets, _ = read(model, batch, seen, plan, tokenizer)
                yield _outcome(knobs, batch, logits.argmax(-1) == targets)


def _outcome(knobs: KnobConfig, batch: PictureBatch, hits: Tensor) -> Outcome:
    """Whether each question is right: all of its answer's tokens are."""
    rows = batch.answers // batch.tokens.shape[1]
    questions = rows * 64 + batch.segments.flatten()[batch.answers]
    names, index = questions.unique(return_inverse=True)
    wrong = torch.zeros(len(names), device=hits.device).index_add(0, index, (~hits).float())
    places_of = [divmod(name, 64) for name in names.tolist()]
    templates = [batch.templates[row][number - 1] for row, number in places_of]
    return Outcome(knobs, batch.datasets[names // 64].cpu(), templates, (wrong == 0).cpu())


def tabulate(results: Iterable[Outcome], space: KnobSpace) -> list[dict[str, Any]]:
    """Return a row for each setting: accuracy and number of questions, of each data set and their mean."""
    counts = np.zeros((len(space), len(GENERATED), 2))
    for outcome in results:
        row = counts[space.index(outcome.knobs)]
        np.add.at(row[:, 0], outcome.datasets.numpy(), outcome.right.numpy().astype(float))
        np.add.at(row[:, 1], outcome.datasets.numpy(), 1.0)
    table = []
    for knobs in space:
        right, asked = counts[space.index(knobs)].T
        if asked.min() > 0:
            table.append(
                {
                    **knobs.as_dict(),
                    "accuracy": round(float((right / asked).mean()), 5),
                    "num_samples": int(asked.sum()),
                    "by_dataset": {
                        name: round(float(r / a), 5) for name, r, a in zip(GENERATED, right, asked, strict=True)
                    },
                }
            )
    return table
