"""Boards in large print: a menu with prices, or the points of teams. To compare, to add and to take away.

The low tier shows them, so that what is asked costs steps and no crops.
"""

from __future__ import annotations

from collections.abc import Sequence

from tempovlm.testbed.content.prints import large_size
from tempovlm.testbed.content.values import WHOLE, Entry, ask_values
from tempovlm.testbed.drawing import fonts
from tempovlm.testbed.drawing.canvas import RGB, Box, Canvas, ink_for
from tempovlm.testbed.drawing.icons import shade
from tempovlm.testbed.drawing.layout import choose_color
from tempovlm.testbed.lexicon import held_out_pair
from tempovlm.testbed.scene import Quiz

_DISHES = ("milk", "soup", "rice", "cake", "tea", "beef", "pork", "corn", "soda", "beer", "bean", "plum")
_COLORS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")
_FACES = ("default", "roboto-bold", "condensed", "arvo-bold")
_PRICES: dict[str, str] = {
    "sum": "how much do the {a} and the {b} cost together?",
    "three": "how much do the {a}, the {b} and the {c} cost together?",
    "difference": "how much more does the {a} cost than the {b}?",
    "twice": "how much do 2 {a} and 1 {b} cost together?",
    "less": "how much more do the {a} and the {b} cost than the {c}?",
    "left": f"how much of ${WHOLE} is left after the {{a}} and the {{b}}?",
    "range": "how much more does the dearest cost than the cheapest?",
    "ends": "how much do the cheapest and the dearest cost together?",
    "top_two": "how much do the two dearest cost together?",
    "second": "what is the second dearest on the menu?",
    "over": "how many cost more than ${low}?",
    "between": "how many cost more than ${low} but less than ${high}?",
}
_POINTS: dict[str, str] = {
    "sum": "how many points do the {a} and the {b} team have together?",
    "three": "how many points do the {a}, the {b} and the {c} team have?",
    "difference": "how many more points has the {a} team than the {b} team?",
    "twice": "what is twice the points of {a} plus those of {b}?",
    "less": "how many more points have {a} and {b} together than {c}?",
    "range": "how many points is the first team ahead of the last?",
    "ends": "how many points have the first and the last team together?",
    "top_two": "how many points have the two best teams together?",
    "second": "which team is second?",
    "over": "how many teams have more than {low} points?",
}


def draw_menu(canvas: Canvas, quiz: Quiz, box: Box, split: str) -> None:
    """Draw a board with three or four dishes and their prices, and ask about them."""
    rng = canvas.rng
    dishes = rng.sample(_DISHES, rng.choice((3, 3, 4)))
    prices = rng.sample(range(1, 10), len(dishes))
    color = choose_color(rng, split, "tag", canvas.visible(_COLORS))
    held = held_out_pair("tag", color)
    fill = canvas.jitter(color)
    canvas.rect(box, fill, outline=shade(fill, 0.7), width=2)
    lines = [f"{dish.upper()} ${price}" for dish, price in zip(dishes, prices, strict=True)]
    face, size = _fitting(canvas, lines, box, len(lines))
    pitch = (box[3] - box[1]) / len(lines)
    for row, line in enumerate(lines):
        canvas.text(((box[0] + box[2]) / 2, box[1] + pitch * (row + 0.5)), line, face, size, ink_for(fill))
    canvas.label_object("tag", color, box)
    entries = [Entry(dish, price, held) for dish, price in zip(dishes, prices, strict=True)]
    for asked in ask_values(rng, entries, _PRICES):
        money = isinstance(asked.answer, int) and asked.way not in ("over", "between")
        answer = f"${asked.answer}" if money else str(asked.answer)
        quiz.ask(f"menu_{asked.way}", asked.question, answer, (str(asked.answer),), held_out=held)
    one, two = rng.sample(entries, 2)
    quiz.ask("menu_price", f"what does the {one.name} cost?", f"${one.value}", (str(one.value),), held_out=held)
    cheap = min(one, two, key=lambda entry: entry.value)
    ask = f"which is cheaper, the {one.name} or the {two.name}?"
    quiz.ask("menu_compare", ask, cheap.name, held_out=held)
    word, best = rng.choice((("cheapest", min), ("dearest", max)))
    answer = best(entries, key=lambda entry: entry.value).name
    quiz.ask("menu_extreme", f"what is the {word} on the menu?", answer, held_out=held)


def draw_score(canvas: Canvas, quiz: Quiz, box: Box, split: str) -> None:
    """Draw the points of three or four teams, each in a panel of its colour, and ask about them."""
    rng = canvas.rng
    count = rng.choice((3, 4, 4))
    free = canvas.visible(_COLORS)
    points = rng.sample(range(1, 13), count)
    colors: list[str] = []
    for _ in points:
        colors.append(choose_color(rng, split, "box", [color for color in free if color not in colors], 0.03))
    rows, cols = (2, 2) if count == 4 else (3, 1)
    high, wide = (box[3] - box[1]) / rows, (box[2] - box[0]) / cols
    face, size = _fitting(canvas, ["88"], (0, 0, wide * 0.8, high), 1)
    for place, (color, value) in enumerate(zip(colors, points, strict=True)):
        x, y = box[0] + wide * (place % cols), box[1] + high * (place // cols)
        panel = (x + 3, y + 3, x + wide - 3, y + high - 3)
        fill: RGB = canvas.jitter(color)
        canvas.rect(panel, fill, outline=shade(fill, 0.7), width=2)
        canvas.text((x + wide / 2, y + high / 2), str(value), face, size, ink_for(fill))
        canvas.label_object("box", color, panel)
    entries = [
        Entry(color, value, held_out_pair("box", color)) for color, value in zip(colors, points, strict=True)
    ]
    for asked in ask_values(rng, entries, _POINTS):
        quiz.ask(f"score_{asked.way}", asked.question, str(asked.answer), held_out=asked.held)
    one, two = rng.sample(entries, 2)
    best = max(one, two, key=lambda entry: entry.value)
    ask = f"which team has more points, {one.name} or {two.name}?"
    quiz.ask("score_compare", ask, best.name, held_out=one.held or two.held)
    quiz.ask("score_of", f"how many points does the {one.name} team have?", str(one.value), held_out=one.held)
    first = max(entries, key=lambda entry: entry.value)
    quiz.ask("score_winner", "which team is first?", first.name, held_out=any(entry.held for entry in entries))


def _fitting(canvas: Canvas, lines: Sequence[str], box: Box, rows: int) -> tuple[str, int]:
    """Return a face and a large em size at which every line fits into the width, and the rows into the height."""
    face, size = canvas.rng.choice(_FACES), large_size(canvas)
    wide = max(fonts.width(face, size, line) for line in lines)
    return face, int(min(size, size * (box[2] - box[0]) * 0.94 / wide, (box[3] - box[1]) / rows / 1.1))
