"""ST-VQA, open dictionary (task 3): questions about scene text in pictures of six collections."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from tempovlm.data.dataset import DataSet, Fields, Need
from tempovlm.data.files import listed, read_fields
from tempovlm.data.metrics.text import anls

_ADDRESS = "https://rrc.cvc.uab.es/?ch=11&com=downloads (free registration), task 3"
_QUESTIONS = "train_task_3.json"
_NUM_VAL = 1024
_SEED = 63069


def _needs(_: str) -> tuple[Need, ...]:
    # Each collection of pictures has a folder: one stands for all.
    return Need((_QUESTIONS,), _ADDRESS), Need(("coco-text", "icdar", "VisualGenome"), _ADDRESS)


def _read(folder: Path, split: str) -> Iterator[Fields]:
    """Read the training questions, the only ones with answers.

    Validation is the part that Molmo's authors set aside: sorted by id, shuffled by numpy with their seed, the
    first 1024.
    """
    import numpy as np

    entries = listed(read_fields(folder / _QUESTIONS), "data", "question_id")
    entries.sort(key=lambda entry: entry.value("question_id"))
    order = list(range(len(entries)))
    np.random.RandomState(_SEED).shuffle(order)
    for entry in (entries[i] for i in (order[_NUM_VAL:] if split == "train" else order[:_NUM_VAL])):
        yield {
            **entry.asked(image_id="file_path"),
            "image_path": folder / entry.text("file_path"),
            "template": entry.fields.get("dataset", ""),
        }


DATA_SET = DataSet(
    name="st_qa",
    order=6,
    style="st_qa",
    home="https://rrc.cvc.uab.es/?ch=11",
    needs=_needs,
    read=_read,
    metric=anls,
)
