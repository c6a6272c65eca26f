"""The declaration of a data set: where its files are, how they are read, and how an answer is scored."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tempovlm.data.entries import Entry
from tempovlm.data.metrics.text import vqa_accuracy

SPLITS = ("train", "val")

Fields = dict[str, Any]
"""Fields of a `Sample`, except those that a split shares: style, dataset, split and data_source."""

Metric = Callable[[str, Sequence[str]], float]
"""Function from a prediction and the right answers to a score from 0 to 1."""


def _asked(row: Entry, _: str) -> Fields:
    return row.asked()


@dataclass(frozen=True, slots=True)
class Need:
    """A file or folder of pictures that a split needs.

    Attributes:
        paths: Possible places, relative to the data set's folder; one is enough.
        url: Address where its owner publishes it.
    """

    paths: tuple[str, ...]
    url: str


@dataclass(frozen=True, slots=True, kw_only=True)
class HubCopy:
    """A copy on the hub in Parquet files, with the pictures in the column `image`.

    Attributes:
        repo_id: Name of the repository of kind data set.
        patterns: Split → pattern of its files there.
        columns: Columns to read besides the picture.
        fields: From a row, and its index in the split, to the fields of a sample except `image_path`.
        id: The column of the question's id; None if there is none.
        gaps: Whether there are rows without a picture, which are left out.
        skip: Name of a folder in the copy that belongs to another data set.
    """

    repo_id: str
    patterns: Mapping[str, str]
    columns: tuple[str, ...] = ("question_id", "image_id", "question", "answers")
    fields: Callable[[Entry, str], Fields] = _asked
    id: str | None = "question_id"
    gaps: bool = False
    skip: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class DataSet:
    """The complete description of a data set.

    Attributes:
        name: Its name, also that of its module in `sets` and of its folder on disk.
        style: Name of the prompt style that the model was trained with.
        home: Address of its home page.
        needs: From a split to the files that it needs, the questions first.
        read: Reads a split of the data set's folder; a missing file is a `FileNotFoundError` that names it.
        task: 'vqa', 'multiple_choice' or 'caption'.
        metric: Scores an open answer; multiple choice is scored by option. None for captions, which have no score
            alone: they get their CIDEr among all captions.
        hub: The usual copy on the hub, if there is one.
        order: Position in lists of data sets and in mixed draws; ties go by name.
    """

    name: str
    style: str
    home: str
    needs: Callable[[str], tuple[Need, ...]]
    read: Callable[[Path, str], Iterable[Fields]]
    task: str = "vqa"
    metric: Metric | None = vqa_accuracy
    hub: HubCopy | None = None
    order: int = 100
