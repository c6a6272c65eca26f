"""Open questions about objects: of several steps, about print, of facts, and those for which a look will do.

A condition or two, ranks, numbers to add, what is beside what is beside something.
"""

from __future__ import annotations

from random import Random

from tempovlm.testbed.content.invented import ask_invented
from tempovlm.testbed.content.things import (
    EXTREMES,
    HOPS,
    ORDERS,
    Thing,
    alike,
    count_answer,
    extreme,
    hop,
    lone,
    looked_up,
    named,
    ordered_from,
)
from tempovlm.testbed.content.values import Entry, ask_values
from tempovlm.testbed.lexicon import plural
from tempovlm.testbed.scene import Quiz

_NUMBERS: dict[str, str] = {
    "sum": "what do the numbers on the {a} and the {b} make together?",
    "three": "what do the numbers on {a}, {b} and {c} make?",
    "difference": "how much higher is the number on the {a} than on the {b}?",
    "twice": "what is twice the number on {a} plus that on {b}?",
    "less": "what are the numbers on {a} and {b} less {c}?",
    "range": "how much higher is the highest number than the lowest?",
    "ends": "what do the highest and the lowest number make together?",
    "top_two": "what do the two highest numbers make together?",
    "second": "which object has the second highest number?",
    "over": "how many numbers are higher than {low}?",
}

_STEPS = {"left of": "left", "right of": "right", "above": "up", "below": "down"}
"""Words for a place beside something to those for a step there."""


def ask_steps(quiz: Quiz, things: list[Thing]) -> None:
    """Ask what takes one to four steps."""
    _ask_extremes(quiz, things)
    _ask_counts(quiz, things)
    _ask_two_groups(quiz, things)
    _ask_order(quiz, things)
    _ask_numbers(quiz, things)
    _ask_hops(quiz, things)


def ask_looks(quiz: Quiz, things: list[Thing]) -> None:
    """Ask for print, for invented facts, and for what a look tells."""
    rng = quiz.rng
    for thing, ref in named(things):
        if thing.small.isdigit():
            quiz.ask("number_on", f"which small number is on the {ref}?", thing.small, held_out=thing.held)
        elif thing.small:
            quiz.ask("word_on", f"what is written on the {ref}?", thing.small, held_out=thing.held)
    known = looked_up(things)
    for thing, ref in rng.sample(known, min(2, len(known))):
        ask_invented(quiz, thing.name, ref)
    singles, colors = lone(things, "shape"), lone(things, "color")
    if singles:
        thing = rng.choice(singles)
        quiz.ask("color_of_shape", f"what color is the {thing.shape}?", thing.color, held_out=thing.held)
    if colors:
        thing = rng.choice(colors)
        ask = f"what shape is the {thing.color} object?"
        quiz.ask("shape_of_color", ask, thing.shape, (thing.name,), held_out=thing.held)
    if found := extreme(things, "largest"):
        quiz.ask("largest", "what is the largest object?", found.name, (found.shape,), held_out=found.held)


def _ask_extremes(quiz: Quiz, things: list[Thing]) -> None:
    """Ask for the colour of the leftmost star, the shape of the largest red object."""
    rng = quiz.rng
    word = rng.choice(list(EXTREMES))
    groups = [group for group in alike(things, "shape").values() if len(group) > 1]
    if groups and (found := extreme(group := rng.choice(groups), word)):
        held = any(thing.held for thing in group)
        quiz.ask("color_of_extreme", f"what color is the {word} {found.shape}?", found.color, held_out=held)
    word = rng.choice(list(EXTREMES))
    groups = [group for group in alike(things, "color").values() if len(group) > 1]
    if groups and (found := extreme(group := rng.choice(groups), word)):
        held = any(thing.held for thing in group)
        ask = f"what shape is the {word} {found.color} object?"
        quiz.ask("shape_of_extreme", ask, found.shape, (found.name,), held_out=held)


def _ask_counts(quiz: Quiz, things: list[Thing]) -> None:
    """Ask how many objects meet a condition, or two."""
    rng = quiz.rng
    held = any(thing.held for thing in things)
    main = _chosen(rng, things)
    shape, color = main.shape, main.color
    same = [thing for thing in things if thing.shape == shape]
    count_answer(quiz, "count_shape", f"how many {plural(shape)} are there?", len(same), held)
    number = sum(thing.color == color for thing in same)
    count_answer(quiz, "count_both", f"how many {color} {plural(shape)} are there?", number, main.held)
    if len(same) > 1:
        ask = f"how many {plural(shape)} are not {color}?"
        count_answer(quiz, "count_others", ask, len(same) - number, held)
    color = rng.choice(things).color
    number = sum(thing.color == color for thing in things)
    if rng.random() < 0.5:
        count_answer(quiz, "count_color", f"how many {color} objects are there?", number, held)
    else:
        count_answer(quiz, "count_not", f"how many objects are not {color}?", len(things) - number, held)
    other = rng.choice(things).shape
    number = sum(thing.color != color and thing.shape != other for thing in things)
    ask = f"how many objects are neither {color} nor {plural(other)}?"
    count_answer(quiz, "count_neither", ask, number, held)


def _chosen(rng: Random, things: list[Thing]) -> Thing:
    """Return an object, most often one of a kind that repeats."""
    shapes = [thing.shape for thing in things]
    several = [thing for thing in things if shapes.count(thing.shape) > 1]
    return rng.choice(several if several and rng.random() < 0.75 else things)


