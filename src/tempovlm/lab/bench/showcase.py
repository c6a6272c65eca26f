"""Example pictures for which the budget matters, and their answers at several budgets.

Pictures are chosen by their content (large print, small print, counting, a fact, a chart), not by a model's
answers.
"""

from __future__ import annotations

import io
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from PIL import Image

from tempovlm.core.files import make_folder
from tempovlm.core.knobs import KnobSpace
from tempovlm.core.paths import write_whole
from tempovlm.core.request import Answer
from tempovlm.data.registry import DATASETS
from tempovlm.data.sample import Sample, choice_question
from tempovlm.data.scoring import score
from tempovlm.lab.bench.bench import Model
from tempovlm.testbed.generate import make_scene, scene_size
from tempovlm.testbed.lexicon import CHARSET, SIGN_WORDS
from tempovlm.testbed.scene import Scene, SceneQuestion

FIXED_BUDGETS_MS = (60.0, 120.0, 300.0)
"""Tight, middle and loose budget without a profile."""

_MAX_JPEG_BYTES = 40_000
_RIGHT = 0.5
_ASPECT = (1.2, 1.4)


class CalibratedProfile(Protocol):
    """Calibrated upper totals of the settings."""

    def upper_total_ms(self, index: int) -> float:
        """Return the calibrated upper bound of the total of the setting with this index."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """Description of an example, and the conditions that its question must fulfil.

    Attributes:
        name: name of the file. caption: text for the reader.
        templates: question templates, any of them.
        lettering: smallest and largest height in pixels of the letters that spell the answer; None: any.
        min_number: the smallest answer, if it is a number.
        known_word: whether the answer is an English word; else it may be a made-up one.
    """

    name: str
    caption: str
    dataset: str
    templates: tuple[str, ...]
    lettering: tuple[float, float] | None = None
    min_number: int = 0
    known_word: bool = False


WANTED = (
    Wanted(
        name="score",
        caption="A scoreboard",
        dataset="text_vqa",
        templates=("score_winner", "score_compare"),
    ),
    Wanted(
        name="small_print",
        caption="Small print",
        dataset="text_vqa",
        templates=("sign_color", "bottle_label", "shop_name"),
        lettering=(6, 11),
        known_word=True,
    ),
    Wanted(name="price", caption="A price tag", dataset="text_vqa", templates=("price",), lettering=(11, 17)),
    Wanted(
        name="count",
        caption="Counting",
        dataset="coco_2014_vqa",
        templates=("count_shape", "count_color"),
        min_number=3,
    ),
    Wanted(
        name="fact",
        caption="A fact, joined with what is seen",
        dataset="okvqa",
        templates=("fact_live", "fact_eat", "fact_use"),
    ),
    Wanted(
        name="chart",
        caption="A bar chart",
        dataset="science_qa_img",
        templates=("bar_color_of", "bar_second"),
    ),
)


FIGURE = Wanted(
    name="figure",
    caption="A sign",
    dataset="text_vqa",
    templates=("sign_color",),
    lettering=(8, 18),
    known_word=True,
)
"""Example for the README's picture: print of a size that only some settings can read."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Example:
    """A picture on disk with one question.

    Attributes:
        question: as shown to people. truth: the right answer in words.
        sample: the same for the model and for scoring.
    """

    name: str
    caption: str
    path: Path
    question: str
    truth: str
    sample: Sample


@dataclass(frozen=True, slots=True, kw_only=True)
class Shown:
    """An example's answer at one budget.

    Attributes:
        score: from 0 to 1. spoken: the answer in words; for a letter, with its option.
    """

    budget_ms: float
    answer: Answer
    score: float
    spoken: str

    @property
    def is_right(self) -> bool:
        """Whether the score is at least one half."""
        return self.score >= _RIGHT


def make_examples(folder: Path, *, seed: int = 0) -> list[Example]:
    """Draw the pictures and write them as JPEG files of at most 40 kB.

    Args:
        folder: folder to make.
        seed: seed of the test bed.
    """
    return [next(draw_examples(wanted, folder, seed=seed)) for wanted in WANTED]


def draw_examples(wanted: Wanted, folder: Path, *, seed: int = 0) -> Iterator[Example]:
    """Yield examples of one kind; each overwrites the picture of the one before."""
    make_folder(folder)
    path = folder / f"{wanted.name}.jpg"
    for index, scene, question in find_scenes(wanted, seed):
        write_whole(path, jpeg(Image.fromarray(scene.image)))
        yield _example(wanted, path, index, question)


def find_scenes(wanted: Wanted, seed: int) -> Iterator[tuple[int, Scene, SceneQuestion]]:
    """Yield validation scenes near 4 : 3 with a question of the wanted kind, in the test bed's order."""
    index = 0
    while True:
        height, width = scene_size(wanted.dataset, "val", index, seed=seed)
        if _ASPECT[0] <= width / height <= _ASPECT[1]:
            scene = make_scene(wanted.dataset, "val", index, seed=seed)
            for question in scene.questions:
                if _fits(wanted, scene, question):
                    yield index, scene, question
        index += 1


