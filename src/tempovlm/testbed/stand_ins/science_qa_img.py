"""Diagrams, charts and maps with multiple choice questions.

What a diagram shows is large, what stands under it is small print.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path

from tempovlm.testbed.content.diagrams.bars import draw_bars
from tempovlm.testbed.content.diagrams.maps import draw_chain, draw_map
from tempovlm.testbed.content.diagrams.measures import draw_beakers, draw_thermometers
from tempovlm.testbed.content.diagrams.sheet import Sheet, new_sheet
from tempovlm.testbed.drawing.canvas import Canvas
from tempovlm.testbed.scene import Quiz
from tempovlm.testbed.stand_in import Record, StandIn, dump

_DIAGRAMS: tuple[tuple[Callable[[Sheet], None], int], ...] = (
    (draw_bars, 6), (draw_map, 5), (draw_chain, 3), (draw_thermometers, 3), (draw_beakers, 2),
)  # fmt: skip
"""Diagrams with their weights."""


def paint(canvas: Canvas, quiz: Quiz, split: str) -> int:
    """Draw one diagram and ask about it.

    Returns:
        The most questions to keep.
    """
    sheet = new_sheet(canvas, quiz, split)
    draws, weights = zip(*_DIAGRAMS, strict=True)
    canvas.rng.choices(draws, weights)[0](sheet)
    sheet.ask_captions()
    return 3


def _problem_id(split: str, index: int, place: int) -> str:
    """Return the number of a problem: pictures times eight, validation from a billion up."""
    return str(index * 8 + place + 1 + (1_000_000_000 if split == "val" else 0))


def _places(split: str, index: int, num_questions: int) -> list[tuple[str, str]]:
    """Return a place of the picture for each of its problems."""
    numbers = [_problem_id(split, index, place) for place in range(num_questions)]
    return [(f"images/{split}/{number}/image.png", f"twins/{number}.png") for number in numbers]


def _write(folder: Path, split: str, records: Iterable[Record]) -> None:
    problems_path, splits_path = folder / "problems.json", folder / "pid_splits.json"
    problems: dict[str, Record] = {}
    splits: dict[str, list[str]] = {"train": [], "val": [], "test": []}
    if problems_path.is_file():
        problems = json.loads(problems_path.read_text(encoding="utf-8"))
        splits = json.loads(splits_path.read_text(encoding="utf-8"))
    for record in records:
        for place, question in enumerate(record["questions"]):
            pid = _problem_id(split, record["index"], place)
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
    dump(problems_path, problems)
    dump(splits_path, splits)


STAND_IN = StandIn(paint=paint, places=_places, write=_write, weight=0.35, paper=True)
