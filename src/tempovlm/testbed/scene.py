"""A generated picture, and the values that its questions are made of.

`stand_ins` draws the scenes.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from random import Random

import numpy as np
from numpy.typing import NDArray

SPLITS: tuple[str, ...] = ("train", "val")

SIZES: tuple[tuple[int, int], ...] = (
    (336, 448), (448, 336), (384, 384), (320, 480), (480, 320), (300, 450), (360, 448), (288, 512),
)  # fmt: skip
"""Height and width in pixels of the pictures, in several aspect ratios."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SceneQuestion:
    """One question about a scene.

    Attributes:
        question: Lower case, at most 14 words; without the options.
        answers: Ten human-like answers, most of them the canonical one.
        answer: The canonical answer, lower case, which a model is trained to give. For multiple choice it is the
            lower-case letter of the option.
        template: Name of its template.
        options: The options of a multiple choice question, else empty.
        answer_index: Index of the right option, -1 without options.
        held_out: Whether it needs a word or a combination that training never shows.
    """

    question: str
    answers: tuple[str, ...]
    answer: str
    template: str
    options: tuple[str, ...] = ()
    answer_index: int = -1
    held_out: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Scene:
    """A picture, its questions and its dense labels.

    Attributes:
        image: uint8 (H, W, 3), RGB.
        questions: One to five questions, as a rule three or four.
        char_boxes: float32 (N, 4), x0 y0 x1 y1 in pixels of every rendered character; may reach a few pixels
            beyond the picture in a twin.
        char_ids: int16 (N,), indices into `CHARSET`.
        shape_boxes: float32 (M, 4), as above, of every object.
        shape_ids: int16 (M,), indices into `SHAPES`.
        color_ids: int16 (M,), indices into `COLORS`.
    """

    image: NDArray[np.uint8]
    questions: tuple[SceneQuestion, ...]
    char_boxes: NDArray[np.float32]
    char_ids: NDArray[np.int16]
    shape_boxes: NDArray[np.float32]
    shape_ids: NDArray[np.int16]
    color_ids: NDArray[np.int16]


@dataclass(slots=True)
class Quiz:
    """Collects the questions of a scene while it is drawn.

    Attributes:
        rng: random numbers of the scene. edition: one of `testbed.EDITIONS`. items: the questions so far.
    """

    rng: Random
    edition: int = 1
    items: list[SceneQuestion] = field(default_factory=list)

    def ask(
        self, template: str, question: str, answer: str, variants: tuple[str, ...] = (), *, held_out: bool = False
    ) -> None:
        """Add an open question; `variants` are other ways in which people answer it."""
        self._add(
            SceneQuestion(
                question=question,
                answers=_humans(self.rng, answer, variants),
                answer=answer,
                template=template,
                held_out=held_out,
            )
        )

    def choose(
        self, template: str, question: str, right: str, wrong: list[str], *, held_out: bool = False
    ) -> None:
        """Add a multiple choice question; the options are put in random order."""
        options = [right, *wrong]
        self.rng.shuffle(options)
        index = options.index(right)
        letter = "abcdefgh"[index]
        self._add(
            SceneQuestion(
                question=question,
                answers=(letter,) * 10,
                answer=letter,
                template=template,
                options=tuple(options),
                answer_index=index,
                held_out=held_out,
            )
        )

    def _add(self, item: SceneQuestion) -> None:
        """Keep a question unless it was asked before."""
        if all(item.question != other.question for other in self.items):
            self.items.append(item)

    def pick(self, most: int, yes_no: float | None = None) -> tuple[SceneQuestion, ...]:
        """Return at most `most` of the questions, in random order.

        Args:
            most: the most questions to keep.
            yes_no: expected share of questions with the answer yes or no; None takes them as they come.
        """
        items, rng = self.items, self.rng
        if yes_no is not None:
            rng.shuffle(items)
            wished = sum(rng.random() < yes_no for _ in range(most))
            closed = [item for item in items if item.answer in ("yes", "no")]
            others = [item for item in items if item.answer not in ("yes", "no")]
            chosen = closed[:wished] + others[: most - wished]
            items = chosen + [item for item in items if item not in chosen][: most - len(chosen)]
        return tuple(rng.sample(items, min(most, len(items))))


def _humans(rng: Random, answer: str, variants: tuple[str, ...]) -> tuple[str, ...]:
    """Return ten answers of which at least six are the canonical one, some in capitals."""
    answers = [answer] * 10
    for place in range(rng.randrange(0, 4)):
        pool = (*variants, answer.upper(), answer.capitalize())
        answers[place] = rng.choice(pool)
    if rng.random() < 0.15:
        answers[9] = "unanswerable"
    rng.shuffle(answers)
    return tuple(answers)
