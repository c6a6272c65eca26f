"""COCO's pictures, and questions about them in VQAv2's format; several data sets share both."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

from tempovlm.data.dataset import Fields, Need
from tempovlm.data.files import first, is_generated, listed, read_fields, twin
from tempovlm.data.sample import check_unique

HOME = "http://images.cocodataset.org"
_SHARED = ("coco", "coco_2014_vqa")
"""Folders beside a data set's own that may contain the shared pictures."""


def coco_pictures(folder: Path, name: str) -> Path:
    """Return a folder of pictures, such as val2014: the data set's own, or one that data sets share beside it.

    A generated data set's pictures have COCO's names but are other pictures, so they are never shared.
    """
    shared = [folder.parent / other / name for other in _SHARED]
    return first(folder / name, *(path for path in shared if not is_generated(path.parent)))


def coco_pictures_needed(split: str) -> Need:
    """Return the folder of the pictures of a split."""
    name = f"{split}2014"
    return Need((name, *(f"../{other}/{name}" for other in _SHARED)), f"{HOME}/zips/{name}.zip")


def vqa_files(prefix: str, split: str) -> tuple[str, str]:
    """Return the names of the files with a split's questions and annotations."""
    return f"{prefix}OpenEnded_mscoco_{split}2014_questions.json", f"{prefix}mscoco_{split}2014_annotations.json"


def vqa_reader(prefix: str) -> Callable[[Path, str], Iterator[Fields]]:
    """Return a reader of VQAv2's format, for files whose names begin with `prefix`."""

    def read(folder: Path, split: str) -> Iterator[Fields]:
        part = f"{split}2014"
        questions, annotations = (read_fields(folder / name) for name in vqa_files(prefix, split))
        notes = listed(annotations, "annotations", "question_id")
        by_id = {note.text("question_id"): note for note in notes}
        check_unique([note.text("question_id") for note in notes], [annotations.path] * len(notes))
        images = coco_pictures(folder, part)
        for entry in listed(questions, "questions", "question_id"):
            question_id = entry.text("question_id")
            if question_id not in by_id:
                raise entry.wrong("question_id", f"has no annotation in {annotations.path.name}")
            name = f"COCO_{part}_{entry.whole('image_id'):012d}.jpg"
            yield {
                "question_id": question_id,
                "image_id": entry.text("image_id"),
                "image_path": images / name,
                "question": entry.text("question"),
                "answers": by_id[question_id].answers(),
                "twin_path": twin(folder, name),
                **by_id[question_id].made(),
            }

    return read
