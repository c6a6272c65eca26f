"""One training step: what is prepared for the device, the loss that follows from it alone, and the gradients.

What is prepared depends on pictures' sizes and on draws; what follows only on shapes and on a `Course`, so that
`graphs` can record it once and replay it. Shapes as in `elastic`; `N` pictures with dense labels.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tempovlm.core.plan import Plan
from tempovlm.model.config import ModelConfig
from tempovlm.model.prompt import Tokenizer
from tempovlm.model.vision.tiling import Crops, Grid
from tempovlm.model.vlm import Molmo
from tempovlm.training.dense import DenseHead, DenseLabels, dense_labels
from tempovlm.training.elastic import Stream, cut, encode, pack, read_stream
from tempovlm.training.pictures import IGNORE, PictureBatch
from tempovlm.training.recipes import Recipe

ROOM = 2048
"""The number of answers' places is padded to a multiple of this, so that most batches have the same."""


class Pupil(nn.Module):
    """The model with the read-outs that only training needs."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.model = Molmo(config)
        self.head = DenseHead(config)


@dataclass(frozen=True, slots=True)
class Course:
    """Decides a step's operations, beside shapes; without a plan the vision side learns alone."""

    grid: Grid
    plan: Plan | None


@dataclass(frozen=True, slots=True)
class Work:
    """A step's course and the values it works on."""

    course: Course
    values: Mapping[str, Tensor]


@dataclass(frozen=True, slots=True)
class Result:
    """Findings of a step.

    Attributes:
        loss: to be lowered. names: of the figures to log. figures: their values, without gradients.
        logits: (A, V) of the answers, and those to be ignored; None without answers.
    """

    loss: Tensor
    names: tuple[str, ...]
    figures: Tensor
    logits: Tensor | None


@torch.no_grad()
def prepare(
    model: Molmo, batch: PictureBatch, tier: str, plan: Plan | None, labelled: slice, tokenizer: Tokenizer
) -> Work:
    """Cut pictures and lay out tokens; `labelled` are the pictures with dense labels."""
    crops = cut(model, batch, tier)
    labels = dense_labels(batch, crops.grid, model.config.vision, labelled)
    B, device = len(batch.images), batch.images.device
    values = {"patches": crops.patches, "index": crops.index, "masks": crops.masks}
    values |= {one.name: getattr(labels, one.name) for one in fields(DenseLabels)}
    values["labelled"] = torch.arange(*labelled.indices(B), device=device)
    if plan is not None:
        room = -(-len(batch.answers) // ROOM) * ROOM
        stream = pack(batch, crops.grid, model.config, tokenizer, room)
        values |= {one.name: getattr(stream, one.name) for one in fields(Stream)}
    return Work(Course(crops.grid, plan), values)


def compute(pupil: Pupil, work: Work, recipe: Recipe) -> Result:
    """Return the loss of prepared work; waits for nothing."""
    values, plan = work.values, work.course.plan
    seen = encode(pupil.model, Crops(values["patches"], values["index"], values["masks"], work.course.grid))
    labels = DenseLabels(**{one.name: values[one.name] for one in fields(DenseLabels)})
    features, tokens = (
        some.index_select(0, values["labelled"]).flatten(0, 1) for some in (seen.features, seen.distinct)
    )
    patch, pooled, chars = pupil.head(features, tokens, labels)
    figures = {"patch": patch, "pooled": pooled, "chars": chars}
    if plan is None:
        return _result(patch + pooled, figures, None)
    stream = Stream(**{one.name: values[one.name] for one in fields(Stream)})
    logits, (balance, spread) = read_stream(pupil.model, seen.tokens, stream, plan)
    answer = F.cross_entropy(logits.float(), stream.targets, ignore_index=IGNORE)
    asked = stream.targets != IGNORE
    right = ((logits.argmax(-1) == stream.targets) & asked).sum() / asked.sum()
    figures |= {"answer": answer, "balance": balance, "spread": spread, "tokens": right}
    loss = answer + recipe.dense_weight * (patch + pooled)
    loss = loss + recipe.balance_weight * balance + recipe.spread_weight * spread
    return _result(loss, figures, logits)


def _result(loss: Tensor, figures: dict[str, Tensor], logits: Tensor | None) -> Result:
    values = torch.stack([value.detach().float() for value in figures.values()])
    return Result(loss, tuple(figures), values, logits)


class Gradients:
    """Hands the gradients of the copy that computes to the weights that take the updates, in float32."""

    def __init__(self, working: Pupil, pupil: Pupil) -> None:
        """Make room for them; `working` may be `pupil` itself."""
        self.computing: list[Tensor] = [*working.parameters()]
        self.taking: list[Tensor] = [*pupil.parameters()]
        self.room = [torch.empty_like(one) for one in self.taking]

    def take(self, loss: Tensor) -> tuple[int, ...]:
        """Write the gradients of a loss into their room; return the numbers of the weights that have one."""
        found = torch.autograd.grad(loss, self.computing, allow_unused=True)
        used = [(i, one) for i, one in enumerate(found) if one is not None]
        torch._foreach_copy_([self.room[i] for i, _ in used], [one for _, one in used])
        return tuple(i for i, _ in used)

    def show(self, used: tuple[int, ...]) -> None:
        """Let the optimisers see what `take` wrote."""
        for one in self.taking:
            one.grad = None
        for i in used:
            self.taking[i].grad = self.room[i]

    def refresh(self) -> None:
        """Copy the weights to those that compute."""
        if self.computing[0] is not self.taking[0]:
            with torch.no_grad():
                torch._foreach_copy_(self.computing, self.taking)
