"""Scenes without their pixels, which take most of the time and which no test of questions and labels looks at."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from random import Random
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tempovlm.testbed.drawing import canvas
from tempovlm.testbed.drawing.canvas import Canvas, Labels


class NoInk:
    """Draws nothing, whatever it is told to draw."""

    def __getattr__(self, _: str) -> Any:
        return lambda *_, **__: None


def blank(one: Canvas) -> Image.Image:
    """A background of one pixel, after the draws of random numbers that a gradient takes."""
    one.rng.uniform(-20, 20), one.rng.uniform(-14, 14)
    return Image.new("RGB", (1, 1))


def finished(one: Canvas, _: Random, shift: tuple[int, int]) -> tuple[np.ndarray, Labels]:
    """A picture of the right size without memory of its own, and the labels."""
    return np.broadcast_to(np.uint8(0), (one.height, one.width, 3)), one._labels(*shift)


@contextmanager
def unpainted() -> Iterator[None]:
    """Within it `make_scene` asks and labels as ever, and every pixel is black."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(canvas, "ImageDraw", SimpleNamespace(Draw=lambda _: NoInk()))
        patch.setattr(canvas, "_number_mask", lambda *_: (None, (0, 0)))
        patch.setattr(Canvas, "_gradient", blank)
        patch.setattr(Canvas, "finish", finished)
        yield
