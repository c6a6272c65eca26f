"""The canvas that scenes are drawn on, with the dense labels of everything drawn.

Paints backgrounds, text and objects and records where they are.
A scene is painted with a margin of `PAD` pixels on each side; the picture is a crop of it, so that a twin can
show the same scene shifted by a few pixels.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from random import Random

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from tempovlm.testbed.drawing import fonts
from tempovlm.testbed.drawing.icons import draw_icon, has_drawing, shade
from tempovlm.testbed.lexicon import CHARSET, COLOR_RGB, COLORS, SHAPES

RGB = tuple[int, int, int]
Box = tuple[float, float, float, float]

PAD = 8
"""Margin in pixels around the picture while it is painted; shifts of twins stay below it."""

_NOISE_SIDE = 720
_NOISE_LEVELS = (2.0, 4.0, 6.0)
_CHAR_ID = {char: index for index, char in enumerate(CHARSET)}
_SHAPE_ID = {name: index for index, name in enumerate(SHAPES)}
_COLOR_ID = {name: index for index, name in enumerate(COLORS)}

LIGHT: tuple[RGB, ...] = (
    (214, 208, 192), (196, 210, 222), (204, 218, 198), (216, 200, 204), (206, 206, 206), (222, 214, 178),
    (184, 200, 196), (200, 190, 214), (178, 188, 204), (188, 176, 160),
)  # fmt: skip
DARK: tuple[RGB, ...] = ((62, 66, 74), (58, 72, 66), (78, 64, 58), (56, 60, 88), (70, 56, 74))


@dataclass(frozen=True, slots=True)
class Labels:
    """Dense labels in picture coordinates; see `Scene` for shapes and meanings."""

    char_boxes: NDArray[np.float32]
    char_ids: NDArray[np.int16]
    shape_boxes: NDArray[np.float32]
    shape_ids: NDArray[np.int16]
    color_ids: NDArray[np.int16]


@lru_cache(maxsize=4)
def _noise_bank(level: int) -> NDArray[np.uint8]:
    """A field of gaussian noise as offsets modulo 256, (side, side, 3); drawn once per process."""
    generator = np.random.Generator(np.random.PCG64(1000 + level))
    field = generator.standard_normal((_NOISE_SIDE, _NOISE_SIDE, 3), dtype=np.float32) * _NOISE_LEVELS[level]
    return np.clip(np.rint(field), -18, 18).astype(np.int8).view(np.uint8)


@lru_cache(maxsize=4)
def _grain_bank(seed: int) -> NDArray[np.uint8]:
    """Sparse specks for drawings on plain paper, (side, side, 3): they differ but compress well."""
    generator = np.random.Generator(np.random.PCG64(2000 + seed))
    field = np.zeros((_NOISE_SIDE, _NOISE_SIDE, 1), np.int8)
    spots = generator.integers(0, _NOISE_SIDE, (_NOISE_SIDE * 12, 2))
    field[spots[:, 0], spots[:, 1], 0] = generator.integers(-12, 13, len(spots))
    return field.repeat(3, axis=2).view(np.uint8)


def luminance(rgb: RGB) -> float:
    """Return the perceived brightness between 0 and 255."""
    return 0.299 * rgb[0] + 0.587 * rgb[1] + 0.114 * rgb[2]


def distance(first: RGB, second: RGB) -> int:
    """Return the sum of absolute differences of two colours."""
    return abs(first[0] - second[0]) + abs(first[1] - second[1]) + abs(first[2] - second[2])


def ink_for(rgb: RGB) -> RGB:
    """Return near-black or near-white, whichever reads better on this colour."""
    return (22, 22, 22) if luminance(rgb) > 118 else (234, 234, 234)


@lru_cache(maxsize=8192)
def _number_mask(face: str, size: int, number: str) -> tuple[Image.Image, tuple[int, int]]:
    """Draw a number once as a mask; return it with its place from where the base line starts, in pixels."""
    font = fonts.face(face, size)
    x0, y0, x1, y1 = (int(edge) for edge in font.getbbox(number, anchor="ls"))
    mask = Image.new("L", (max(1, x1 - x0), max(1, y1 - y0)))
    ImageDraw.Draw(mask).text((-x0, -y0), number, fill=255, font=font, anchor="ls")
    return mask, (x0, y0)


class Canvas:
    """One picture in progress; coordinates given to its methods are those of the finished picture."""

    def __init__(self, rng: Random, size: tuple[int, int], *, paper: bool = False) -> None:
        """Paint the background.

        Args:
            rng: Random numbers for every choice.
            size: Height and width of the finished picture in pixels.
            paper: A plain light sheet (for diagrams) instead of a photo-like gradient with clutter.
        """
        self.rng = rng
        self.height, self.width = size
        self.paper = paper
        if paper:
            tone = rng.choice((238, 232, 226))
            self.background: RGB = (min(235, tone), min(235, tone), min(235, tone - rng.randrange(0, 14)))
            shape = (self.width + 2 * PAD, self.height + 2 * PAD)
            self.image = Image.new("RGB", shape, self.background)
        else:
            self.background = rng.choice(LIGHT) if rng.random() < 0.8 else rng.choice(DARK)
            self.image = self._gradient()
        self.draw = ImageDraw.Draw(self.image)
        self._chars: list[Box] = []
        self._char_ids: list[int] = []
        self._shapes: list[Box] = []
        self._shape_ids: list[int] = []
        self._color_ids: list[int] = []
        if not paper:
            self._clutter()

    def _gradient(self) -> Image.Image:
        """A gentle linear change of tone, with the margin."""
        rng = self.rng
        rows, cols = self.height + 2 * PAD, self.width + 2 * PAD
        vertical = np.linspace(0, rng.uniform(-20, 20), rows, dtype=np.float32)[:, None]
        horizontal = np.linspace(0, rng.uniform(-14, 14), cols, dtype=np.float32)[None, :]
        ramp = (vertical + horizontal).astype(np.int8).view(np.uint8)
        tones = (np.uint8(min(200, max(54, tone))) for tone in self.background)
        return Image.merge("RGB", [Image.fromarray(ramp + tone) for tone in tones])

    def _clutter(self) -> None:
        """Faint shapes behind the scene, close to the background in tone."""
        rng = self.rng
        for _ in range(rng.randrange(2, 7)):
            tone = shade(self.background, rng.choice((0.9, 0.94, 1.0)))
            x, y = rng.uniform(-20, self.width), rng.uniform(-20, self.height)
            w, h = rng.uniform(20, 140), rng.uniform(20, 140)
            kind = rng.randrange(3)
            if kind == 0:
                self.draw.ellipse((x, y, x + w, y + h), fill=tone)
            elif kind == 1:
                self.draw.polygon((x, y, x + w, y + h * 0.3, x + w * 0.4, y + h), fill=tone)
            else:
                self.draw.line((x, y, x + w, y + h), fill=tone, width=rng.randrange(2, 8))

    def jitter(self, name: str, amount: int = 12) -> RGB:
        """A colour near the named one, in [20, 235]."""
        rng = self.rng
        red, green, blue = (min(235, max(20, c + rng.randrange(-amount, amount + 1))) for c in COLOR_RGB[name])
        return red, green, blue

    def visible(self, names: tuple[str, ...]) -> list[str]:
        """Return the colours that stand out from the background."""
        return [name for name in names if distance(COLOR_RGB[name], self.background) > 150]

    def colors_of(self, shape: str) -> set[str]:
        """Return the colours in which this object is already in the scene."""
        wanted = _SHAPE_ID[shape]
        return {COLORS[c] for s, c in zip(self._shape_ids, self._color_ids, strict=True) if s == wanted}

    def objects(self) -> list[tuple[str, str, Box]]:
        """Return shape, colour and box of every object so far."""
        kinds = zip(self._shape_ids, self._color_ids, self._shapes, strict=True)
        return [(SHAPES[shape], COLORS[color], box) for shape, color, box in kinds]

    def label_object(self, shape: str, color: str, box: Box) -> None:
        """Label an object drawn by other means; `box` is x0, y0, x1, y1 in pixels."""
        self._shapes.append(box)
        self._shape_ids.append(_SHAPE_ID[shape])
        self._color_ids.append(_COLOR_ID[color])

    def icon(
        self, shape: str, color: str, center: tuple[float, float], half: float, *, flip: bool = False
    ) -> None:
        """Draw and label an object of `icons` in a named colour."""
        x, y = center
        if has_drawing(shape):
            draw_icon(self.draw, shape, (x + PAD, y + PAD), half, self.jitter(color), flip=flip)
        self.label_object(shape, color, (x - half, y - half, x + half, y + half))

    def rect(
        self, box: Box, fill: RGB | None, outline: RGB | None = None, width: int = 1, radius: float = 0
    ) -> None:
        """A rectangle, with round corners if `radius` > 0."""
        moved = (box[0] + PAD, box[1] + PAD, box[2] + PAD, box[3] + PAD)
        if radius:
            self.draw.rounded_rectangle(moved, radius, fill=fill, outline=outline, width=width)
        else:
            self.draw.rectangle(moved, fill=fill, outline=outline, width=width)

    def ellipse(self, box: Box, fill: RGB | None, outline: RGB | None = None, width: int = 1) -> None:
        """An ellipse inside a box."""
        moved = (box[0] + PAD, box[1] + PAD, box[2] + PAD, box[3] + PAD)
        self.draw.ellipse(moved, fill=fill, outline=outline, width=width)

    def polygon(self, points: list[tuple[float, float]], fill: RGB, outline: RGB | None = None) -> None:
        """A filled polygon."""
        self.draw.polygon([(x + PAD, y + PAD) for x, y in points], fill=fill, outline=outline)

    def line(self, points: list[tuple[float, float]], fill: RGB, width: int = 2) -> None:
        """A polyline."""
        self.draw.line([(x + PAD, y + PAD) for x, y in points], fill=fill, width=width)

    def text(self, center: tuple[float, float], string: str, face: str, size: int, fill: RGB) -> Box:
        """Write one line centred on a point and label its characters.

        Args:
            center: Middle of the capitals, pixels.
            string: Text; letters are labelled by their lower-case class, spaces not at all.
            face: A face of `fonts.FACES`.
            size: Em size in pixels.
            fill: Colour of the ink.

        Returns:
            The box around the line, x0, y0, x1, y1.
        """
        font = fonts.face(face, size)
        total = fonts.width(face, size, string)
        cap = fonts.cap_height(face, size)
        x, baseline = round(center[0] - total / 2), round(center[1] + cap / 2)
        if len(string) <= 2 and string.isdigit():
            mask, (left, top) = _number_mask(face, size, string)
            self.draw.bitmap((x + PAD + left, baseline + PAD + top), mask, fill=fill)
        else:
            self.draw.text((x + PAD, baseline + PAD), string, fill=fill, font=font, anchor="ls")
        pen = float(x)
        for char in string:
            advance, x0, y0, x1, y1 = fonts.glyph(face, size, char)
            if char != " ":
                self._chars.append((pen + x0, baseline + y0, pen + x1, baseline + y1))
                self._char_ids.append(_CHAR_ID[char.lower()])
            pen += advance
        return x, baseline - cap, pen, baseline

    def finish(self, noise_rng: Random, shift: tuple[int, int]) -> tuple[NDArray[np.uint8], Labels]:
        """Crop, add noise and return the picture with its labels.

        Args:
            noise_rng: Chooses the place in the noise bank.
            shift: Right and down shift of the crop in pixels, each below `PAD` in size.

        Returns:
            The picture, uint8 (H, W, 3), and its labels.
        """
        dx, dy = shift
        left, top = PAD + dx, PAD + dy
        pixels = np.asarray(self.image)[top : top + self.height, left : left + self.width]
        level = noise_rng.randrange(len(_NOISE_LEVELS))
        bank = _grain_bank(level) if self.paper else _noise_bank(level)
        y, x = noise_rng.randrange(_NOISE_SIDE - self.height), noise_rng.randrange(_NOISE_SIDE - self.width)
        noisy = pixels + bank[y : y + self.height, x : x + self.width]
        return noisy, self._labels(dx, dy)

    def _labels(self, dx: int, dy: int) -> Labels:
        """Return boxes moved by the crop."""
        move = np.array((dx, dy, dx, dy), np.float32)
        return Labels(
            char_boxes=np.array(self._chars, np.float32).reshape(-1, 4) - move,
            char_ids=np.array(self._char_ids, np.int16),
            shape_boxes=np.array(self._shapes, np.float32).reshape(-1, 4) - move,
            shape_ids=np.array(self._shape_ids, np.int16),
            color_ids=np.array(self._color_ids, np.int16),
        )
