"""COCO 2014 captions: one sample a picture, whose answers are all of its captions."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from tempovlm.data.coco import HOME, coco_pictures, coco_pictures_needed
from tempovlm.data.dataset import DataSet, Fields, HubCopy, Need
from tempovlm.data.entries import Entry
from tempovlm.data.files import first, listed, read_fields

_REQUEST = "Briefly describe the image."
"""Question that the model gets, since COCO has captions and no questions."""


def _captions(split: str) -> tuple[str, ...]:
    name = f"captions_{split}2014.json"
    return f"annotations/{name}", name


def _needs(split: str) -> tuple[Need, ...]:
    archive = f"{HOME}/annotations/annotations_trainval2014.zip"
    return Need(_captions(split), archive), coco_pictures_needed(split)


def _read(folder: Path, split: str) -> Iterator[Fields]:
    """Pictures without a caption are left out; the ids of questions are those of the pictures."""
    content = read_fields(first(*(folder / name for name in _captions(split))))
    images = coco_pictures(folder, f"{split}2014")
    captions: dict[str, list[str]] = {}
    for note in listed(content, "annotations", "image_id", "picture"):
        captions.setdefault(note.text("image_id"), []).append(note.text("caption"))
    for entry in listed(content, "images", "id", "picture"):
        if entry.text("id") in captions:
            answers = tuple(captions[entry.text("id")])
            yield {**_sample(entry, answers), "image_path": images / entry.text("file_name")}


def _row(row: Entry, _: str) -> Fields:
    return _sample(row, row.answers("answer"))


def _sample(entry: Entry, answers: tuple[str, ...]) -> Fields:
    number = entry.text("id")
    return {"question_id": number, "image_id": number, "question": _REQUEST, "answers": answers}


DATA_SET = DataSet(
    name="coco_caption",
    order=8,
    style="coco_captioning",
    task="caption",
    home="https://cocodataset.org",
    needs=_needs,
    read=_read,
    metric=None,
    hub=HubCopy(
        repo_id="lmms-lab/COCO-Caption",
        patterns={"val": "data/val-*.parquet"},
        columns=("id", "answer"),
        fields=_row,
        id="id",
    ),
)
