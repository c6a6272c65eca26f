"""A sample (a picture, a question and what is right to answer) and its score.

It knows what every data set has in common; it does not know any file format.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from tempovlm.core.errors import UserError
from tempovlm.tasks import scoring
from tempovlm.tasks.choices import choice_accuracy

STYLES: dict[str, str] = {
    "text_vqa": "text_vqa",
    "coco_2014_vqa": "vqa2",
    "okvqa": "okvqa",
    "science_qa_img": "science_qa",
}
"""Data set to the name of its prompt style, for those that the generated test bed stands in for."""

GENERATED: tuple[str, ...] = tuple(STYLES)
"""Data sets that the generated test bed stands in for."""

DATASETS: dict[str, str] = {
    **STYLES,
    "doc_qa": "doc_qa",
    "st_qa": "st_qa",
    "tally_qa": "tally_qa",
    "coco_caption": "coco_captioning",
}
"""Every data set that can be read → the name of its prompt style."""

SCORED_TOGETHER = frozenset({"coco_caption"})
"""Data sets with a score of all answers together (CIDEr of captions), where an answer alone has none."""

_RULES: dict[str, Callable[[str, Sequence[str]], float]] = {
    "text_vqa": scoring.text_vqa_accuracy,
    "doc_qa": scoring.anls,
    "st_qa": scoring.anls,
    "tally_qa": scoring.number_match,
}
"""How one answer is scored where it is neither multiple choice nor VQA accuracy."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """One question of a data set.

    Attributes:
        question_id: Unique within data set and split.
        image_id: The same for all questions of a picture, so that statistics can be clustered by it.
        image_path: Where the picture is.
        question: What is asked; for multiple choice with the options below, one a line.
        answers: What people answered; for multiple choice the right letter.
        style: Name of the prompt style, see `DATASETS`.
        dataset: Name of the data set.
        split: 'train' or 'val'.
        options: Options of a multiple choice question, else empty.
        answer_index: Index of the right option, -1 where there are none.
        twin_path: The same scene with other noise and a small shift, where the data set has one.
        data_source: 'synthetic' or 'official'.
        template: What kind of question it is, where the data set says so.
        held_out: Whether it needs a word or combination that training never shows (generated data only).
    """

    question_id: str
    image_id: str
    image_path: Path
    question: str
    answers: tuple[str, ...]
    style: str
    dataset: str
    split: str
    options: tuple[str, ...] = ()
    answer_index: int = -1
    twin_path: Path | None = None
    data_source: str = "official"
    template: str = ""
    held_out: bool = False


def check_unique(ids: Sequence[str], places: Sequence[object]) -> None:
    """Raise a `UserError` that names the first id that is there twice: one of its rows would stand for all.

    Args:
        ids: of questions.
        places: the file, or what else, that each id is from.
    """
    first: dict[str, int] = {}
    for place, name in enumerate(ids):
        if name in first:
            count, others = ids.count(name), len(ids) - len(set(ids))
            kept, again = places[first[name]], places[place]
            files = f"{again}" if kept == again else f"{again} (and {kept})"
            more = f"; {others} of {len(ids)} ids repeat an earlier one" if others >= count else ""
            raise UserError(f"{files}: question id {name} is there {count} times{more}; give each its own id")
        first[name] = place


def choice_question(question: str, options: Sequence[str]) -> str:
    """The text of a multiple choice question: the question, then a line `A: option` for each, each line ended."""
    lines = [f"{chr(ord('A') + index)}: {option}" for index, option in enumerate(options)]
    return "\n".join((question, *lines)) + "\n"


def lists_options(question: str) -> bool:
    """Whether a question offers answers by letter: it names A and B alone, however it sets them off."""
    letters = re.findall(r"(?<![\w'])[a-z](?!\w)", unicodedata.normalize("NFKC", question).casefold())
    return {"a", "b"} <= set(letters)


def score(sample: Sample, prediction: str) -> float:
    """The score of a prediction, from 0 to 1, by the rule of the sample's data set.

    Raises:
        UserError: The data set has no score for a single answer.
    """
    if sample.options:
        return choice_accuracy(prediction, sample.options, sample.answer_index)
    if sample.dataset in SCORED_TOGETHER:
        raise UserError(
            f"{sample.dataset} is scored by CIDEr over many captions at once: use tempovlm bench or "
            "test_adaptive_inference.py"
        )
    return _RULES.get(sample.dataset, scoring.vqa_accuracy)(prediction, sample.answers)


def check_datasets(names: Sequence[str], flag: str, *, together: bool = False) -> list[str]:
    """The names, each once and in order.

    Args:
        names: What the user gave.
        flag: Its name, for the message.
        together: Whether data sets whose answers have no score of their own will do.

    Raises:
        UserError: One is unknown, or will not do.
    """
    for name in names:
        if name not in DATASETS:
            raise UserError(f"--{flag} {name}: unknown data set; choose from {', '.join(DATASETS)}")
        if name in SCORED_TOGETHER and not together:
            raise UserError(
                f"--{flag} {name}: captions are scored many at once, not answer by answer; tempovlm bench and "
                "test_adaptive_inference.py score them"
            )
    return list(dict.fromkeys(names))


def check_scorable(samples: Sequence[Sample]) -> None:
    """Make sure that these can be scored, before anybody answers them.

    Raises:
        UserError: Captions are among them, and pycocoevalcap is not installed or there are too few.
    """
    captions = sum(sample.dataset in SCORED_TOGETHER for sample in samples)
    if captions:
        from tempovlm.tasks.captions import check_cider

        check_cider(captions)
