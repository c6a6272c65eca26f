"""Knowledge scenes: objects, flags and company signs, and questions that combine the picture with stored facts.

Questions refer to things without naming them. A company is referred to by its place
or by the colour of its sign, so that its name must be read before anything known about it can be recalled.
"""

from __future__ import annotations

from dataclasses import dataclass
from random import Random

from tempovlm.testbed.coco import coco_places, coco_writer
from tempovlm.testbed.content import company_signs
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
from tempovlm.testbed.lexicon import COLOR_RGB, SIGN_WORDS, held_out_pair
from tempovlm.testbed.scene import Quiz
from tempovlm.testbed.stand_in import StandIn

_RARE = 0.3
"""Share of held-out pairs among validation objects that have one in a colour that shows."""
_COLOR_NAMES = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")
_COMPANIES, _FLAGS, _NOTES = 0.42, 0.1, 0.16
"""Shares of company signs, of flags, and in the second edition of notes in small print, among all things; the rest
are objects."""
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
        kind: 'object', 'flag', 'note', or of a company 'sign' or 'shop'.
        name: The object's class, the flag's country, the note's word or the company's name.
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
        shape = "sign" if self.kind == "note" else self.kind if self.company else self.name
        return self.kind != "flag" and held_out_pair(shape, self.color)


def _draw_flag(canvas: Canvas, country: str, center: tuple[float, float], half: float) -> None:
    """Three bands of equal width on a pole."""
    _, direction, bands = FLAGS[country]
    x0, y0 = center[0] - half, center[1] - half * 0.66
    wide, high = half * 2, half * 1.32
    for band, color in enumerate(bands):
        if direction == "v":
            box = (x0 + wide * band / 3, y0, x0 + wide * (band + 1) / 3, y0 + high)
        else:
            box = (x0, y0 + high * band / 3, x0 + wide, y0 + high * (band + 1) / 3)
        canvas.rect(box, canvas.jitter(color, 6))
    canvas.rect((x0, y0, x0 + wide, y0 + high), None, outline=(90, 90, 90))
    canvas.rect((x0 - max(2, half * 0.08), y0 - half * 0.1, x0, y0 + half * 1.7), COLOR_RGB["brown"])
    canvas.label_object("flag", "mixed", (x0, y0, x0 + wide, y0 + high))


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
            _draw_flag(canvas, country, *_spot(canvas, layout, middle, quiz.edition))
            seen.append(Seen("flag", country, "mixed", where))
        elif quiz.edition > 1 and draw < _COMPANIES + _FLAGS + _NOTES:
            color = choose_color(rng, split, "sign", free, _RARE)
            word, look = rng.choice(SIGN_WORDS), ("sign", color)
            cell, size = _cell(canvas, layout, middle), rng.randrange(12, 20)
            company_signs.draw_company(canvas, quiz, word, look, cell, split, size)
            seen.append(Seen("note", word, color, where))
        else:
            color = choose_color(rng, split, name, free, _RARE)
            center, half = _spot(canvas, layout, middle, quiz.edition)
            canvas.icon(name, color, center, half, flip=rng.random() < 0.5)
            seen.append(Seen("object", name, color, where))
        free = [other for other in free if other != seen[-1].color]
    return seen


def _cell(canvas: Canvas, layout: str, middle: tuple[float, float]) -> Box:
    """Return the room of a sign around a middle, x0, y0, x1, y1 in pixels."""
    wide, high = _CELLS[layout][0] * canvas.width, _CELLS[layout][1] * canvas.height
    return middle[0] - wide / 2, middle[1] - high / 2, middle[0] + wide / 2, middle[1] + high / 2


def _spot(
    canvas: Canvas, layout: str, middle: tuple[float, float], edition: int
) -> tuple[tuple[float, float], float]:
    """Return the place of an object or flag, a little off the middle, and half its extent, in pixels."""
    rng = canvas.rng
    along = min(canvas.width, canvas.height) if layout == "grid" else max(canvas.width, canvas.height)
    room = min(along * (0.155 if layout.endswith("3") else 0.23), min(canvas.width, canvas.height) * 0.3)
    half = _half(rng, room, edition)
    slack = max(0.0, room - half) * 0.5
    x, y = (value + rng.uniform(-slack, slack) for value in middle)
    return (x, y), min(half, x - 2, y - 2, canvas.width - x - 2, canvas.height - y - 2 + PAD)


