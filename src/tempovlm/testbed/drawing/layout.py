"""Layout of objects: middles, scattered places, and choices that respect the held-out rules.

Works with geometry and splits only.
"""

from __future__ import annotations

from collections.abc import Sequence
from random import Random

from tempovlm.testbed.drawing.canvas import Box
from tempovlm.testbed.lexicon import held_out_pair

HELD_OUT_SHARE = 0.13
"""Share of validation choices taken from those that training never shows."""


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
