"""Reads the files of each data set as its owners publish them.

It knows official names and keys; it does not know where a folder is, how answers are scored or who answers.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from tempovlm.tasks.base import DATASETS, Sample, check_unique, choice_question

NOTICE = "SYNTHETIC.md"
"""The file whose presence marks a folder as generated."""


def _json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def _once(pairs: list[tuple[str, Any]], path: Path) -> dict[str, Any]:
    """An object of a file whose keys are ids; JSON readers keep the last of equal keys and say nothing."""
    check_unique([key for key, _ in pairs], [path] * len(pairs))
    return dict(pairs)


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
    entries = _json(folder / f"TextVQA_0.5.1_{split}.json")["data"]
    images = _images(folder, "train_images")
    source = _source(folder)
    return [
        Sample(
            question_id=str(entry["question_id"]),
            image_id=str(entry["image_id"]),
            image_path=images / f"{entry['image_id']}.jpg",
            question=entry["question"],
            answers=tuple(entry["answers"]),
            style=DATASETS["text_vqa"],
            dataset="text_vqa",
            split=split,
            twin_path=_twin(folder, f"{entry['image_id']}.jpg"),
            data_source=source,
            template=entry.get("template", ""),
            held_out=entry.get("held_out", False),
        )
        for entry in entries
    ]


def _read_coco(dataset: str, prefix: str) -> Callable[[Path, str], list[Sample]]:
    """A reader of VQAv2 or OK-VQA, which differ in the prefix of their file names and in `raw_answer`."""

    def read(folder: Path, split: str) -> list[Sample]:
        part = f"{split}2014"
        questions = _json(folder / f"{prefix}OpenEnded_mscoco_{part}_questions.json")["questions"]
        noted = folder / f"{prefix}mscoco_{part}_annotations.json"
        annotations = _json(noted)["annotations"]
        check_unique([str(entry["question_id"]) for entry in annotations], [noted] * len(annotations))
        by_id = {entry["question_id"]: entry for entry in annotations}
        images = _coco_images(folder, part)
        source = _source(folder)
        samples = []
        for entry in questions:
            note = by_id[entry["question_id"]]
            name = f"COCO_{part}_{int(entry['image_id']):012d}.jpg"
            sample = Sample(
                question_id=str(entry["question_id"]),
                image_id=str(entry["image_id"]),
                image_path=images / name,
                question=entry["question"],
                answers=tuple(answer.get("raw_answer", answer["answer"]) for answer in note["answers"]),
                style=DATASETS[dataset],
                dataset=dataset,
                split=split,
                twin_path=_twin(folder, name),
                data_source=source,
                template=note.get("template", ""),
                held_out=note.get("held_out", False),
            )
            samples.append(sample)
        return samples

    return read


def _read_science(folder: Path, split: str) -> list[Sample]:
    """ScienceQA: problems without a picture are left out; a hint stands before its question."""
    problems, listed = folder / "problems.json", folder / "pid_splits.json"
    by_id = json.loads(problems.read_text(encoding="utf-8"), object_pairs_hook=lambda p: _once(p, problems))
    pids = _json(listed)[split]
    check_unique([str(pid) for pid in pids], [listed] * len(pids))
    images = _images(folder, f"images/{split}")
    source = _source(folder)
    samples = []
    for pid in pids:
        problem = by_id[pid]
        if not problem.get("image"):
            continue
        options = tuple(str(choice) for choice in problem["choices"])
        index = int(problem["answer"])
        sample = Sample(
            question_id=str(pid),
            image_id=str(problem.get("image_id", pid)),
            image_path=images / str(pid) / problem["image"],
            question=choice_question(hinted(problem["question"], problem.get("hint")), options),
            answers=(chr(ord("a") + index),),
            style=DATASETS["science_qa_img"],
            dataset="science_qa_img",
            split=split,
            options=options,
            answer_index=index,
            twin_path=_twin(folder, f"{pid}.png"),
            data_source=source,
            template=problem.get("template", ""),
            held_out=problem.get("held_out", False),
        )
        samples.append(sample)
    return samples


def hinted(question: str, hint: str | None) -> str:
    """A ScienceQA question after its hint, which often holds what the question is about."""
    return f"{hint.strip()}\n{question}" if hint and hint.strip() else question


def _read_doc_qa(folder: Path, split: str) -> list[Sample]:
    """DocVQA, single pages: `train_v1.0…json` and pictures, as first published or as `spdocvqa_*` later."""
    names = (f"{split}_v1.0_withQT.json", f"{split}_v1.0.json")
    places = (folder / "spdocvqa_qas", folder / split, folder)
    entries = _json(_first(*(place / name for place in places for name in names)))["data"]
    images = _first(folder / "spdocvqa_images", folder / split / "documents", folder / "documents")
    source = _source(folder)
    return [
        Sample(
            question_id=str(entry["questionId"]),
            image_id=Path(entry["image"]).stem,
            image_path=images / Path(entry["image"]).name,
            question=entry["question"],
            answers=tuple(entry["answers"]),
            style=DATASETS["doc_qa"],
            dataset="doc_qa",
            split=split,
            data_source=source,
            template=", ".join(entry.get("question_types") or ()),
        )
        for entry in entries
    ]


_ST_QA_VAL = 1024
_ST_QA_SEED = 63069


def _read_st_qa(folder: Path, split: str) -> list[Sample]:
    """ST-VQA, open dictionary (task 3): only its training questions have answers.

    Validation is the part that Molmo's authors set aside: sorted by id, shuffled by numpy with their seed, the
    first 1024.
    """
    entries = sorted(_json(folder / "train_task_3.json")["data"], key=lambda entry: entry["question_id"])
    np.random.RandomState(_ST_QA_SEED).shuffle(entries)
    source = _source(folder)
    return [
        Sample(
            question_id=str(entry["question_id"]),
            image_id=entry["file_path"],
            image_path=folder / entry["file_path"],
            question=entry["question"],
            answers=tuple(entry["answers"]),
            style=DATASETS["st_qa"],
            dataset="st_qa",
            split=split,
            data_source=source,
            template=entry.get("dataset", ""),
        )
        for entry in (entries[_ST_QA_VAL:] if split == "train" else entries[:_ST_QA_VAL])
    ]


def _read_tally_qa(folder: Path, split: str) -> list[Sample]:
    """TallyQA: `train.json` and `test.json`; it has no validation questions, so `val` reads the test questions."""
    source = _source(folder)
    return [
        Sample(
            question_id=str(entry["question_id"]),
            image_id=str(entry["image_id"]),
            image_path=_tally_image(folder, entry["image"]),
            question=entry["question"],
            answers=(str(entry["answer"]),),
            style=DATASETS["tally_qa"],
            dataset="tally_qa",
            split=split,
            data_source=source,
            template="" if "issimple" not in entry else "simple" if entry["issimple"] else "complex",
        )
        for entry in _json(folder / ("train.json" if split == "train" else "test.json"))
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
    content = _json(_first(folder / "annotations" / name, folder / name))
    images = _coco_images(folder, f"{split}2014")
    source = _source(folder)
    captions: dict[int, list[str]] = {}
    for entry in content["annotations"]:
        captions.setdefault(entry["image_id"], []).append(entry["caption"])
    return [
        Sample(
            question_id=str(entry["id"]),
            image_id=str(entry["id"]),
            image_path=images / entry["file_name"],
            question=CAPTION_REQUEST,
            answers=tuple(captions[entry["id"]]),
            style=DATASETS["coco_caption"],
            dataset="coco_caption",
            split=split,
            data_source=source,
        )
        for entry in content["images"]
        if entry["id"] in captions
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
