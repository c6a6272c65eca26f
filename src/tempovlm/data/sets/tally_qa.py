"""TallyQA: counting questions about pictures of COCO and Visual Genome."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from tempovlm.data.coco import coco_pictures, coco_pictures_needed
from tempovlm.data.dataset import DataSet, Fields, Need
from tempovlm.data.entries import Entry
from tempovlm.data.files import read_json
from tempovlm.data.metrics.text import number_match

_ADDRESS = "https://github.com/manoja328/tallyqa/blob/master/tallyqa.zip?raw=true"
_GENOME = "https://cs.stanford.edu/people/rak248/VG_100K_2"


def _questions(split: str) -> str:
    """There are no validation questions, so `val` means the test questions."""
    return "train.json" if split == "train" else "test.json"


def _needs(split: str) -> tuple[Need, ...]:
    parts = (("VG_100K", "images.zip"), ("VG_100K_2", "images2.zip"))
    genome = (Need((name,), f"{_GENOME}/{archive}") for name, archive in parts)
    coco = tuple(coco_pictures_needed(part) for part in (("train", "val") if split == "train" else ("val",)))
    return Need((_questions(split),), _ADDRESS), *coco, *genome


def _read(folder: Path, split: str) -> Iterator[Fields]:
    path = folder / _questions(split)
    for entry in Entry.each(read_json(path), path, "question_id"):
        simple = entry.fields.get("issimple")
        yield {
            "question_id": entry.text("question_id"),
            "image_id": entry.text("image_id"),
            "image_path": _picture(folder, entry.text("image")),
            "question": entry.text("question"),
            "answers": entry.counts("answer"),
            "template": "" if "issimple" not in entry.fields else "simple" if simple else "complex",
        }


def _picture(folder: Path, name: str) -> Path:
    """Return a picture of COCO, which may be in another data set's folder, or of Visual Genome."""
    part, _, file = name.partition("/")
    return (coco_pictures(folder, part) if part.endswith("2014") else folder / part) / file


DATA_SET = DataSet(
    name="tally_qa",
    order=7,
    style="tally_qa",
    home="https://github.com/manoja328/TallyQA_dataset",
    needs=_needs,
    read=_read,
    metric=number_match,
)