def _fits(wanted: Wanted, scene: Scene, question: SceneQuestion) -> bool:
    if (
        question.template not in wanted.templates
        or question.held_out
        or " " in question.answer.removeprefix("to ")
    ):
        return False
    if wanted.known_word and question.answer not in SIGN_WORDS:
        return False
    if question.answer.isdigit() and int(question.answer) < wanted.min_number:
        return False
    if wanted.lettering is None:
        return True
    height = lettering(scene, question.answer)
    return height is not None and wanted.lettering[0] <= height <= wanted.lettering[1]


def lettering(scene: Scene, text: str) -> float | None:
    """Return the height in pixels of the tallest letter of a text that is in the scene once, else None."""
    written = "".join(CHARSET[i] for i in scene.char_ids)
    wanted = text.replace(" ", "").lower()
    if not wanted or written.count(wanted) != 1:
        return None
    start = written.index(wanted)
    boxes = scene.char_boxes[start : start + len(wanted)]
    return float((boxes[:, 3] - boxes[:, 1]).max())


def jpeg(image: Image.Image) -> bytes:
    """Return the picture as JPEG, at the best quality from 92 down that stays within 40 kB."""
    data = b""
    for quality in range(92, 40, -6):
        buffer = io.BytesIO()
        image.save(buffer, "JPEG", quality=quality, optimize=True)
        data = buffer.getvalue()
        if len(data) <= _MAX_JPEG_BYTES:
            break
    return data


def answer_examples(
    model: Model, examples: Sequence[Example], budgets_ms: Sequence[float]
) -> Iterator[tuple[Example, tuple[Shown, ...]]]:
    """Answer each example at each budget, from the tightest to the loosest."""
    for example in examples:
        yield example, tuple(_show(model, example, budget_ms) for budget_ms in sorted(budgets_ms))


def _show(model: Model, example: Example, budget_ms: float) -> Shown:
    sample = example.sample
    answer = model.answer(sample.image_path, sample.question, budget_ms, style=sample.style)
    place = "abcdefgh".find(answer.text.strip(" .()").lower() or "?")
    option = sample.options[place] if 0 <= place < len(sample.options) else ""
    spoken = f"{answer.text} ({option})" if option else answer.text
    return Shown(budget_ms=budget_ms, answer=answer, score=score(sample, answer.text), spoken=spoken)


def choose_budgets_ms(space: KnobSpace, profile: CalibratedProfile | None) -> tuple[float, float, float]:
    """Return a tight, a middle and a loose budget for this machine.

    Tight is a little above the upper total of the cheapest setting, loose above that of the native one, middle
    their geometric mean; each rounded up to a round number. Without a profile they are `FIXED_BUDGETS_MS`.
    """
    if profile is None:
        return FIXED_BUDGETS_MS
    cheapest_ms, native_ms = (
        1.1 * profile.upper_total_ms(space.index(knobs)) for knobs in (space.cheapest, space.native)
    )
    tight_ms, loose_ms = _round_up(cheapest_ms), _round_up(native_ms)
    middle_ms = _round_up(math.sqrt(tight_ms * loose_ms))
    if not tight_ms < middle_ms < loose_ms:
        return FIXED_BUDGETS_MS
    return tight_ms, middle_ms, loose_ms


def _round_up(value_ms: float) -> float:
    """Round up to two digits, for readable budgets."""
    step = 10.0 ** (math.floor(math.log10(value_ms)) - 1)
    return math.ceil(value_ms / step - 1e-9) * step


def is_telling(shown: Sequence[Shown]) -> bool:
    """Whether the answers show the effect of a budget: wrong at the tightest, right at the loosest.

    A picture chosen in this way is labelled as such: it is an illustration, not evidence.
    """
    return shown[-1].is_right and not shown[0].is_right


def _example(wanted: Wanted, path: Path, index: int, question: SceneQuestion) -> Example:
    asked = question.question
    if question.options:
        asked = choice_question(asked, question.options)
    truth = question.options[question.answer_index] if question.options else question.answer
    sample = Sample(
        question_id=f"{wanted.name}-{index}",
        image_id=f"{wanted.dataset}-{index}",
        image_path=path,
        question=asked,
        answers=question.answers,
        style=DATASETS[wanted.dataset].style,
        dataset=wanted.dataset,
        split="val",
        options=question.options,
        answer_index=question.answer_index,
        data_source="synthetic",
        template=question.template,
    )
    return Example(
        name=wanted.name, caption=wanted.caption, path=path, question=question.question, truth=truth, sample=sample
    )
