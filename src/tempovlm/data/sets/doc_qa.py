"""DocVQA, single pages: questions about scanned documents."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from tempovlm.data.dataset import DataSet, Fields, HubCopy, Need
from tempovlm.data.entries import Entry
from tempovlm.data.files import first, listed, read_fields
from tempovlm.data.metrics.text import anls

_ADDRESS = "https://rrc.cvc.uab.es/?ch=17&com=downloads (free registration), Single Page Document VQA"


def _questions(split: str) -> tuple[str, ...]:
    """Places of the questions' file: as published later (`spdocvqa_*`), and as at first."""
    names = (f"{split}_v1.0_withQT.json", f"{split}_v1.0.json")
    return tuple(f"{place}{name}" for place in ("spdocvqa_qas/", f"{split}/", "") for name in names)


def _pictures(split: str) -> tuple[str, ...]:
    return "spdocvqa_images", f"{split}/documents", "documents"


def _needs(split: str) -> tuple[Need, ...]:
    return Need(_questions(split), _ADDRESS), Need(_pictures(split), _ADDRESS)


def _read(folder: Path, split: str) -> Iterator[Fields]:
    content = read_fields(first(*(folder / name for name in _questions(split))))
    images = first(*(folder / name for name in _pictures(split)))
    for entry in listed(content, "data", "questionId"):
        image = Path(entry.text("image"))
        yield {
            **entry.asked("questionId", "image"),
            "image_id": image.stem,
            "image_path": images / image.name,
            "template": ", ".join(entry.fields.get("question_types") or ()),
        }


def _row(row: Entry, _: str) -> Fields:
    # One document has several pages, each a picture of its own.
    page = f"{row.text('ucsf_document_id')}_{row.text('ucsf_document_page_no')}"
    return {**row.asked("questionId", "ucsf_document_id"), "image_id": page}


DATA_SET = DataSet(
    name="doc_qa",
    order=5,
    style="doc_qa",
    home="https://www.docvqa.org",
    needs=_needs,
    read=_read,
    metric=anls,
    hub=HubCopy(
        repo_id="lmms-lab/DocVQA",
        patterns={"val": "DocVQA/validation-*.parquet"},
        columns=("questionId", "question", "answers", "ucsf_document_id", "ucsf_document_page_no"),
        fields=_row,
        id="questionId",
        skip="InfographicVQA",
    ),
)
