"""From generated scenes to training batches, on the CPU: pictures of one size, packed questions, boxes of labels.

Several questions share one picture: a row holds the image part once and the questions one after another, and
`segments` says which token belongs to which question. One batch serves any tier.
Shapes: `B` pictures, `S` text tokens of a row, `N` boxes of a picture.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from tempovlm.data.registry import DATASETS, GENERATED
from tempovlm.data.sample import choice_question
from tempovlm.model.prompt import Tokenizer, prompt_text
from tempovlm.testbed import stand_ins
from tempovlm.testbed.generate import make_scene
from tempovlm.testbed.scene import SIZES, Scene, SceneQuestion

_WEIGHTS = np.array([stand_ins.find(name).weight for name in GENERATED])
MIXTURE = _WEIGHTS / _WEIGHTS.sum()
"""The share of each stand-in among the pictures, in the order of `GENERATED`."""

OPEN_STYLE = DATASETS["coco_2014_vqa"].style
GENERAL_STYLE = 0.25
"""Share of training pictures asked in the style of open questions, the default style of a user."""

OPEN_FORM = 0.5
"""Share of multiple choice questions of the training pictures that are asked without their options, the answer
being the option's text: finding it in the picture is learned far sooner than finding its letter at once."""

MAX_BOXES = 96
IGNORE = -100


