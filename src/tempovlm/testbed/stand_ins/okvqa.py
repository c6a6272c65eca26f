"""Knowledge scenes: objects, flags and company signs, and questions that combine the picture with stored facts.

Questions refer to things without naming them. A company is referred to by its place
or by the colour of its sign, so that its name must be read before anything known about it can be recalled.
"""

from __future__ import annotations

from dataclasses import dataclass
from random import Random

from tempovlm.testbed.coco import coco_places, coco_writer
from tempovlm.testbed.content import company_signs
from tempovlm.testbed.content.cabinet import draw_flag, paint_cabinet
from tempovlm.testbed.content.companies import (
    COMPANY_CLAUSES,
    COMPANY_FACTS,
    COMPANY_QUESTIONS,
    draw_names,
    facts_of,
    said_otherwise,
)
from tempovlm.testbed.content.facts import ANIMALS, FACTS, FLAGS, QUESTIONS, SYNONYMS
from tempovlm.testbed.drawing.canvas import PAD, Box, Canvas
from tempovlm.testbed.drawing.layout import choose_color
from tempovlm.testbed.lexicon import held_out_pair
from tempovlm.testbed.scene import Quiz
from tempovlm.testbed.stand_in import StandIn

_RARE = 0.3
"""Share of held-out pairs among validation objects that have one in a colour that shows."""
_COLOR_NAMES = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")
_COMPANIES, _FLAGS = 0.42, 0.1
"""Shares of company signs and of flags among all things; the rest are objects."""
_LAYOUTS: dict[str, tuple[tuple[str, float, float], ...]] = {
    "row2": (("on the left", 0.27, 0.5), ("on the right", 0.73, 0.5)),
    "column2": (("at the top", 0.5, 0.27), ("at the bottom", 0.5, 0.73)),
    "row3": (("on the left", 0.18, 0.5), ("in the middle", 0.5, 0.5), ("on the right", 0.82, 0.5)),
    "column3": (("at the top", 0.5, 0.18), ("in the middle", 0.5, 0.5), ("at the bottom", 0.5, 0.82)),
    "grid": (("at the top left", 0.26, 0.26), ("at the top right", 0.74, 0.26),
             ("at the bottom left", 0.26, 0.74), ("at the bottom right", 0.74, 0.74)),
}  # fmt: skip
_CELLS: dict[str, tuple[float, float]] = {
    "row2": (0.44, 0.8), "column2": (0.8, 0.44), "row3": (0.3, 0.8), "column3": (0.8, 0.3), "grid": (0.44, 0.44),
}  # fmt: skip
"""Width and height of the room of a sign, as shares of the picture's."""


@dataclass(frozen=True, slots=True)
class Seen:
    """One thing in a scene.

    Attributes:
        kind: 'object', 'flag', or of a company 'sign' or 'shop'.
        name: The object's class, the flag's country or the company's name.
        color: Name of its colour, unlike that of every other thing in the scene; 'mixed' for a flag.
        where: Its place in words.
    """

    kind: str
    name: str
    color: str
    where: str

    @property
    def company(self) -> bool:
        """Whether it is a company's sign."""
        return self.kind in company_signs.KINDS

    @property
    def held(self) -> bool:
        """Whether training never shows such a thing in this colour."""
        shape = self.kind if self.company else self.name
        return self.kind != "flag" and held_out_pair(shape, self.color)


def _draw_scene(canvas: Canvas, quiz: Quiz, split: str) -> list[Seen]:
    """Two to four things at named places, in different colours and of very different size."""
    rng = canvas.rng
    tall = canvas.height > canvas.width
    layout = rng.choice(("grid", "grid", "column2", "column3") if tall else ("grid", "grid", "row2", "row3"))
    spots = _LAYOUTS[layout]
    names, flags = (rng.sample(list(table), len(spots)) for table in (FACTS, FLAGS))
    companies = draw_names(rng, len(spots), quiz.edition)
    free = canvas.visible(_COLOR_NAMES)
    seen = []
    for (where, fx, fy), name, country, company in zip(spots, names, flags, companies, strict=True):
        draw = rng.random()
        middle = (fx * canvas.width, fy * canvas.height)
        if draw < _COMPANIES:
            kind = rng.choice(company_signs.KINDS)
            color = choose_color(rng, split, kind, free, _RARE)
            cell = _cell(canvas, layout, middle)
            company_signs.draw_company(canvas, quiz, company, (kind, color), cell, split)
            seen.append(Seen(kind, company, color, where))
        elif draw < _COMPANIES + _FLAGS:
            draw_flag(canvas, country, *_spot(canvas, layout, middle))
            seen.append(Seen("flag", country, "mixed", where))
        else:
            color = choose_color(rng, split, name, free, _RARE)
            center, half = _spot(canvas, layout, middle)
            canvas.icon(name, color, center, half, flip=rng.random() < 0.5)
            seen.append(Seen("object", name, color, where))
        free = [other for other in free if other != seen[-1].color]
    return seen


def _cell(canvas: Canvas, layout: str, middle: tuple[float, float]) -> Box:
    """Return the room of a sign around a middle, x0, y0, x1, y1 in pixels."""
    wide, high = _CELLS[layout][0] * canvas.width, _CELLS[layout][1] * canvas.height
    return middle[0] - wide / 2, middle[1] - high / 2, middle[0] + wide / 2, middle[1] + high / 2


