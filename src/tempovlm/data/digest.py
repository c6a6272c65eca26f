"""What a question is, in a few digits, so that another one of the same id is not taken for it.

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
"""In place of a picture's digits, where its file cannot be read."""

Digests = Mapping[str, str]
"""Question id → the digits of what is asked and right, a slash, and those of the picture."""


def question_digests(samples: Iterable[Sample]) -> dict[str, str]:
    """The digest of each question by its id; each picture is read once, and again when its file has changed."""
    return {str(one.question_id): f"{text_digits(one)}/{picture_digits(one.image_path)}" for one in samples}


def text_digits(sample: Sample) -> str:
    """Those of what is asked and what is right."""
    about = (sample.dataset, sample.split, str(sample.question_id), sample.question)
    rule = [sample.rule] if sample.rule else []
    return _digits(json.dumps([*about, sample.answers, sample.options, sample.answer_index, *rule]).encode())


def picture_digits(path: Path) -> str:
    """Those of a file's bytes, or `MISSING`."""
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
    """What two digests of one id differ in, `text` or `picture`; a picture that is missing differs from none."""
    (text, picture), (other_text, other_picture) = one.split("/"), other.split("/")
    if text != other_text:
        return "text"
    if pictures and picture != other_picture and MISSING not in (picture, other_picture):
        return "picture"
    return None


def refuse_others(before: Digests, now: Digests, where: str, *, pictures: bool = True) -> None:
    """Raise a `UserError` where an id names another question than before.

    Args:
        before: digests of what is there.
        now: those of this run's questions; ids of one side alone say nothing.
        where: begins the message.
        pictures: False compares the texts alone.
    """
    shared = [name for name in now if name in before]
    found = {name: difference(before[name], now[name], pictures=pictures) for name in shared}
    others = [name for name in shared if found[name]]
    if others:
        raise UserError(
            f"{where}: the {found[others[0]]} of question {others[0]} is another now ({len(others)} of "
            f"{len(shared)} questions differ): give the --data_dir that was used before, or another output"
        )


def merged(before: Digests, now: Digests) -> dict[str, str]:
    """Digests of both; now counts, except that a picture that is missing now keeps the digits that it had."""
    gone = {name for name in now if now[name] == f"{before.get(name, '').partition('/')[0]}/{MISSING}"}
    return {**before, **{name: value for name, value in now.items() if name not in gone}}
