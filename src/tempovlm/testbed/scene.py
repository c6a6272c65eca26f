"""A generated picture, and the values that its questions are made of.

`stand_ins` draws the scenes.
"""

from __future__ import annotations

from bisect import bisect
from dataclasses import dataclass, field, replace
from itertools import accumulate
from random import Random

import numpy as np
from numpy.typing import NDArray

from tempovlm.testbed.costs import SHARES, cost_of

SPLITS: tuple[str, ...] = ("train", "val")

SIZES: tuple[tuple[int, int], ...] = (
    (336, 448), (448, 336), (384, 384), (320, 480), (480, 320), (300, 450), (360, 448), (288, 512),
)  # fmt: skip
"""Height and width in pixels of the pictures, in several aspect ratios."""

_MOST_WORDS = 14


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
        rng: random numbers of the scene. items: the questions so far; the answers of an open one are all ways
            to say the right one. asked: their words.
    """

    rng: Random
    items: list[SceneQuestion] = field(default_factory=list)
    asked: set[str] = field(default_factory=set)

    def ask(
        self, template: str, question: str, answer: str, variants: tuple[str, ...] = (), *, held_out: bool = False
    ) -> None:
        """Add an open question; `variants` are other ways in which people answer it."""
        self._add(
            SceneQuestion(
                question=question,
                answers=(answer, *variants),
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
        """Keep a question unless it was asked before or has too many words."""
        if item.question not in self.asked and len(item.question.split()) <= _MOST_WORDS:
            self.asked.add(item.question)
            self.items.append(item)

    def pick(self, most: int, yes_no: float | None = None) -> tuple[SceneQuestion, ...]:
        """Return at most `most` of the questions, by the shares of `costs.SHARES`.

        The counts are those of the shares, rounded up or down at random. Where a
        scene has no question of that cost left, another takes its place.

        Args:
            most: the most questions to keep.
            yes_no: expected share of questions with the answer yes or no; None takes them as they come.
        """
        rng = self.rng
        left = [(item, item.answer in ("yes", "no"), cost_of(item.template)) for item in self.items]
        rng.shuffle(left)
        most = min(most, len(left))
        start, edges = rng.random(), list(accumulate(SHARES.values()))
        costs = [list(SHARES)[bisect(edges[:-1], (start + slot) / most)] for slot in range(most)]
        closed: list[bool | None] = [None] * most
        if yes_no is not None:
            number = int(most * yes_no + rng.random())
            closed = [slot < number for slot in range(most)]
            rng.shuffle(closed)
        chosen: list[SceneQuestion] = []
        for cost, wished in zip(costs, closed, strict=True):
            strange = [(wished is not None and says != wished, own != cost) for _, says, own in left]
            chosen.append(left.pop(strange.index(min(strange)))[0])
        rng.shuffle(chosen)
        return tuple(item if item.options else self._answered(item) for item in chosen)

    def _answered(self, item: SceneQuestion) -> SceneQuestion:
        """Return an open question with ten answers of people in place of all ways to say the right one."""
        answer, *variants = item.answers
        return replace(item, answers=_humans(self.rng, answer, tuple(variants)))


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
