"""Objects that carry text, and the questions of the second edition about several of them or none of their text.

What stands beside something, which of two is cheaper, a time an hour later; and colours and counts, for which
nothing has to be read.
"""

from __future__ import annotations

from dataclasses import dataclass

from tempovlm.testbed.drawing.canvas import Box
from tempovlm.testbed.drawing.layout import center_of, clear_direction
from tempovlm.testbed.lexicon import plural
from tempovlm.testbed.scene import Quiz

_COLORED = ("bus", "shop", "jersey", "book", "bottle", "sign")
"""Objects with one colour that shows."""

_LARGE = 45.0
"""Height in pixels of a plate with large print."""
_SPOKEN = {"speed": "speed limit", "tag": "menu"}
"""Classes to their names in questions, where these differ."""


@dataclass(frozen=True, slots=True)
class Written:
    """An object with its text.

    Attributes:
        kind: its class, of a price the class of the good. color: its colour. box: where it is, in pixels.
        text: the answer to what stands on it, empty for companies and menus. held: whether it is held out.
    """

    kind: str
    color: str
    box: Box
    text: str
    held: bool


def _is_large(one: Written) -> bool:
    """Whether the print is legible at the low tier, so that the steps of a question cost more than its crops."""
    return one.box[3] - one.box[1] >= _LARGE


def ask_about_written(quiz: Quiz, written: list[Written], size: tuple[int, int]) -> None:
    """Ask about the objects of a scene.

    Args:
        quiz: takes the questions.
        written: the objects.
        size: height and width of the picture in pixels.
    """
    kinds = [one.kind for one in written]
    single = [one for one in written if kinds.count(one.kind) == 1]
    _ask_looks(quiz, written, single)
    _ask_beside(quiz, written, single, size)
    _ask_two_texts(quiz, written, single)


def _ask_looks(quiz: Quiz, written: list[Written], single: list[Written]) -> None:
    """Ask for a colour and for a count."""
    rng = quiz.rng
    colored = [one for one in single if one.kind in _COLORED]
    if colored and rng.random() < 0.7:
        one = rng.choice(colored)
        quiz.ask("color_of_carrier", f"what color is the {one.kind}?", one.color, held_out=one.held)
    signs = [one for one in written if one.kind == "sign"]
    if signs and rng.random() < 0.3:
        held = any(one.held for one in signs)
        quiz.ask("count_signs", f"how many {plural('sign')} are there?", str(len(signs)), held_out=held)


def _ask_beside(quiz: Quiz, written: list[Written], single: list[Written], size: tuple[int, int]) -> None:
    """Ask for the text of the only sign on a side of another object, and for the colour of such a one."""
    rng = quiz.rng
    found = []
    for ref in single:
        by_side: dict[str, list[Written]] = {}
        for other in written:
            where = other is not ref and clear_direction(center_of(other.box), center_of(ref.box), size)
            if where and other.kind == "sign":
                by_side.setdefault(f"{where} of" if where in ("left", "right") else where, []).append(other)
        only = [(side, signs[0]) for side, signs in by_side.items() if len(signs) == 1 and ref.kind != "sign"]
        found += [(ref, side, sign) for side, sign in only if sign.text and _is_large(sign)]
    for ref, side, sign in rng.sample(found, min(2, len(found))):
        if rng.random() < 0.7:
            ask = f"what does the sign {side} the {_SPOKEN.get(ref.kind, ref.kind)} say?"
            quiz.ask("sign_beside", ask, sign.text, held_out=sign.held or ref.held)
        else:
            ask = f"what color is the sign {side} the {_SPOKEN.get(ref.kind, ref.kind)}?"
            quiz.ask("color_beside", ask, sign.color, held_out=sign.held or ref.held)


def _ask_two_texts(quiz: Quiz, written: list[Written], single: list[Written]) -> None:
    """Compare two prices; tell the time in an hour."""
    rng = quiz.rng
    priced = [one for one in written if one.text.startswith("$") and _is_large(one)]
    if len(priced) > 1:
        first, second = rng.sample(priced, 2)
        costs = [float(one.text[1:]) for one in (first, second)]
        held = first.held or second.held
        if costs[0] != costs[1]:
            cheap = first if costs[0] < costs[1] else second
            ask = f"which is cheaper, the {first.kind} or the {second.kind}?"
            quiz.ask("cheaper", ask, cheap.kind, held_out=held)
    clocks = [one for one in single if one.kind == "clock" and one.text and _is_large(one)]
    if clocks:
        hour, minute = clocks[0].text.split(":")
        later = f"{int(hour) % 12 + 1}:{minute}"
        quiz.ask("hour_later", "what time will it be in one hour?", later, (f"{later} am", f"{later} pm"))
