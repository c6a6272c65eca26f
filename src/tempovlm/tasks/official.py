"""Reads the files of each data set as its owners publish them.

It knows official names and keys; it does not know where a folder is, how answers are scored or who answers.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from tempovlm.core.errors import UserError
from tempovlm.tasks.base import DATASETS, Sample, check_unique, choice_question
from tempovlm.tasks.entries import Entry

NOTICE = "SYNTHETIC.md"
"""The file whose presence marks a folder as generated."""


def _json(path: Path, *, keyed_by_id: bool = False) -> Any:
    last: list[str] = []

    def keep_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        last[:] = [key for key, _ in pairs]
        return dict(pairs)

    hook = keep_keys if keyed_by_id else None
    try:
        content = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=hook)
    except ValueError as error:
        raise UserError(f"{path}: half-written or damaged, not a JSON file ({error}); get it anew") from None
    # JSON readers keep the last of equal keys and say nothing. The outermost object is read last.
    check_unique(last, [path] * len(last))
    return content


def _content(path: Path, *, keyed_by_id: bool = False) -> Entry:
    """A file's fields."""
    content = _json(path, keyed_by_id=keyed_by_id)
    if not isinstance(content, dict):
        raise UserError(f"{path}: holds no JSON object; get the file anew")
    return Entry(content, path, "the file")


def _listed(content: Entry, field: str, key: str, word: str = "question") -> list[Entry]:
    """The entries of a list in a file, called by their id, the field `key`."""
    return list(Entry.each(content.value(field), content.path, key, word))


def _source(folder: Path) -> str:
    return "synthetic" if (folder / NOTICE).is_file() else "official"


def _first(*paths: Path) -> Path:
    """The first of several places that is there; a `FileNotFoundError` that names the first where none is."""
    for path in paths:
        if path.exists():
            return path
    raise FileNotFoundError(2, "missing", str(paths[0]))


def _coco_images(folder: Path, name: str) -> Path:
    """A folder of COCO pictures: the data set's own, or one that several data sets share beside it.

    A generated data set's pictures have COCO's names and are other pictures, so they are never shared.
    """
    shared = [folder.parent / other / name for other in ("coco", "coco_2014_vqa")]
    return _first(folder / name, *(path for path in shared if _source(path.parent) == "official"))


def _twin(folder: Path, name: str) -> Path | None:
    path = folder / "twins" / name
    return path if path.is_file() else None


def _images(folder: Path, name: str) -> Path:
    """The folder of the pictures, which must be there."""
    path = folder / name
    if not path.is_dir():
        raise FileNotFoundError(2, "missing", str(path))
    return path


def _read_text_vqa(folder: Path, split: str) -> list[Sample]:
    """TextVQA 0.5.1: one file a split, all pictures in `train_images`."""
    entries = _listed(_content(folder / f"TextVQA_0.5.1_{split}.json"), "data", "question_id")
    images = _images(folder, "train_images")
    source = _source(folder)
    return [
        Sample(
            question_id=entry.text("question_id"),
            image_id=entry.text("image_id"),
            image_path=images / f"{entry.text('image_id')}.jpg",
            question=entry.text("question"),
            answers=entry.answers(),
            style=DATASETS["text_vqa"],
            dataset="text_vqa",
            split=split,
            twin_path=_twin(folder, f"{entry.text('image_id')}.jpg"),
            data_source=source,
            template=entry.fields.get("template", ""),
            held_out=entry.fields.get("held_out", False),
        )
        for entry in entries
    ]


def _read_coco(dataset: str, prefix: str) -> Callable[[Path, str], list[Sample]]:
    """A reader of VQAv2 or OK-VQA, which differ in the prefix of their file names and in `raw_answer`."""

    def read(folder: Path, split: str) -> list[Sample]:
        part = f"{split}2014"
        questions = _content(folder / f"{prefix}OpenEnded_mscoco_{part}_questions.json")
        annotations = _content(folder / f"{prefix}mscoco_{part}_annotations.json")
        notes = _listed(annotations, "annotations", "question_id")
        by_id = {note.text("question_id"): note for note in notes}
        check_unique([note.text("question_id") for note in notes], [annotations.path] * len(notes))
        images = _coco_images(folder, part)
        source = _source(folder)
        samples = []
        for entry in _listed(questions, "questions", "question_id"):
            question_id = entry.text("question_id")
            if question_id not in by_id:
                raise entry.wrong("question_id", f"has no annotation in {annotations.path.name}")
            note = by_id[question_id]
            name = f"COCO_{part}_{entry.whole('image_id'):012d}.jpg"
            sample = Sample(
                question_id=question_id,
                image_id=entry.text("image_id"),
                image_path=images / name,
                question=entry.text("question"),
                answers=note.answers(),
                style=DATASETS[dataset],
                dataset=dataset,
                split=split,
                twin_path=_twin(folder, name),
                data_source=source,
                template=note.fields.get("template", ""),
                held_out=note.fields.get("held_out", False),
            )
            samples.append(sample)
        return samples

    return read


def _read_science(folder: Path, split: str) -> list[Sample]:
    """ScienceQA: problems without a picture are left out; a hint stands before its question."""
    problems = _content(folder / "problems.json", keyed_by_id=True)
    splits = _content(folder / "pid_splits.json")
    pids = splits.value(split)
    check_unique([str(pid) for pid in pids], [splits.path] * len(pids))
    images = _images(folder, f"images/{split}")
    source = _source(folder)
    samples = []
    for pid in pids:
        fields = problems.value(str(pid))
        if not isinstance(fields, dict):
            raise problems.wrong(str(pid), "is no problem")
        problem = Entry(fields, problems.path, f"question {pid}")
        if not fields.get("image"):
            continue
        options = problem.options("choices")
        index = problem.option_index("answer", len(options))
        sample = Sample(
            question_id=str(pid),
            image_id=str(fields.get("image_id", pid)),
            image_path=images / str(pid) / problem.text("image"),
            question=choice_question(hinted(problem), options),
            answers=(chr(ord("a") + index),),
            style=DATASETS["science_qa_img"],
            dataset="science_qa_img",
            split=split,
            options=options,
            answer_index=index,
            twin_path=_twin(folder, f"{pid}.png"),
            data_source=source,
            template=fields.get("template", ""),
            held_out=fields.get("held_out", False),
        )
        samples.append(sample)
    return samples


