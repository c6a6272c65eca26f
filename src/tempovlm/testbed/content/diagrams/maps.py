"""Maps of coloured regions and chains of coloured discs: to walk along, one to four steps."""

from __future__ import annotations

from tempovlm.testbed.content.diagrams.sheet import INK, Sheet
from tempovlm.testbed.content.prints import small_size, small_text
from tempovlm.testbed.drawing import fonts
from tempovlm.testbed.drawing.canvas import ink_for
from tempovlm.testbed.lexicon import held_out_pair

WAYS: dict[str, tuple[int, int]] = {"north": (-1, 0), "south": (1, 0), "west": (0, -1), "east": (0, 1)}
"""Compass direction to steps of row and column; north is up."""
_TEMPLATES = {1: "map_direction", 2: "map_two_steps", 3: "map_three_steps", 4: "map_four_steps"}


def draw_map(sheet: Sheet) -> None:
    """Draw a map of regions, each of its own colour and with small print on it, and ask where walks lead."""
    rng, canvas = sheet.canvas.rng, sheet.canvas
    x0, y0, x1, y1 = sheet.area
    y0, y1 = y0 + 8, y1 - 8
    rows, cols = rng.choice(((2, 3), (2, 4), (2, 3)) if x1 - x0 > y1 - y0 else ((3, 2), (4, 2), (2, 3)))
    colors = sheet.colors("region", rows * cols)
    xs = [x0 + (x1 - x0) * k / cols for k in range(cols + 1)]
    ys = [y0 + (y1 - y0) * k / rows for k in range(rows + 1)]
    wobble = min((x1 - x0) / cols, (y1 - y0) / rows) * 0.12
    knots = [[(x + rng.uniform(-wobble, wobble), y + rng.uniform(-wobble, wobble)) for x in xs] for y in ys]
    for place, color in enumerate(colors):
        row, col = divmod(place, cols)
        points = [knots[row][col], knots[row][col + 1], knots[row + 1][col + 1], knots[row + 1][col]]
        fill = canvas.jitter(color)
        canvas.polygon(points, fill, outline=(70, 70, 70))
        canvas.label_object("region", color, (xs[col], ys[row], xs[col + 1], ys[row + 1]))
        text = small_text(rng)
        if text not in sheet.captions.values():
            middle = ((xs[col] + xs[col + 1]) / 2, (ys[row] + ys[row + 1]) / 2)
            sheet.captions[f"on the {color} region"] = text
            canvas.text(middle, text, rng.choice(fonts.SMALL_FACES), small_size(canvas), ink_for(fill))
    for length in (1, 1, 2, 2, 3, 3, 4):
        _ask_walk(sheet, colors, (rows, cols), length)
    corners = {"top left": 0, "top right": cols - 1, "bottom left": (rows - 1) * cols, "bottom right": -1}
    where, place = rng.choice(list(corners.items()))
    held = held_out_pair("region", colors[place])
    sheet.one_of("map_corner", f"what color is the region at the {where}?", colors[place], colors, held)


def _ask_walk(sheet: Sheet, colors: list[str], shape: tuple[int, int], length: int) -> None:
    """Ask for the colour at the end of a walk that never comes back."""
    rng = sheet.canvas.rng
    passed, ways = [(rng.randrange(shape[0]), rng.randrange(shape[1]))], []
    for _ in range(length):
        row, col = passed[-1]
        there = {way: (row + down, col + right) for way, (down, right) in WAYS.items()}
        legal = [
            way for way, spot in there.items()
            if spot not in passed and 0 <= spot[0] < shape[0] and 0 <= spot[1] < shape[1]
        ]  # fmt: skip
        if not legal:
            return
        ways.append(rng.choice(legal))
        passed.append(there[ways[-1]])
    start, end = (colors[row * shape[1] + col] for row, col in (passed[0], passed[-1]))
    if length == 1:
        ask = f"what color is the region {ways[0]} of the {start} one?"
    elif length == 2 and rng.random() < 0.5:
        ask = f"what color is the region {ways[1]} of that {ways[0]} of {start}?"
    else:
        ask = f"from {start} go {', '.join(ways[:-1])} and {ways[-1]}: what color is it?"
    held = any(held_out_pair("region", color) for color in (start, end))
    sheet.one_of(_TEMPLATES[length], ask, end, [color for color in colors if color != start], held)


def draw_chain(sheet: Sheet) -> None:
    """Draw a chain of coloured discs with arrows and small print beside them, and ask what comes after what."""
    rng, canvas = sheet.canvas.rng, sheet.canvas
    x0, y0, x1, y1 = sheet.area
    count = rng.choice((4, 5, 5, 6))
    colors = sheet.colors("circle", count)
    down = y1 - y0 > x1 - x0
    pitch = (y1 - y0 if down else x1 - x0) / count
    half = min(pitch * 0.33, 0.3 * (x1 - x0 if down else y1 - y0))
    forward = rng.random() < 0.5
    across = (x0 + x1) / 2 if down else y0 + (y1 - y0) * rng.uniform(0.4, 0.6)
    for place, color in enumerate(colors):
        along = (y0 if down else x0) + pitch * (place + 0.5)
        x, y = (across, along) if down else (along, across)
        canvas.icon("circle", color, (x, y), half)
        if down:
            sheet.caption(f"beside the {color} disc", x + half + 50, y - 8)
        else:
            sheet.caption(f"under the {color} disc", x, y + half + 5)
        if place + 1 < count:
            _arrow(sheet, across, along + half + 2, along + pitch - half - 2, down, forward)
    _ask_chain(sheet, colors if forward else colors[::-1])


def _arrow(sheet: Sheet, across: float, start: float, end: float, down: bool, forward: bool) -> None:
    """Draw an arrow along one axis, with its head at the end or at the start."""
    head, back = (end, max(start, end - 12)) if forward else (start, min(end, start + 12))

    def at(along: float, off: float) -> tuple[float, float]:
        return (across + off, along) if down else (along, across + off)

    sheet.canvas.line([at(start, 0), at(end, 0)], INK, 4)
    sheet.canvas.polygon([at(head, 0), at(back, -9), at(back, 9)], INK)


def _ask_chain(sheet: Sheet, chain: list[str]) -> None:
    """Ask for what comes some places after or before a disc; `chain` is in the arrows' direction."""
    rng = sheet.canvas.rng
    held = any(held_out_pair("circle", color) for color in chain)
    words = {1: "", 2: "two places ", 3: "three places "}
    for length, template in ((1, "chain_after"), (1, "chain_after"), (2, "chain_two"), (2, "chain_two"),
                             (3, "chain_three")):  # fmt: skip
        word, way = rng.choice((("after", 1), ("before", -1)))
        starts = [place for place in range(len(chain)) if 0 <= place + way * length < len(chain)]
        place = rng.choice(starts)
        rest = [color for color in chain if color != chain[place]]
        ask = f"what color comes {words[length]}{word} {chain[place]}?"
        sheet.one_of(template, ask, chain[place + way * length], rest, held)
    place = rng.randrange(len(chain) - 2)
    ends = rng.sample((chain[place], chain[place + 2]), 2)
    rest = [color for color in chain if color not in ends]
    sheet.one_of("chain_between", f"what color is between {ends[0]} and {ends[1]}?", chain[place + 1], rest, held)
    word, right = rng.choice((("first", chain[0]), ("last", chain[-1])))
    sheet.one_of("chain_first", f"what color is {word} in the chain?", right, chain, held)
