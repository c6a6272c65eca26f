"""Reads your own questions: one file of pictures, questions and right answers, which stands for a data set.

Columns are `image`, `question`, `answer` or `answers`, and optionally `id`, `options`, `style`, `split`, `score`;
others are left alone. In messages a row of .csv and .jsonl is counted as a spreadsheet or an editor shows it, and
one of .parquet from 0. Reading .parquet needs pyarrow, which the extra `experiments` brings.
"""

from __future__ import annotations

import csv
import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from io import StringIO
from itertools import zip_longest
from pathlib import Path
from typing import Any

from tempovlm.core.checks import PATH_SHOWN, shown
from tempovlm.core.errors import UserError
from tempovlm.core.paths import cache_dir, check_file, exists_as, expanded, write_whole
from tempovlm.core.request import Request
from tempovlm.data.dataset import SPLITS
from tempovlm.data.entries import Entry
from tempovlm.data.metrics.rules import DESCRIPTIONS, LEAST_FOR_VQA, RULES, choose_rule
from tempovlm.data.parquet import has_picture, open_parquet, picture_bytes, read_pictures
from tempovlm.data.sample import Sample, choice_question
from tempovlm.data.styles import STYLES

SUFFIXES = (".csv", ".jsonl", ".parquet")

_NEEDED = ("image", "question")
_ANSWERS = ("answers", "answer")
_OPTIONAL = ("id", "options", "style", "split", "score")
_LISTS = ("answers", "answer", "options")
_COLUMNS = "image, question and answer or answers, and optionally id, options, style, split, score"
_OPEN_STYLE, _CHOICE_STYLE = "vqa2", "science_qa"
_DIGITS = 12
_DIGEST_OF_PICTURE = 32


@dataclass(frozen=True, slots=True)
class OwnSet:
    """Questions of one file.

    Attributes:
        path: the file.
        digest: of its bytes, 12 hex digits.
        samples: all questions, in the file's order.
        score: the rule that was asked for; None left it to the file.
        version: tells whether the file has changed since it was read.
    """

    path: Path
    digest: str
    samples: tuple[Sample, ...]
    score: str | None
    version: tuple[object, ...]
    _held: Mapping[Path, int] = field(repr=False)

    @classmethod
    def read(cls, path: Path, score: str | None = None) -> OwnSet:
        """Read and check a file, its pictures too.

        Args:
            path: a file with one of `SUFFIXES`.
            score: the rule for open questions; by default that of the column `score`, else one by their answers.

        Raises:
            UserError: the file, a row or a picture is missing or wrong; names file, row and column.
        """
        path = expanded(path).absolute()
        version = version_of(path)
        digest = digest_of(path)
        name, source = own_name(path), f"{path.name} {digest}"
        pictures = _Pictures(path)
        samples = tuple(
            Sample(**fields, dataset=name, data_source=source)
            for row in _rows(path)
            for fields in (_fields(row, pictures, score),)
        )
        if not samples:
            raise UserError(f"{path}: holds no questions; give each a row below the names of the columns")
        return cls(path, digest, samples, score, version, pictures.held)

    @property
    def name(self) -> str:
        """Its name in results: the file's name without its ending, with `_` for all but letters and digits."""
        return own_name(self.path)

    @property
    def task(self) -> str:
        """'multiple_choice' where all questions have options, else 'vqa'."""
        return "multiple_choice" if all(sample.options for sample in self.samples) else "vqa"

    @property
    def count(self) -> str:
        """The number of questions, for people."""
        number = len(self.samples)
        return f"{number} question{'s' if number > 1 else ''}"

    def of(self, split: str) -> list[Sample]:
        """The questions of a split.

        Raises:
            UserError: there are none.
        """
        found = [sample for sample in self.samples if sample.split == split]
        if not found:
            raise UserError(
                f"{self.path}: has no question of split {split}; mark some in a column split "
                f"({' or '.join(SPLITS)}; an empty cell is val)"
            )
        return found

    def extract(self, samples: Sequence[Sample]) -> list[Sample]:
        """The samples, after the pictures that the file itself holds are in files of their own, in the cache."""
        missing = {sample.image_path for sample in samples if sample.image_path in self._held}
        rows = {self._held[place]: place for place in missing if not place.is_file()}
        for row, value in read_pictures(self.path, set(rows)) if rows else ():
            write_whole(rows[row], picture_bytes(value, f"{self.path}: row {row}, column image"))
        return list(samples)


