"""Signs with a company's name: a plate, a plate on a post, or a framed plate.

The facts about companies are in `companies`.
"""

from __future__ import annotations

from tempovlm.testbed.content.companies import (
    ALL_FACTS,
    COMPANY_QUESTIONS,
    fact_values,
    facts_of,
    said_otherwise,
)
from tempovlm.testbed.content.text_job import Job
from tempovlm.testbed.drawing import fonts
from tempovlm.testbed.drawing.canvas import RGB, Box, ink_for
from tempovlm.testbed.drawing.icons import shade
from tempovlm.testbed.drawing.layout import center_of
from tempovlm.testbed.scene import Quiz

_POST: tuple[RGB, ...] = ((96, 72, 52), (96, 98, 104))
_BESIDE = 0.9
"""Em sizes by which a sign is wider than its line."""
_DRIFT = 0.5
"""Share of the free room that a sign may use, so that it stays clearly in its cell."""


def draw_company(job: Job, name: str, color: str) -> None:
    """Draw and label the sign of a company: a plate, bare, framed, or on a post."""
    rng, canvas, shown = job.rng, job.canvas, job.case(name)
    style = rng.choice(("bare", "framed", "post", "post"))
    if job.cell[3] - job.cell[1] < 2.8 * job.size:
        style = "framed"
    post = 1.2 if style == "post" else 0.0
    face, size, wide = _fit(job, shown, 1.6 + post)
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


def _fit(job: Job, shown: str, tall: float) -> tuple[str, int, float]:
    """Return face, em size and width in pixels of a sign that is `tall` em high."""
    face, size = job.fit(shown, tall=tall)
    room = job.cell[2] - job.cell[0]
    wide = fonts.width(face, size, shown) + size * _BESIDE
    if wide > room:
        size = int(size * room / wide)
        wide = fonts.width(face, size, shown) + size * _BESIDE
    return face, size, wide


def _place(job: Job, wide: float, high: float) -> Box:
    """Return a box of this size near the middle of the cell."""
    x, y = center_of(job.cell)
    room_x = max(0.0, (job.cell[2] - job.cell[0] - wide) / 2) * _DRIFT
    room_y = max(0.0, (job.cell[3] - job.cell[1] - high) / 2) * _DRIFT
    x, y = x + job.rng.uniform(-room_x, room_x), y + job.rng.uniform(-room_y, room_y)
    return x - wide / 2, y - high / 2, x + wide / 2, y + high / 2
