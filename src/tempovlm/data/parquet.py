"""Read a data set's Parquet files from the hub: all questions at once, pictures only of the drawn samples.

Needs pyarrow, from the extra `experiments`.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Sequence
from dataclasses import replace
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tempovlm.core.errors import UserError
from tempovlm.core.paths import cache_dir, write_whole
from tempovlm.data.dataset import DataSet, HubCopy
from tempovlm.data.entries import Entry
from tempovlm.data.files import is_generated
from tempovlm.data.sample import Sample

if TYPE_CHECKING:
    import pyarrow.parquet as pq

_SPLITS = {"train": re.compile(r"train(ing)?\d*\b"), "val": re.compile(r"val(idation)?(2014)?\b")}
_LONGEST_NAME = 40
"""Characters of an image id in a file's name, which is limited to 255 bytes; a digest distinguishes the files."""

_UNSAFE = re.compile(r"[^\w.-]+")


class ParquetSet:
    """One split of a data set in parquet files.

    Attributes:
        samples: All questions. Their picture is in the parquet file that `image_path` names; see `extract`.
    """

    def __init__(
        self, dataset: DataSet, columns: HubCopy, split: str, files: Sequence[Path], folder: Path
    ) -> None:
        self.samples: list[Sample] = []
        self._rows: list[int] = []
        self._pictures = cache_dir() / "pictures" / dataset.name
        source = "synthetic" if is_generated(folder) else "official"
        row_number = 0
        for path in files:
            file = open_parquet(path)
            found = file.schema_arrow.names
            missing = {*columns.columns, "image"} - set(found)
            if missing:
                raise UserError(f"{path}: has no column {min(missing)}; is this a copy of {dataset.name}?")
            if doubled := [name for name in (*columns.columns, "image") if found.count(name) > 1]:
                raise UserError(f"{path}: has {found.count(doubled[0])} columns named {doubled[0]}; keep one")
            table = file.read(columns=list(columns.columns))
            for i, row in enumerate(table.to_pylist()):
                entry = Entry(row, path, f"row {i}")
                if columns.id:
                    entry = Entry(row, path, f"question {entry.text(columns.id)}")
                sample = Sample(
                    **columns.fields(entry, f"{split}-{row_number + i}"),
                    image_path=path,
                    style=dataset.style,
                    dataset=dataset.name,
                    split=split,
                    data_source=source,
                )
                self.samples.append(sample)
                self._rows.append(i)
            row_number += table.num_rows
        if columns.gaps:
            self._drop_rows_without_picture()

    @classmethod
    def find(cls, dataset: DataSet, folder: Path, split: str) -> ParquetSet | None:
        """Return the split's Parquet files in a folder, at any depth; None if there are none.

        Raises:
            UserError: a file is damaged or of another data set, or pyarrow is not installed.
        """
        files = parquet_files(dataset, folder, split)
        return cls(dataset, dataset.hub, split, files, folder) if files and dataset.hub else None

    @property
    def files(self) -> list[Path]:
        """The file that each sample comes from."""
        return [sample.image_path for sample in self.samples]

    def extract(self, indices: Sequence[int]) -> list[Sample]:
        """Return some of the samples, each with its picture in a file of its own.

        The files are in the cache, named by picture and by a digest of its bytes, and are written if they
        are missing, so that pictures of other Parquet files are never mixed up.

        Raises:
            UserError: a row has no picture, or its content is not one.
        """
        wanted: dict[Path, dict[int, int]] = {}
        for i in indices:
            wanted.setdefault(self.samples[i].image_path, {})[self._rows[i]] = i
        places: dict[int, Path] = {}
        for path, rows in wanted.items():
            for row, value in read_pictures(path, set(rows)):
                content = picture_bytes(value, f"{path}: row {row}")
                name = _UNSAFE.sub("_", self.samples[rows[row]].image_id)[:_LONGEST_NAME]
                digest = hashlib.sha256(content).hexdigest()[:32]
                places[rows[row]] = target = self._pictures / f"{name}-{digest}.picture"
                if not target.is_file():
                    write_whole(target, content)
        return [replace(self.samples[i], image_path=places[i]) for i in indices]

    def _drop_rows_without_picture(self) -> None:
        paths = dict.fromkeys(sample.image_path for sample in self.samples)
        with_picture = {(path, row) for path in paths for row in _rows_with_picture(path)}
        places = [(sample.image_path, row) for sample, row in zip(self.samples, self._rows, strict=True)]
        kept = [i for i, place in enumerate(places) if place in with_picture]
        self.samples = [self.samples[i] for i in kept]
        self._rows = [self._rows[i] for i in kept]


def parquet_files(dataset: DataSet, folder: Path, split: str) -> list[Path]:
    """Return the Parquet files of a split, found by the beginning of their own or their folder's name."""
    if dataset.hub is None:
        return []
    pattern = _SPLITS[split]
    found = [path for path in sorted(folder.rglob("*.parquet")) if dataset.hub.skip not in path.parts]
    return [path for path in found if pattern.match(path.name) or pattern.fullmatch(path.parent.name)]


def open_parquet(path: Path) -> pq.ParquetFile:
    """Open a file.

    Raises:
        UserError: it is damaged, or pyarrow is not installed.
    """
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
    return (row for row, value in read_pictures(path) if has_picture(value))


def has_picture(value: Any) -> bool:
    """Whether a row has a picture: a struct without bytes and path, no bytes and an empty list are none."""
    if isinstance(value, dict):
        return bool(value.get("bytes") or value.get("path"))
    if isinstance(value, list):
        return any(one is not None and (isinstance(one, int) or has_picture(one)) for one in value)
    return bool(value)


def picture_bytes(value: Any, where: str) -> bytes:
    """The bytes of a picture, as the hub's struct of bytes and path, as bytes, or as a list of one of these."""
    from PIL import Image, UnidentifiedImageError

    if not has_picture(value):
        raise UserError(f"{where} has no picture; get a copy that has it")
    if isinstance(value, dict) and not value.get("bytes"):
        raise UserError(
            f"{where} names its picture ({value['path']}) and does not hold it; get a copy that holds it"
        )
    content = value["bytes"] if isinstance(value, dict) else value
    if isinstance(content, list):
        if len(content) == 1 and not isinstance(content[0], int):
            return picture_bytes(content[0], where)
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
        raise UserError(f"{where} holds {about}; get the file again") from None
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        pass  # Whoever opens a damaged or too large picture reports it.
    return content


def read_pictures(path: Path, rows: set[int] | None = None) -> Iterable[tuple[int, Any]]:
    """Yield the pictures of some rows, or of all; parts of the file without any of these rows are not read."""
    file, start = open_parquet(path), 0
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
