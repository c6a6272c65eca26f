"""Signs with a company's name: a plate, a plate on a post, a framed plate, or the front of a shop.

The facts about companies are in `companies`.
Lettering is 13 to 60 px, large, middle and small about a third each, as in the scenes to read.
"""

from __future__ import annotations

from random import Random

from tempovlm.testbed.content.companies import (
    ALL_FACTS,
    COMPANY_QUESTIONS,
    fact_values,
    facts_of,
    said_otherwise,
)
from tempovlm.testbed.content.text_job import Job
from tempovlm.testbed.drawing import fonts
from tempovlm.testbed.drawing.canvas import RGB, Box, Canvas, ink_for
from tempovlm.testbed.drawing.icons import shade
from tempovlm.testbed.drawing.layout import center_of
from tempovlm.testbed.scene import Quiz

KINDS: tuple[str, ...] = ("sign", "sign", "shop")
"""Object classes of a company's sign, as often as they occur."""

_POST: tuple[RGB, ...] = ((96, 72, 52), (96, 98, 104))
_DRIFT = 0.5
"""Share of the free room that a sign may use, so that it stays clearly in its cell."""


def em_size(rng: Random) -> int:
    """Return an em size in pixels: large, middle or small print, about a third each."""
    draw = rng.random()
    low, high = (36, 61) if draw < 0.36 else (19, 33) if draw < 0.68 else (13, 19)
    return rng.randrange(low, high)


def draw_company(
    canvas: Canvas, quiz: Quiz, name: str, look: tuple[str, str], cell: Box, split: str, size: int | None = None
) -> None:
    """Draw and label the sign of a company.

    Args:
        canvas: Canvas to draw on.
        quiz: The quiz of the scene.
        name: Name to write, lower case.
        look: Object class, one of `KINDS`, and the name of its colour.
        cell: x0, y0, x1, y1 in pixels; the sign stays inside.
        split: 'train' or 'val'.
        size: Em size in pixels; None draws one.
    """
    kind, color = look
    job = Job(canvas, cell, size or em_size(canvas.rng), split, quiz)
    if kind == "shop":
        _draw_shop(job, name.upper(), color)
    else:
        _draw_plate(job, job.case(name), color)


def ask_company(quiz: Quiz, name: str, ref: str, held: bool, *, options: bool = False) -> None:
    """Ask for two of the facts about a company.

    Args:
        quiz: takes the questions.
        name: its name, which no question tells.
        ref: words that point at it.
        held: whether what the words speak of is held out.
        options: ask with two wrong answers to choose from.
    """
    known = facts_of(name)
    for fact in quiz.rng.sample(ALL_FACTS, 2):
        answer, ask = known[fact], quiz.rng.choice(COMPANY_QUESTIONS[fact]).format(ref=ref)
        if options:
            wrong = [value for value in fact_values(fact) if value != answer]
            quiz.choose(f"fact_company_{fact}", ask, answer, quiz.rng.sample(wrong, 2), held_out=held)
        else:
            quiz.ask(f"fact_company_{fact}", ask, answer, said_otherwise(fact, answer), held_out=held)


def _fit(job: Job, shown: str, beside: float, tall: float) -> tuple[str, int, float]:
    """Return face, em size and width in pixels of a sign `beside` em wider than its line and `tall` em high."""
    face, size = job.fit(shown, tall=tall)
    room = job.cell[2] - job.cell[0]
    wide = fonts.width(face, size, shown) + size * beside
    if wide > room:
        size = int(size * room / wide)
        wide = fonts.width(face, size, shown) + size * beside
    return face, size, wide


def _place(job: Job, wide: float, high: float) -> Box:
    """Return a box of this size near the middle of the cell."""
    x, y = center_of(job.cell)
    room_x = max(0.0, (job.cell[2] - job.cell[0] - wide) / 2) * _DRIFT
    room_y = max(0.0, (job.cell[3] - job.cell[1] - high) / 2) * _DRIFT
    x, y = x + job.rng.uniform(-room_x, room_x), y + job.rng.uniform(-room_y, room_y)
    return x - wide / 2, y - high / 2, x + wide / 2, y + high / 2


def _draw_plate(job: Job, shown: str, color: str) -> None:
    """A plate: bare, framed, or on a post."""
    rng, canvas = job.rng, job.canvas
    style = rng.choice(("bare", "framed", "post", "post"))
    if job.quiz.edition > 1 and job.cell[3] - job.cell[1] < 2.8 * job.size:
        style = "framed"
    post = 1.2 if style == "post" else 0.0
    face, size, wide = _fit(job, shown, 0.9, 1.6 + post)
    fill = canvas.jitter(color)
    post *= size
    x0, y0, x1, y1 = _place(job, wide, size * 1.6 + post)
    box = (x0, y0, x1, y1 - post)
    x, _ = middle = center_of(box)
    if style == "post":
        thick = max(2.0, size * 0.14)
        canvas.rect((x - thick, box[3], x + thick, y1), rng.choice(_POST))
    canvas.rect(box, fill, outline=shade(fill, 0.75), width=2, radius=rng.choice((0, size * 0.35)))
    if style == "framed":
        edge = max(3.0, size * 0.14)
        inner = (box[0] + edge, box[1] + edge, box[2] - edge, box[3] - edge)
        canvas.rect(inner, None, outline=shade(fill, 0.6 if max(fill) > 90 else 4.0))
    canvas.text(middle, shown, face, size, ink_for(fill))
    canvas.label_object("sign", color, box)


def _draw_shop(job: Job, shown: str, color: str) -> None:
    """A painted front with the name on a board above a door and a window."""
    rng, canvas = job.rng, job.canvas
    face, size, wide = _fit(job, shown, 1.3, 3.5)
    fill = canvas.jitter(color)
    x0, y0, x1, y1 = _place(job, wide, size * 3.5)
    canvas.rect((x0, y0, x1, y1), fill, outline=shade(fill, 0.7), width=2)
    board: RGB = rng.choice(((232, 228, 214), (36, 36, 40)))
    edge = size * 0.3
    canvas.rect((x0 + edge, y0 + edge, x1 - edge, y0 + size * 1.7), board, outline=(90, 86, 80))
    canvas.text(((x0 + x1) / 2, y0 + size * 1.0), shown, face, size, ink_for(board))
    door = x0 + wide * rng.choice((0.12, 0.66))
    window = x0 + wide * (0.12 if door > (x0 + x1) / 2 else 0.42)
    canvas.rect((door, y0 + size * 2.0, door + wide * 0.22, y1 - 2), (92, 72, 56))
    canvas.rect((window, y0 + size * 2.0, window + wide * 0.46, y0 + size * 3.0), (196, 214, 224))
    canvas.label_object("shop", color, (x0, y0, x1, y1))