def _ask_two_groups(quiz: Quiz, things: list[Thing]) -> None:
    """Ask for the sum and the difference of the numbers of two kinds of objects, and of which there are more."""
    rng = quiz.rng
    quality = rng.choice(("shape", "color"))
    groups = alike(things, quality)
    if len(groups) < 2:
        return
    most = max(groups, key=lambda name: len(groups[name]))
    second = rng.choice([name for name in groups if name != most])
    first = most if rng.random() < 0.8 else rng.choice([name for name in groups if name != second])
    held = any(thing.held for thing in groups[first] + groups[second])
    many, few = sorted((first, second), key=lambda name: -len(groups[name]))
    said = {name: plural(name) if quality == "shape" else f"{name} objects" for name in (first, second)}
    more = len(groups[many]) - len(groups[few])
    if more:
        ask = f"how many more {said[many]} than {said[few]} are there?"
        count_answer(quiz, "count_more", ask, more, held)
        one, two = rng.sample((said[many], said[few]), 2)
        ask = f"of which are there more, {one} or {two}?"
        quiz.ask("kind_of_most", ask, plural(many) if quality == "shape" else many, (many,), held_out=held)
    ask = f"how many {said[first]} and {said[second]} are there together?"
    count_answer(quiz, "count_sum", ask, len(groups[first]) + len(groups[second]), held)


def _ask_order(quiz: Quiz, things: list[Thing]) -> None:
    """Ask for the second from a side, and for the colours of two or three of a kind in their order."""
    rng = quiz.rng
    side = rng.choice(list(ORDERS))
    groups = [group for group in alike(things, "shape").values() if len(group) > 2]
    if groups and (found := ordered_from(rng.choice(groups), side)):
        held = any(thing.held for thing in found)
        ask = f"what color is the second {found[1].shape} from the {side}?"
        quiz.ask("color_of_second", ask, found[1].color, held_out=held)
    side = rng.choice(list(ORDERS))
    groups = [group for group in alike(things, "color").values() if len(group) > 2]
    if groups and (found := ordered_from(rng.choice(groups), side)):
        ask = f"what shape is the second {found[1].color} object from the {side}?"
        quiz.ask("shape_of_second", ask, found[1].shape, held_out=any(thing.held for thing in found))
    groups = [group for group in alike(things, "shape").values() if len(group) in (2, 3)]
    if groups and (found := ordered_from(rng.choice(groups), "left")):
        colors = [thing.color for thing in found]
        if len(set(colors)) > 1:
            template, word = ("pair_colors", "two") if len(found) == 2 else ("triple_colors", "three")
            ask = f"what colors are the {word} {plural(found[0].shape)} from left to right?"
            answer = " and ".join(colors) if len(found) == 2 else " ".join(colors)
            held = any(thing.held for thing in found)
            quiz.ask(template, ask, answer, (" ".join(colors), ", ".join(colors)), held_out=held)


def _ask_numbers(quiz: Quiz, things: list[Thing]) -> None:
    """Ask for sums, differences and ranks of the numbers in large print."""
    rng = quiz.rng
    entries = [Entry(ref, thing.number, thing.held) for thing, ref in named(things) if thing.number]
    if len(entries) < 2:
        return
    for asked in ask_values(rng, entries, _NUMBERS):
        quiz.ask(f"number_{asked.way}", asked.question, str(asked.answer), held_out=asked.held)
    one, two = rng.sample(entries, 2)
    better = max(one, two, key=lambda entry: entry.value)
    ask = f"which has the higher number, the {one.name} or the {two.name}?"
    quiz.ask("number_compare", ask, better.name, held_out=one.held or two.held)


def _ask_hops(quiz: Quiz, things: list[Thing]) -> None:
    """Ask for what is one, two or three places from an object on a shelf."""
    rng = quiz.rng
    starts = [(thing, ref) for thing, ref in named(things) if thing.spot]
    for length in (1, 1, 2, 2, 2, 3, 3):
        if not starts:
            return
        start, ref = rng.choice(starts)
        found = _walk(rng, start, things, length)
        if found is None:
            continue
        end, ways = found
        held, said = start.held or end.held, " the one ".join(reversed(ways))
        if length > 1:
            template = "two_hops" if length == 2 else "three_hops"
            ask = f"what color is the object {said} the {ref}?"
            if length > 2 or rng.random() < 0.5:
                steps = [_STEPS[way] for way in ways]
                ask = f"from the {ref} go {', '.join(steps[:-1])} and {steps[-1]}: what color is it?"
            quiz.ask(template, ask, end.color, held_out=held)
        elif rng.random() < 0.5:
            quiz.ask("hop_color", f"what color is the object {said} the {ref}?", end.color, held_out=held)
        else:
            quiz.ask("hop_shape", f"which shape is {said} the {ref}?", end.shape, (end.name,), held_out=held)
        if length == 1 and end.number:
            ask = f"what number is on the object {said} the {ref}?"
            quiz.ask("number_of_beside", ask, str(end.number), held_out=held)


def _walk(rng: Random, start: Thing, things: list[Thing], length: int) -> tuple[Thing, list[str]] | None:
    """Return where a walk over a shelf ends that never comes back, and its ways in order; None if it is stuck."""
    passed, ways = [start], []
    for _ in range(length):
        legal = [(way, there) for way in HOPS if (there := hop(passed[-1], things, way)) and there not in passed]
        if not legal:
            return None
        way, there = rng.choice(legal)
        ways.append(way)
        passed.append(there)
    return passed[-1], ways
