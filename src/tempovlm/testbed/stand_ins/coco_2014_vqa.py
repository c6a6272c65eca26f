"""Scenes of objects: colours, counts, shapes, positions, sizes, numbers, yes and no.

Questions are about a set of objects, which `testbed.drawing` draws. In the first edition they are 16 to 110 px
wide, so that some questions need only the low tier and others the high one.
"""

from __future__ import annotations

from random import Random

from tempovlm.testbed.coco import coco_places, coco_writer
from tempovlm.testbed.content.scattered import draw_scattered, draw_things
from tempovlm.testbed.content.steps import ask_looks, ask_steps
from tempovlm.testbed.content.things import Thing, alike, count_answer, lone
from tempovlm.testbed.content.yes_no import ask_yes_no
from tempovlm.testbed.drawing.canvas import Canvas
from tempovlm.testbed.drawing.layout import choose_color, clear_direction, region
from tempovlm.testbed.lexicon import PLAIN_SHAPES, article, held_out_pair, plural
from tempovlm.testbed.scene import Quiz
from tempovlm.testbed.stand_in import StandIn

_RARE = 0.11
"""Share of held-out pairs among validation objects; a question often speaks of several objects."""
_COLOR_NAMES = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")


def _halves(rng: Random, count: int) -> list[float]:
    """Return half extents in pixels, the first clearly the largest, the last clearly the smallest."""
    scale = 1.0 if count <= 6 else 0.8
    halves = []
    for _ in range(count):
        draw = rng.random()
        low, high = (32, 52) if draw < 0.3 else (17, 32) if draw < 0.65 else (9, 16)
        halves.append(rng.uniform(low, high) * scale)
    halves.sort(reverse=True)
    halves[0] = max(halves[0], halves[1] * 1.35)
    if halves[-2] < halves[-1] * 1.3:
        halves[-1] = max(8.5, halves[-2] / 1.35)
    return halves


def _kinds(rng: Random, split: str, names: list[str], count: int) -> list[tuple[str, str]]:
    """Return shape and colour of every object: one group that repeats and some others."""
    main = rng.choice(PLAIN_SHAPES)
    repeat = min(count, rng.choice((1, 1, 2, 3, 4, 5, 6)))
    others = rng.sample([shape for shape in PLAIN_SHAPES if shape != main], 4)
    one_color = rng.random() < 0.3
    base = choose_color(rng, split, main, names, _RARE)
    kinds = [(main, base if one_color else choose_color(rng, split, main, names, _RARE)) for _ in range(repeat)]
    while len(kinds) < count:
        shape = rng.choice(others)
        kinds.append((shape, choose_color(rng, split, shape, names, _RARE)))
    rng.shuffle(kinds)
    return kinds


def _draw_things(canvas: Canvas, split: str) -> list[Thing]:
    """Scatter three to nine objects."""
    rng = canvas.rng
    count = rng.choice((3, 4, 5, 5, 6, 6, 7, 8, 9))
    halves = _halves(rng, count)
    names = canvas.visible(_COLOR_NAMES)
    kinds = _kinds(rng, split, names, count)
    return draw_scattered(canvas, halves, kinds)


def _ask_counts(quiz: Quiz, things: list[Thing]) -> None:
    """Ask how many there are of a shape, of a colour, of both."""
    rng = quiz.rng
    by_shape, by_color = alike(things, "shape"), alike(things, "color")
    group = max(by_shape.values(), key=len) if rng.random() < 0.6 else rng.choice(list(by_shape.values()))
    if len(group) <= 6 and rng.random() < 0.85:
        held = any(thing.held for thing in group)
        count_answer(quiz, "count_shape", f"how many {plural(group[0].shape)} are there?", len(group), held)
    group = max(by_color.values(), key=len) if rng.random() < 0.5 else rng.choice(list(by_color.values()))
    if len(group) <= 6 and rng.random() < 0.4:
        held = any(thing.held for thing in group)
        count_answer(quiz, "count_color", f"how many {group[0].color} objects are there?", len(group), held)


def _ask_single(quiz: Quiz, things: list[Thing], size: tuple[int, int]) -> None:
    """Ask about one object that its shape or colour names."""
    lone_shapes, lone_colors = lone(things, "shape"), lone(things, "color")
    rng = quiz.rng
    if lone_shapes:
        thing = rng.choice(lone_shapes)
        if rng.random() < 0.4:
            quiz.ask("color_of_shape", f"what color is the {thing.shape}?", thing.color, held_out=thing.held)
        thing = rng.choice(lone_shapes)
        where = region(thing.place, size)
        if where:
            quiz.ask("where_shape", f"where is the {thing.shape}?", where, (f"in the {where}", f"{where} corner"),
                     held_out=thing.held)  # fmt: skip
    if lone_colors and rng.random() < 0.5:
        thing = rng.choice(lone_colors)
        ask = rng.choice((f"what is the {thing.color} object?", f"what shape is the {thing.color} object?"))
        quiz.ask("shape_of_color", ask, thing.shape, (thing.name,), held_out=thing.held)


