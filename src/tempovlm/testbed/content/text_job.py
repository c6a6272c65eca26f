"""Shared by all objects that carry text: their cell, em size, words and numbers.

Chooses the size of a line and whether its word is held out; the objects are drawn in `stand_ins.text_vqa`.
"""

from __future__ import annotations

from dataclasses import dataclass
from random import Random

from tempovlm.testbed.drawing import fonts
from tempovlm.testbed.drawing.canvas import Box, Canvas
from tempovlm.testbed.drawing.layout import HELD_OUT_SHARE, center_of
from tempovlm.testbed.lexicon import HELD_OUT_WORDS, SIGN_WORDS
from tempovlm.testbed.scene import Quiz


@dataclass(frozen=True, slots=True)
class Job:
    """One object to draw: the canvas, its cell, the wished em size and the quiz."""

    canvas: Canvas
    cell: Box
    size: int
    split: str
    quiz: Quiz

    @property
    def rng(self) -> Random:
        """The scene's random numbers."""
        return self.canvas.rng

    def fit(self, text: str, share: float = 1.0, *, tall: float = 1.0, broad: float = 1.0) -> tuple[str, int]:
        """Return a face and the largest size up to the wished one at which a line fits a share of the cell.

        The object around the line is `tall` em high and at least `broad` em wide.
        """
        wide = (self.cell[2] - self.cell[0]) * share
        high = (self.cell[3] - self.cell[1]) / tall
        face = self.rng.choice(fonts.FACES if self.size >= 18 else fonts.SMALL_FACES)
        size = min(self.size, int(high), int((self.cell[2] - self.cell[0]) / broad))
        needed = fonts.width(face, size, text)
        if needed > wide:
            size = int(size * wide / needed)
        return face, max(12, size)

    def case(self, word: str) -> str:
        """Return the text in capitals if it is small print, else now and then."""
        draw = self.rng.random()
        if self.size < 22 or draw < 0.7:
            return word.upper()
        return word.capitalize() if draw < 0.88 else word

    def place(self, wide: float, high: float) -> tuple[float, float]:
        """Return a middle for a box of this size inside the cell, jittered if there is room."""
        x, y = center_of(self.cell)
        room_x = max(0.0, (self.cell[2] - self.cell[0] - wide) / 2)
        room_y = max(0.0, (self.cell[3] - self.cell[1] - high) / 2)
        return x + self.rng.uniform(-room_x, room_x), y + self.rng.uniform(-room_y, room_y)


def _made_up(rng: Random) -> str:
    """Return a pronounceable word of three to six letters without a meaning."""
    while True:
        length = rng.choice((3, 4, 4, 5, 5, 6))
        start = rng.randrange(2)
        word = "".join(rng.choice("aeiou" if (start + i) % 2 else "bcdfghjklmnprstvwxyz") for i in range(length))
        if word not in HELD_OUT_WORDS and word not in SIGN_WORDS:
            return word


def pick_word(job: Job, made_up: float) -> tuple[str, bool]:
    """Return a word to write, and whether it is held out of training."""
    rng = job.rng
    if job.split == "val" and rng.random() < HELD_OUT_SHARE:
        return rng.choice(HELD_OUT_WORDS), True
    return (_made_up(rng) if rng.random() < made_up else rng.choice(SIGN_WORDS)), False


def number_of(rng: Random, digits: int) -> str:
    """Return a number with this many digits."""
    return str(rng.randrange(10 ** (digits - 1), 10**digits))
