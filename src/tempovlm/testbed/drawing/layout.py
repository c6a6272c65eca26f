"""Layout of objects: cells that do not overlap, scattered places, and choices that respect the held-out rules.

Works with geometry and splits only.
"""

from __future__ import annotations

from collections.abc import Sequence
from random import Random

from tempovlm.testbed.drawing.canvas import Box
from tempovlm.testbed.lexicon import held_out_pair

HELD_OUT_SHARE = 0.13
"""Share of validation choices taken from those that training never shows."""


_MARGIN = 6
"""Pixels left free inside every cell's edge."""


def split_cells(rng: Random, size: tuple[int, int], count: int) -> list[Box]:
    """Cut a picture into cells by halving the largest along its longer side.

    Args:
        rng: Source of the cuts.
        size: Height and width in pixels.
        count: Number of cells.

    Returns:
        Boxes x0, y0, x1, y1 in pixels, largest first.
    """
    height, width = size
    cells: list[Box] = [(0.0, 0.0, float(width), float(height))]
    while len(cells) < count:
        cells.sort(key=area)
        x0, y0, x1, y1 = cells.pop()
        ratio = rng.uniform(0.4, 0.6)
        if x1 - x0 > 1.15 * (y1 - y0):
            cut = x0 + (x1 - x0) * ratio
            cells += [(x0, y0, cut, y1), (cut, y0, x1, y1)]
        else:
            cut = y0 + (y1 - y0) * ratio
            cells += [(x0, y0, x1, cut), (x0, cut, x1, y1)]
    cells.sort(key=area, reverse=True)
    return [(x0 + _MARGIN, y0 + _MARGIN, x1 - _MARGIN, y1 - _MARGIN) for x0, y0, x1, y1 in cells]


def area(box: Box) -> float:
    """Return the area of a box in square pixels."""
    return (box[2] - box[0]) * (box[3] - box[1])


def center_of(box: Box) -> tuple[float, float]:
    """Return the middle of a box."""
    return (box[0] + box[2]) / 2, (box[1] + box[3]) / 2


def scatter(rng: Random, size: tuple[int, int], halves: Sequence[float]) -> list[tuple[float, float] | None]:
    """Find places for squares of the given half sizes that do not touch one another.

    Args:
        rng: Source of the places.
        size: Height and width in pixels.
        halves: Half extents in pixels, in the order in which places are sought (large ones first is best).

    Returns:
        One middle for every half size, None if no free place was found.
    """
    height, width = size
    used: list[tuple[float, float, float]] = []
    places: list[tuple[float, float] | None] = []
    for half in halves:
        found = None
        for _ in range(40):
            x = rng.uniform(half + 3, width - half - 3)
            y = rng.uniform(half + 3, height - half - 3)
            if all(max(abs(x - ox), abs(y - oy)) > half + other + 4 for ox, oy, other in used):
                found = (x, y)
                used.append((x, y, half))
                break
        places.append(found)
    return places


def choose_color(rng: Random, split: str, shape: str, names: Sequence[str], share: float = HELD_OUT_SHARE) -> str:
    """Choose a colour for an object; in training never a held-out pair, in validation sometimes one.

    Args:
        rng: Source of the choice.
        split: 'train' or 'val'.
        shape: The object.
        names: Colours to choose from.
        share: How often validation takes a held-out pair, if there is one.
    """
    held = [name for name in names if held_out_pair(shape, name)]
    if split == "val" and held and rng.random() < share:
        return rng.choice(held)
    free = [name for name in names if not held_out_pair(shape, name)]
    return rng.choice(free or list(names))


def clear_direction(first: tuple[float, float], second: tuple[float, float], size: tuple[int, int]) -> str | None:
    """Return where the first point lies from the second: left, right, above, below, or None if not clear."""
    dx, dy = (first[0] - second[0]) / size[1], (first[1] - second[1]) / size[0]
    if abs(dx) > 0.18 and abs(dx) > 1.6 * abs(dy):
        return "left" if dx < 0 else "right"
    if abs(dy) > 0.18 and abs(dy) > 1.6 * abs(dx):
        return "above" if dy < 0 else "below"
    return None


def region(point: tuple[float, float], size: tuple[int, int]) -> str | None:
    """Return the corner or middle that a point clearly lies in, or None."""
    x, y = point[0] / size[1] - 0.5, point[1] / size[0] - 0.5
    if abs(x) < 0.12 and abs(y) < 0.12:
        return "center"
    if abs(x) > 0.12 and abs(y) > 0.12:
        return f"{'top' if y < 0 else 'bottom'} {'left' if x < 0 else 'right'}"
    return None
