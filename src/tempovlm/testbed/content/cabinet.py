"""Knowledge scenes: objects in rows and columns, with small print below them.

Flags and notes stand among them, and above or below them often the signs of companies in large print.
"""

from __future__ import annotations

from random import Random

from tempovlm.testbed.content.companies import draw_names
from tempovlm.testbed.content.company_signs import ask_company, draw_company
from tempovlm.testbed.content.facts import ANIMALS, FACTS, FLAGS, QUESTIONS, SYNONYMS
from tempovlm.testbed.content.invented import ask_invented
from tempovlm.testbed.content.lives import Known, ask_about_known
from tempovlm.testbed.content.prints import OBJECT, large_size, plate, scale, small_size, small_text
from tempovlm.testbed.content.text_job import Job
from tempovlm.testbed.drawing.canvas import Box, Canvas
from tempovlm.testbed.drawing.layout import choose_color
from tempovlm.testbed.lexicon import COLOR_RGB, SIGN_WORDS, held_out_pair
from tempovlm.testbed.scene import Quiz

_RARE = 0.2
"""Share of held-out pairs among validation objects that have one in a colour that shows."""
_COLOR_NAMES = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")
_SIGNS = 0.7
"""Share of scenes with a band of company signs."""
_BAND = 0.27
"""Share of the height that the band takes."""
_FLAG, _NOTE = 0.07, 0.1
"""Shares of flags and of notes in small print among the things in rows and columns; the rest are objects."""
_PALE = ("snowman",)
"""Objects that show hardly anything of the colour that they are named by."""
_ANIMALS = 0.5
"""Share of animals among the objects."""


def draw_flag(canvas: Canvas, country: str, center: tuple[float, float], half: float) -> None:
    """Draw three bands of equal width on a pole."""
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


def paint_cabinet(canvas: Canvas, quiz: Quiz, split: str) -> None:
    """Draw a scene and ask about it."""
    rng = canvas.rng
    free = canvas.visible(_COLOR_NAMES)
    top, bottom = 0.0, float(canvas.height)
    band = rng.random() < _SIGNS
    if band:
        high = canvas.height * _BAND
        start = 0.0 if rng.random() < 0.5 else bottom - high
        row = (0.0, start, float(canvas.width), start + high)
        _draw_signs(canvas, quiz, row, free, split)
        top, bottom = (high, bottom) if start == 0 else (top, start)
    tall = bottom - top > canvas.width
    rows, cols = rng.choice(((2, 2), (3, 2), (3, 2)) if tall else ((2, 2), (2, 3), (2, 3)))
    names = _names(rng, rows * cols)
    countries = rng.sample(list(FLAGS), rows * cols)
    known = []
    wide, high = canvas.width / cols, (bottom - top) / rows
    for place, (name, country) in enumerate(zip(names, countries, strict=True)):
        spot = divmod(place, cols)
        cell = (spot[1] * wide, top + spot[0] * high, (spot[1] + 1) * wide, top + (spot[0] + 1) * high)
        draw = rng.random()
        if draw < _FLAG:
            _flag(canvas, quiz, country, cell, spot, (rows, cols))
        elif draw < _FLAG + _NOTE:
            _note(canvas, quiz, cell, free, split)
        elif one := _object(canvas, quiz, name, cell, spot, free, split):
            known.append(one)
    ask_about_known(quiz, known)
    _ask_facts(quiz, known)


def _names(rng: Random, count: int) -> list[str]:
    """Return different objects, half of them animals."""
    animals = rng.sample(ANIMALS, min(count, len(ANIMALS)))
    others = rng.sample([name for name in FACTS if name not in (*ANIMALS, *_PALE)], count)
    return [one if rng.random() < _ANIMALS else two for one, two in zip(animals, others, strict=True)]


def _take(rng: Random, split: str, shape: str, free: list[str]) -> str | None:
    """Choose a colour that no other thing has; None if none is left that the split may show."""
    if not any(split == "val" or not held_out_pair(shape, color) for color in free):
        return None
    color = choose_color(rng, split, shape, free, _RARE)
    free.remove(color)
    return color


