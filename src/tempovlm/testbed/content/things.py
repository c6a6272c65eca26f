"""Objects of a scattered scene, and the questions of the second edition about them.

Open ones that take several steps: a condition or two, the nearest one, a difference of counts. And yes or no: the
answer is drawn, and either is asked for with the same words, so that a question alone says nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import permutations
from math import dist, log
from random import Random
from zlib import crc32

from tempovlm.testbed.content.companies import fact_values, said_otherwise
from tempovlm.testbed.content.facts import FACTS, QUESTIONS, SYNONYMS
from tempovlm.testbed.drawing.layout import clear_direction
from tempovlm.testbed.lexicon import PLAIN_SHAPES, article, held_out_pair, plural
from tempovlm.testbed.scene import Quiz

NUMBER_WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")

_EXTREMES: dict[str, tuple[Callable[[Thing], float], float]] = {
    "leftmost": (lambda thing: thing.place[0], 18.0),
    "rightmost": (lambda thing: -thing.place[0], 18.0),
    "highest": (lambda thing: thing.place[1], 18.0),
    "lowest": (lambda thing: -thing.place[1], 18.0),
    "largest": (lambda thing: -log(thing.half), 0.22),
    "smallest": (lambda thing: log(thing.half), 0.22),
}
"""Word to what is least for the object that it means, and by how much at least."""

_SIDES: dict[str, tuple[int, int]] = {"left of": (0, 1), "right of": (0, -1), "above": (1, 1), "below": (1, -1)}
"""Words to the axis and its sign on which an object lies less far."""

_APART = 14.0
"""Pixels between two middles, along a side, of which one clearly lies on that side of the other."""

_NEARER = 1.3
"""Ratio of distances from which one object is clearly nearer than the next."""

_ASKED = ("use", "made", "place", "who")
"""Facts that objects of these scenes have different ones of."""

_NEGATED = 0.25
"""Share of the yes or no questions that may be put negated and are."""


@dataclass(frozen=True, slots=True)
class Thing:
    """An object of the scene: name, colour, middle, and half its extent in pixels."""

    shape: str
    color: str
    place: tuple[float, float]
    half: float

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
    """Return the object that one of `_EXTREMES` means, or None if it is not clear."""
    value, gap = _EXTREMES[word]
    ordered = sorted(things, key=value)
    return ordered[0] if len(ordered) > 1 and value(ordered[1]) - value(ordered[0]) > gap else None


def nearest(thing: Thing, things: list[Thing]) -> Thing | None:
    """Return the object nearest to one of them, or None if it is not clear."""
    others = sorted((dist(thing.place, other.place), i) for i, other in enumerate(things) if other is not thing)
    if len(others) < 2 or others[1][0] < _NEARER * others[0][0]:
        return None
    return things[others[0][1]]


def beside(thing: Thing, things: list[Thing], side: str) -> list[Thing] | None:
    """Return the other objects on a side of one of them, or None if of one it is not clear where it lies."""
    axis, sign = _SIDES[side]
    gaps = [sign * (thing.place[axis] - other.place[axis]) for other in things if other is not thing]
    if any(abs(gap) < _APART for gap in gaps):
        return None
    return [other for other in things if sign * (thing.place[axis] - other.place[axis]) > 0]


def ask_steps(quiz: Quiz, things: list[Thing]) -> None:
    """Ask open questions that take two or three steps, and some that take a fact."""
    _ask_extreme_of_group(quiz, things)
    _ask_nearest(quiz, things)
    _ask_conditions(quiz, things)
    _ask_two_groups(quiz, things)
    _ask_use(quiz, things)
    _ask_invented(quiz, things)


def _ask_extreme_of_group(quiz: Quiz, things: list[Thing]) -> None:
    """Ask for the colour of the leftmost star, the shape of the largest red object."""
    rng = quiz.rng
    word = rng.choice(list(_EXTREMES))
    groups = [group for group in alike(things, "shape").values() if len(group) > 1]
    if groups and (found := extreme(group := rng.choice(groups), word)):
        held = any(thing.held for thing in group)
        quiz.ask("color_of_extreme", f"what color is the {word} {found.shape}?", found.color, held_out=held)
    word = rng.choice(list(_EXTREMES))
    groups = [group for group in alike(things, "color").values() if len(group) > 1]
    if groups and (found := extreme(group := rng.choice(groups), word)):
        held = any(thing.held for thing in group)
        ask = f"what shape is the {word} {found.color} object?"
        quiz.ask("shape_of_extreme", ask, found.shape, (found.name,), held_out=held)


def _ask_nearest(quiz: Quiz, things: list[Thing]) -> None:
    """Ask for what is nearest to an object, which a word or two steps single out."""
    rng = quiz.rng
    singles = lone(things, "shape")
    if singles and (found := nearest(thing := rng.choice(singles), things)):
        held = thing.held or found.held
        if rng.random() < 0.5:
            ask = f"what is nearest to the {thing.shape}?"
            quiz.ask("nearest", ask, found.shape, (found.name,), held_out=held)
        else:
            ask = f"what color is the object nearest to the {thing.shape}?"
            quiz.ask("color_of_nearest", ask, found.color, held_out=held)
    word = rng.choice(list(_EXTREMES))
    group = rng.choice([things, *alike(things, "shape").values()])
    start = extreme(group, word)
    if start and (found := nearest(start, things)):
        noun = "object" if group is things else start.shape
        ask = f"what color is the object nearest to the {word} {noun}?"
        quiz.ask("nearest_to_extreme", ask, found.color, held_out=start.held or found.held)


def _ask_conditions(quiz: Quiz, things: list[Thing]) -> None:
    """Ask how many objects are both, are not, or lie on a side of another."""
    rng = quiz.rng
    names = [thing.name for thing in things]
    several = [thing for thing in things if names.count(thing.name) > 1]
    thing = rng.choice(several if several and rng.random() < 0.7 else things)
    number = names.count(thing.name)
    if rng.random() < 0.7:
        ask = f"how many {thing.color} {plural(thing.shape)} are there?"
        count_answer(quiz, "count_both", ask, number, thing.held)
    color = rng.choice(things).color
    others = [other for other in things if other.color != color]
    if rng.random() < 0.4:
        held = any(other.held for other in things)
        count_answer(quiz, "count_not", f"how many objects are not {color}?", len(others), held)
    singles = lone(things, "shape")
    if singles:
        thing, side = rng.choice(singles), rng.choice(list(_SIDES))
        found = beside(thing, things, side)
        if found is not None:
            held = any(other.held for other in (thing, *found))
            ask = f"how many objects are {side} the {thing.shape}?"
            count_answer(quiz, "count_side", ask, len(found), held)


def _ask_two_groups(quiz: Quiz, things: list[Thing]) -> None:
    """Ask for the sum and the difference of the numbers of two kinds of objects."""
    rng = quiz.rng
    groups = alike(things, "shape")
    if len(groups) < 2:
        return
    first, second = rng.sample(list(groups), 2)
    many, few = sorted((first, second), key=lambda shape: -len(groups[shape]))
    held = any(thing.held for thing in groups[first] + groups[second])
    more = len(groups[many]) - len(groups[few])
    if more and rng.random() < 0.7:
        ask = f"how many more {plural(many)} than {plural(few)} are there?"
        count_answer(quiz, "count_more", ask, more, held)
    elif rng.random() < 0.5:
        ask = f"how many {plural(first)} and {plural(second)} are there together?"
        count_answer(quiz, "count_sum", ask, len(groups[first]) + len(groups[second]), held)


def _ask_use(quiz: Quiz, things: list[Thing]) -> None:
    """Ask for a fact about an object that its colour singles out."""
    rng = quiz.rng
    known = [(t, fact) for t in lone(things, "color") for fact in _ASKED if fact in FACTS.get(t.shape, {})]
    if known:
        thing, fact = rng.choice(known)
        answer = FACTS[thing.shape][fact]
        ask = rng.choice(QUESTIONS[fact]).format(ref=f"{thing.color} object")
        quiz.ask(f"fact_{fact}", ask, answer, SYNONYMS.get(answer, ()), held_out=thing.held)


def invented(thing: Thing, fact: str) -> str:
    """Return what is known of an object in its colour: its owner, a `founder`, or where it is from, a `city`.

    Nothing tells but memory, as with companies, and there is nothing to read.
    """
    values = fact_values(fact)
    return values[crc32(f"{thing.name}|{fact}".encode()) % len(values)]


def _ask_invented(quiz: Quiz, things: list[Thing]) -> None:
    """Ask for invented facts about two objects; those that training never shows cannot be known."""
    rng = quiz.rng
    known = [thing for thing in lone(things, "shape") if not thing.held]
    for thing in rng.sample(known, min(2, len(known))):
        if rng.random() < 0.5:
            quiz.ask("fact_owner", f"who owns the {thing.shape}?", invented(thing, "founder"))
        else:
            city = invented(thing, "city")
            quiz.ask("fact_home", f"which city is the {thing.shape} from?", city, said_otherwise("city", city))


@dataclass(frozen=True, slots=True)
class _Saying:
    """A yes or no question, the same one negated (empty if it is not put so), and whether it is held out."""

    ask: str
    negated: str
    held: bool


_Pair = tuple[str, _Saying, _Saying] | None
"""Template, a question whose answer is yes and a like one whose answer is no; None if the scene has not both."""


@dataclass(frozen=True, slots=True)
class _YesNo:
    """Makes pairs of questions about one scene; training gets none that is held out."""

    rng: Random
    things: list[Thing]
    size: tuple[int, int]
    split: str

    def other_color(self, thing: Thing) -> str | None:
        """Return the colour of another object that this one could have too, but has not."""
        colors = [other.color for other in self.things if other.color != thing.color]
        if self.split == "train":
            colors = [color for color in colors if not held_out_pair(thing.shape, color)]
        return self.rng.choice(colors) if colors else None

    def absent(self) -> Thing | None:
        """Return an object whose shape and whose colour the scene has, but not together."""
        names = {thing.name for thing in self.things}
        thing = self.rng.choice(self.things)
        color = self.other_color(thing)
        missing = color and replace(thing, color=color)
        return missing if missing and missing.name not in names else None

    def color_pair(self, template: str, what: str, thing: Thing) -> _Pair:
        """Ask whether something has its own colour, and whether it has another one."""
        wrong = self.other_color(thing)
        if wrong is None:
            return None
        yes, no = (
            _Saying(f"is {what} {color}?", f"is {what} not {color}?", held_out_pair(thing.shape, color))
            for color in (thing.color, wrong)
        )
        return template, yes, no

    def shape_exists(self) -> _Pair:
        """Ask for a shape that is there, and for one that is not."""
        thing, there = self.rng.choice(self.things), {thing.shape for thing in self.things}
        absent = self.rng.choice([shape for shape in PLAIN_SHAPES if shape not in there])
        yes, no = (
            _Saying(f"is there {article(shape)} {shape}?", f"are there no {plural(shape)}?", thing.held)
            for shape in (thing.shape, absent)
        )
        return "shape_exists", yes, no

    def exists(self) -> _Pair:
        """Ask for one that is there, and for one that is not."""
        missing = self.absent()
        if missing is None:
            return None
        yes, no = (
            _Saying(f"is there {_a(thing)}?", f"is there no {thing.name}?", thing.held)
            for thing in (self.rng.choice(self.things), missing)
        )
        return "exists", yes, no

    def both_exist(self) -> _Pair:
        """Ask for two at once; of the second pair one is not there."""
        missing = self.absent()
        first, second = self.rng.sample(self.things, 2)
        if missing is None or first.name == second.name:
            return None
        wrong = self.rng.sample((first, missing), 2)
        yes, no = (
            _Saying(f"is there {_a(one)} and {_a(two)}?", "", one.held or two.held)
            for one, two in ((first, second), wrong)
        )
        return "both_exist", yes, no

    def is_color(self) -> _Pair:
        """Ask for the colour of an object that its shape singles out."""
        singles = lone(self.things, "shape")
        if not singles:
            return None
        thing = self.rng.choice(singles)
        return self.color_pair("is_color", f"the {thing.shape}", thing)

    def extreme_is(self) -> _Pair:
        """Ask for the colour of the largest object, of the leftmost star."""
        word = self.rng.choice(list(_EXTREMES))
        groups = [group for group in alike(self.things, "shape").values() if len(group) > 1]
        group = self.rng.choice([self.things, *groups])
        thing = extreme(group, word)
        if thing is None:
            return None
        return self.color_pair(
            "extreme_is", f"the {word} {'object' if group is self.things else thing.shape}", thing
        )

    def nearest_is(self) -> _Pair:
        """Ask for the colour of the object nearest to another one."""
        singles = lone(self.things, "shape")
        start = self.rng.choice(singles) if singles else None
        thing = start and nearest(start, self.things)
        if start is None or thing is None:
            return None
        return self.color_pair("nearest_is", f"the object nearest to the {start.shape}", thing)

    def more(self) -> _Pair:
        """Ask of which of two kinds there are more."""
        quality = self.rng.choice(("shape", "color"))
        groups = alike(self.things, quality)
        pairs = [(one, two) for one, two in permutations(groups, 2) if len(groups[one]) > len(groups[two])]
        if not pairs:
            return None
        many, few = self.rng.choice(pairs)
        held = any(thing.held for thing in groups[many] + groups[few])
        word = self.rng.choice(("more", "fewer"))
        first, second = (plural(name) if quality == "shape" else f"{name} objects" for name in (many, few))
        asks = [f"are there {word} {one} than {two}?" for one, two in ((first, second), (second, first))]
        if word == "fewer":
            asks.reverse()
        yes, no = (_Saying(ask, "", held) for ask in asks)
        return "more", yes, no

    def number(self) -> _Pair:
        """Ask whether there are as many of a kind, with its own number and with that of another kind."""
        groups = alike(self.things, "shape")
        pairs = [(one, two) for one, two in permutations(groups, 2) if len(groups[one]) != len(groups[two])]
        if not pairs:
            return None
        one, two = self.rng.choice(pairs)
        held = any(thing.held for thing in groups[one])
        yes, no = (
            _Saying(
                f"is there one {one}?" if count == 1 else f"are there {NUMBER_WORDS[count]} {plural(one)}?",
                "",
                held,
            )
            for count in (len(groups[one]), len(groups[two]))
        )
        return "number_is", yes, no

    def two(self) -> tuple[Thing, Thing] | None:
        """Return two objects that their shapes single out."""
        singles = lone(self.things, "shape")
        if len(singles) < 2:
            return None
        first, second = self.rng.sample(singles, 2)
        return first, second

    def relation(self) -> _Pair:
        """Ask on which side of another an object is."""
        pair = self.two()
        where = pair and clear_direction(pair[0].place, pair[1].place, self.size)
        if not pair or not where:
            return None
        first, second = pair
        held = first.held or second.held
        opposite = {"left": "right", "right": "left", "above": "below", "below": "above"}[where]
        phrases = [f"{said} of" if said in ("left", "right") else said for said in (where, opposite)]
        yes, no = (
            _Saying(
                f"is the {first.shape} {said} the {second.shape}?",
                f"is the {first.shape} not {said} the {second.shape}?",
                held,
            )
            for said in phrases
        )
        return "relation", yes, no

    def bigger(self) -> _Pair:
        """Ask which of two objects is the bigger one."""
        pair = self.two()
        if not pair or 0.7 < pair[0].half / pair[1].half < 1.4:
            return None
        big, small = sorted(pair, key=lambda thing: -thing.half)
        word = self.rng.choice(("bigger", "smaller"))
        right = (big, small) if word == "bigger" else (small, big)
        yes, no = (
            _Saying(f"is the {one.shape} {word} than the {two.shape}?", "", big.held or small.held)
            for one, two in (right, right[::-1])
        )
        return "is_bigger", yes, no

    def same_color(self) -> _Pair:
        """Ask whether two objects have one colour."""
        singles = lone(self.things, "shape")
        pairs = list(permutations(singles, 2))
        same = [(one, two) for one, two in pairs if one.color == two.color]
        other = [(one, two) for one, two in pairs if one.color != two.color]
        if not same or not other:
            return None
        sayings = []
        for one, two in (self.rng.choice(same), self.rng.choice(other)):
            both = f"do the {one.shape} and the {two.shape} have"
            sayings.append(_Saying(f"{both} the same color?", f"{both} different colors?", one.held or two.held))
        return "same_color", sayings[0], sayings[1]


def _a(thing: Thing) -> str:
    """Return an object's name with its article."""
    return f"{article(thing.name)} {thing.name}"


