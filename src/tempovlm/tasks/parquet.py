"""Reads the hub's parquet of a data set: questions at once, pictures only of the samples that are drawn.

It knows the columns of the common hub copies; it does not know how to get them. Needs pyarrow, which the extra
`experiments` brings.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tempovlm.core.errors import UserError
from tempovlm.core.paths import cache_dir
from tempovlm.tasks.base import DATASETS, Sample, choice_question
from tempovlm.tasks.official import CAPTION_REQUEST, hinted

if TYPE_CHECKING:
    import pyarrow.parquet as pq

_SPLITS = {"train": re.compile(r"train(ing)?\d*\b"), "val": re.compile(r"val(idation)?(2014)?\b")}
_OTHER_SET = "InfographicVQA"
"""Lies beside DocVQA in the hub's copy and is another data set."""
_UNSAFE = re.compile(r"[^\w.-]+")

Row = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class _Columns:
    """What a hub copy's rows mean: the columns to read beside the picture, and the fields of a sample in a row."""

    names: tuple[str, ...]
    fields: Callable[[Row, str], dict[str, Any]]


def _asked(row: Row, image_id: Any) -> dict[str, Any]:
    answers = [one.get("raw_answer", one["answer"]) if isinstance(one, dict) else one for one in row["answers"]]
    return {
        "question_id": str(row["question_id"]),
        "image_id": str(image_id),
        "question": row["question"],
        "answers": tuple(answers),
    }


def _science(row: Row, place: str) -> dict[str, Any]:
    index, options = int(row["answer"]), tuple(row["choices"])
    return {
        "question_id": place,
        "image_id": place,
        "question": choice_question(hinted(row["question"], row["hint"]), options),
        "answers": (chr(ord("a") + index),),
        "options": options,
        "answer_index": index,
    }


def _document(row: Row, _: str) -> dict[str, Any]:
    # One document has several pages, each a picture of its own.
    page = f"{row['ucsf_document_id']}_{row['ucsf_document_page_no']}"
    return _asked({**row, "question_id": row["questionId"]}, page)


def _caption(row: Row, _: str) -> dict[str, Any]:
    caption = {"question_id": row["id"], "question": CAPTION_REQUEST, "answers": row["answer"]}
    return _asked(caption, row["id"])


_QUESTION = ("question_id", "question", "answers")
_COLUMNS = {
    "text_vqa": _Columns((*_QUESTION, "image_id"), lambda row, _: _asked(row, row["image_id"])),
    "coco_2014_vqa": _Columns((*_QUESTION, "image_id"), lambda row, _: _asked(row, row["image_id"])),
    # A question's id is its picture's with one more digit.
    "okvqa": _Columns(_QUESTION, lambda row, _: _asked(row, str(row["question_id"])[:-1])),
    # The hub's copy has no ids: a row's place in its split stands for one.
    "science_qa_img": _Columns(("question", "choices", "answer", "hint"), _science),
    "doc_qa": _Columns(
        ("questionId", "question", "answers", "ucsf_document_id", "ucsf_document_page_no"), _document
    ),
    "coco_caption": _Columns(("id", "answer"), _caption),
}


class ParquetSet:
    """One split of a data set in parquet files."""

    def __init__(self, dataset: str, split: str, files: Sequence[Path], folder: Path) -> None:
        self.samples: list[Sample] = []
        self._places: list[tuple[Path, int]] = []
        columns = _COLUMNS[dataset]
        pictures = cache_dir() / "pictures" / f"{dataset}-{split}-{_fingerprint(files)}"
        row_number = 0
        for path in files:
            file = _open(path)
            missing = {*columns.names, "image"} - set(file.schema_arrow.names)
            if missing:
                raise UserError(f"{path}: has no column {min(missing)}; is this a copy of {dataset}?")
            table = file.read(columns=list(columns.names))
            for i, row in enumerate(table.to_pylist()):
                fields = columns.fields(row, f"{split}-{row_number + i}")
                name = _UNSAFE.sub("_", fields["image_id"])
                sample = Sample(
                    **fields,
                    image_path=pictures / f"{name}.picture",
                    style=DATASETS[dataset],
                    dataset=dataset,
                    split=split,
                    data_source="synthetic" if (folder / "SYNTHETIC.md").is_file() else "official",
                )
                self.samples.append(sample)
                self._places.append((path, i))
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
        return [path for path, _ in self._places]

    def extract(self, indices: Iterable[int]) -> None:
        """Write the pictures of these samples to their paths, where they are not there yet."""
        wanted: dict[Path, dict[int, Path]] = {}
        for i in indices:
            path, row = self._places[i]
            target = self.samples[i].image_path
            if not target.is_file():
                wanted.setdefault(path, {})[row] = target
        for path, rows in wanted.items():
            for row, value in _pictures(path, set(rows)):
                if value is None or not value.get("bytes"):
                    raise UserError(f"{path}: row {row} has no picture")
                _write(rows[row], value["bytes"])

    def _drop_rows_without_picture(self) -> None:
        with_picture = set()
        for path in dict.fromkeys(path for path, _ in self._places):
            with_picture |= {(path, row) for row in _rows_with_picture(path)}
        kept = [i for i, place in enumerate(self._places) if place in with_picture]
        self.samples = [self.samples[i] for i in kept]
        self._places = [self._places[i] for i in kept]


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
        raise UserError(f"{path}: damaged or half-written parquet file ({error}); download it again") from None


def _rows_with_picture(path: Path) -> Iterable[int]:
    file, start = _open(path), 0
    for group in range(file.num_row_groups):
        column = file.read_row_group(group, columns=["image"]).column("image")
        yield from (start + i for i, valid in enumerate(column.is_valid().to_pylist()) if valid)
        start += len(column)


def _pictures(path: Path, rows: set[int]) -> Iterable[tuple[int, dict[str, Any] | None]]:
    """The pictures of some rows; parts of the file without any of them are not read."""
    file, start = _open(path), 0
    for group in range(file.num_row_groups):
        size = file.metadata.row_group(group).num_rows
        inside = [i for i in range(size) if start + i in rows]
        if inside:
            column = file.read_row_group(group, columns=["image"]).column("image")
            yield from ((start + i, column[i].as_py()) for i in inside)
        start += size


def _write(path: Path, content: bytes) -> None:
    """Write a picture so that it is whole or absent, even where two processes do it at once."""
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_suffix(f".{os.getpid()}")
    scratch.write_bytes(content)
    scratch.replace(path)


def _fingerprint(files: Sequence[Path]) -> str:
    """Changes with the names and sizes of files, so that no picture of another copy is taken for theirs."""
    text = "\n".join(f"{path.name} {path.stat().st_size}" for path in files)
    return hashlib.sha256(text.encode()).hexdigest()[:12]