def _draw_signs(canvas: Canvas, quiz: Quiz, row: Box, free: list[str], split: str) -> None:
    """Draw one company's sign in a row, or two where there is room, and ask about each."""
    rng = canvas.rng
    names = draw_names(rng, 2 if canvas.width > 1.3 * canvas.height else 1)
    wide = (row[2] - row[0]) / len(names)
    for place, name in enumerate(names):
        cell = (row[0] + wide * place + 3, row[1] + 3, row[0] + wide * (place + 1) - 3, row[3] - 3)
        color = _take(rng, split, "sign", free)
        if color is None:
            continue
        draw_company(Job(canvas, cell, large_size(canvas), split, quiz), name, color)
        ref = f"company on the {color} sign"
        ask_company(quiz, name, ref, held_out_pair("sign", color))


def _flag(
    canvas: Canvas, quiz: Quiz, country: str, cell: Box, spot: tuple[int, int], shape: tuple[int, int]
) -> None:
    """Draw a flag and ask for its country, or the capital."""
    half = min(cell[2] - cell[0], cell[3] - cell[1]) * 0.36
    draw_flag(canvas, country, ((cell[0] + cell[2]) / 2, (cell[1] + cell[3]) / 2), half)
    ref = f"flag {_where(spot, shape)}"
    if quiz.rng.random() < 0.5:
        quiz.ask("flag_country", f"which country has the {ref}?", country)
    else:
        ask = f"what is the capital of the country with the {ref}?"
        quiz.ask("flag_capital", ask, FLAGS[country][0], (country,))


def _where(spot: tuple[int, int], shape: tuple[int, int]) -> str:
    """Return words for a place in rows and columns."""
    names = [("top", "bottom") if shape[0] == 2 else ("top", "middle", "bottom"),
             ("left", "right") if shape[1] == 2 else ("left", "middle", "right")]  # fmt: skip
    return f"at the {names[0][spot[0]]} {names[1][spot[1]]}"


def _note(canvas: Canvas, quiz: Quiz, cell: Box, free: list[str], split: str) -> None:
    """Draw a sign with a word in small print and ask for it."""
    color, word = _take(canvas.rng, split, "sign", free), canvas.rng.choice(SIGN_WORDS)
    if color is None:
        return
    box = (cell[0] + 4, cell[1] + 4, cell[2] - 4, cell[3] - 4)
    draw_company(Job(canvas, box, small_size(canvas), split, quiz), word, color)
    quiz.ask("note_says", f"what does the {color} sign say?", word, held_out=held_out_pair("sign", color))


def _object(
    canvas: Canvas, quiz: Quiz, name: str, cell: Box, spot: tuple[int, int], free: list[str], split: str
) -> Known | None:
    """Draw an object, most often with small print below it, and ask for that; None if no colour is left."""
    rng = canvas.rng
    color = _take(rng, split, name, free)
    if color is None:
        return None
    room = min(cell[2] - cell[0], cell[3] - cell[1])
    half = max(OBJECT * scale(canvas), room * rng.uniform(0.3, 0.36))
    x, y = (cell[0] + cell[2]) / 2 + rng.uniform(-0.06, 0.06) * room, (cell[1] + cell[3]) / 2 - room * 0.09
    canvas.icon(name, color, (x, y), half, flip=rng.random() < 0.5)
    one = Known(name, color, spot, held_out_pair(name, color))
    if rng.random() < 0.75:
        text, size = small_text(rng), small_size(canvas)
        plate(canvas, (x, min(y + half + size * 0.8, cell[3] - size * 0.65)), text, size)
        quiz.ask("print_on", f"what is written under the {one.ref}?", text, held_out=one.held)
    return one


def _ask_facts(quiz: Quiz, known: list[Known]) -> None:
    """Ask for a fact of the table, for invented ones, and for a colour."""
    rng = quiz.rng
    for one in rng.sample(known, min(2, len(known))):
        fact = rng.choice(list(FACTS[one.name]))
        answer = FACTS[one.name][fact]
        ask = rng.choice(QUESTIONS[fact]).format(ref=one.ref)
        quiz.ask(f"fact_{fact}", ask, answer, SYNONYMS.get(answer, ()), held_out=one.held)
    sure = [one for one in known if not one.held]
    for one in rng.sample(sure, min(1, len(sure))):
        ask_invented(quiz, f"{one.color} {one.name}", one.ref)
