"""Legs and weights of objects, and where they lie: to count, to add and to compare what the fact table tells."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from random import Random

from tempovlm.testbed.content.facts import ANIMALS, FACTS, QUESTIONS, SYNONYMS
from tempovlm.testbed.scene import Quiz

_NO_LEGS = ("fish", "snail")
_WEIGHTS = (
    "bee spider leaf",
    "snail key pencil flower cherry",
    "mouse bird apple banana pear carrot pepper mushroom cup fork scissors candle glove hat",
    "rabbit book hammer ball boot bell umbrella fish",
    "cat penguin guitar drum lamp",
    "ladder chair bicycle tent",
    "bed anchor",
    "car",
    "boat tree",
    "plane house train rocket",
    "moon",
    "sun",
)
"""Objects in classes of weight, from the lightest; two classes apart the difference is plain."""
WEIGHT = {name: level for level, names in enumerate(_WEIGHTS) for name in names.split()}
"""Object to its class of weight."""
FOOD = ("apple", "banana", "carrot", "pear", "cherry", "pepper", "mushroom")
"""Objects that one can eat."""

WAYS: dict[str, tuple[int, int]] = {"left of": (0, -1), "right of": (0, 1), "above": (-1, 0), "below": (1, 0)}
"""Words to steps of row and column."""


@dataclass(frozen=True, slots=True)
class Known:
    """An object of a knowledge scene: class, colour, row and column, held out or not."""

    name: str
    color: str
    spot: tuple[int, int]
    held: bool

    @property
    def noun(self) -> str:
        """The word that points at it without naming it."""
        return "animal" if self.name in ANIMALS else "object"

    @property
    def ref(self) -> str:
        """The words that point at it."""
        return f"{self.color} {self.noun}"


def legs(name: str) -> int:
    """Return the number of legs of an animal."""
    return 0 if name in _NO_LEGS else int(FACTS[name]["legs"])


def ask_about_known(quiz: Quiz, known: list[Known]) -> None:
    """Ask what takes facts about several objects, or a fact about one that must be found first."""
    _ask_legs(quiz, [one for one in known if one.noun == "animal"])
    _ask_weights(quiz, [one for one in known if one.name in WEIGHT])
    _ask_counts(quiz, known)
    _ask_beside(quiz, known)


def _ask_legs(quiz: Quiz, animals: list[Known]) -> None:
    """Ask for sums and differences of legs, and for who has the most."""
    rng = quiz.rng
    if len(animals) < 2:
        return
    held = any(one.held for one in animals)
    first, second = rng.sample(animals, 2)
    many, few = sorted((first, second), key=lambda one: -legs(one.name))
    ask = f"how many legs do the {first.color} and the {second.color} animal have together?"
    quiz.ask("legs_sum", ask, str(legs(first.name) + legs(second.name)), held_out=held)
    if legs(many.name) > legs(few.name):
        more = str(legs(many.name) - legs(few.name))
        ask = f"how many more legs has the {many.color} animal than the {few.color} animal?"
        quiz.ask("legs_difference", ask, more, held_out=held)
        ask = f"which animal has more legs, the {first.color} or the {second.color} one?"
        quiz.ask("compare_legs", ask, many.color, held_out=held)
    if len(animals) > 2:
        total = sum(legs(one.name) for one in animals)
        quiz.ask("legs_total", "how many legs do all the animals have together?", str(total), held_out=held)
        ordered = sorted(animals, key=lambda one: -legs(one.name))
        if legs(ordered[0].name) > legs(ordered[1].name):
            ask = "what color is the animal with the most legs?"
            quiz.ask("legs_most", ask, ordered[0].color, held_out=held)


def _ask_weights(quiz: Quiz, heavy: list[Known]) -> None:
    """Ask for the heavier of two and the heaviest of all, where it is plain."""
    rng = quiz.rng
    if len(heavy) < 2:
        return
    for _ in range(2):
        first, second = rng.sample(heavy, 2)
        if abs(WEIGHT[first.name] - WEIGHT[second.name]) > 1:
            word, least = rng.choice((("heavier", -1), ("lighter", 1)))
            best = min(first, second, key=lambda one: least * WEIGHT[one.name])
            ask = f"which is {word} in real life, the {first.color} or the {second.color} one?"
            quiz.ask("heavier", ask, best.color, held_out=first.held or second.held)
    ordered = sorted(heavy, key=lambda one: -WEIGHT[one.name])
    if len(heavy) > 2 and WEIGHT[ordered[0].name] - WEIGHT[ordered[1].name] > 1:
        ask = "what color is the heaviest thing in real life?"
        quiz.ask("heaviest", ask, ordered[0].color, held_out=any(one.held for one in heavy))


def _ask_counts(quiz: Quiz, known: list[Known]) -> None:
    """Ask how many things are animals, can be eaten, are made of something; and for the colour of the only one."""
    rng = quiz.rng
    held = any(one.held for one in known)
    animals = sum(one.noun == "animal" for one in known)
    quiz.ask("count_animals", "how many animals are there?", str(animals), held_out=held)
    food = sum(one.name in FOOD for one in known)
    if rng.random() < (0.7 if food else 0.15):
        quiz.ask("count_food", "how many things can you eat?", str(food), held_out=held)
    made = [FACTS[one.name]["made"] for one in known if "made" in FACTS[one.name]]
    if made:
        stuff = rng.choice(made)
        ask = f"how many things are made of {stuff}?"
        quiz.ask("count_made", ask, str(made.count(stuff)), held_out=held)
    used = [(one, FACTS[one.name]["use"]) for one in known if "use" in FACTS[one.name]]
    single = [(one, use) for one, use in used if sum(other == use for _, other in used) == 1]
    if single:
        one, use = rng.choice(single)
        quiz.ask("color_by_use", f"what color is the object used {use}?", one.color, held_out=one.held)


def _ask_beside(quiz: Quiz, known: list[Known]) -> None:
    """Ask for a fact about what is beside something, or beside that, and for what is beside what a fact tells."""
    rng = quiz.rng
    for hops, template in ((1, "beside_object"), (1, "beside_object"), (2, "beside_two"), (2, "beside_two")):
        walk = _walk(rng, known, hops)
        if walk is None:
            continue
        start, ways, end = walk
        said = " the one ".join(reversed(ways))
        fact = rng.choice(list(FACTS[end.name]))
        answer = FACTS[end.name][fact]
        ask = QUESTIONS[fact][0].format(ref=f"{end.noun} {said} the {start.color} {start.noun}")
        if len(ask.split()) <= 14:
            quiz.ask(template, ask, answer, SYNONYMS.get(answer, ()), held_out=start.held or end.held)
    walk = _walk(rng, [one for one in known if _clause(one, known)], 1, known)
    if walk:
        start, (way,), end = walk
        ask = f"what color is the {end.noun} {way} the {_clause(start, known)}?"
        quiz.ask("color_beside_fact", ask, end.color, held_out=start.held or end.held)


def _clause(one: Known, known: list[Known]) -> str:
    """Return words that single an object out by what is known of it; empty if nothing does."""
    says: tuple[tuple[str, Callable[[str], str]], ...] = (
        ("one made of {}", lambda name: FACTS[name].get("made", "")),
        ("one that eats {}", lambda name: FACTS[name].get("eat", "")),
        ("one that grows {}", lambda name: FACTS[name].get("grow", "")),
    )
    for words, value in says:
        own = value(one.name)
        if own and sum(value(other.name) == own for other in known) == 1:
            return words.format(own)
    return ""


def _walk(
    rng: Random, starts: list[Known], length: int, known: list[Known] | None = None
) -> tuple[Known, list[str], Known] | None:
    """Return start, ways and end of a walk that never comes back, or None if there is none from a drawn start."""
    by_spot = {one.spot: one for one in known or starts}
    for start in rng.sample(starts, len(starts)):
        passed, ways = [start], []
        for _ in range(length):
            (row, col), legal = passed[-1].spot, []
            for way, (down, right) in WAYS.items():
                there = by_spot.get((row + down, col + right))
                if there and there not in passed:
                    legal.append((way, there))
            if not legal:
                break
            way, there = rng.choice(legal)
            ways.append(way)
            passed.append(there)
        if len(ways) == length:
            return start, ways, passed[-1]
    return None
