"""Bar charts, read by height: values to add and to compare, ranks, and what stands beside what."""

from __future__ import annotations

from tempovlm.testbed.content.diagrams.sheet import INK, Sheet
from tempovlm.testbed.content.values import Entry, ask_values
from tempovlm.testbed.drawing import fonts
from tempovlm.testbed.lexicon import held_out_pair

_PHRASES: dict[str, str] = {
    "sum": "what is the value of the {a} and the {b} bar together?",
    "three": "what do the {a}, the {b} and the {c} bar make together?",
    "difference": "how much more is the {a} bar than the {b} bar?",
    "twice": "what is twice the {a} bar plus the {b} bar?",
    "less": "how much more are the {a} and the {b} bar than the {c}?",
    "range": "how much higher is the tallest bar than the shortest?",
    "ends": "what do the tallest and the shortest bar make together?",
    "top_two": "what do the two tallest bars make together?",
    "second": "what color is the second tallest bar?",
    "over": "how many bars are higher than {low}?",
    "between": "how many bars are higher than {low} but lower than {high}?",
}
_HIGHEST = 10


def draw_bars(sheet: Sheet) -> None:
    """Draw three to five bars of different height and colour, with small print under each, and ask about them."""
    rng, canvas = sheet.canvas.rng, sheet.canvas
    count = rng.choice((3, 4, 4, 5))
    values = rng.sample(range(1, _HIGHEST + 1), count)
    colors = sheet.colors("bar", count)
    x0, y0, x1, y1 = sheet.area
    left, bottom = x0 + 24, y1 - 30
    unit = (bottom - y0) / (_HIGHEST + 0.5)
    face = rng.choice(fonts.SMALL_FACES)
    for mark in range(0, _HIGHEST + 1, 2):
        y = bottom - mark * unit
        canvas.line([(left, y), (x1, y)], (190, 190, 186), 1)
        canvas.text((left - 13, y), str(mark), face, 15, INK)
    canvas.line([(left, y0), (left, bottom), (x1, bottom)], INK, 2)
    slot = (x1 - left) / count
    for place, (color, value) in enumerate(zip(colors, values, strict=True)):
        middle = left + slot * (place + 0.5)
        box = (middle - slot * 0.34, bottom - value * unit, middle + slot * 0.34, bottom)
        canvas.rect(box, canvas.jitter(color))
        canvas.label_object("bar", color, box)
        sheet.caption(f"under the {color} bar", middle, bottom + 6)
    _ask(sheet, colors, values)


def _ask(sheet: Sheet, colors: list[str], values: list[int]) -> None:
    """Ask about values, ranks and neighbours."""
    rng = sheet.canvas.rng
    entries = [
        Entry(color, value, held_out_pair("bar", color)) for color, value in zip(colors, values, strict=True)
    ]
    for asked in ask_values(rng, entries, _PHRASES):
        if isinstance(asked.answer, str):
            sheet.one_of(f"bar_{asked.way}", asked.question, asked.answer, colors, asked.held)
        else:
            sheet.number(f"bar_{asked.way}", asked.question, asked.answer, asked.held)
    held = any(entry.held for entry in entries)
    for _ in range(2):
        place = rng.randrange(len(colors))
        side, step = rng.choice((("left", -1), ("right", 1)))
        if 0 <= place + step < len(colors):
            ref = colors[place]
            if values[place] in (max(values), min(values)):
                ref = "tallest" if values[place] == max(values) else "shortest"
            ask = f"what color is the bar {side} of the {ref} bar?"
            rest = [color for color in colors if color != colors[place]]
            sheet.one_of("bar_beside", ask, colors[place + step], rest, held)
            ask = f"what is the value of the bar {side} of the {ref} bar?"
            sheet.number("bar_beside_value", ask, values[place + step], held)
    color, value = rng.choice(list(zip(colors, values, strict=True)))
    sheet.number("bar_value", f"what is the value of the {color} bar?", value, held_out_pair("bar", color))
    word, best = rng.choice((("tallest", max), ("shortest", min)))
    right = colors[values.index(best(values))]
    sheet.one_of("bar_color_of", f"what color is the {word} bar?", right, colors, held)
