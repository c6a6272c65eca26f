"""Drawings of the objects, as short lists of primitives in unit coordinates.

The layout places the objects.

One drawing is a string of commands separated by `;`, coordinates in hundredths of the half size, x right and y
down, both from -100 to 100:

    e x0 y0 x1 y1 c      ellipse            r x0 y0 x1 y1 c     rectangle
    p x y x y ... c      polygon            l w x y x y ... c   line of width w
    o w x0 y0 x1 y1 c    ellipse outline    a x0 y0 x1 y1 s t c pie slice from s to t degrees

Colours: m main, d darker, h lighter, k black, w white, n brown, g green, y yellow, s grey.
"""

from __future__ import annotations

from functools import lru_cache

from PIL import ImageDraw

RGB = tuple[int, int, int]
Command = tuple[str, tuple[float, ...], str]

_FIXED: dict[str, RGB] = {
    "k": (26, 26, 26),
    "w": (234, 234, 234),
    "n": (112, 72, 40),
    "g": (50, 140, 60),
    "y": (230, 205, 50),
    "s": (150, 150, 150),
}

_DRAWINGS: dict[str, str] = {
    "circle": "e -92 -92 92 92 m",
    "square": "r -82 -82 82 82 m",
    "triangle": "p 0 -95 95 80 -95 80 m",
    "star": "p 0 -100 25 -34 95 -31 40 13 59 81 0 42 -59 81 -40 13 -95 -31 -25 -34 m",
    "heart": "e -95 -85 5 15 m;e -5 -85 95 15 m;p -88 -12 88 -12 0 95 m",
    "cross": "r -32 -95 32 95 m;r -95 -32 95 32 m",
    "diamond": "p 0 -100 70 0 0 100 -70 0 m",
    "ring": "o 34 -95 -95 95 95 m",
    "moon": "p 30 -95 -30 -85 -75 -40 -85 5 -70 50 -30 85 30 95 75 75 35 65 -5 35 -20 0 -5 -40 35 -70 75 -78 m",
    "arrow": "p -95 -25 10 -25 10 -70 95 0 10 70 10 25 -95 25 m",
    "car": "p -55 -10 -35 -55 40 -55 65 -10 m;r -98 -10 98 40 m;p -42 -12 -28 -45 0 -45 0 -12 w;"
    "p 8 -12 8 -45 34 -45 50 -12 w;e -75 15 -25 65 k;e 25 15 75 65 k;e -60 30 -40 50 s;e 40 30 60 50 s",
    "house": "r -75 -15 75 90 m;p -98 -15 0 -95 98 -15 d;r -20 25 20 90 n;r 35 10 60 35 w;r -60 10 -35 35 w",
    "tree": "r -14 30 14 98 n;e -80 -95 80 45 m",
    "fish": "e -60 -48 95 48 m;p -40 0 -98 -50 -98 50 d;e 50 -22 72 0 w;e 57 -16 67 -6 k",
    "cup": "p -70 -70 50 -70 35 80 -55 80 m;o 14 25 -45 95 35 m;e -70 -84 50 -56 d",
    "boat": "p -98 30 98 30 60 85 -60 85 m;r -6 -95 4 30 n;p 10 -88 10 15 75 15 w;p -12 -65 -12 15 -62 15 w",
    "umbrella": "a -95 -90 95 100 180 360 m;l 10 0 0 0 75 20 90 38 78 n;e -95 -8 -45 24 m;e 45 -8 95 24 m",
    "scissors": "l 16 -55 -95 25 40 s;l 16 55 -95 -25 40 s;o 18 -75 25 -5 95 m;o 18 5 25 75 95 m",
    "hammer": "r -12 -40 14 98 n;p -80 -90 50 -90 85 -65 50 -40 -80 -40 m",
    "key": "o 26 -95 -50 0 50 m;r -10 -12 95 14 m;r 50 10 66 48 m;r 78 10 94 40 m",
    "bird": "e -60 -35 55 55 m;e 25 -75 85 -15 m;p 80 -52 100 -42 80 -32 y;p -45 0 -98 -40 -85 20 d;"
    "p -25 -5 25 -5 -10 40 d;e 55 -60 66 -49 k;l 7 0 50 0 88 y",
    "cat": "e -75 -55 75 85 m;p -72 -20 -66 -98 -18 -50 m;p 72 -20 66 -98 18 -50 m;e -42 -15 -14 13 w;"
    "e 14 -15 42 13 w;e -33 -9 -22 8 k;e 22 -9 33 8 k;p -10 25 10 25 0 38 k;"
    "l 4 -90 20 -35 32 k;l 4 90 20 35 32 k",
    "rabbit": "e -55 -10 55 95 m;e -50 -100 -12 15 m;e 12 -100 50 15 m;e -40 -85 -24 -10 h;e 24 -85 40 -10 h;"
    "e -32 22 -14 40 k;e 14 22 32 40 k;e -10 52 10 66 w",
    "snail": "p -95 80 -80 50 60 50 70 -20 92 -20 90 80 d;e -65 -70 55 60 m;o 12 -38 -42 30 34 w;"
    "l 6 80 -20 95 -55 d",
    "bee": "e -45 -98 0 -25 w;e 0 -98 45 -25 w;e -75 -40 85 55 m;r -40 -34 -18 48 k;r 8 -40 30 54 k;"
    "e 55 -15 72 4 w",
    "spider": "e -40 -30 40 60 m;e -24 -62 24 -20 m;l 8 -30 0 -75 -40 -98 -5 m;l 8 30 0 75 -40 98 -5 m;"
    "l 8 -30 20 -80 5 -95 50 m;l 8 30 20 80 5 95 50 m;l 8 -25 40 -60 50 -65 92 m;l 8 25 40 60 50 65 92 m",
    "penguin": "e -58 -95 58 90 m;e -36 -40 36 82 w;e -26 -76 -8 -58 w;e 8 -76 26 -58 w;"
    "p -12 -55 12 -55 0 -34 y;"
    "e -55 78 -5 98 y;e 5 78 55 98 y",
    "mouse": "e -50 -30 70 65 m;e 0 -75 45 -25 m;e -45 -70 5 -15 m;e 45 -5 56 8 k;e 64 14 76 26 k;"
    "l 8 -45 40 -90 60 -98 20 d",
    "apple": "e -80 -55 15 90 m;e -15 -55 80 90 m;l 10 0 -45 8 -90 n;e 8 -92 60 -62 g",
    "banana": "p -85 -70 -65 -80 -45 -20 -5 20 50 35 90 30 95 50 50 80 -15 75 -60 35 -85 -20 m;"
    "r -90 -90 -66 -68 n",
    "carrot": "p -45 -40 45 -40 0 98 m;p 0 -40 -50 -90 -15 -85 g;p 0 -40 -10 -98 20 -98 g;"
    "p 0 -40 25 -85 55 -85 g",
    "mushroom": "p -28 0 28 0 38 95 -38 95 w;a -95 -85 95 85 180 360 m;e -50 -50 -20 -22 w;e 10 -65 40 -36 w",
    "cactus": "r -22 -95 22 60 m;r -75 -40 -50 15 m;r -75 -5 -10 18 m;r 50 -60 75 0 m;r 10 -20 75 2 m;"
    "p -50 55 50 55 35 98 -35 98 n",
    "snowman": "e -65 0 65 98 w;e -42 -68 42 12 w;r -48 -70 48 -56 m;r -30 -98 30 -60 m;e -20 -42 -8 -30 k;"
    "e 8 -42 20 -30 k;p 0 -28 38 -18 0 -12 y;r -44 2 44 18 m",
    "sun": "e -52 -52 52 52 m;l 12 0 -60 0 -98 m;l 12 0 60 0 98 m;l 12 -60 0 -98 0 m;l 12 60 0 98 0 m;"
    "l 12 -44 -44 -70 -70 m;l 12 44 -44 70 -70 m;l 12 -44 44 -70 70 m;l 12 44 44 70 70 m",
    "cloud": "e -98 -15 -20 60 m;e -60 -60 30 50 m;e -10 -45 70 50 m;e 30 -10 98 60 m;r -60 15 62 60 m",
    "lightning": "p 15 -98 -60 15 -8 15 -30 98 60 -25 8 -25 50 -98 m",
    "leaf": "p -80 80 -70 -10 -20 -70 85 -90 70 5 15 70 m;l 7 -95 95 60 -65 d",
    "flower": "l 10 0 0 0 98 g;e -30 -98 30 -38 m;e -30 -22 30 38 m;e -70 -60 -10 0 m;e 10 -60 70 0 m;"
    "e -22 -52 22 -8 y",
    "rocket": "p 0 -98 35 -40 35 50 -35 50 -35 -40 m;p -35 10 -75 70 -35 60 d;p 35 10 75 70 35 60 d;"
    "e -18 -40 18 -4 w;"
    "p -22 54 22 54 0 98 y",
    "plane": "e -95 -22 98 22 m;p 20 0 -30 -90 -55 -90 -20 0 d;p 20 0 -30 90 -55 90 -20 0 d;"
    "p -75 0 -98 -50 -98 0 d;e 65 -12 85 4 w",
    "bicycle": "o 11 -98 0 -12 86 k;o 11 12 0 98 86 k;l 14 -55 43 -20 -30 40 -30 55 43 m;"
    "l 14 -20 -30 0 43 40 -30 m;"
    "l 12 40 -30 30 -65 60 -65 m;l 14 -35 -45 -5 -45 k",
    "train": "r -95 -40 55 50 m;r 20 -85 95 50 m;r 35 -65 80 -25 w;r -75 -85 -45 -40 d;e -85 35 -45 80 k;"
    "e -25 35 15 80 k;e 40 35 80 80 k",
    "ball": "e -90 -90 90 90 m;p 0 -35 34 -10 21 30 -21 30 -34 -10 k;l 8 0 -35 0 -88 k;l 8 34 -10 82 -30 k;"
    "l 8 21 30 50 72 k;l 8 -21 30 -50 72 k;l 8 -34 -10 -82 -30 k",
    "book": "p 0 -60 -95 -80 -95 65 0 85 m;p 0 -60 95 -80 95 65 0 85 m;p 0 -62 -80 -88 -80 50 0 72 w;"
    "p 0 -62 80 -88 80 50 0 72 w;"
    "l 6 0 -62 0 80 k;l 5 -65 -50 -15 -36 s;l 5 -65 -15 -15 0 s;l 5 65 -50 15 -36 s;l 5 65 -15 15 0 s",
    "pencil": "p -60 -98 -10 -98 -10 45 -60 45 m;p -60 45 -10 45 -35 98 w;p -43 78 -27 78 -35 98 k;"
    "r -60 -98 -10 -75 h",
    "fork": "r -12 0 12 98 m;r -45 -98 -28 -30 m;r -9 -98 9 -30 m;r 28 -98 45 -30 m;"
    "p -45 -40 45 -40 12 12 -12 12 m",
    "bed": "r -98 -60 -82 80 n;r 82 -10 98 80 n;r -82 10 82 55 m;e -78 -20 -25 16 w",
    "chair": "r -60 -98 -40 95 m;r 40 10 60 95 m;r -60 0 60 24 m;r -40 -85 -28 -20 m;"
    "p -60 -98 -20 -98 -20 -20 -60 -20 m",
    "lamp": "p -35 -95 35 -95 75 -15 -75 -15 m;r -8 -15 8 80 k;r -45 78 45 95 k",
    "candle": "r -26 -35 26 95 m;l 7 0 -35 0 -55 k;p 0 -98 18 -65 0 -48 -18 -65 y;r -60 85 60 98 n",
    "bell": "p -30 -70 30 -70 50 30 85 60 -85 60 -50 30 m;e -35 -92 35 -30 m;e -18 55 18 92 k;"
    "e -10 -100 10 -80 d",
    "guitar": "e -90 15 -5 98 m;e -60 -25 15 45 m;l 16 -20 10 75 -80 n;r 62 -98 92 -66 k;e -50 10 -18 42 k",
    "drum": "r -85 -40 85 60 m;e -85 40 85 85 m;e -85 -65 85 -15 w;l 10 -30 -40 -85 -98 n;"
    "l 10 30 -40 85 -98 n",
    "tent": "p 0 -85 98 80 -98 80 m;p 0 -40 35 80 -35 80 k",
    "crown": "p -90 70 -95 -60 -45 0 0 -85 45 0 95 -60 90 70 m;r -90 50 90 78 d;e -12 52 12 76 w",
    "ladder": "r -55 -98 -38 98 m;r 38 -98 55 98 m;r -45 -75 45 -58 m;r -45 -30 45 -13 m;"
    "r -45 15 45 32 m;r -45 58 45 75 m",
    "anchor": "o 14 -25 -98 25 -48 m;r -10 -50 10 90 m;r -45 -35 45 -18 m;"
    "p -95 20 -70 10 -62 50 0 78 62 50 70 10 95 20 75 72 0 98 -75 72 m",
    "hat": "r -98 35 98 62 m;p -55 40 -45 -70 45 -70 55 40 m;r -53 10 53 34 k",
    "glove": "r -50 -20 50 60 m;e -56 -95 -26 10 m;e -26 -100 4 10 m;e 4 -100 34 10 m;e 28 -85 58 10 m;"
    "p 45 20 95 -25 100 5 50 58 m;r -50 62 50 95 d",
    "boot": "p -45 -95 25 -95 25 20 90 45 92 80 -45 80 m;r -45 80 95 96 k;r -45 -95 25 -72 d",
    "pear": "e -70 -10 70 95 m;e -36 -70 36 30 m;l 10 0 -65 10 -98 n",
    "cherry": "e -90 20 -15 95 m;e 15 20 90 95 m;l 8 -50 25 15 -85 n;l 8 50 25 15 -85 n;e 12 -98 70 -68 g",
    "pepper": "e -70 -50 5 85 m;e -40 -50 40 92 m;e -5 -50 70 85 m;p -10 -45 10 -45 18 -98 0 -98 g",
}  # fmt: skip


