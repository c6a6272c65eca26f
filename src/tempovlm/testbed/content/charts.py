"""Bar charts, line charts and thermometers, with the shared look of all diagrams.

A chart is drawn with its questions and right options; `stand_ins` decides which diagram a scene gets.
"""

from __future__ import annotations

from random import Random

from tempovlm.testbed.drawing.canvas import RGB, Canvas
from tempovlm.testbed.drawing.layout import choose_color
from tempovlm.testbed.lexicon import held_out_pair
from tempovlm.testbed.scene import Quiz

RARE = 0.25
"""Share of held-out colours in validation where an object has one."""
INK: RGB = (30, 30, 34)
"""Colour of lines and labels."""
CHART_COLORS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown")
TOPICS: dict[str, tuple[str, ...]] = {
    "votes": ("anna", "ben", "cara", "dan", "eva", "finn"),
    "pets": ("cats", "dogs", "fish", "birds", "mice"),
    "fruit": ("apples", "pears", "plums", "figs", "limes"),
    "rain": ("may", "june", "july", "april", "march"),
}
"""Topic of a bar chart to its possible labels."""


def label_face(rng: Random) -> str:
    """Return a face for the labels of a diagram."""
    return rng.choice(("default", "roboto", "roboto-bold", "arvo-bold"))


def label_size(rng: Random) -> int:
    """Return the em size of labels in pixels: small, middle or large."""
    return rng.choice((14, 15, 16, 18, 20, 22, 24, 28, 32))


def frame(canvas: Canvas, share: float = 0.8) -> tuple[float, float, float, float]:
    """Return the part of the sheet that the diagram fills, jittered."""
    rng = canvas.rng
    share = share * rng.uniform(0.85, 1.1)
    wide, high = canvas.width * share, canvas.height * share
    x = (canvas.width - wide) / 2 + rng.uniform(-0.05, 0.05) * canvas.width * 0.5
    y = (canvas.height - high) / 2 + rng.uniform(-0.05, 0.05) * canvas.height * 0.5
    return x, y, x + wide, y + high


def bars(canvas: Canvas, quiz: Quiz, split: str) -> None:
    """A bar chart: most, least, value of a bar, comparison."""
    rng = canvas.rng
    topic = rng.choice(list(TOPICS))
    count = rng.choice((3, 3, 4))
    labels = rng.sample(TOPICS[topic], count)
    values = rng.sample(range(1, 11), len(labels))
    while sorted(values)[-1] - sorted(values)[-2] < 2 or sorted(values)[1] - sorted(values)[0] < 2:
        values = rng.sample(range(1, 11), len(labels))
    x0, y0, x1, y1 = frame(canvas, 0.84)
    size, face = min(label_size(rng), 26), label_face(rng)
    bottom, left = y1 - size * 1.4, x0 + size * 1.6
    unit = (bottom - y0) / 10.5
    for mark in range(0, 11, 2):
        y = bottom - mark * unit
        canvas.line([(left, y), (x1, y)], (190, 190, 186), 1)
        canvas.text((left - size * 0.8, y), str(mark), face, min(size, 18), INK)
    canvas.line([(left, y0), (left, bottom), (x1, bottom)], INK, 2)
    slot = (x1 - left) / len(labels)
    pairs = []
    used: list[str] = []
    for place, (label, value) in enumerate(zip(labels, values, strict=True)):
        color = choose_color(rng, split, label, [c for c in CHART_COLORS if c not in used], RARE)
        used.append(color)
        middle = left + slot * (place + 0.5)
        box = (middle - slot * 0.32, bottom - value * unit, middle + slot * 0.32, bottom)
        canvas.rect(box, canvas.jitter(color))
        canvas.label_object("bar", color, box)
        small = size
        while small > 12 and len(label) * small * 0.62 > slot:
            small -= 1
        canvas.text((middle, bottom + size * 0.8), label, face, small, INK)
        pairs.append((value, label, color))
    _ask_bars(quiz, topic, pairs)


def _ask_bars(quiz: Quiz, topic: str, pairs: list[tuple[int, str, str]]) -> None:
    """Questions about a bar chart; `pairs` holds value, label and colour of every bar."""
    rng = quiz.rng
    held = {label: held_out_pair(label, color) for _, label, color in pairs}
    labels = [label for _, label, _ in pairs]
    top, low = max(pairs)[1], min(pairs)[1]
    most = {"votes": "who got the most votes?", "rain": "which month had the most rain?"}
    least = {"votes": "who got the fewest votes?", "rain": "which month had the least rain?"}
    quiz.choose("bar_most", most.get(topic, f"which of the {topic} bars is the tallest?"), top,
                [label for label in labels if label != top], held_out=held[top])  # fmt: skip
    quiz.choose("bar_least", least.get(topic, f"which of the {topic} bars is the shortest?"), low,
                [label for label in labels if label != low], held_out=held[low])  # fmt: skip
    value, label, color = rng.choice(pairs)
    wrong = [str(v) for v in range(1, 11) if abs(v - value) >= 2]
    ask = rng.choice((f"what is the value of the {color} bar?", f"what is the value for {label}?"))
    quiz.choose("bar_value", ask, str(value), rng.sample(wrong, 2), held_out=held[label])
    (one, first, _), (two, second, _) = rng.sample(pairs, 2)
    winner, loser = (first, second) if one > two else (second, first)
    quiz.choose("bar_compare", f"which has more, {first} or {second}?", winner, [loser], held_out=held[winner])
    quiz.choose("bar_color", f"which bar is {color}?", label, [other for other in labels if other != label],
                held_out=held[label])  # fmt: skip


