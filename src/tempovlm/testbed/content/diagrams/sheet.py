"""A sheet of paper with a diagram: often a company's name above it, and captions in small print."""

from __future__ import annotations

from dataclasses import dataclass, field

from tempovlm.testbed.content.companies import draw_names
from tempovlm.testbed.content.company_signs import ask_company, draw_company
from tempovlm.testbed.content.prints import large_size, misread, small_size, small_text
from tempovlm.testbed.content.text_job import Job
from tempovlm.testbed.content.values import near
from tempovlm.testbed.drawing import fonts
from tempovlm.testbed.drawing.canvas import RGB, Box, Canvas
from tempovlm.testbed.drawing.layout import choose_color
from tempovlm.testbed.lexicon import SIGN_WORDS, held_out_pair
from tempovlm.testbed.scene import Quiz

INK: RGB = (30, 30, 34)
"""Colour of lines and labels."""
RARE = 0.12
"""Share of held-out colours in validation where an object has one; a question often speaks of several."""
COLORS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black")
_TITLED = 0.88
"""Share of sheets with a company's name above the diagram."""
_TITLE = 0.2
"""Share of the height that the name takes."""


@dataclass(slots=True)
class Sheet:
    """A diagram in progress.

    Attributes:
        canvas, quiz, split: as everywhere.
        area: where the diagram goes, x0, y0, x1, y1 in pixels.
        captions: what has been written in small print so far, by how its place is named.
    """

    canvas: Canvas
    quiz: Quiz
    split: str
    area: Box
    captions: dict[str, str] = field(default_factory=dict)

    def colors(self, shape: str, count: int) -> list[str]:
        """Choose different colours for objects of a class; fewer if training may show fewer."""
        found: list[str] = []
        for _ in range(count):
            free = [color for color in COLORS if color not in found]
            if self.split == "train" and all(held_out_pair(shape, color) for color in free):
                break
            found.append(choose_color(self.canvas.rng, self.split, shape, free, RARE))
        return found

    def caption(self, ref: str, x: float, y: float) -> float:
        """Write something in small print with its upper edge at y, and return its lower edge."""
        canvas = self.canvas
        text, size = small_text(canvas.rng), small_size(canvas)
        if text not in self.captions.values():
            self.captions[ref] = text
            face = canvas.rng.choice(fonts.SMALL_FACES)
            canvas.text((x, y + size * 0.5), text, face, size, INK)
        return y + size

    def ask_captions(self) -> None:
        """Ask what each caption says; one of the wrong answers looks alike, one stands elsewhere if it can."""
        rng = self.canvas.rng
        for ref, text in self.captions.items():
            others = [other for other in self.captions.values() if other.isdigit() == text.isdigit()]
            others.remove(text)
            alike = [misread(rng, text) for _ in range(4)] if text.isdigit() else rng.sample(SIGN_WORDS, 4)
            wrong = list(dict.fromkeys(rng.sample(others, min(1, len(others))) + alike))
            template = "caption_number" if text.isdigit() else "caption_word"
            wrong = [other for other in wrong if other != text][:2]
            if len(wrong) == 2:
                self.quiz.choose(template, f"what is written {ref}?", text, wrong)

    def number(self, template: str, ask: str, right: int, held: bool, step: int = 1) -> None:
        """Ask for a number, with two wrong ones that are near it."""
        wrong = [str(step * int(other)) for other in near(self.canvas.rng, right // step)]
        self.quiz.choose(template, ask, str(right), wrong, held_out=held)

    def one_of(self, template: str, ask: str, right: str, names: list[str], held: bool) -> None:
        """Ask for one of some names; two others of them are the wrong answers, or one if there is no more."""
        wrong = [name for name in names if name != right]
        self.quiz.choose(template, ask, right, self.canvas.rng.sample(wrong, min(2, len(wrong))), held_out=held)


def new_sheet(canvas: Canvas, quiz: Quiz, split: str) -> Sheet:
    """Return a sheet, often with a company's name on it, which is asked about."""
    rng = canvas.rng
    left, right = canvas.width * rng.uniform(0.03, 0.08), canvas.width * rng.uniform(0.92, 0.97)
    top, bottom = canvas.height * 0.04, canvas.height * 0.97
    if rng.random() < _TITLED:
        (name,) = draw_names(rng, 1)
        color = choose_color(rng, split, "sign", COLORS, RARE)
        edge = canvas.height * (_TITLE + 0.02)
        cell = (left, 4.0, right, edge)
        draw_company(Job(canvas, cell, large_size(canvas), split, quiz), name, color)
        ref, held = f"company on the {color} sign", held_out_pair("sign", color)
        ask_company(quiz, name, ref, held, options=True)
        top = edge + 6
    return Sheet(canvas, quiz, split, (left, top, right, bottom))