@dataclass(frozen=True, slots=True)
class PictureBatch:
    """Pictures of one size with their packed questions.

    Attributes:
        images: (B, H, W, 3) uint8.
        tokens: (B, S) ids, padded. segments: (B, S) question number from 1, 0 for padding.
        offsets: (B, S) place within its question. targets: (B, S) next token where it is part of an answer.
        answers: (A,) the places, in B·S, where it is.
        datasets: (B,) index into GENERATED.
        templates: of each picture, the template of each of its questions.
        char_boxes, char_ids, shape_boxes, shape_ids, color_ids: (B, N, 4) and (B, N); ids of -1 are padding.
    """

    images: Tensor
    tokens: Tensor
    segments: Tensor
    offsets: Tensor
    targets: Tensor
    answers: Tensor
    datasets: Tensor
    char_boxes: Tensor
    char_ids: Tensor
    shape_boxes: Tensor
    shape_ids: Tensor
    color_ids: Tensor
    templates: tuple[tuple[str, ...], ...]

    def to(self, device: torch.device) -> PictureBatch:
        """Return the same batch on another device."""
        return self._each(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> PictureBatch:
        """Return the same batch in page-locked memory; called by the loader."""
        return self._each(Tensor.pin_memory)

    def _each(self, change: Callable[[Tensor], Tensor]) -> PictureBatch:
        """Return a batch of changed tensors."""
        values = ((one.name, getattr(self, one.name)) for one in fields(self))
        changed: dict[str, Any] = {name: change(value) for name, value in values if isinstance(value, Tensor)}
        return replace(self, **changed)


class Pictures(IterableDataset[PictureBatch]):
    """An endless, seeded stream of batches; batch `i` is the same whichever worker makes it."""

    def __init__(
        self,
        tokenizer: Path,
        split: str,
        batch: int,
        seed: int,
        first: int,
        count: int,
        *,
        questions: int | None = None,
    ) -> None:
        """Describe a stream; nothing is drawn yet.

        Args:
            tokenizer: Its file.
            split: 'train' or 'val'.
            batch: Pictures of a batch.
            seed: Seed of all pictures.
            first: Number of the first batch.
            count: Batches from there on.
            questions: The most of a picture; None leaves it to its data set.
        """
        self.tokenizer, self.split, self.batch, self.seed = tokenizer, split, batch, seed
        self.first, self.count, self.questions = first, count, questions

    def __iter__(self) -> Iterator[PictureBatch]:
        worker = get_worker_info()
        torch.set_num_threads(1)
        tokenizer = Tokenizer.load(self.tokenizer)
        offset, stride = (worker.id, worker.num_workers) if worker else (0, 1)
        for index in range(self.first + offset, self.first + self.count, stride):
            yield self.make(index, tokenizer)

    def make(self, index: int, tokenizer: Tokenizer) -> PictureBatch:
        """Return batch number `index`: its size and its mixture of data sets follow from the number alone."""
        rng, names = self.mixture(index)
        scenes = [self.scene(index, row, name) for row, name in enumerate(names)]
        general = rng.random(self.batch) < (GENERAL_STYLE if self.split == "train" else 0.0)
        styles = [OPEN_STYLE if g else DATASETS[name].style for g, name in zip(general, names, strict=True)]
        asked = [[self.word(q, s, rng) for q in scene.questions] for scene, s in zip(scenes, styles, strict=True)]
        rows = [pack_questions(prompts, tokenizer) for prompts in asked]
        datasets = torch.tensor([GENERATED.index(name) for name in names])
        templates = tuple(tuple(item.template for item in scene.questions) for scene in scenes)
        return collate(scenes, rows, datasets, templates)

    def mixture(self, index: int) -> tuple[np.random.Generator, list[str]]:
        """Return the data set of each picture of batch `index`, and the numbers that word its questions."""
        rng = np.random.default_rng((self.seed, index))
        return rng, [str(name) for name in rng.choice(GENERATED, size=self.batch, p=MIXTURE)]

    def scene(self, index: int, row: int, name: str) -> Scene:
        """Draw picture `row` of batch `index`, a scene of data set `name`."""
        size = SIZES[index % len(SIZES)]
        number = index * self.batch + row
        return make_scene(name, self.split, number, seed=self.seed, size=size, most=self.questions)

    def word(self, item: SceneQuestion, style: str, rng: np.random.Generator) -> tuple[str, str]:
        """Return a question's prompt and its answer; in training a choice may be asked as an open question."""
        if item.options and self.split == "train" and rng.random() < OPEN_FORM:
            return prompt_text(item.question, OPEN_STYLE), item.options[item.answer_index]
        return prompt_text(full_question(item), style), item.answer


def full_question(item: SceneQuestion) -> str:
    """Return the question with its options, if it has some."""
    return choice_question(item.question, item.options) if item.options else item.question


def picture_loader(pictures: Pictures, workers: int) -> DataLoader[PictureBatch]:
    """Yield batches made by worker processes, in order, page-locked if there is a GPU."""
    return DataLoader(
        pictures,
        batch_size=None,
        num_workers=workers,
        pin_memory=torch.cuda.is_available(),
        prefetch_factor=4 if workers else None,
        persistent_workers=False,
    )


def pack_questions(asked: list[tuple[str, str]], tokenizer: Tokenizer) -> np.ndarray:
    """Return (4, S) tokens, segments, offsets and targets of a picture's prompts with their answers."""
    parts = []
    for number, (text, said) in enumerate(asked, start=1):
        prompt = tokenizer.encode(text)
        answer = [*tokenizer.encode(said), tokenizer.end]
        tokens = np.array([*prompt, *answer[:-1]])
        targets = np.full(len(tokens), IGNORE)
        targets[len(prompt) - 1 :] = answer
        parts.append(np.stack([tokens, np.full_like(tokens, number), np.arange(len(tokens)), targets]))
    return np.concatenate(parts, axis=1)


def collate(
    scenes: list[Scene], rows: list[np.ndarray], datasets: Tensor, templates: tuple[tuple[str, ...], ...]
) -> PictureBatch:
    """Stack scenes of one size, padding rows and boxes."""
    length = max(row.shape[1] for row in rows)
    packed = np.zeros((4, len(rows), length), dtype=np.int64)
    packed[3] = IGNORE
    for i, row in enumerate(rows):
        packed[:, i, : row.shape[1]] = row
    tokens, segments, offsets, targets = torch.from_numpy(packed)
    chars = [_pad_boxes(s.char_boxes, s.char_ids) for s in scenes]
    shapes = [_pad_boxes(s.shape_boxes, s.shape_ids, s.color_ids) for s in scenes]
    return PictureBatch(
        torch.from_numpy(np.stack([s.image for s in scenes])),
        tokens,
        segments,
        offsets,
        targets,
        (targets != IGNORE).flatten().nonzero().squeeze(1),
        datasets,
        torch.from_numpy(np.stack([c[0] for c in chars])),
        torch.from_numpy(np.stack([c[1] for c in chars])),
        torch.from_numpy(np.stack([s[0] for s in shapes])),
        torch.from_numpy(np.stack([s[1] for s in shapes])),
        torch.from_numpy(np.stack([s[2] for s in shapes])),
        templates,
    )


def _pad_boxes(boxes: np.ndarray, *ids: np.ndarray) -> tuple[np.ndarray, ...]:
    """Return boxes (MAX_BOXES, 4) and each list of ids (MAX_BOXES,), -1 without a box."""
    count = min(len(boxes), MAX_BOXES)
    padded = np.zeros((MAX_BOXES, 4), dtype=np.float32)
    padded[:count] = boxes[:count]
    columns = []
    for values in ids:
        column = np.full(MAX_BOXES, -1, dtype=np.int64)
        column[:count] = values[:count]
        columns.append(column)
    return padded, *columns