def ask_yes_no(quiz: Quiz, things: list[Thing], size: tuple[int, int], split: str, *, steps: bool) -> None:
    """Ask yes or no questions of the kinds that the scene allows.

    Args:
        quiz: takes the questions.
        things: the objects.
        size: height and width of the picture in pixels.
        split: 'train' or 'val'.
        steps: ask for several steps, and for a mere look; else for what has to be seen well.
    """
    rng = quiz.rng
    maker = _YesNo(rng, things, size, split)
    seen = (
        maker.exists, maker.exists, maker.exists, maker.number, maker.relation, maker.relation, maker.is_color,
        maker.is_color,
    )  # fmt: skip
    thought = (
        maker.both_exist, maker.extreme_is, maker.extreme_is, maker.nearest_is, maker.more, maker.bigger,
        maker.same_color, maker.is_color,
    )  # fmt: skip
    for make in (maker.shape_exists, *(thought if steps else seen)):
        pair = make()
        if pair:
            template, *sayings = pair
            right, negated = rng.random() < 0.5, rng.random() < _NEGATED
            said = sayings[0 if right else 1]
            negated = negated and said.negated != ""
            ask, answer = (said.negated, not right) if negated else (said.ask, right)
            quiz.ask(template, ask, "yes" if answer else "no", held_out=said.held)
