"""TextVQA 0.5.1: questions about text in pictures of OpenImages."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from tempovlm.data.dataset import DataSet, Fields, HubCopy, Need
from tempovlm.data.files import listed, pictures, read_fields, twin
from tempovlm.data.metrics.text import text_vqa_accuracy

_ADDRESS = "https://dl.fbaipublicfiles.com/textvqa"


def _questions(split: str) -> str:
    return f"TextVQA_0.5.1_{split}.json"


def _needs(split: str) -> tuple[Need, ...]:
    name = _questions(split)
    return (
        Need((name,), f"{_ADDRESS}/data/{name}"),
        Need(("train_images",), f"{_ADDRESS}/images/train_val_images.zip"),
    )


def _read(folder: Path, split: str) -> Iterator[Fields]:
    """One file a split; the pictures of both splits are in `train_images`."""
    entries = listed(read_fields(folder / _questions(split)), "data", "question_id")
    images = pictures(folder, "train_images")
    for entry in entries:
        asked = entry.asked()
        name = f"{asked['image_id']}.jpg"
        yield {**asked, "image_path": images / name, "twin_path": twin(folder, name), **entry.made()}


DATA_SET = DataSet(
    name="text_vqa",
    order=1,
    style="text_vqa",
    home="https://textvqa.org",
    needs=_needs,
    read=_read,
    metric=text_vqa_accuracy,
    hub=HubCopy(
        repo_id="lmms-lab/textvqa",
        patterns={"train": "data/train-*.parquet", "val": "data/validation-*.parquet"},
    ),
)
