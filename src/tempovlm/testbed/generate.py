"""Draw a scene that depends only on a data set's name, a split and a number."""

from __future__ import annotations

import hashlib
from random import Random

from tempovlm.core.errors import UserError
from tempovlm.testbed import stand_ins
from tempovlm.testbed.drawing.canvas import Canvas
from tempovlm.testbed.scene import SIZES, SPLITS, Quiz, Scene

_SHIFTS = (-6, -5, -4, -3, 3, 4, 5, 6)


def _stream(*parts: object) -> Random:
    """Return random numbers that depend on the parts alone, the same on every machine."""
    digest = hashlib.blake2b("/".join(map(str, parts)).encode(), digest_size=8).digest()
    return Random(int.from_bytes(digest, "little"))


def scene_size(dataset: str, split: str, index: int, *, seed: int = 0) -> tuple[int, int]:
    """Return the height and width in pixels of the picture that `make_scene` draws where it is given no size."""
    return _stream(seed, dataset, split, index).choice(SIZES)


def make_scene(
    dataset: str,
    split: str,
    index: int,
    *,
    seed: int = 0,
    size: tuple[int, int] | None = None,
    twin: bool = False,
    most: int | None = None,
) -> Scene:
    """Draw one picture with its questions; the same arguments always give the same bytes.

    Args:
        dataset: One of `stand_ins.NAMES`.
        split: 'train' or 'val'.
        index: Any number from 0; each gives another picture.
        seed: Another seed gives another data set.
        size: Height and width in pixels; None draws one of `SIZES`.
        twin: The same scene and questions with other noise and a shift of 3 to 6 pixels each way.
        most: The most questions; None leaves it to the data set. The picture is the same.

    Returns:
        The picture with its questions and dense labels.

    Raises:
        UserError: Unknown data set or split.
    """
    stand_in = stand_ins.find(dataset)
    if split not in SPLITS:
        raise UserError(f"unknown split {split!r}; choose train or val")
    rng = _stream(seed, dataset, split, index)
    drawn = rng.choice(SIZES)
    canvas = Canvas(rng, size or drawn, paper=stand_in.paper)
    quiz = Quiz(rng)
    usual = stand_in.paint(canvas, quiz, split)
    questions = quiz.pick(most or usual, stand_in.yes_no)
    noise = _stream(seed, dataset, split, index, "twin" if twin else "original")
    shift = (noise.choice(_SHIFTS), noise.choice(_SHIFTS)) if twin else (0, 0)
    image, labels = canvas.finish(noise, shift)
    return Scene(
        image=image,
        questions=questions,
        char_boxes=labels.char_boxes,
        char_ids=labels.char_ids,
        shape_boxes=labels.shape_boxes,
        shape_ids=labels.shape_ids,
        color_ids=labels.color_ids,
    )