def _half(rng: Random, room: float, edition: int) -> float:
    """Return half the extent in pixels: large, middle or small, about a third each, or half of them small."""
    large, middle = (0.35, 0.7) if edition == 1 else (0.2, 0.5)
    draw = rng.random()
    low, high = (0.75, 1.0) if draw < large else (0.45, 0.7) if draw < middle else (0.22, 0.4)
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


def _ask_note(quiz: Quiz, thing: Seen) -> None:
    """Ask for the word on a note."""
    quiz.ask("note_says", f"what does the {thing.color} sign say?", thing.name, held_out=thing.held)


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


_DECADES = ("thirties", "forties", "fifties", "sixties", "seventies", "eighties", "nineties")
_SIDES = {"left of": (0, -1), "right of": (0, 1), "above": (1, -1), "below": (1, 1)}
"""Words to axis and direction of an object that lies there from another, in its row or column."""


def _noun(thing: Seen) -> str:
    """Return the word for a thing that is not a flag, without naming it."""
    return thing.kind if thing.company else "animal" if thing.name in ANIMALS else "object"


def _spot_of(thing: Seen) -> tuple[int, int]:
    """Return column and row, -1 to 1, of the place that the words name."""
    words = thing.where.split()
    return ("right" in words) - ("left" in words), ("bottom" in words) - ("top" in words)


def _beside(thing: Seen, seen: list[Seen]) -> list[tuple[str, Seen]]:
    """Return the sides of a thing on which one other thing lies in its row or column, each with that one."""
    found = []
    own = _spot_of(thing)
    for side, (axis, sign) in _SIDES.items():
        places = [(other, _spot_of(other)) for other in seen]
        there = [o for o, at in places if at[1 - axis] == own[1 - axis] and sign * (at[axis] - own[axis]) > 0]
        if len(there) == 1:
            found.append((side, there[0]))
    return found


def _ask_steps(quiz: Quiz, seen: list[Seen]) -> None:
    """Ask for facts about what is beside something, which of two companies is older, and for mere looks."""
    rng = quiz.rng
    known = [thing for thing in seen if thing.kind not in ("flag", "note")]
    pairs = [(thing, side, other) for thing in known for side, other in _beside(thing, seen) if other in known]
    for thing, side, other in rng.sample(pairs, min(2, len(pairs))):
        what = "company" if other.company else _noun(other)
        ref, held = f"{what} {side} the {thing.color} {_noun(thing)}", thing.held or other.held
        if other.company:
            fact = rng.choice(COMPANY_FACTS)
            answer = facts_of(other.name)[fact]
            ask = COMPANY_QUESTIONS[fact][0].format(ref=ref)
            quiz.ask("beside_company", ask, answer, said_otherwise(fact, answer), held_out=held)
        else:
            fact = rng.choice(list(FACTS[other.name]))
            answer = FACTS[other.name][fact]
            ask = QUESTIONS[fact][0].format(ref=ref)
            quiz.ask("beside_object", ask, answer, SYNONYMS.get(answer, ()), held_out=held)
    firms = [thing for thing in seen if thing.company]
    if len(firms) > 1:
        first, second = rng.sample(firms, 2)
        since = [_DECADES.index(facts_of(firm.name)["decade"]) for firm in (first, second)]
        if since[0] != since[1]:
            older = first if since[0] < since[1] else second
            ask = f"which company is older, the {first.color} or the {second.color} one?"
            quiz.ask("older_company", ask, older.color, held_out=first.held or second.held)
    if known and rng.random() < 0.7:
        thing = rng.choice(known)
        quiz.ask("color_at", f"what color is the {_noun(thing)} {thing.where}?", thing.color, held_out=thing.held)
    animals = [thing for thing in known if thing.name in ANIMALS]
    if rng.random() < 0.15 * (1 + 2 * bool(animals)):
        held = any(thing.held for thing in known)
        quiz.ask("count_animals", "how many animals are there?", str(len(animals)), held_out=held)


def paint(canvas: Canvas, quiz: Quiz, split: str) -> int:
    """Place things and ask for facts about them.

    Returns:
        The most questions to keep.
    """
    seen = _draw_scene(canvas, quiz, split)
    for thing in seen:
        asks = {"flag": _ask_flag, "note": _ask_note, "object": _ask_fact}
        asks.get(thing.kind, _ask_company)(quiz, thing)
    _ask_inverse(quiz, seen)
    if quiz.edition > 1:
        _ask_steps(quiz, seen)
    else:
        _ask_which_company(quiz, seen)
    return 4


STAND_IN = StandIn(paint=paint, places=coco_places, write=coco_writer("", raw=True), weight=0.2)