def _ask_extremes(quiz: Quiz, things: list[Thing], size: tuple[int, int]) -> None:
    """Ask for the largest, the smallest, and the only object of a corner."""
    rng = quiz.rng
    ordered = sorted(things, key=lambda thing: thing.half)
    top, low = ordered[-1], ordered[0]
    if top.half > 1.3 * ordered[-2].half:
        if rng.random() < 0.9:
            quiz.ask("largest", "what is the largest object?", top.name, (top.shape,), held_out=top.held)
        else:
            quiz.ask("largest_color", "what color is the largest object?", top.color, held_out=top.held)
    if low.half * 1.25 < ordered[1].half:
        if rng.random() < 0.9:
            quiz.ask("smallest", "what is the smallest object?", low.name, (low.shape,), held_out=low.held)
        else:
            quiz.ask("smallest_color", "what color is the smallest object?", low.color, held_out=low.held)
    corners: dict[str, list[Thing]] = {}
    for thing in things:
        corners.setdefault(_quarter(thing, size), []).append(thing)
    single = [(name, found[0]) for name, found in corners.items() if len(found) == 1]
    single = [(name, thing) for name, thing in single if region(thing.place, size) == name]
    for name, thing in rng.sample(single, min(2, len(single))):
        quiz.ask("what_is_at", f"what is in the {name}?", thing.name, (thing.shape,), held_out=thing.held)


def _quarter(thing: Thing, size: tuple[int, int]) -> str:
    """Return the quarter of the picture that the middle of an object lies in."""
    x, y = thing.place
    return f"{'top' if y < size[0] / 2 else 'bottom'} {'left' if x < size[1] / 2 else 'right'}"


def _ask_yes_no(quiz: Quiz, things: list[Thing], size: tuple[int, int], split: str) -> None:
    """Ask whether there is one, two are alike, one is beside the other; yes and no are equally likely."""
    rng = quiz.rng
    wish = rng.random() < 0.5
    thing = rng.choice(things)
    names = {other.name for other in things}
    shape, color = thing.shape, thing.color
    if not wish:
        shape = rng.choice(PLAIN_SHAPES) if rng.random() < 0.5 else shape
        color = choose_color(rng, split, shape, _COLOR_NAMES, _RARE)
    answer = "yes" if f"{color} {shape}" in names else "no"
    if rng.random() < 0.45:
        ask = f"is there {article(color)} {color} {shape}?"
        quiz.ask("exists", ask, answer, held_out=held_out_pair(shape, color))
    single = _ask_colors(quiz, things)
    if len(single) < 2:
        return
    first, second = rng.sample(single, 2)
    held = first.held or second.held
    where = clear_direction(first.place, second.place, size)
    if where:
        opposite = {"left": "right", "right": "left", "above": "below", "below": "above"}[where]
        said = where if rng.random() < 0.5 else opposite
        phrase = f"{said} of" if said in ("left", "right") else said
        ask = f"is the {first.shape} {phrase} the {second.shape}?"
        quiz.ask("relation", ask, "yes" if said == where else "no", held_out=held)
    ratio = first.half / second.half
    if ratio > 1.4 or ratio < 0.7:
        ask = f"which is bigger, the {first.shape} or the {second.shape}?"
        winner = first if ratio > 1 else second
        quiz.ask("bigger", ask, winner.shape, (winner.name,), held_out=held)
    same = first.color == second.color
    if same or rng.random() < 0.2:
        ask = f"do the {first.shape} and the {second.shape} have the same color?"
        quiz.ask("same_color", ask, "yes" if same else "no", held_out=held)


def _ask_colors(quiz: Quiz, things: list[Thing]) -> list[Thing]:
    """Ask for the colours of two pairs of objects that their shapes single out; return all that they do."""
    single = lone(things, "shape")
    for pair in (single[:2], single[2:4]):
        if len(pair) == 2:
            _ask_two(quiz, pair)
    return single


def _ask_two(quiz: Quiz, pair: list[Thing]) -> None:
    """Ask for the colours of two objects, in the order in which the question names them."""
    first, second = quiz.rng.sample(pair, 2)
    quiz.ask(
        "two_colors",
        f"what colors are the {first.shape} and the {second.shape}?",
        f"{first.color} and {second.color}",
        (f"{first.color} {second.color}", f"{first.color}, {second.color}"),
        held_out=first.held or second.held,
    )


def _ask_pair(quiz: Quiz, things: list[Thing]) -> None:
    """Ask for the colours of two objects of one kind, from left to right."""
    rng = quiz.rng
    shapes = [thing.shape for thing in things]
    pairs = [shape for shape in dict.fromkeys(shapes) if shapes.count(shape) == 2]
    if not pairs:
        return
    shape = rng.choice(pairs)
    first, second = sorted((t for t in things if t.shape == shape), key=lambda thing: thing.place[0])
    if second.place[0] - first.place[0] < 45 or first.color == second.color:
        return
    quiz.ask(
        "pair_colors",
        f"what colors are the two {plural(shape)} from left to right?",
        f"{first.color} and {second.color}",
        (f"{first.color} {second.color}", f"{first.color}, {second.color}"),
        held_out=first.held or second.held,
    )


def paint(canvas: Canvas, quiz: Quiz, split: str) -> int:
    """Place objects on the canvas and ask about them.

    Returns:
        The most questions to keep.
    """
    if quiz.edition > 1:
        things = draw_things(canvas, split)
        ask_steps(quiz, things)
        ask_looks(quiz, things)
        ask_yes_no(quiz, things, split)
    else:
        size = (canvas.height, canvas.width)
        things = _draw_things(canvas, split)
        _ask_counts(quiz, things)
        _ask_single(quiz, things, size)
        _ask_extremes(quiz, things, size)
        _ask_yes_no(quiz, things, size, split)
        _ask_pair(quiz, things)
    return 5 if quiz.rng.random() < 0.5 else 4


STAND_IN = StandIn(
    paint=paint,
    places=coco_places,
    write=coco_writer("v2_", raw=False),
    weight=0.15,
    later_weight=0.24,
    yes_no=0.38,
)