def describe(samples: Sequence[Sample]) -> str:
    """Say for people how questions that name their rule are scored; empty if none does."""
    kinds = Counter((one.rule, _few(one)) for one in samples if one.rule)
    told = []
    for (rule, few), count in kinds.items():
        some = f"{count} of {len(samples)} questions, " if count < len(samples) else ""
        told.append(f"{some}{few}scored by {DESCRIPTIONS[rule]}")
    return "; ".join(told)


def _few(sample: Sample) -> str:
    """That an open question has too few references for VQA accuracy."""
    if sample.options or len(sample.answers) >= LEAST_FOR_VQA:
        return ""
    return f"{'one reference' if len(sample.answers) == 1 else 'two or three references'} a question: "


def is_own(name: str | Path) -> bool:
    """Whether a data set's name is that of a file of questions."""
    return Path(name).suffix.lower() in SUFFIXES


def own_name(path: str | Path) -> str:
    """Return the name that results give to the questions of a file."""
    return "".join(letter if letter.isalnum() else "_" for letter in Path(path).stem)


def digest_of(path: Path) -> str:
    """Twelve hex digits of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:_DIGITS]


def version_of(path: Path) -> tuple[object, ...]:
    """Return a value that changes when the file does.

    Raises:
        UserError: there is no such file.
    """
    path = expanded(path).absolute()
    check_file(path, f"give a file of questions ({', '.join(SUFFIXES)})")
    about = path.stat()
    return path, about.st_size, about.st_mtime_ns


class _Row(Entry):
    """A row without its empty cells; cells that are lists written as text are lists."""

    __slots__ = ()

    @classmethod
    def of(cls, cells: Mapping[str, Any], path: Path, name: str) -> _Row:
        kept = {key: cell for key, cell in cells.items() if cell is not None and str(cell).strip()}
        row = cls(kept, path, name)
        lists = {key: row.parsed(key) for key in _LISTS if isinstance(kept.get(key), str)}
        return cls({**kept, **lists}, path, name)

    def wrong(self, key: str, why: str) -> UserError:
        """The error that a cell is wrong, on one line."""
        return UserError(f"{self.path}: {self.name}, column {key}: {why}; correct it, or leave the row out")

    def parsed(self, key: str) -> Any:
        """A cell's text as a list: JSON, or parts between `|` where the column is one of lists; else as it is."""
        text = self.text(key).strip()
        if text.startswith("[") and text.endswith("]"):
            try:
                return json.loads(text)
            except (ValueError, RecursionError):
                raise self.wrong(
                    key, f'is {shown(text)}, a list that is no JSON; write it as ["red", "blue"] or red|blue'
                ) from None
        if "|" in text and key != "answer":
            return [part.strip() for part in text.split("|")]
        return [text] if key == "options" else text

    def choice(self, key: str, names: Sequence[str]) -> str | None:
        """A cell that holds one of several names; None where it is empty."""
        if key not in self.fields:
            return None
        value = self.text(key).strip()
        if value not in names:
            raise self.wrong(key, f"is {shown(value)}, none of {', '.join(names)}")
        return value


