"""Print in three sizes, by the tier that it takes: large the low one, small the medium one, fine the high one.

Sizes are em sizes in pixels of a picture with a longest side of 448, and grow with it.
"""

from __future__ import annotations

from random import Random
from string import digits

from tempovlm.testbed.drawing import fonts
from tempovlm.testbed.drawing.canvas import Canvas
from tempovlm.testbed.lexicon import SIGN_WORDS

LARGE = 40
"""Em size from which the low tier shows a digit or a word of the training."""
OBJECT = 20.0
"""Half extent from which the low tier shows an object and its colour."""
_SIDE = 448
_FINE = 0.45
"""Share of fine print among what is not large."""


def scale(canvas: Canvas) -> float:
    """Return how much the picture is shrunk more than one with a longest side of 448, so that print must grow."""
    return max(canvas.height, canvas.width) / _SIDE


def large_size(canvas: Canvas) -> int:
    """Return an em size that the low tier shows."""
    return round(scale(canvas) * canvas.rng.randrange(LARGE + 1, 50))


def small_size(canvas: Canvas) -> int:
    """Return an em size that the low tier does not show: fine or small print."""
    rng = canvas.rng
    size = rng.randrange(12, 14) if rng.random() < _FINE else rng.randrange(16, 21)
    return max(12, round(scale(canvas) * size))


def small_text(rng: Random) -> str:
    """Return two or three digits or a word of the training."""
    if rng.random() < 0.35:
        return rng.choice([word for word in rng.sample(SIGN_WORDS, 5) if len(word) < 8] or ["open"])
    return str(rng.randrange(10, 100) if rng.random() < 0.7 else rng.randrange(100, 1000))


def misread(rng: Random, number: str) -> str:
    """Return the number with another digit in one place; the first is never 0."""
    place = rng.randrange(len(number))
    others = [digit for digit in digits[place == 0 :] if digit != number[place]]
    return number[:place] + rng.choice(others) + number[place + 1 :]


def plate(canvas: Canvas, middle: tuple[float, float], text: str, size: int) -> None:
    """Put a plate with a line of print on the picture."""
    face = canvas.rng.choice(fonts.SMALL_FACES)
    wide = fonts.width(face, size, text) / 2 + size * 0.25
    x, y = middle
    canvas.rect((x - wide, y - size * 0.6, x + wide, y + size * 0.6), (234, 234, 226))
    canvas.text(middle, text, face, size, (22, 22, 30))
