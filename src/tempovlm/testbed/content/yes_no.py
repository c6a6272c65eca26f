"""Yes or no questions about objects: the answer is drawn, and either is asked for with the same words.

So a question alone says nothing.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import permutations
from random import Random

from tempovlm.testbed.content.invented import invented, values_of
from tempovlm.testbed.content.prints import misread
from tempovlm.testbed.content.things import EXTREMES, HOPS, Thing, alike, extreme, hop, lone, looked_up, named
from tempovlm.testbed.lexicon import PLAIN_SHAPES, SIGN_WORDS, article, held_out_pair, plural
from tempovlm.testbed.scene import Quiz

_TRIED = 12
"""Kinds that are tried of all in a scene; few questions are kept."""
_NEGATED = 0.25
"""Share of the yes or no questions that may be put negated and are."""


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
    named: list[tuple[Thing, str]]
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
        word = self.rng.choice(list(EXTREMES))
        groups = [group for group in alike(self.things, "shape").values() if len(group) > 1]
        group = self.rng.choice([self.things, *groups])
        thing = extreme(group, word)
        if thing is None:
            return None
        return self.color_pair(
            "extreme_is", f"the {word} {'object' if group is self.things else thing.shape}", thing
        )

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

    def hop_is(self) -> _Pair:
        """Ask for the colour of what is beside an object on a shelf."""
        found = [(ref, way, hop(thing, self.things, way)) for thing, ref in self.named for way in HOPS]
        there = [(ref, way, thing) for ref, way, thing in found if thing]
        if not there:
            return None
        ref, way, thing = self.rng.choice(there)
        return self.color_pair("hop_is", f"the object {way} the {ref}", thing)

    def numbered(self, count: int) -> list[tuple[str, Thing]]:
        """Return some objects with a number in large print, each with its name; none if there are too few."""
        found = [(ref, thing) for thing, ref in self.named if thing.number]
        return self.rng.sample(found, count) if len(found) >= count else []

    def number_higher(self) -> _Pair:
        """Ask which of two numbers is the higher one."""
        found = self.numbered(2)
        if not found:
            return None
        (one, first), (two, second) = sorted(found, key=lambda pair: -pair[1].number)
        held = first.held or second.held
        word = self.rng.choice(("higher", "lower"))
        names = (one, two) if word == "higher" else (two, one)
        yes, no = (
            _Saying(f"is the number on the {a} {word} than on the {b}?", "", held) for a, b in (names, names[::-1])
        )
        return "number_higher", yes, no

    def sum_is(self) -> _Pair:
        """Ask whether two numbers make a third."""
        found = self.numbered(2)
        if not found:
            return None
        (one, first), (two, second) = found
        total, held = first.number + second.number, first.held or second.held
        wrong = self.rng.choice([total + more for more in (-3, -2, -1, 1, 2, 3) if total + more > 1])
        yes, no = (
            _Saying(f"do the numbers on the {one} and the {two} make {number}?", "", held)
            for number in (total, wrong)
        )
        return "sum_is", yes, no

    def print_is(self) -> _Pair:
        """Ask whether small print is this number, or one that differs in a digit; this word, or another one."""
        found = [(ref, thing) for thing, ref in self.named if thing.small]
        if not found:
            return None
        ref, thing = self.rng.choice(found)
        if thing.small.isdigit():
            numbers = (thing.small, misread(self.rng, thing.small))
            yes, no = (_Saying(f"does the {ref} have the number {number}?", "", thing.held) for number in numbers)
            return "number_is", yes, no
        wrong = next(word for word in self.rng.sample(SIGN_WORDS, 2) if word != thing.small)
        yes, no = (_Saying(f"does the {ref} say {word}?", "", thing.held) for word in (thing.small, wrong))
        return "word_is", yes, no

    def fact_is(self) -> _Pair:
        """Ask whether an object has its own owner or home, or another one."""
        known = looked_up(self.things)
        if not known:
            return None
        thing, ref = self.rng.choice(known)
        fact = self.rng.choice(("owner", "home"))
        ask = "does {0} own the {1}?" if fact == "owner" else "is {0} the home of the {1}?"
        right = invented(thing.name, fact)
        wrong = next(value for value in self.rng.sample(values_of(fact), 2) if value != right)
        yes, no = (_Saying(ask.format(value, ref), "", False) for value in (right, wrong))
        return f"{fact}_is", yes, no

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


def ask_yes_no(quiz: Quiz, things: list[Thing], split: str) -> None:
    """Ask yes or no questions of the kinds that the scene allows.

    Args:
        quiz: takes the questions.
        things: the objects.
        split: 'train' or 'val'.
    """
    rng = quiz.rng
    maker = _YesNo(rng, things, named(things), split)
    kinds = (
        maker.both_exist, maker.extreme_is, maker.extreme_is, maker.hop_is, maker.hop_is, maker.more, maker.sum_is,
        maker.number_higher, maker.same_color,
        maker.print_is, maker.print_is, maker.print_is, maker.print_is, maker.fact_is, maker.fact_is,
        maker.is_color, maker.exists, maker.shape_exists,
    )  # fmt: skip
    said_yes: set[str] = set()
    for make in rng.sample(kinds, _TRIED):
        pair = make()
        if pair and pair[1].ask not in said_yes:  # else the same thing would be asked about with no more often
            template, *sayings = pair
            said_yes.add(pair[1].ask)
            right, negated = rng.random() < 0.5, rng.random() < _NEGATED
            said = sayings[0 if right else 1]
            negated = negated and said.negated != ""
            ask, answer = (said.negated, not right) if negated else (said.ask, right)
            quiz.ask(template, ask, "yes" if answer else "no", held_out=said.held)
