"""Diagrams, charts and maps with multiple choice questions.

Each diagram is drawn with its questions and right options.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable
from pathlib import Path

from tempovlm.testbed.content.charts import (
    CHART_COLORS,
    INK,
    RARE,
    bars,
    frame,
    heat,
    label_face,
    label_size,
    line_chart,
)
from tempovlm.testbed.content.diagrams.bars import draw_bars
from tempovlm.testbed.content.diagrams.maps import draw_chain, draw_map
from tempovlm.testbed.content.diagrams.measures import draw_beakers, draw_thermometers
from tempovlm.testbed.content.diagrams.sheet import Sheet, new_sheet
from tempovlm.testbed.drawing.canvas import Canvas, ink_for
from tempovlm.testbed.drawing.layout import HELD_OUT_SHARE, choose_color
from tempovlm.testbed.lexicon import held_out_pair
from tempovlm.testbed.scene import Quiz
from tempovlm.testbed.stand_in import Record, StandIn, dump

CHAINS: tuple[tuple[str, ...], ...] = (
    ("grass", "rabbit", "fox", "eagle"), ("leaf", "snail", "frog", "snake"), ("corn", "mouse", "owl"),
    ("algae", "shrimp", "fish", "seal"), ("seeds", "bird", "cat"), ("clover", "bee", "toad", "hawk"),
    ("grass", "deer", "wolf"), ("plankton", "krill", "whale"), ("carrot", "rabbit", "wolf"),
    ("fruit", "fly", "spider", "bird"), ("grass", "zebra", "lion"), ("algae", "fish", "bear"),
)  # fmt: skip
_HELD_OUT_CHAINS: tuple[tuple[str, ...], ...] = (
    ("leaf", "deer", "lion"), ("seeds", "mouse", "hawk"), ("plankton", "shrimp", "seal"),
    ("corn", "rabbit", "snake"),
)  # fmt: skip
_MAP_NAMES = ("a", "b", "c", "d", "e", "f", "g", "h", "k", "m")


def _map(canvas: Canvas, quiz: Quiz, split: str) -> None:
    """A map of lettered regions in colours; north is up."""
    rng = canvas.rng
    rows, cols = rng.choice(((2, 2), (2, 3), (3, 2), (3, 3))) if canvas.height >= 320 else (2, 3)
    x0, y0, x1, y1 = frame(canvas, 0.86)
    names = rng.sample(_MAP_NAMES, rows * cols)
    xs = [x0 + (x1 - x0) * k / cols for k in range(cols + 1)]
    ys = [y0 + (y1 - y0) * k / rows for k in range(rows + 1)]
    wobble = min((x1 - x0) / cols, (y1 - y0) / rows) * 0.14
    knots = [[(x + rng.uniform(-wobble, wobble), y + rng.uniform(-wobble, wobble)) for x in xs] for y in ys]
    size, face = max(16, label_size(rng)), label_face(rng)
    colors: dict[str, str] = {}
    for row in range(rows):
        for col in range(cols):
            name = names[row * cols + col]
            near = [colors[names[r * cols + c]] for r, c in ((row - 1, col), (row, col - 1)) if r >= 0 and c >= 0]
            color = choose_color(rng, split, f"region {name}", [c for c in CHART_COLORS if c not in near], RARE)
            colors[name] = color
            points = [knots[row][col], knots[row][col + 1], knots[row + 1][col + 1], knots[row + 1][col]]
            fill = canvas.jitter(color)
            canvas.polygon(points, fill, outline=(70, 70, 70))
            middle = ((xs[col] + xs[col + 1]) / 2, (ys[row] + ys[row + 1]) / 2)
            canvas.text(middle, name.upper(), face, size, ink_for(fill))
            canvas.label_object("region", color, (xs[col], ys[row], xs[col + 1], ys[row + 1]))
    _ask_map(quiz, names, colors, rows, cols)


def _ask_map(quiz: Quiz, names: list[str], colors: dict[str, str], rows: int, cols: int) -> None:
    """Neighbours by compass direction, and colours."""
    rng = quiz.rng
    held = {name: held_out_pair(f"region {name}", colors[name]) for name in names}
    for _ in range(2):
        row, col = rng.randrange(rows), rng.randrange(cols)
        steps = {"north": (row - 1, col), "south": (row + 1, col), "west": (row, col - 1), "east": (row, col + 1)}
        steps = {way: (r, c) for way, (r, c) in steps.items() if 0 <= r < rows and 0 <= c < cols}
        way = rng.choice(list(steps))
        here, right = names[row * cols + col], names[steps[way][0] * cols + steps[way][1]]
        wrong = rng.sample([name for name in names if name not in (here, right)], 2)
        quiz.choose("map_direction", f"which region is {way} of {here}?", right, wrong, held_out=held[right])
    name = rng.choice(names)
    wrong = rng.sample([color for color in CHART_COLORS if color != colors[name]], 2)
    quiz.choose("map_color", f"what color is region {name} on the map?", colors[name], wrong, held_out=held[name])
    lone = [name for name in names if list(colors.values()).count(colors[name]) == 1]
    if lone:
        name = rng.choice(lone)
        wrong = rng.sample([other for other in names if other != name], 2)
        quiz.choose("map_which", f"which region is {colors[name]}?", name, wrong, held_out=held[name])


def _chain(canvas: Canvas, quiz: Quiz, split: str) -> None:
    """A food chain: boxes with words, arrows from the eaten to the eater."""
    rng = canvas.rng
    down = canvas.height > canvas.width or rng.random() < 0.4
    held = split == "val" and rng.random() < HELD_OUT_SHARE
    chain = rng.choice(_HELD_OUT_CHAINS if held else CHAINS)
    order = list(chain)
    flipped = rng.random() < 0.5
    if flipped:
        order.reverse()
    x0, y0, x1, y1 = frame(canvas, 0.88)
    pitch = ((y1 - y0) if down else (x1 - x0)) / len(order)
    limit = 0.5 * pitch if down else pitch * 0.72 / (0.62 * max(len(word) for word in order))
    size, face = max(13, int(min(label_size(rng), limit))), label_face(rng)
    fill = canvas.jitter(rng.choice(("yellow", "pink", "white", "orange")))
    sign = -1 if flipped else 1
    for place, word in enumerate(order):
        along = (y0 if down else x0) + pitch * (place + 0.5)
        x, y = ((x0 + x1) / 2, along) if down else (along, (y0 + y1) / 2)
        half = 0.34 * size * len(word) + size * 0.3 if down else pitch * 0.4
        canvas.rect((x - half, y - size * 0.8, x + half, y + size * 0.8), fill, outline=INK, radius=size * 0.3)
        canvas.text((x, y), word, face, size, ink_for(fill))
        canvas.label_object("box", "mixed", (x - half, y - size * 0.8, x + half, y + size * 0.8))
        if place + 1 < len(order):
            start = along + (size * 0.85 if down else pitch * 0.41)
            _arrow(canvas, (x, y), start, along + pitch - (size * 0.85 if down else pitch * 0.41), down, sign)
    _ask_chain(quiz, chain, held)


def _arrow(canvas: Canvas, at: tuple[float, float], start: float, end: float, down: bool, sign: int) -> None:
    """An arrow along one axis from start to end, its head at the end where sign is 1 and at the start where -1."""
    head = end if sign > 0 else start
    back = head - sign * min(9, abs(end - start) * 0.6)
    if down:
        canvas.line([(at[0], start), (at[0], end)], INK, 3)
        canvas.polygon([(at[0], head), (at[0] - 7, back), (at[0] + 7, back)], INK)
    else:
        canvas.line([(start, at[1]), (end, at[1])], INK, 3)
        canvas.polygon([(head, at[1]), (back, at[1] - 7), (back, at[1] + 7)], INK)


def _ask_chain(quiz: Quiz, chain: tuple[str, ...], held: bool) -> None:
    """Ask who eats whom, where it starts and ends."""
    rng = quiz.rng
    place = rng.randrange(len(chain) - 1)
    eaten, eater = chain[place], chain[place + 1]
    quiz.choose("chain_eats", f"what eats the {eaten} in this food chain?", eater,
                [word for word in chain if word not in (eaten, eater)][:2], held_out=held)  # fmt: skip
    place = rng.randrange(len(chain) - 1)
    eaten, eater = chain[place], chain[place + 1]
    quiz.choose("chain_food", f"what does the {eater} eat?", eaten,
                [word for word in chain if word not in (eaten, eater)][:2], held_out=held)  # fmt: skip
    quiz.choose("chain_start", "which is the producer in this food chain?", chain[0],
                rng.sample(chain[1:], 2), held_out=held)  # fmt: skip
    quiz.choose("chain_top", "which is the top predator?", chain[-1], rng.sample(chain[:-1], 2), held_out=held)


def _magnets(canvas: Canvas, quiz: Quiz, split: str) -> None:
    """Two bar magnets: unlike poles attract."""
    rng = canvas.rng
    x0, y0, x1, y1 = frame(canvas, 0.86)
    size, face = max(16, label_size(rng)), label_face(rng)
    names = ("red", "blue", "green", "orange", "purple")
    north = choose_color(rng, split, "magnet", names, RARE)
    south = rng.choice([name for name in names if name != north])
    wide, high = (x1 - x0) * 0.42, max(size * 1.8, (y1 - y0) * rng.uniform(0.14, 0.22))
    y = (y0 + y1) / 2 + rng.uniform(-0.2, 0.2) * (y1 - y0)
    poles = []
    for left in (x0, x1 - wide):
        order = ("N", "S") if rng.random() < 0.5 else ("S", "N")
        for part, pole in enumerate(order):
            box = (left + wide * part / 2, y - high / 2, left + wide * (part + 1) / 2, y + high / 2)
            fill = canvas.jitter(north if pole == "N" else south)
            canvas.rect(box, fill, outline=INK)
            canvas.text(((box[0] + box[2]) / 2, y), pole, face, size, ink_for(fill))
        canvas.label_object("magnet", north, (left, y - high / 2, left + wide, y + high / 2))
        poles.append(order)
    held = held_out_pair("magnet", north)
    answer = "repel" if poles[0][1] == poles[1][0] else "attract"
    quiz.choose("magnet_force", "will these magnets attract or repel each other?", answer,
                ["attract" if answer == "repel" else "repel"], held_out=held)  # fmt: skip
    side = rng.randrange(2)
    pole = poles[0][1] if side == 0 else poles[1][0]
    ask = f"which pole of the {('left', 'right')[side]} magnet faces the other magnet?"
    quiz.choose("magnet_pole", ask, "north" if pole == "N" else "south", ["south" if pole == "N" else "north"],
                held_out=held)  # fmt: skip


def _beakers(canvas: Canvas, quiz: Quiz, split: str) -> None:
    """Two solutions with particles: which is more concentrated."""
    rng = canvas.rng
    x0, y0, x1, y1 = frame(canvas, 0.84)
    size, face = max(16, label_size(rng)), label_face(rng)
    color = choose_color(rng, split, "beaker", ("red", "green", "purple", "orange", "pink"), RARE)
    held = held_out_pair("beaker", color)
    low, high = rng.randrange(2, 5), rng.randrange(8, 12)
    counts = rng.choice(((low, high), (high, low), (low, low), (high, high)))
    wide = (x1 - x0) * 0.38
    for left, name, count in ((x0, "A", counts[0]), (x1 - wide, "B", counts[1])):
        top, bottom = y0 + size * 1.5, y1
        level = top + (bottom - top) * 0.2
        canvas.rect((left, level, left + wide, bottom), (186, 210, 228))
        canvas.line([(left, top), (left, bottom), (left + wide, bottom), (left + wide, top)], INK, 3)
        dot = min(wide, bottom - level) * rng.uniform(0.045, 0.06)
        for cell in rng.sample(range(12), count):
            x = left + wide * (cell % 3 + 0.5 + rng.uniform(-0.2, 0.2)) / 3
            y = level + (bottom - level) * (cell // 3 + 0.5 + rng.uniform(-0.2, 0.2)) / 4
            canvas.ellipse((x - dot, y - dot, x + dot, y + dot), canvas.jitter(color))
        canvas.text((left + wide / 2, y0 + size * 0.6), name, face, size, INK)
        canvas.label_object("beaker", color, (left, top, left + wide, bottom))
    first, second = counts
    answer = "a" if first > second else "b" if second > first else "the same"
    others = [other for other in ("a", "b", "the same") if other != answer]
    quiz.choose("beaker_more", "which solution is more concentrated?", answer, others, held_out=held)
    answer = {"a": "b", "b": "a"}.get(answer, answer)
    others = [other for other in ("a", "b", "the same") if other != answer]
    quiz.choose("beaker_less", "which solution has fewer particles?", answer, others, held_out=held)
    name, count = rng.choice((("a", first), ("b", second)))
    wrong = [str(other) for other in range(2, 12) if abs(other - count) >= 2]
    quiz.choose("beaker_count", f"how many particles are in solution {name}?", str(count), rng.sample(wrong, 2),
                held_out=held)  # fmt: skip


def _circuit(canvas: Canvas, quiz: Quiz, split: str) -> None:
    """A loop of wire with a battery, a lamp and perhaps an open switch."""
    rng = canvas.rng
    x0, y0, x1, y1 = frame(canvas, 0.7)
    closed = rng.random() < 0.5
    gap = (x1 - x0) * rng.uniform(0.14, 0.22)
    middle = (x0 + x1) / 2
    bold = rng.choice((4, 5, 6))
    canvas.line([(middle - gap, y1), (x0, y1), (x0, y0), (x1, y0), (x1, y1), (middle + gap, y1)], INK, bold)
    tip = (middle + gap, y1) if closed else (middle + gap * 0.7, y1 - gap * 1.2)
    canvas.line([(middle - gap, y1), tip], INK, bold)
    for x in (middle - gap, middle + gap):
        canvas.ellipse((x - 7, y1 - 7, x + 7, y1 + 7), INK)
    color = choose_color(rng, split, "lamppost", ("yellow", "orange", "red", "green"), RARE)
    radius = min(x1 - x0, y1 - y0) * 0.14
    canvas.ellipse((middle - radius, y0 - radius, middle + radius, y0 + radius), canvas.jitter(color), INK, 3)
    reach = radius * math.sqrt(0.5)
    for sign in (-1, 1):
        canvas.line([(middle - reach, y0 - sign * reach), (middle + reach, y0 + sign * reach)], INK, 3)
    canvas.label_object("lamppost", color, (middle - radius, y0 - radius, middle + radius, y0 + radius))
    y = (y0 + y1) / 2
    canvas.rect((x0 - 14, y - 26, x0 + 14, y + 26), (150, 150, 150), outline=INK, width=2)
    canvas.rect((x0 - 7, y - 34, x0 + 7, y - 26), INK)
    held = held_out_pair("lamppost", color)
    quiz.choose("circuit_light", "will the lamp light up?", "yes" if closed else "no", ["no" if closed else "yes"],
                held_out=held)  # fmt: skip
    quiz.choose("circuit_switch", "is the switch open or closed?", "closed" if closed else "open",
                ["open" if closed else "closed"], held_out=held)  # fmt: skip
    wrong = rng.sample([other for other in ("yellow", "orange", "red", "green") if other != color], 2)
    quiz.choose("circuit_color", "what color is the lamp in the circuit?", color, wrong, held_out=held)


_DIAGRAMS: tuple[tuple[Callable[[Canvas, Quiz, str], None], int], ...] = (
    (bars, 4), (_map, 4), (_chain, 3), (heat, 2), (_magnets, 2), (_beakers, 2), (line_chart, 2), (_circuit, 1),
)  # fmt: skip
"""Diagrams with their weights in the first edition."""

_SHEETS: tuple[tuple[Callable[[Sheet], None], int], ...] = (
    (draw_bars, 6), (draw_map, 5), (draw_chain, 3), (draw_thermometers, 3), (draw_beakers, 2),
)  # fmt: skip
"""Diagrams with their weights in the second edition."""


def paint(canvas: Canvas, quiz: Quiz, split: str) -> int:
    """Draw one diagram and ask about it.

    Returns:
        The most questions to keep.
    """
    if quiz.edition > 1:
        sheet = new_sheet(canvas, quiz, split)
        draws, shares = zip(*_SHEETS, strict=True)
        canvas.rng.choices(draws, shares)[0](sheet)
        sheet.ask_captions()
        return 3
    kinds, weights = zip(*_DIAGRAMS, strict=True)
    canvas.rng.choices(kinds, weights)[0](canvas, quiz, split)
    return 3


def _problem_id(split: str, index: int, place: int) -> str:
    """Return the number of a problem: pictures times eight, validation from a billion up."""
    return str(index * 8 + place + 1 + (1_000_000_000 if split == "val" else 0))


def _places(split: str, index: int, num_questions: int) -> list[tuple[str, str]]:
    """Return a place of the picture for each of its problems."""
    numbers = [_problem_id(split, index, place) for place in range(num_questions)]
    return [(f"images/{split}/{number}/image.png", f"twins/{number}.png") for number in numbers]


def _write(folder: Path, split: str, records: Iterable[Record]) -> None:
    problems_path, splits_path = folder / "problems.json", folder / "pid_splits.json"
    problems: dict[str, Record] = {}
    splits: dict[str, list[str]] = {"train": [], "val": [], "test": []}
    if problems_path.is_file():
        problems = json.loads(problems_path.read_text(encoding="utf-8"))
        splits = json.loads(splits_path.read_text(encoding="utf-8"))
    for record in records:
        for place, question in enumerate(record["questions"]):
            pid = _problem_id(split, record["index"], place)
            splits[split].append(pid)
            problems[pid] = {
                "question": question["question"],
                "choices": question["options"],
                "answer": question["answer_index"],
                "hint": "",
                "image": "image.png",
                "task": "closed choice",
                "grade": "grade4",
                "subject": "natural science",
                "topic": "",
                "category": "",
                "skill": question["template"],
                "lecture": "",
                "solution": "",
                "split": split,
                "template": question["template"],
                "held_out": question["held_out"],
                "image_id": f"{split}-{record['index']}",
            }
    dump(problems_path, problems)
    dump(splits_path, splits)


STAND_IN = StandIn(paint=paint, places=_places, write=_write, weight=0.35, paper=True)
