"""ScienceQA, the multiple choice questions that have a picture."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from tempovlm.data.dataset import DataSet, Fields, HubCopy, Need
from tempovlm.data.entries import Entry
from tempovlm.data.files import pictures, read_fields, twin
from tempovlm.data.sample import check_unique, choice_question

_ADDRESS = "https://github.com/lupantech/ScienceQA/tree/main/data/scienceqa"


def _needs(split: str) -> tuple[Need, ...]:
    files = (Need((name,), f"{_ADDRESS}/{name}") for name in ("problems.json", "pid_splits.json"))
    return *files, Need((f"images/{split}",), f"https://scienceqa.s3.us-west-1.amazonaws.com/images/{split}.zip")


def _read(folder: Path, split: str) -> Iterator[Fields]:
    """Two files for all splits; problems without a picture are left out."""
    problems = read_fields(folder / "problems.json", keyed_by_id=True)
    splits = read_fields(folder / "pid_splits.json")
    pids = splits.value(split)
    check_unique([str(pid) for pid in pids], [splits.path] * len(pids))
    images = pictures(folder, f"images/{split}")
    for pid in pids:
        fields = problems.value(str(pid))
        if not isinstance(fields, dict):
            raise problems.wrong(str(pid), "is no problem")
        problem = Entry(fields, problems.path, f"question {pid}")
        if not fields.get("image"):
            continue
        yield {
            **_choice(problem),
            "question_id": str(pid),
            "image_id": str(fields.get("image_id", pid)),
            "image_path": images / str(pid) / problem.text("image"),
            "twin_path": twin(folder, f"{pid}.png"),
            **problem.made(),
        }


def _row(row: Entry, place: str) -> Fields:
    return {**_choice(row), "question_id": place, "image_id": place}


def _choice(problem: Entry) -> Fields:
    """Return the question after its hint, which often contains the facts to use, with options and answer."""
    options = problem.options("choices")
    index = problem.option_index("answer", len(options))
    question, hint = problem.text("question"), ""
    if problem.fields.get("hint") is not None:
        hint = problem.text("hint").strip()
    return {
        "question": choice_question(f"{hint}\n{question}" if hint else question, options),
        "answers": (chr(ord("a") + index),),
        "options": options,
        "answer_index": index,
    }


DATA_SET = DataSet(
    name="science_qa_img",
    order=4,
    style="science_qa",
    task="multiple_choice",
    home="https://scienceqa.github.io",
    needs=_needs,
    read=_read,
    hub=HubCopy(
        repo_id="derek-thomas/ScienceQA",
        patterns={"train": "data/train-*.parquet", "val": "data/validation-*.parquet"},
        # The hub's copy has no ids, so a row's index in its split is used.
        columns=("question", "choices", "answer", "hint"),
        fields=_row,
        id=None,
        gaps=True,
    ),
)
