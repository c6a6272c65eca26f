"""One of the processes that draw a test bed: `python -m tempovlm.testbed.worker FOLDER SHARE`.

It is a plain child process, not multiprocessing, so that callers need no `if __name__ == "__main__"`.
SHARE is JSON: seed, num_train, num_val, datasets, worker, workers. For each batch of pictures a line with their
number goes to stdout.
"""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from tempovlm.testbed import stand_ins
from tempovlm.testbed.generate import make_scene
from tempovlm.testbed.stand_in import Record

_BATCH = 16


def _encode(pixels: NDArray[np.uint8], paths: list[Path]) -> None:
    """Write a picture, uint8 (H, W, 3), to all of these places."""
    buffer = io.BytesIO()
    image = Image.fromarray(pixels)
    if paths[0].suffix == ".png":
        image.save(buffer, "PNG", compress_level=1)
    else:
        image.save(buffer, "JPEG", quality=92)
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(buffer.getvalue())


def draw_picture(folder: Path, dataset: str, split: str, index: int, seed: int) -> Record:
    """Draw and store one picture, and its twin in validation.

    Args:
        folder: The folder of the data set.
        dataset: Its name.
        split: 'train' or 'val'.
        index: Number of the picture.
        seed: Seed of the test bed.

    Returns:
        The record that the stand-in's writer needs.
    """
    scene = make_scene(dataset, split, index, seed=seed)
    places = stand_ins.find(dataset).places(split, index, len(scene.questions))
    _encode(scene.image, [folder / path for path, _ in places])
    if split == "val":
        twin = make_scene(dataset, split, index, seed=seed, twin=True)
        _encode(twin.image, [folder / path for _, path in places])
    height, width = scene.image.shape[:2]
    questions = [asdict(question) for question in scene.questions]
    return {"index": index, "width": width, "height": height, "questions": questions}


def part_path(folder: Path, dataset: str, split: str, worker: int) -> Path:
    """Return the file to which a worker writes the records of its pictures."""
    return folder / f".part-{dataset}-{split}-{worker}.json"


def draw_share(folder: Path, share: dict[str, Any], report: Callable[[int], None]) -> None:
    """Draw every picture whose number belongs to this worker.

    Args:
        folder: The folder of the test bed.
        share: As the module's docstring describes it.
        report: Is called with the number of pictures of each batch.
    """
    done = 0
    for dataset in share["datasets"]:
        for split in ("train", "val"):
            records = []
            for index in range(share["worker"], share[f"num_{split}"], share["workers"]):
                records.append(draw_picture(folder / dataset, dataset, split, index, share["seed"]))
                done += 1
                if done % _BATCH == 0:
                    report(_BATCH)
            path = part_path(folder, dataset, split, share["worker"])
            path.write_text(json.dumps(records), encoding="utf-8")
    report(done % _BATCH)


def _print(count: int) -> None:
    sys.stdout.write(f"{count}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    draw_share(Path(sys.argv[1]), json.loads(sys.argv[2]), _print)
