"""Short digests of questions, to detect another question with the same id.

Pictures count by the bytes of their files, which are not decoded: 10,000 of 50 kB take two seconds.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path

from tempovlm.core.errors import UserError
from tempovlm.data.sample import Sample

DIGITS = 12

MISSING = "-"
"""Stands for a picture's digits if its file cannot be read."""

Digests = Mapping[str, str]
"""From question id to the digits of text and answers, a slash, and those of the picture."""


def question_digests(samples: Iterable[Sample]) -> dict[str, str]:
    """Return the digest of each question by its id; each picture is read once, and again if its file changed."""
    return {str(one.question_id): f"{text_digits(one)}/{picture_digits(one.image_path)}" for one in samples}


def text_digits(sample: Sample) -> str:
    """Return the digits of the question's text and answers."""
    about = (sample.dataset, sample.split, str(sample.question_id), sample.question)
    rule = [sample.rule] if sample.rule else []
    return _digits(json.dumps([*about, sample.answers, sample.options, sample.answer_index, *rule]).encode())


def picture_digits(path: Path) -> str:
    """Return the digits of a file's bytes, or `MISSING`."""
    try:
        about = path.stat()
        return _file_digits(path, about.st_size, about.st_mtime_ns)
    except OSError:
        return MISSING


@cache
def _file_digits(path: Path, _size: int, _changed: int) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:DIGITS]


def _digits(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:DIGITS]


def difference(one: str, other: str, *, pictures: bool = True) -> str | None:
    """Return the difference of two digests, `text` or `picture`; a missing picture equals any."""
    (text, picture), (other_text, other_picture) = one.split("/"), other.split("/")
    if text != other_text:
        return "text"
    if pictures and picture != other_picture and MISSING not in (picture, other_picture):
        return "picture"
    return None


def refuse_others(before: Digests, now: Digests, where: str, *, pictures: bool = True) -> None:
    """Raise a `UserError` if an id names another question than before.

    Args:
        before: digests that are stored.
        now: digests of this run's questions; ids that only one side has are ignored.
        where: beginning of the message.
        pictures: False compares only the texts.
    """
    shared = [name for name in now if name in before]
    found = {name: difference(before[name], now[name], pictures=pictures) for name in shared}
    others = [name for name in shared if found[name]]
    if others:
        raise UserError(
            f"{where}: the {found[others[0]]} of question {others[0]} has changed ({len(others)} of "
            f"{len(shared)} questions differ): give the --data_dir that was used before, or another output"
        )


def merged(before: Digests, now: Digests) -> dict[str, str]:
    """Merge both; `now` wins, except that a picture that is missing now keeps its earlier digits."""
    gone = {name for name in now if now[name] == f"{before.get(name, '').partition('/')[0]}/{MISSING}"}
    return {**before, **{name: value for name, value in now.items() if name not in gone}}
