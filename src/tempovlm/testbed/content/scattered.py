"""Scenes of objects that the low tier shows: scattered, or in the compartments of a shelf.

Some carry a number in large print, to add and to compare, others a plate in small or fine print.
"""

from __future__ import annotations

from dataclasses import replace
from random import Random

from tempovlm.testbed.content.prints import OBJECT, large_size, plate, scale, small_size, small_text
from tempovlm.testbed.content.things import Thing, named
from tempovlm.testbed.drawing import fonts
from tempovlm.testbed.drawing.canvas import Canvas
from tempovlm.testbed.drawing.layout import choose_color, scatter
from tempovlm.testbed.lexicon import PLAIN_SHAPES

_RARE = 0.11
"""Share of held-out pairs among validation objects; a question often speaks of several objects."""
_SHELF = 0.45
"""Share of scenes that show a shelf."""
_COLOR_NAMES = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")
_LETTER = 0.7
"""Width of a letter, in em sizes, up to which a plate leaves enough of an object to be seen."""
_NUMBERED = 33.0
"""Half extent in pixels, at a longest side of 448, from which an object may carry a number in large print."""


def draw_things(canvas: Canvas, split: str) -> list[Thing]:
    """Draw the objects of a scene with what stands on them."""
    shelf = canvas.rng.random() < _SHELF
    things = _draw_shelf(canvas, split) if shelf else _draw_large(canvas, split)
    return _write_on(canvas, things)


def _kinds(canvas: Canvas, split: str, count: int) -> list[tuple[str, str]]:
    """Return shape and colour of every object: a shape that repeats and a few others, in a few colours."""
    rng = canvas.rng
    names = canvas.visible(_COLOR_NAMES)
    colors = rng.sample(names, min(len(names), rng.choice((4, 5, 6))))
    main, *others = rng.sample(PLAIN_SHAPES, 5)
    repeat = rng.choice((1, 2, 2, 3, 3))
    shapes = [main] * min(repeat, count) + [rng.choice(others) for _ in range(count - repeat)]
    kinds = [(shape, choose_color(rng, split, shape, colors, _RARE)) for shape in shapes]
    rng.shuffle(kinds)
    return kinds


def _draw_large(canvas: Canvas, split: str) -> list[Thing]:
    """Scatter four to seven objects, one of them clearly the largest."""
    rng, unit = canvas.rng, scale(canvas)
    count = rng.choice((5, 5, 6, 6, 7, 7))
    halves = sorted((unit * _half(rng) for _ in range(count)), reverse=True)
    if rng.random() < 0.5:
        halves[0] = max(halves[0], 1.3 * halves[1])
    kinds, things = _kinds(canvas, split, count), []
    places = scatter(rng, (canvas.height, canvas.width), halves)
    for half, place, (shape, color) in zip(halves, places, kinds, strict=True):
        if place is not None:
            canvas.icon(shape, color, place, half, flip=rng.random() < 0.5)
            things.append(Thing(shape, color, place, half))
    return things


def _half(rng: Random) -> float:
    """Return half an extent in pixels, at a longest side of 448: large or middle."""
    return rng.uniform(34, 42) if rng.random() < 0.45 else rng.uniform(OBJECT + 2, 33)


def _draw_shelf(canvas: Canvas, split: str) -> list[Thing]:
    """Put objects into most compartments of a shelf of two or three rows and columns."""
    rng = canvas.rng
    wide = canvas.width > canvas.height
    rows, cols = rng.choice(((2, 3), (2, 3), (3, 3)) if wide else ((3, 2), (3, 2), (3, 3)))
    high, broad = canvas.height * 0.94 / rows, canvas.width * 0.94 / cols
    x0, y0 = canvas.width * 0.03, canvas.height * 0.03
    spots = [(row, col) for row in range(rows) for col in range(cols)]
    spots = sorted(rng.sample(spots, len(spots) - rng.choice((0, 0, 1, 1))))
    board = canvas.jitter("brown", 6)
    for row in range(rows + 1):
        canvas.line([(x0, y0 + row * high), (x0 + cols * broad, y0 + row * high)], board, 3)
    for col in range(cols + 1):
        canvas.line([(x0 + col * broad, y0), (x0 + col * broad, y0 + rows * high)], board, 3)
    things = []
    for (row, col), (shape, color) in zip(spots, _kinds(canvas, split, len(spots)), strict=True):
        half = min(high, broad) * rng.uniform(0.34, 0.42)
        slack = min(high, broad) * 0.04
        x = x0 + broad * (col + 0.5) + rng.uniform(-slack, slack)
        y = y0 + high * (row + 0.5) + rng.uniform(-slack, slack)
        canvas.icon(shape, color, (x, y), half, flip=rng.random() < 0.5)
        things.append(Thing(shape, color, (x, y), half, spot=(row, col)))
    return things


def _write_on(canvas: Canvas, things: list[Thing]) -> list[Thing]:
    """Write different numbers in large print on some objects and something in small print on others."""
    rng = canvas.rng
    told = {thing.place for thing, _ in named(things)}
    order = rng.sample(range(len(things)), len(things))
    able = [i for i in order if things[i].half >= _NUMBERED * scale(canvas) and things[i].place in told]
    numbered = able[: rng.choice((2, 3, 3))]
    if len(numbered) < 2:
        numbered = []
    numbers = dict(zip(numbered, rng.sample(range(1, 10), len(numbered)), strict=True))
    written = []
    for index, thing in enumerate(things):
        number, small = numbers.get(index, 0), ""
        if number:
            _write_number(canvas, thing, number)
        elif thing.place in told:
            small, size = small_text(rng), small_size(canvas)
            if len(small) * size * _LETTER > 2 * thing.half:
                small = str(rng.randrange(10, 100))
            plate(canvas, thing.place, small, size)
        written.append(replace(thing, number=number, small=small))
    return written


def _write_number(canvas: Canvas, thing: Thing, number: int) -> None:
    """Write a digit in large print on an object."""
    x, y = thing.place
    size = large_size(canvas)
    wide, high = size * 0.36, size * 0.46
    canvas.rect((x - wide, y - high, x + wide, y + high), (234, 234, 226))
    canvas.text((x, y), str(number), canvas.rng.choice(fonts.SMALL_FACES), size, (22, 22, 30))