@lru_cache(maxsize=256)
def _commands(name: str) -> tuple[Command, ...]:
    """The parsed drawing of one object."""
    parsed = []
    for part in _DRAWINGS[name].split(";"):
        words = part.split()
        parsed.append((words[0], tuple(float(word) / 100 for word in words[1:-1]), words[-1]))
    return tuple(parsed)


def has_drawing(name: str) -> bool:
    """Whether this module can draw the object."""
    return name in _DRAWINGS


def shade(rgb: RGB, factor: float) -> RGB:
    """A darker (factor < 1) or lighter (factor > 1) tone, kept inside [20, 235]."""
    red, green, blue = (min(235, max(20, int(value * factor + (25 if factor > 1 else 0)))) for value in rgb)
    return red, green, blue


def draw_icon(
    draw: ImageDraw.ImageDraw, name: str, center: tuple[float, float], half: float, rgb: RGB, *, flip: bool = False
) -> None:
    """Draw one object.

    Args:
        draw: Image to draw on.
        name: A key of the drawings.
        center: Middle of the object, pixels.
        half: Half of its extent, pixels.
        rgb: The main colour.
        flip: Mirror it left to right.
    """
    tones = {"m": rgb, "d": shade(rgb, 0.7), "h": shade(rgb, 1.25), **_FIXED}
    if max(rgb) < 60:
        tones |= {"k": _FIXED["s"], "d": (84, 84, 84), "h": (110, 110, 110)}
    elif min(rgb) > 190:
        tones |= {"w": _FIXED["s"], "d": _FIXED["s"]}
    cx, cy = center
    sx = -half if flip else half
    for kind, numbers, tone in _commands(name):
        fill = tones[tone]
        values = numbers[1:] if kind in "ol" else numbers
        count = 4 if kind == "a" else len(values)
        points = [(cx + values[i] * sx if i % 2 == 0 else cy + values[i] * half) for i in range(count)]
        if kind in "eroa" and points[0] > points[2]:
            points[0], points[2] = points[2], points[0]
        if kind == "e":
            draw.ellipse(points, fill=fill)
        elif kind == "r":
            draw.rectangle(points, fill=fill)
        elif kind == "p":
            draw.polygon(points, fill=fill)
        elif kind == "l":
            draw.line(points, fill=fill, width=max(1, round(numbers[0] * half)))
        elif kind == "o":
            draw.ellipse(points, outline=fill, width=max(1, round(numbers[0] * half)))
        else:
            draw.pieslice(points, values[4] * 100, values[5] * 100, fill=fill)