def _spot(canvas: Canvas, layout: str, middle: tuple[float, float]) -> tuple[tuple[float, float], float]:
    """Return the place of an object or flag, a little off the middle, and half its extent, in pixels."""
    rng = canvas.rng
    along = min(canvas.width, canvas.height) if layout == "grid" else max(canvas.width, canvas.height)
    room = min(along * (0.155 if layout.endswith("3") else 0.23), min(canvas.width, canvas.height) * 0.3)
    half = _half(rng, room)
    slack = max(0.0, room - half) * 0.5
    x, y = (value + rng.uniform(-slack, slack) for value in middle)
    return (x, y), min(half, x - 2, y - 2, canvas.width - x - 2, canvas.height - y - 2 + PAD)


def _half(rng: Random, room: float) -> float:
    """Return half the extent in pixels: large, middle or small, about a third each."""
    draw = rng.random()
    low, high = (0.75, 1.0) if draw < 0.35 else (0.45, 0.7) if draw < 0.7 else (0.22, 0.4)
    return max(15.0, room * rng.uniform(low, high))


def _refer(rng: Random, thing: Seen) -> str:
    """Refer to a thing by place or by colour, without naming it."""
    if thing.kind == "flag":
        return f"flag {thing.where}"
    if thing.company:
        by_color = f"company {'in' if thing.kind == 'shop' else 'on'} the {thing.color} {thing.kind}"
        return f"company {thing.where}" if rng.random() < 0.5 else by_color
    noun = "animal" if thing.name in ANIMALS else "object"
    return f"{noun} {thing.where}" if rng.random() < 0.5 else f"{thing.color} {noun}"


def _ask_fact(quiz: Quiz, thing: Seen) -> None:
    """Ask for one or two facts about an object."""
    rng = quiz.rng
    facts = FACTS[thing.name]
    for fact in rng.sample(list(facts), min(2, len(facts))):
        answer = facts[fact]
        ask = rng.choice(QUESTIONS[fact]).format(ref=_refer(rng, thing))
        quiz.ask(f"fact_{fact}", ask, answer, SYNONYMS.get(answer, ()), held_out=thing.held)


def _ask_flag(quiz: Quiz, thing: Seen) -> None:
    """Ask for the country of a flag, or its capital."""
    if quiz.rng.random() < 0.5:
        quiz.ask("flag_country", f"which country has the {_refer(quiz.rng, thing)}?", thing.name)
    else:
        ask = f"what is the capital of the country with the {_refer(quiz.rng, thing)}?"
        quiz.ask("flag_capital", ask, FLAGS[thing.name][0], (thing.name,))


def _ask_company(quiz: Quiz, thing: Seen) -> None:
    """Ask for two facts about a company."""
    rng = quiz.rng
    for fact in rng.sample(COMPANY_FACTS, 2):
        answer = facts_of(thing.name)[fact]
        ask = rng.choice(COMPANY_QUESTIONS[fact]).format(ref=_refer(rng, thing))
        quiz.ask(f"fact_company_{fact}", ask, answer, said_otherwise(fact, answer), held_out=thing.held)


def _ask_which_company(quiz: Quiz, seen: list[Seen]) -> None:
    """Ask for the colour of the only sign, of at least two of its kind, whose company a fact identifies."""
    rng = quiz.rng
    alike = [[thing for thing in seen if thing.kind == kind] for kind in dict.fromkeys(company_signs.KINDS)]
    signs = max(alike, key=len)
    if len(signs) < 2:
        return
    thing, fact = rng.choice(signs), rng.choice(COMPANY_FACTS)
    answer = facts_of(thing.name)[fact]
    if sum(facts_of(other.name)[fact] == answer for other in seen if other.company) == 1:
        clause = COMPANY_CLAUSES[fact].format(answer=answer)
        ask = f"what color is the {thing.kind} of the company {clause}?"
        quiz.ask("color_by_company", ask, thing.color, held_out=thing.held)


def _ask_inverse(quiz: Quiz, seen: list[Seen]) -> None:
    """Ask for the colour of the only object that a fact identifies."""
    rng = quiz.rng
    for thing in seen:
        if thing.kind != "object" or rng.random() < 0.5:
            continue
        facts = FACTS[thing.name]
        if "use" in facts and sum(FACTS.get(other.name, {}).get("use") == facts["use"] for other in seen) == 1:
            ask = f"what color is the object used {facts['use']}?"
            quiz.ask("color_by_use", ask, thing.color, held_out=thing.held)
            return
        if "eat" in facts and sum(other.name in ANIMALS for other in seen) == 1:
            ask = rng.choice(("what animal is it?", "which animal can you see?"))
            quiz.ask("which_animal", ask, thing.name, held_out=thing.held)
            return


def paint(canvas: Canvas, quiz: Quiz, split: str) -> int:
    """Place things and ask for facts about them.

    Returns:
        The most questions to keep.
    """
    if quiz.edition > 1:
        paint_cabinet(canvas, quiz, split)
        return 4
    seen = _draw_scene(canvas, quiz, split)
    for thing in seen:
        asks = {"flag": _ask_flag, "object": _ask_fact}
        asks.get(thing.kind, _ask_company)(quiz, thing)
    _ask_inverse(quiz, seen)
    _ask_which_company(quiz, seen)
    return 4


STAND_IN = StandIn(paint=paint, places=coco_places, write=coco_writer("", raw=True), weight=0.2)
