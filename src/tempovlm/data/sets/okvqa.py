"""OK-VQA: questions about COCO's pictures that need knowledge from outside of them."""

from __future__ import annotations

from tempovlm.data.coco import coco_pictures_needed, vqa_files, vqa_reader
from tempovlm.data.dataset import DataSet, Fields, HubCopy, Need
from tempovlm.data.entries import Entry

_ADDRESS = "https://okvqa.allenai.org/static/data"


def _needs(split: str) -> tuple[Need, ...]:
    files = (Need((name,), f"{_ADDRESS}/{name}.zip") for name in vqa_files("", split))
    return *files, coco_pictures_needed(split)


def _row(row: Entry, _: str) -> Fields:
    # A question's id is its picture's with one more digit.
    return row.asked(image_id="question_id") | {"image_id": row.text("question_id")[:-1]}


DATA_SET = DataSet(
    name="okvqa",
    order=3,
    style="okvqa",
    home="https://okvqa.allenai.org",
    needs=_needs,
    read=vqa_reader(""),
    hub=HubCopy(
        repo_id="lmms-lab/OK-VQA",
        patterns={"val": "data/val2014-*.parquet"},
        columns=("question_id", "question", "answers"),
        fields=_row,
    ),
)
