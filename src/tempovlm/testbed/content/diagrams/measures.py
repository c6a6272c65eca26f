"""Thermometers and beakers: to read, to count, to compare and to add."""

from __future__ import annotations

from tempovlm.testbed.content.diagrams.sheet import INK, Sheet
from tempovlm.testbed.content.prints import large_size
from tempovlm.testbed.drawing import fonts
from tempovlm.testbed.drawing.layout import choose_color
from tempovlm.testbed.lexicon import held_out_pair

_RED = (208, 36, 36)
_NAMES = ("a", "b", "c")


def draw_thermometers(sheet: Sheet) -> None:
    """Draw two or three thermometers with a large letter above and small print under each, and ask about them."""
    rng, canvas = sheet.canvas.rng, sheet.canvas
    x0, y0, x1, y1 = sheet.area
    count = rng.choice((2, 3, 3))
    values = [5 * value for value in rng.sample(range(1, 11), count)]
    size, face, marks = large_size(canvas), rng.choice(fonts.SMALL_FACES), rng.randrange(13, 17)
    slot = (x1 - x0) / count
    top, bottom = y0 + size, y1 - 26
    bulb = min(20.0, (bottom - top) * 0.09)
    base, tube = bottom - bulb * 2, bulb * 0.6
    unit = (base - top) / 55
    for place, value in enumerate(values):
        middle = x0 + slot * (place + 0.4)
        canvas.rect((middle - tube, top, middle + tube, base + bulb), (234, 234, 234), outline=INK, radius=tube)
        canvas.rect((middle - tube + 3, base - value * unit, middle + tube - 3, base + bulb), _RED)
        canvas.ellipse((middle - bulb, base, middle + bulb, bottom), _RED, outline=INK)
        for mark in range(0, 51, 10):
            y = base - mark * unit
            canvas.line([(middle + tube, y), (middle + tube + 8, y)], INK, 2)
            canvas.text((middle + tube + 12 + marks * 0.6, y), str(mark), face, marks, INK)
        canvas.label_object("thermometer", "red", (middle - bulb, top, middle + bulb, bottom))
        name = _NAMES[place]
        canvas.text((middle, y0 + size * 0.45), name.upper(), face, size, INK)
        sheet.caption(f"under thermometer {name}", middle, bottom + 4)
    _ask_heat(sheet, values)


def _ask_heat(sheet: Sheet, values: list[int]) -> None:
    """Ask for readings, differences, ranks and what comes after a change."""
    rng = sheet.canvas.rng
    heat = dict(zip(_NAMES, values, strict=False))
    for _ in range(2):
        one, two = sorted(rng.sample(list(heat), 2), key=lambda name: -heat[name])
        ask = f"how much warmer is {one} than {two}?"
        sheet.number("thermo_difference", ask, heat[one] - heat[two], False, 5)
    for word, sign in (("warmer", 1), ("colder", -1)):
        name, change = rng.choice(list(heat)), 5 * rng.randrange(1, 6)
        after = heat[name] + sign * change
        if 0 <= after <= 60:
            ask = f"what does thermometer {name} show when it is {change} degrees {word}?"
            sheet.number("thermo_after", ask, after, False, 5)
    if len(heat) > 2:
        more = max(values) - min(values)
        ask = "how much warmer is the warmest thermometer than the coldest?"
        sheet.number("thermo_range", ask, more, False, 5)
        second = sorted(heat, key=lambda name: -heat[name])[1]
        sheet.one_of("thermo_second", "which thermometer is the second warmest?", second, list(heat), False)
        coldest, middle, _ = sorted(heat, key=lambda name: heat[name])
        ask = "how much warmer is the second warmest thermometer than the coldest?"
        sheet.number("thermo_gap", ask, heat[middle] - heat[coldest], False, 5)
    name = rng.choice(list(heat))
    sheet.number("thermo_read", f"what temperature does thermometer {name} show?", heat[name], False, 5)


def draw_beakers(sheet: Sheet) -> None:
    """Draw two solutions with particles, a large letter above and small print under each, and ask about them."""
    rng, canvas = sheet.canvas.rng, sheet.canvas
    x0, y0, x1, y1 = sheet.area
    color = choose_color(rng, sheet.split, "beaker", ("red", "green", "purple", "orange", "pink"))
    held = held_out_pair("beaker", color)
    counts = rng.sample(range(1, 10), 2)
    size, face = large_size(canvas), rng.choice(fonts.SMALL_FACES)
    wide = (x1 - x0) * 0.42
    top, bottom = y0 + size * 1.1, y1 - 26
    level = top + (bottom - top) * 0.06
    dot = min(wide / 3, (bottom - level) / 3) * 0.24
    for left, name, count in ((x0, "a", counts[0]), (x1 - wide, "b", counts[1])):
        canvas.rect((left, level, left + wide, bottom), (186, 210, 228))
        canvas.line([(left, top), (left, bottom), (left + wide, bottom), (left + wide, top)], INK, 3)
        for cell in rng.sample(range(9), count):
            x = left + wide * (cell % 3 + 0.5 + rng.uniform(-0.15, 0.15)) / 3
            y = level + (bottom - level) * (cell // 3 + 0.5 + rng.uniform(-0.15, 0.15)) / 3
            canvas.ellipse((x - dot, y - dot, x + dot, y + dot), canvas.jitter(color))
        canvas.text((left + wide / 2, y0 + size * 0.45), name.upper(), face, size, INK)
        canvas.label_object("beaker", color, (left, top, left + wide, bottom))
        sheet.caption(f"under solution {name}", left + wide / 2, bottom + 4)
    first, second = counts
    more, less = ("a", "b") if first > second else ("b", "a")
    ask = "how many particles are in both solutions together?"
    sheet.number("beaker_sum", ask, first + second, held)
    ask = f"how many more particles are in {more} than in {less}?"
    sheet.number("beaker_difference", ask, abs(first - second), held)
    moved = rng.randrange(1, 4)
    ask = f"how many particles are in {less} after {moved} more come in?"
    sheet.number("beaker_after", ask, min(counts) + moved, held)
    ask = f"how many are in both solutions when {moved} particles are taken away?"
    sheet.number("beaker_left", ask, max(0, first + second - moved), held)
    name, count = rng.choice((("a", first), ("b", second)))
    sheet.number("beaker_count", f"how many particles are in solution {name}?", count, held)
    sheet.one_of("beaker_more", "which solution is more concentrated?", more, ["a", "b"], held)
