"""A sample: a picture, a question and the right answers."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tempovlm.core.errors import UserError

_LETTER = re.compile(r"(?<![\w'])(?:[A-Z](?!\w)|[a-z](?=\s*[.):\]]|\s+[-–=]\s))")
"""A letter that can name an option."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """One question of a data set.

    Attributes:
        question_id: Unique within data set and split.
        image_id: The same for all questions of a picture, so that statistics can be clustered by it.
        image_path: The picture's file.
        question: The question; for multiple choice with the options below, one a line.
        answers: People's answers; for multiple choice the right letter.
        style: Name of the prompt style, see `model/prompt.py`.
        dataset: Name of the data set.
        split: 'train' or 'val'.
        options: Options of a multiple choice question, else empty.
        answer_index: Index of the right option, -1 without options.
        twin_path: The same scene with other noise and a small shift, if the data set has one.
        data_source: 'synthetic' or 'official'.
        template: Kind of question, if the data set names it.
        held_out: Whether it needs a word or combination that training never shows (generated data only).
        rule: What an answer is scored by, one of `metrics.rules.RULES`; empty for the rule of the data set.
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
    rule: str = ""


def check_unique(ids: Sequence[str], places: Sequence[object]) -> None:
    """Raise a `UserError` that names the first duplicate id: one of its rows would stand for all.

    Args:
        ids: ids of questions.
        places: the file or other place that each id comes from.
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
    """Return the text of a multiple choice question: the question, then a line `A: option` for each."""
    lines = [f"{chr(ord('A') + index)}: {option}" for index, option in enumerate(options)]
    return "\n".join((question, *lines)) + "\n"


def lists_options(question: str) -> bool:
    """Whether a question offers answers by letter: A and B alone, or small ones before a mark such as `a)`.

    A small letter without a mark is a word, as in `is this a plan b?`.
    """
    text = unicodedata.normalize("NFKC", question)
    return {"A", "B"} <= {letter.upper() for letter in _LETTER.findall(text)}
