"""Objects of a scattered scene or of a shelf, and what can be said of them.

`steps` and `yes_no` ask the questions.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from math import log

from tempovlm.testbed.lexicon import held_out_pair
from tempovlm.testbed.scene import Quiz

NUMBER_WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")

EXTREMES: dict[str, tuple[Callable[[Thing], float], float]] = {
    "leftmost": (lambda thing: thing.place[0], 18.0),
    "rightmost": (lambda thing: -thing.place[0], 18.0),
    "highest": (lambda thing: thing.place[1], 18.0),
    "lowest": (lambda thing: -thing.place[1], 18.0),
    "largest": (lambda thing: -log(thing.half), 0.22),
    "smallest": (lambda thing: log(thing.half), 0.22),
}
"""Word to what is least for the object that it means, and by how much at least."""

ORDERS: dict[str, tuple[int, int]] = {"left": (0, 1), "right": (0, -1), "top": (1, 1), "bottom": (1, -1)}
"""Word of a side to the axis and sign by which objects are ordered from there."""

HOPS: dict[str, tuple[int, int]] = {"left of": (0, -1), "right of": (0, 1), "above": (-1, 0), "below": (1, 0)}
"""Words to steps of row and column on a shelf."""

_ORDERED = 22.0
"""Pixels between two middles from which their order is clear."""


@dataclass(frozen=True, slots=True)
class Thing:
    """An object of the scene.

    Attributes:
        shape, color: its class and the name of its colour.
        place, half: its middle, and half its extent in pixels.
        number: the number on it in large print, 0 for none.
        small: what a plate on it says in small print, empty for none.
        spot: row and column on a shelf.
    """

    shape: str
    color: str
    place: tuple[float, float]
    half: float
    number: int = 0
    small: str = ""
    spot: tuple[int, int] | None = None

    @property
    def held(self) -> bool:
        """Whether training never shows this object in this colour."""
        return held_out_pair(self.shape, self.color)

    @property
    def name(self) -> str:
        """Colour and shape."""
        return f"{self.color} {self.shape}"


def count_answer(quiz: Quiz, template: str, question: str, number: int, held: bool) -> None:
    """Ask a question whose answer is a number of objects."""
    quiz.ask(template, question, str(number), (NUMBER_WORDS[number],), held_out=held)


def alike(things: list[Thing], quality: str) -> dict[str, list[Thing]]:
    """Group objects by `shape` or `color`."""
    groups: dict[str, list[Thing]] = {}
    for thing in things:
        groups.setdefault(getattr(thing, quality), []).append(thing)
    return groups


def lone(things: list[Thing], quality: str) -> list[Thing]:
    """Return the objects that are the only ones of their `shape` or `color`."""
    return [group[0] for group in alike(things, quality).values() if len(group) == 1]


def extreme(things: list[Thing], word: str) -> Thing | None:
    """Return the object that one of `EXTREMES` means, or None if it is not clear."""
    value, gap = EXTREMES[word]
    ordered = sorted(things, key=value)
    return ordered[0] if len(ordered) > 1 and value(ordered[1]) - value(ordered[0]) > gap else None


def named(things: list[Thing]) -> list[tuple[Thing, str]]:
    """Return the objects that a name singles out, each with the shortest: shape, or colour and shape."""
    shapes, names = Counter(thing.shape for thing in things), Counter(thing.name for thing in things)
    found = [(thing, thing.shape if shapes[thing.shape] == 1 else thing.name) for thing in things]
    return [(thing, ref) for thing, ref in found if names[thing.name] == 1]


def looked_up(things: list[Thing]) -> list[tuple[Thing, str]]:
    """Return the objects that their shape or their colour alone singles out, each with such a name.

    What is known of a red star can so not be answered without the picture. Objects that training never shows are
    left out.
    """
    shapes, colors = Counter(thing.shape for thing in things), Counter(thing.color for thing in things)
    found = [
        (thing, thing.shape if shapes[thing.shape] == 1 else f"{thing.color} object")
        for thing in things
        if shapes[thing.shape] == 1 or colors[thing.color] == 1
    ]
    return [(thing, ref) for thing, ref in found if not thing.held]


def ordered_from(things: list[Thing], side: str) -> list[Thing] | None:
    """Return the objects from one side of `ORDERS` to the other, or None if the order is not clear."""
    axis, sign = ORDERS[side]
    found = sorted(things, key=lambda thing: sign * thing.place[axis])
    places = [thing.place[axis] for thing in found]
    clear = all(abs(one - two) >= _ORDERED for one, two in pairwise(places))
    return found if clear else None


def hop(thing: Thing, things: list[Thing], way: str) -> Thing | None:
    """Return the object beside another one on a shelf, or None if there is none."""
    if thing.spot is None:
        return None
    spot = (thing.spot[0] + HOPS[way][0], thing.spot[1] + HOPS[way][1])
    return next((other for other in things if other.spot == spot), None)
