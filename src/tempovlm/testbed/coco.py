"""Generated data in VQAv2's format about pictures with COCO's names."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

from tempovlm.testbed.stand_in import Record, dump

_COCO_BASE = {"train": 1, "val": 500_001}
_CONFIDENCE = "yes"


def coco_id(split: str, index: int) -> int:
    """Return the image number in COCO's style; the splits do not overlap below half a million pictures."""
    return index + _COCO_BASE[split]


def coco_places(split: str, index: int, _: int) -> list[tuple[str, str]]:
    """Return the paths of a picture and its twin."""
    name = f"COCO_{split}2014_{coco_id(split, index):012d}.jpg"
    return [(f"{split}2014/{name}", f"twins/{name}")]


def _answer_type(answer: str) -> str:
    """Return the answer's kind, of VQAv2's three."""
    return "yes/no" if answer in ("yes", "no") else "number" if answer.isdigit() else "other"


def _coco_parts(split: str, records: Iterable[Record], raw: bool) -> tuple[list[Record], list[Record]]:
    """Return questions and annotations in VQAv2's format."""
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


def coco_writer(prefix: str, *, raw: bool) -> Callable[[Path, str, Iterable[Record]], None]:
    """Return a writer of questions and annotations to files named `prefix…`; `raw` adds `raw_answer`."""

    def write(folder: Path, split: str, records: Iterable[Record]) -> None:
        questions, annotations = _coco_parts(split, records, raw)
        shared = {"data_type": "mscoco", "data_subtype": f"{split}2014"}
        dump(folder / f"{prefix}OpenEnded_mscoco_{split}2014_questions.json",
             shared | {"task_type": "Open-Ended", "questions": questions})  # fmt: skip
        dump(folder / f"{prefix}mscoco_{split}2014_annotations.json", shared | {"annotations": annotations})

    return write
