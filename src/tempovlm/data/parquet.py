"""Reads the hub's parquet of a data set: questions at once, pictures only of the samples that are drawn.

It knows the columns of the common hub copies; it does not know how to get them. Needs pyarrow, which the extra
`experiments` brings.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image, UnidentifiedImageError

from tempovlm.core.errors import UserError
from tempovlm.core.paths import cache_dir
from tempovlm.data.entries import Entry
from tempovlm.data.files import CAPTION_REQUEST, hinted
from tempovlm.data.sample import DATASETS, Sample, choice_question

if TYPE_CHECKING:
    import pyarrow.parquet as pq

_SPLITS = {"train": re.compile(r"train(ing)?\d*\b"), "val": re.compile(r"val(idation)?(2014)?\b")}
_OTHER_SET = "InfographicVQA"
"""Lies beside DocVQA in the hub's copy and is another data set."""
_UNSAFE = re.compile(r"[^\w.-]+")


@dataclass(frozen=True, slots=True)
class _Columns:
    """What a hub copy's rows mean.

    Attributes:
        names: Columns to read beside the picture.
        fields: From a row, and its place in the split, to the fields of a sample.
        id: The column of the question's id, where there is one.
    """

    names: tuple[str, ...]
    fields: Callable[[Entry, str], dict[str, Any]]
    id: str | None = None


def _asked(row: Entry, question_id: str, image_id: str) -> dict[str, Any]:
    return {
        "question_id": question_id,
        "image_id": image_id,
        "question": row.text("question"),
        "answers": row.answers(),
    }


def _numbered(row: Entry, _: str) -> dict[str, Any]:
    return _asked(row, row.text("question_id"), row.text("image_id"))


def _outside(row: Entry, _: str) -> dict[str, Any]:
    # A question's id is its picture's with one more digit.
    return _asked(row, row.text("question_id"), row.text("question_id")[:-1])


def _science(row: Entry, place: str) -> dict[str, Any]:
    options = row.options("choices")
    index = row.option_index("answer", len(options))
    return {
        "question_id": place,
        "image_id": place,
        "question": choice_question(hinted(row), options),
        "answers": (chr(ord("a") + index),),
        "options": options,
        "answer_index": index,
    }


def _document(row: Entry, _: str) -> dict[str, Any]:
    # One document has several pages, each a picture of its own.
    page = f"{row.text('ucsf_document_id')}_{row.text('ucsf_document_page_no')}"
    return _asked(row, row.text("questionId"), page)


def _caption(row: Entry, _: str) -> dict[str, Any]:
    return {
        "question_id": row.text("id"),
        "image_id": row.text("id"),
        "question": CAPTION_REQUEST,
        "answers": row.answers("answer"),
    }


_QUESTION = ("question_id", "question", "answers")
_COLUMNS = {
    "text_vqa": _Columns((*_QUESTION, "image_id"), _numbered, "question_id"),
    "coco_2014_vqa": _Columns((*_QUESTION, "image_id"), _numbered, "question_id"),
    "okvqa": _Columns(_QUESTION, _outside, "question_id"),
    # The hub's copy has no ids: a row's place in its split stands for one.
    "science_qa_img": _Columns(("question", "choices", "answer", "hint"), _science),
    "doc_qa": _Columns(
        ("questionId", "question", "answers", "ucsf_document_id", "ucsf_document_page_no"), _document, "questionId"
    ),
    "coco_caption": _Columns(("id", "answer"), _caption, "id"),
}


class ParquetSet:
    """One split of a data set in parquet files.

    Attributes:
        samples: All questions. Their picture is in the parquet file that `image_path` names; see `extract`.
    """

    def __init__(self, dataset: str, split: str, files: Sequence[Path], folder: Path) -> None:
        self.samples: list[Sample] = []
        self._rows: list[int] = []
        self._pictures = cache_dir() / "pictures" / dataset
        columns = _COLUMNS[dataset]
        row_number = 0
        for path in files:
            file = _open(path)
            missing = {*columns.names, "image"} - set(file.schema_arrow.names)
            if missing:
                raise UserError(f"{path}: has no column {min(missing)}; is this a copy of {dataset}?")
            table = file.read(columns=list(columns.names))
            for i, row in enumerate(table.to_pylist()):
                entry = Entry(row, path, f"row {i}")
                if columns.id:
                    entry = Entry(row, path, f"question {entry.text(columns.id)}")
                sample = Sample(
                    **columns.fields(entry, f"{split}-{row_number + i}"),
                    image_path=path,
                    style=DATASETS[dataset],
                    dataset=dataset,
                    split=split,
                    data_source="synthetic" if (folder / "SYNTHETIC.md").is_file() else "official",
                )
                self.samples.append(sample)
                self._rows.append(i)
            row_number += table.num_rows
        if dataset == "science_qa_img":
            self._drop_rows_without_picture()

    @classmethod
    def find(cls, dataset: str, folder: Path, split: str) -> ParquetSet | None:
        """The split's parquet files in a folder, in any depth; None if there are none.

        Raises:
            UserError: a file is damaged or of another data set, or pyarrow is not installed.
        """
        files = parquet_files(folder, split) if dataset in _COLUMNS else []
        return cls(dataset, split, files, folder) if files else None

    @property
    def files(self) -> list[Path]:
        """The file that each sample is from."""
        return [sample.image_path for sample in self.samples]

    def extract(self, indices: Sequence[int]) -> list[Sample]:
        """Some of the samples, each with its picture in a file of its own.

        The files are in the cache, named by picture and by a digest of its bytes, and are written where they are
        not there yet: whatever parquet file a picture is from, no other one is taken for it.

        Raises:
            UserError: a row has no picture, or what it holds is none.
        """
        wanted: dict[Path, dict[int, int]] = {}
        for i in indices:
            wanted.setdefault(self.samples[i].image_path, {})[self._rows[i]] = i
        places: dict[int, Path] = {}
        for path, rows in wanted.items():
            for row, value in _pictures(path, set(rows)):
                content = _content(value, f"{path}: row {row}")
                name = _UNSAFE.sub("_", self.samples[rows[row]].image_id)
                digest = hashlib.sha256(content).hexdigest()[:32]
                places[rows[row]] = target = self._pictures / f"{name}-{digest}.picture"
                if not target.is_file():
                    _write(target, content)
        return [replace(self.samples[i], image_path=places[i]) for i in indices]

    def _drop_rows_without_picture(self) -> None:
        paths = dict.fromkeys(sample.image_path for sample in self.samples)
        with_picture = {(path, row) for path in paths for row in _rows_with_picture(path)}
        places = [(sample.image_path, row) for sample, row in zip(self.samples, self._rows, strict=True)]
        kept = [i for i, place in enumerate(places) if place in with_picture]
        self.samples = [self.samples[i] for i in kept]
        self._rows = [self._rows[i] for i in kept]