def hinted(problem: Entry) -> str:
    """A ScienceQA question after its hint, which often holds what the question is about."""
    question, hint = problem.text("question"), ""
    if problem.fields.get("hint") is not None:
        hint = problem.text("hint").strip()
    return f"{hint}\n{question}" if hint else question


def _read_doc_qa(folder: Path, split: str) -> list[Sample]:
    """DocVQA, single pages: `train_v1.0…json` and pictures, as first published or as `spdocvqa_*` later."""
    names = (f"{split}_v1.0_withQT.json", f"{split}_v1.0.json")
    places = (folder / "spdocvqa_qas", folder / split, folder)
    content = _content(_first(*(place / name for place in places for name in names)))
    images = _first(folder / "spdocvqa_images", folder / split / "documents", folder / "documents")
    source = _source(folder)
    return [
        Sample(
            question_id=entry.text("questionId"),
            image_id=Path(entry.text("image")).stem,
            image_path=images / Path(entry.text("image")).name,
            question=entry.text("question"),
            answers=entry.answers(),
            style=DATASETS["doc_qa"],
            dataset="doc_qa",
            split=split,
            data_source=source,
            template=", ".join(entry.fields.get("question_types") or ()),
        )
        for entry in _listed(content, "data", "questionId")
    ]


_ST_QA_VAL = 1024
_ST_QA_SEED = 63069


def _read_st_qa(folder: Path, split: str) -> list[Sample]:
    """ST-VQA, open dictionary (task 3): only its training questions have answers.

    Validation is the part that Molmo's authors set aside: sorted by id, shuffled by numpy with their seed, the
    first 1024.
    """
    entries = _listed(_content(folder / "train_task_3.json"), "data", "question_id")
    entries.sort(key=lambda entry: entry.value("question_id"))
    order = list(range(len(entries)))
    np.random.RandomState(_ST_QA_SEED).shuffle(order)
    source = _source(folder)
    return [
        Sample(
            question_id=entry.text("question_id"),
            image_id=entry.text("file_path"),
            image_path=folder / entry.text("file_path"),
            question=entry.text("question"),
            answers=entry.answers(),
            style=DATASETS["st_qa"],
            dataset="st_qa",
            split=split,
            data_source=source,
            template=entry.fields.get("dataset", ""),
        )
        for entry in (entries[i] for i in (order[_ST_QA_VAL:] if split == "train" else order[:_ST_QA_VAL]))
    ]


def _read_tally_qa(folder: Path, split: str) -> list[Sample]:
    """TallyQA: `train.json` and `test.json`; it has no validation questions, so `val` reads the test questions."""
    path = folder / ("train.json" if split == "train" else "test.json")
    source = _source(folder)
    return [
        Sample(
            question_id=entry.text("question_id"),
            image_id=entry.text("image_id"),
            image_path=_tally_image(folder, entry.text("image")),
            question=entry.text("question"),
            answers=entry.counts("answer"),
            style=DATASETS["tally_qa"],
            dataset="tally_qa",
            split=split,
            data_source=source,
            template="" if "issimple" not in entry.fields else "simple" if entry.fields["issimple"] else "complex",
        )
        for entry in Entry.each(_json(path), path, "question_id")
    ]


def _tally_image(folder: Path, name: str) -> Path:
    """A COCO or Visual Genome picture; the former may lie with another data set."""
    part, _, file = name.partition("/")
    return (_coco_images(folder, part) if part.endswith("2014") else folder / part) / file


CAPTION_REQUEST = "Briefly describe the image."
"""COCO has captions and no questions; this is what a model is asked."""


def _read_coco_caption(folder: Path, split: str) -> list[Sample]:
    """COCO 2014 captions: one sample a picture, whose answers are all of its captions; ids are the pictures'."""
    name = f"captions_{split}2014.json"
    content = _content(_first(folder / "annotations" / name, folder / name))
    images = _coco_images(folder, f"{split}2014")
    source = _source(folder)
    captions: dict[str, list[str]] = {}
    for note in _listed(content, "annotations", "image_id", "picture"):
        captions.setdefault(note.text("image_id"), []).append(note.text("caption"))
    return [
        Sample(
            question_id=entry.text("id"),
            image_id=entry.text("id"),
            image_path=images / entry.text("file_name"),
            question=CAPTION_REQUEST,
            answers=tuple(captions[entry.text("id")]),
            style=DATASETS["coco_caption"],
            dataset="coco_caption",
            split=split,
            data_source=source,
        )
        for entry in _listed(content, "images", "id", "picture")
        if entry.text("id") in captions
    ]


READERS: dict[str, Callable[[Path, str], list[Sample]]] = {
    "text_vqa": _read_text_vqa,
    "coco_2014_vqa": _read_coco("coco_2014_vqa", "v2_"),
    "okvqa": _read_coco("okvqa", ""),
    "science_qa_img": _read_science,
    "doc_qa": _read_doc_qa,
    "st_qa": _read_st_qa,
    "tally_qa": _read_tally_qa,
    "coco_caption": _read_coco_caption,
}
"""Data set → what reads a split of its folder; a missing file is a `FileNotFoundError` that names it."""
