"""The file formats of the four data sets: where a picture lies and what is said about it.

It knows official names and keys; it does not know who draws the pictures.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

Record = dict[str, Any]
"""One rendered picture: dataset, split, index, width, height and its questions as dictionaries."""

_COCO_BASE = {"train": 1, "val": 500_001}
_CONFIDENCE = "yes"


def coco_id(split: str, index: int) -> int:
    """Image number in the COCO style data sets; the splits do not overlap below half a million pictures."""
    return index + _COCO_BASE[split]


def open_images_id(split: str, index: int) -> str:
    """Sixteen hexadecimal digits, as in OpenImages."""
    return f"{'a' if split == 'train' else 'b'}{index:015x}"


def problem_id(split: str, index: int, place: int) -> str:
    """Number of a problem: pictures times eight, validation from a billion up."""
    return str(index * 8 + place + 1 + (1_000_000_000 if split == "val" else 0))


def picture_paths(dataset: str, split: str, index: int, num_questions: int) -> list[str]:
    """Where a picture goes, relative to the folder of the data set."""
    if dataset == "text_vqa":
        return [f"train_images/{open_images_id(split, index)}.jpg"]
    if dataset == "science_qa_img":
        return [f"images/{split}/{problem_id(split, index, k)}/image.png" for k in range(num_questions)]
    return [f"{split}2014/COCO_{split}2014_{coco_id(split, index):012d}.jpg"]


def twin_paths(dataset: str, split: str, index: int, num_questions: int) -> list[str]:
    """Where the twin of a picture goes, relative to the folder of the data set."""
    if dataset == "science_qa_img":
        return [f"twins/{problem_id(split, index, k)}.png" for k in range(num_questions)]
    name = Path(picture_paths(dataset, split, index, num_questions)[0]).name
    return [f"twins/{name}"]


def _dump(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content), encoding="utf-8")


def _write_text_vqa(folder: Path, split: str, records: Iterable[Record]) -> None:
    data: list[Record] = []
    for record in records:
        image_id = open_images_id(split, record["index"])
        for question in record["questions"]:
            data.append(
                {
                    "question_id": len(data) + (0 if split == "train" else 1_000_000),
                    "question": question["question"],
                    "image_id": image_id,
                    "image_classes": [],
                    "flickr_original_url": "",
                    "flickr_300k_url": "",
                    "image_width": record["width"],
                    "image_height": record["height"],
                    "answers": question["answers"],
                    "set_name": split,
                    "template": question["template"],
                    "held_out": question["held_out"],
                }
            )
    header = {"dataset_type": split, "dataset_name": "textvqa", "dataset_version": "0.5.1", "data": data}
    _dump(folder / f"TextVQA_0.5.1_{split}.json", header)


def _answer_type(answer: str) -> str:
    """The three kinds of answers that VQAv2 tells apart."""
    return "yes/no" if answer in ("yes", "no") else "number" if answer.isdigit() else "other"


def _coco_parts(split: str, records: Iterable[Record], raw: bool) -> tuple[list[Record], list[Record]]:
    """Questions and annotations of the COCO style data sets."""
    questions, annotations = [], []
    for record in records:
        image_id = coco_id(split, record["index"])
        for place, question in enumerate(record["questions"]):
            question_id = image_id * 1000 + place
            questions.append({"image_id": image_id, "question": question["question"], "question_id": question_id})
            answers = []
            for number, answer in enumerate(question["answers"], start=1):
                entry = {"answer": answer, "answer_confidence": _CONFIDENCE, "answer_id": number}
                answers.append(entry | {"raw_answer": answer} if raw else entry)
            annotations.append(
                {
                    "question_id": question_id,
                    "image_id": image_id,
                    "question_type": " ".join(question["question"].split()[:2]),
                    "answer_type": _answer_type(question["answer"]),
                    "multiple_choice_answer": question["answer"],
                    "answers": answers,
                    "template": question["template"],
                    "held_out": question["held_out"],
                }
            )
    return questions, annotations


def _write_coco(folder: Path, split: str, records: Iterable[Record]) -> None:
    questions, annotations = _coco_parts(split, records, raw=False)
    shared = {"data_type": "mscoco", "data_subtype": f"{split}2014"}
    _dump(folder / f"v2_OpenEnded_mscoco_{split}2014_questions.json",
          shared | {"task_type": "Open-Ended", "questions": questions})  # fmt: skip
    _dump(folder / f"v2_mscoco_{split}2014_annotations.json", shared | {"annotations": annotations})


def _write_okvqa(folder: Path, split: str, records: Iterable[Record]) -> None:
    questions, annotations = _coco_parts(split, records, raw=True)
    shared = {"data_type": "mscoco", "data_subtype": f"{split}2014"}
    _dump(folder / f"OpenEnded_mscoco_{split}2014_questions.json",
          shared | {"task_type": "Open-Ended", "questions": questions})  # fmt: skip
    _dump(folder / f"mscoco_{split}2014_annotations.json", shared | {"annotations": annotations})


def _write_science(folder: Path, split: str, records: Iterable[Record]) -> None:
    problems_path, splits_path = folder / "problems.json", folder / "pid_splits.json"
    problems: dict[str, Record] = {}
    splits: dict[str, list[str]] = {"train": [], "val": [], "test": []}
    if problems_path.is_file():
        problems = json.loads(problems_path.read_text(encoding="utf-8"))
        splits = json.loads(splits_path.read_text(encoding="utf-8"))
    for record in records:
        for place, question in enumerate(record["questions"]):
            pid = problem_id(split, record["index"], place)
            splits[split].append(pid)
            problems[pid] = {
                "question": question["question"],
                "choices": question["options"],
                "answer": question["answer_index"],
                "hint": "",
                "image": "image.png",
                "task": "closed choice",
                "grade": "grade4",
                "subject": "natural science",
                "topic": "",
                "category": "",
                "skill": question["template"],
                "lecture": "",
                "solution": "",
                "split": split,
                "template": question["template"],
                "held_out": question["held_out"],
                "image_id": f"{split}-{record['index']}",
            }
    _dump(problems_path, problems)
    _dump(splits_path, splits)


WRITERS: dict[str, Callable[[Path, str, Iterable[Record]], None]] = {
    "text_vqa": _write_text_vqa,
    "coco_2014_vqa": _write_coco,
    "okvqa": _write_okvqa,
    "science_qa_img": _write_science,
}
"""Data set to the function that writes the questions of a split into its folder."""