def parquet_files(folder: Path, split: str) -> list[Path]:
    """The parquet files of a split, told by the beginning of their own or their folder's name."""
    pattern = _SPLITS[split]
    found = sorted(folder.rglob("*.parquet"))
    found = [path for path in found if _OTHER_SET not in path.parts]
    return [path for path in found if pattern.match(path.name) or pattern.fullmatch(path.parent.name)]


def _open(path: Path) -> pq.ParquetFile:
    try:
        import pyarrow.parquet as pq
    except ModuleNotFoundError:
        raise UserError(f"{path}: reading it needs pyarrow: pip install 'tempovlm[experiments]'") from None
    try:
        return pq.ParquetFile(path)
    except (OSError, ValueError) as error:
        raise _damaged(path, error) from None


def _damaged(path: Path, error: Exception) -> UserError:
    return UserError(f"{path}: damaged or half-written parquet file ({error}); download it again")


def _rows_with_picture(path: Path) -> Iterable[int]:
    return (row for row, value in _pictures(path) if _has_picture(value))


def _has_picture(value: Any) -> bool:
    """Whether a row has a picture: a struct without bytes and path, no bytes and an empty list are none."""
    if isinstance(value, dict):
        return bool(value.get("bytes") or value.get("path"))
    if isinstance(value, list):
        return any(one is not None and (isinstance(one, int) or _has_picture(one)) for one in value)
    return bool(value)


def _content(value: Any, where: str) -> bytes:
    """The bytes of a picture, as the hub's struct of bytes and path, as bytes, or as a list of one of these."""
    if not _has_picture(value):
        raise UserError(f"{where} has no picture; get a copy that has it")
    if isinstance(value, dict) and not value.get("bytes"):
        raise UserError(
            f"{where} names its picture ({value['path']}) and does not hold it; get a copy that holds it"
        )
    content = value["bytes"] if isinstance(value, dict) else value
    if isinstance(content, list):
        if len(content) == 1 and not isinstance(content[0], int):
            return _content(content[0], where)
        if not all(isinstance(one, int) and 0 <= one < 256 for one in content):
            raise UserError(
                f"{where} holds a list of {len(content)} where one picture belongs; get a copy with one"
            )
        content = bytes(content)
    if not isinstance(content, bytes):
        raise UserError(
            f"{where} holds {type(content).__name__} in the column image, no bytes; get a copy with bytes"
        )
    try:
        Image.open(BytesIO(content)).close()
    except UnidentifiedImageError:
        about = f"{len(content)} bytes that are no picture (they begin with {content[:8]!r})"
        raise UserError(f"{where} holds {about}; get the file anew") from None
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        pass  # Damaged or too large: whoever opens it says so, as of any other picture.
    return content


def _pictures(path: Path, rows: set[int] | None = None) -> Iterable[tuple[int, Any]]:
    """What some rows, or all, hold in the column of pictures; parts of the file without any are not read."""
    file, start = _open(path), 0
    for group in range(file.num_row_groups):
        size = file.metadata.row_group(group).num_rows
        inside = [i for i in range(size) if rows is None or start + i in rows]
        if inside:
            try:
                column = file.read_row_group(group, columns=["image"]).column("image")
            except (OSError, ValueError) as error:
                raise _damaged(path, error) from None
            yield from ((start + i, column[i].as_py()) for i in inside)
        start += size


def _write(path: Path, content: bytes) -> None:
    """Write a picture so that it is whole or absent, even where two processes do it at once."""
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_suffix(f".{os.getpid()}")
    scratch.write_bytes(content)
    scratch.replace(path)