def _thermometer(
    canvas: Canvas, middle: float, top: float, bottom: float, value: int, size: int, face: str
) -> None:
    """One thermometer from 0 to 50 degrees."""
    bulb = min(22.0, (bottom - top) * 0.08)
    base = bottom - bulb * 2
    unit = (base - top) / 55
    tube = bulb * 0.55
    canvas.rect((middle - tube, top, middle + tube, base + bulb), (234, 234, 234), outline=INK, radius=tube)
    canvas.rect((middle - tube + 3, base - value * unit, middle + tube - 3, base + bulb), (208, 36, 36))
    canvas.ellipse((middle - bulb, base, middle + bulb, bottom), (208, 36, 36), outline=INK)
    for mark in range(0, 51, 10):
        y = base - mark * unit
        canvas.line([(middle + tube, y), (middle + tube + 8, y)], INK, 2)
        canvas.text((middle + tube + 12 + size * 0.6, y), str(mark), face, size, INK)
    canvas.label_object("thermometer", "red", (middle - bulb, top, middle + bulb, bottom))


def heat(canvas: Canvas, quiz: Quiz, split: str) -> None:
    """One thermometer to read, or two to compare."""
    del split
    rng = canvas.rng
    x0, y0, x1, y1 = frame(canvas, 0.88)
    size, face = min(22, label_size(rng)), label_face(rng)
    if rng.random() < 0.5:
        value = rng.randrange(1, 11) * 5
        _thermometer(canvas, x0 + (x1 - x0) * rng.uniform(0.2, 0.7), y0, y1, value, size, face)
        wrong = [str(other) for other in range(0, 55, 5) if abs(other - value) >= 10]
        quiz.choose("thermo_read", "what temperature does the thermometer show?", str(value), rng.sample(wrong, 2))
        answer = "hot" if value >= 30 else "cold" if value <= 10 else "mild"
        quiz.choose("thermo_feel", "how does the weather feel?", answer,
                    [other for other in ("hot", "mild", "cold") if other != answer])  # fmt: skip
        return
    first, second = rng.sample(range(1, 11), 2)
    while abs(first - second) < 2:
        first, second = rng.sample(range(1, 11), 2)
    for share, name, value in ((0.2, "A", first), (0.7, "B", second)):
        middle = x0 + (x1 - x0) * share
        _thermometer(canvas, middle, y0 + size * 1.4, y1, value * 5, size, face)
        canvas.text((middle, y0 + size * 0.5), name, face, max(18, size), INK)
    warm, cold = ("a", "b") if first > second else ("b", "a")
    quiz.choose("thermo_warmer", "which thermometer is warmer?", warm, [cold])
    quiz.choose("thermo_colder", "which thermometer is colder?", cold, [warm])
    name, value = rng.choice((("a", first), ("b", second)))
    wrong = [str(5 * other) for other in range(11) if abs(other - value) >= 2]
    quiz.choose("thermo_value", f"what temperature does thermometer {name} show?", str(5 * value),
                rng.sample(wrong, 2))  # fmt: skip


def line_chart(canvas: Canvas, quiz: Quiz, split: str) -> None:
    """A line over the week days that rises, falls or stays."""
    rng = canvas.rng
    x0, y0, x1, y1 = frame(canvas, 0.82)
    size, face = min(24, label_size(rng)), label_face(rng)
    days = ("mon", "tue", "wed", "thu", "fri")
    kind = rng.choice(("rises", "falls", "stays flat", "peak"))
    peak = rng.randrange(1, 4)
    levels = {
        "rises": [0.1 + 0.2 * k for k in range(5)],
        "falls": [0.9 - 0.2 * k for k in range(5)],
        "stays flat": [0.5] * 5,
        "peak": [0.9 - 0.25 * abs(k - peak) for k in range(5)],
    }[kind]
    levels = [min(0.97, max(0.03, level + rng.uniform(-0.04, 0.04))) for level in levels]
    bottom = y1 - size * 1.4
    color = choose_color(rng, split, "line", ("red", "blue", "green", "purple"), RARE)
    canvas.line([(x0, y0), (x0, bottom), (x1, bottom)], INK, 2)
    points = [(x0 + (x1 - x0) * (k + 0.5) / 5, bottom - level * (bottom - y0)) for k, level in enumerate(levels)]
    small = max(12, min(size, int((x1 - x0) / 5 / 2.2)))
    fill = canvas.jitter(color)
    canvas.line(points, fill, 4)
    for (x, y), day in zip(points, days, strict=True):
        canvas.ellipse((x - 5, y - 5, x + 5, y + 5), fill)
        canvas.text((x, bottom + size * 0.8), day, face, small, INK)
    held = held_out_pair("line", color)
    if kind != "peak":
        wrong = [other for other in ("rises", "falls", "stays flat") if other != kind]
        quiz.choose("line_trend", "what does the line do over the week?", kind, wrong, held_out=held)
    if kind != "stays flat":
        for word, best in (("highest", max(levels)), ("lowest", min(levels))):
            right = days[levels.index(best)]
            if word == "highest" or kind != "peak":
                wrong = rng.sample([day for day in days if day != right], 2)
                quiz.choose(f"line_{word}", f"on which day is the line {word}?", right, wrong, held_out=held)