def _rows(path: Path) -> Iterator[_Row]:
    """The rows of a file.

    Raises:
        UserError: it cannot be read, or lacks a column.
    """
    readers = {".csv": _csv_rows, ".jsonl": _jsonl_rows, ".parquet": _parquet_rows}
    rows = list(readers[path.suffix.lower()](path))
    names = dict.fromkeys(name for _, cells in rows for name in cells)
    missing = [name for name in _NEEDED if name not in names]
    missing += [] if any(name in names for name in _ANSWERS) else ["answer"]
    if rows and missing:
        has = ", ".join(map(str, names)) or "none"
        raise UserError(f"{path}: has no column {missing[0]} (it has {shown(has)}); give {_COLUMNS}")
    seen: dict[str, int] = {}
    for number, cells in rows:
        row = _Row.of(cells, path, f"row {number}")
        name = row.text("id") if "id" in row.fields else str(number)
        if name in seen:
            raise row.wrong("id", f"{shown(name)} is the id of row {seen[name]} too")
        seen[name] = number
        yield _Row({**row.fields, "id": name}, path, row.name)


def _text(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: is no UTF-8 text (byte {error.start}); save it as UTF-8") from None


def _csv_rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Rows below the head, which says what separates the cells: commas, semicolons or tabs."""
    text = _text(path)
    csv.field_size_limit(max(csv.field_size_limit(), len(text)))  # a cell may be as long as the file
    head = text.partition("\n")[0]
    reader = csv.reader(StringIO(text, newline=""), delimiter=max(",;\t", key=head.count), strict=True)
    names: list[str] = []
    before = 0
    try:
        for cells in reader:
            number, before = before + 1, reader.line_num
            if not names:
                names = [cell.strip() for cell in cells]
                _check_head(names, path)
            elif len(cells) > len(names):
                raise UserError(
                    f"{path}: row {number}: has {len(cells)} cells below {len(names)} columns; put texts that "
                    "hold the separator in double quotes"
                )
            elif any(cell.strip() for cell in cells):
                yield number, dict(zip_longest(names, cells))
    except csv.Error as error:
        raise UserError(f"{path}: row {before + 1}: {error}; double each quote within quotes") from None


def _check_head(names: Sequence[str], path: Path) -> None:
    doubled = [name for name in names if name and names.count(name) > 1]
    if doubled:
        raise UserError(f"{path}: has {names.count(doubled[0])} columns named {doubled[0]}; keep one")


def _jsonl_rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    for number, line in enumerate(_text(path).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            cells = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{path}: row {number}: no JSON ({error}); write one object on each line") from None
        if not isinstance(cells, dict):
            raise UserError(f"{path}: row {number}: is {shown(cells)}; write one object on each line")
        yield number, {key: _named(key, cell, f"{path}: row {number}") for key, cell in cells.items()}


def _parquet_rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    file = open_parquet(path)
    names = file.schema_arrow.names
    _check_head(names, path)
    wanted = [name for name in ("question", *_ANSWERS, *_OPTIONAL) if name in names]
    try:
        rows = file.read(columns=wanted).to_pylist()
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: damaged or half-written parquet file ({error}); write it anew") from None
    pictures = read_pictures(path) if "image" in names else ()
    # Bytes are let go one by one: a file may hold gigabytes of them.
    images = {number: {"image": _named("image", value, f"{path}: row {number}")} for number, value in pictures}
    others = dict.fromkeys(names)
    yield from ((number, {**others, **row, **images.get(number, {})}) for number, row in enumerate(rows))


@dataclass(frozen=True, slots=True)
class _Held:
    """A picture that is in the file itself, by the digest of its bytes."""

    digest: str


def _named(key: str, value: Any, where: str) -> Any:
    """A cell; of a picture's bytes their digest, and of a struct that has a path alone that path."""
    if key != "image":
        return value
    if isinstance(value, dict) and not value.get("bytes"):
        return value.get("path")
    if not isinstance(value, dict | bytes | list) or not has_picture(value):
        return value
    content = picture_bytes(value, f"{where}, column image")
    return _Held(hashlib.sha256(content).hexdigest()[:_DIGEST_OF_PICTURE])


class _Pictures:
    """Finds the pictures of a file's rows and checks that they are there.

    Attributes:
        held: where pictures that the file itself holds are to be put → a row that holds it.
    """

    def __init__(self, path: Path) -> None:
        self.held: dict[Path, int] = {}
        self._folder = cache_dir() / "pictures" / own_name(path)
        self._known: set[Path] = set()

    def find(self, row: _Row) -> tuple[str, Path]:
        """Id and place of a row's picture.

        Raises:
            UserError: it is missing, or no picture.
        """
        from PIL import Image, UnidentifiedImageError

        value = row.value("image")
        if isinstance(value, _Held):
            place = self._folder / f"{value.digest}.picture"
            self.held.setdefault(place, int(row.name.removeprefix("row ")))
            return value.digest[:_DIGITS], place
        if not isinstance(value, str):
            raise row.wrong("image", f"is {shown(value)}, neither the path of a picture nor its bytes")
        if value.startswith(("http://", "https://", "data:")):
            raise row.wrong("image", f"is an address ({shown(value)}), and nothing is fetched: name a file")
        try:
            place = row.path.parent / expanded(value.strip())
        except UserError:
            raise row.wrong("image", f"{shown(value)} is in the home folder of nobody") from None
        if place not in self._known:
            if not exists_as(place, Path.is_file):
                raise row.wrong("image", f"{shown(value)} is missing in {shown(place.parent, PATH_SHOWN)}")
            try:
                Image.open(place).close()
            except UnidentifiedImageError:
                raise row.wrong("image", f"{shown(place)} is no picture") from None
            except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
                pass  # Damaged or too large: whoever opens it says so, as of any other picture.
            self._known.add(place)
        return str(Path(value.strip())), place


def _fields(row: _Row, pictures: _Pictures, score: str | None) -> dict[str, Any]:
    """The fields of a sample, all but those that the file has in common."""
    image_id, image_path = pictures.find(row)
    question = row.text("question").strip()
    try:
        Request(images=(), question=question)
    except UserError as error:
        raise row.wrong("question", str(error)) from None
    key = next((name for name in _ANSWERS if name in row.fields), "answer")
    answers = row.answers(key)
    if not all(answer.strip() for answer in answers):
        raise row.wrong(key, "holds an empty answer, which an empty reply would meet")
    fields: dict[str, Any] = {
        "question_id": row.fields["id"],
        "image_id": image_id,
        "image_path": image_path,
        "split": row.choice("split", SPLITS) or "val",
    }
    style = row.choice("style", STYLES)
    rule = row.choice("score", RULES)
    if "options" not in row.fields:
        if (score or rule) == "choice":
            raise row.wrong("options", "is missing, and the rule choice is about options")
        fields |= {"question": question, "answers": answers, "style": style or _OPEN_STYLE}
        return fields | {"rule": choose_rule(score or rule, len(answers))}
    if rule not in (None, "choice"):
        raise row.wrong("options", f"is there, and the rule {rule} is about open answers: score it by choice")
    options = row.options("options")
    index = _right_option(row, key, answers, options)
    return fields | {
        "question": choice_question(question, options),
        "answers": (chr(ord("A") + index),),
        "options": options,
        "answer_index": index,
        "style": style or _CHOICE_STYLE,
        "rule": "choice",
    }


def _right_option(row: _Row, key: str, answers: Sequence[str], options: Sequence[str]) -> int:
    """The place of the right option, given by its letter or its text; first by letter, as replies are read."""
    given = answers[0].strip()
    letters = [chr(ord("A") + place) for place in range(len(options))]
    if len(answers) == 1 and given in letters:
        return letters.index(given)
    texts = [option.strip().casefold() for option in options]
    if len(answers) > 1 or texts.count(given.casefold()) != 1:
        what = f"{len(answers)} answers" if len(answers) > 1 else shown(given)
        raise row.wrong(
            key, f"is {what}; give the letter ({letters[0]} to {letters[-1]}) or the text of one option"
        )
    return texts.index(given.casefold())
