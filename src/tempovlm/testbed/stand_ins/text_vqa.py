"""Scenes to read: signs, labels, prices, plates, tickets, clocks, numbers on buses and jerseys.

Each object is drawn with its text and its questions. A board in large print, which the low tier shows, stands
beside objects in small and fine print.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from random import Random

from tempovlm.testbed.content.boards import draw_menu, draw_score
from tempovlm.testbed.content.companies import draw_names
from tempovlm.testbed.content.company_signs import ask_company, draw_company
from tempovlm.testbed.content.prints import large_size, small_size
from tempovlm.testbed.content.text_job import Job, number_of, pick_word
from tempovlm.testbed.drawing import fonts
from tempovlm.testbed.drawing.canvas import RGB, Box, Canvas, ink_for
from tempovlm.testbed.drawing.icons import shade
from tempovlm.testbed.drawing.layout import choose_color
from tempovlm.testbed.lexicon import SIGN_WORDS, held_out_pair
from tempovlm.testbed.scene import Quiz
from tempovlm.testbed.stand_in import Record, StandIn, dump

_PLATE_COLORS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")
_GOODS = ("apple", "banana", "carrot", "pear", "cherry", "pepper", "mushroom", "fish", "cup")
_COLORED = ("bus", "jersey", "shop", "bottle", "book", "sign", *_GOODS)
_LETTERS = "abcdefghjkmnprstuvwxyz"
_DIGITS = "23456789"


def _sign(job: Job) -> None:
    """A plate with a word or two; several may stand in one picture, told apart by colour."""
    rng, canvas = job.rng, job.canvas
    word, held = pick_word(job, 0.15)
    lines = [word]
    if not held and word in SIGN_WORDS and rng.random() < 0.5:
        lines.append(rng.choice(SIGN_WORDS))
    shown = [job.case(line) for line in lines]
    face, size = job.fit(max(shown, key=len), 0.8, tall=1.5 * len(lines))
    size = min(size, *(job.fit(line, 0.8)[1] for line in shown))
    pitch = size * 1.15
    names = [n for n in canvas.visible(_PLATE_COLORS) if n not in canvas.colors_of("sign")]
    color = choose_color(rng, job.split, "sign", names)
    fill = canvas.jitter(color)
    wide = max(fonts.width(face, size, line) for line in shown) + size * 0.9
    high = pitch * len(lines) + size * 0.5
    x, y = job.place(wide, high)
    box = (x - wide / 2, y - high / 2, x + wide / 2, y + high / 2)
    canvas.rect(box, fill, outline=shade(fill, 0.75), width=2, radius=rng.choice((0, size * 0.3)))
    for row, line in enumerate(shown):
        canvas.text((x, y + (row - (len(lines) - 1) / 2) * pitch), line, face, size, ink_for(fill))
    canvas.label_object("sign", color, box)
    ask = rng.choice((f"what does the {color} sign say?", f"what is written on the {color} sign?"))
    job.quiz.ask("sign_color", ask, " ".join(lines), held_out=held or held_out_pair("sign", color))


def _bus(job: Job) -> None:
    rng, canvas = job.rng, job.canvas
    number = number_of(rng, rng.choice((1, 2, 2, 3, 3)))
    face, size = job.fit(number, 0.4, tall=2.5, broad=3.2)
    color = choose_color(rng, job.split, "bus", canvas.visible(("red", "yellow", "green", "blue", "orange")))
    fill = canvas.jitter(color)
    wide = max(fonts.width(face, size, number) * 2.2, size * 3.2)
    wide, high = min(wide, job.cell[2] - job.cell[0]), size * 2.3
    x, y = job.place(wide, high)
    x0, y0, x1, y1 = x - wide / 2, y - high / 2, x + wide / 2, y + high / 2
    canvas.rect((x0, y0, x1, y1 - size * 0.25), fill, radius=size * 0.2)
    for k in range(4):
        left = x0 + wide * (0.06 + k * 0.23)
        canvas.rect((left, y0 + size * 0.18, left + wide * 0.17, y0 + size * 0.65), (190, 212, 226))
    for share in (0.25, 0.75):
        mid = x0 + wide * share
        canvas.ellipse((mid - size * 0.28, y1 - size * 0.5, mid + size * 0.28, y1), (28, 28, 28))
    canvas.text((x, y0 + size * 1.25), number, face, size, ink_for(fill))
    canvas.label_object("bus", color, (x0, y0, x1, y1))
    ask = rng.choice(("what number is on the bus?", "what is the number of the bus?"))
    job.quiz.ask(
        "bus_number", ask, number, (f"number {number}", f"bus {number}"), held_out=held_out_pair("bus", color)
    )


def _plate(job: Job) -> None:
    rng, canvas = job.rng, job.canvas
    letters = "".join(rng.choice(_LETTERS) for _ in range(rng.choice((1, 2, 2, 3))))
    digits = "".join(rng.choice(_DIGITS) for _ in range(rng.choice((1, 2, 2))))
    code = letters + digits
    face, size = job.fit(code.upper(), 0.48, tall=2.9)
    color = choose_color(
        rng, job.split, "plate", canvas.visible(("red", "blue", "green", "black", "white", "brown"))
    )
    fill = canvas.jitter(color)
    text_wide = fonts.width(face, size, code.upper()) + size * 0.7
    wide, high = text_wide * 1.5, size * 2.7
    x, y = job.place(wide, high)
    x0, y0, x1, y1 = x - wide / 2, y - high / 2, x + wide / 2, y + high / 2
    canvas.polygon(
        [
            (x0 + wide * 0.12, y0 + size),
            (x0 + wide * 0.2, y0),
            (x1 - wide * 0.2, y0),
            (x1 - wide * 0.12, y0 + size),
        ],
        fill,
    )
    canvas.rect((x0 + wide * 0.22, y0 + size * 0.15, x1 - wide * 0.22, y0 + size * 0.8), (188, 206, 218))
    canvas.rect((x0, y0 + size * 0.9, x1, y1), fill, radius=size * 0.2)
    for left in (x0 + 2, x1 - 2 - wide * 0.09):
        canvas.rect((left, y0 + size * 1.2, left + wide * 0.09, y0 + size * 1.6), (226, 60, 40))
    box = (x - text_wide / 2, y0 + size * 1.2, x + text_wide / 2, y0 + size * 2.4)
    canvas.rect(box, (234, 234, 226), outline=(40, 40, 40))
    canvas.text((x, y0 + size * 1.8), code.upper(), face, size, (22, 22, 30))
    canvas.label_object("plate", color, (x0, y0, x1, y1))
    ask = rng.choice(("what is the license plate of the car?", "what is the plate number of the car?"))
    job.quiz.ask("plate_number", ask, code, (f"{letters} {digits}",), held_out=held_out_pair("plate", color))


def _jersey(job: Job) -> None:
    rng, canvas = job.rng, job.canvas
    number = number_of(rng, rng.choice((1, 2, 2)))
    face, size = job.fit(number, 0.4, tall=2.2, broad=2.9)
    color = choose_color(rng, job.split, "jersey", canvas.visible(_PLATE_COLORS[:8]))
    fill = canvas.jitter(color)
    half, high = size * 0.95, size * 2.1
    x, y = job.place(half * 3, high)
    y0, y1 = y - high / 2, y + high / 2
    sleeve = half * 1.5
    canvas.polygon(
        [(x - half * 0.5, y0), (x + half * 0.5, y0), (x + sleeve, y0 + high * 0.2),
         (x + sleeve * 0.85, y0 + high * 0.42),
         (x + half, y0 + high * 0.32), (x + half, y1), (x - half, y1), (x - half, y0 + high * 0.32),
         (x - sleeve * 0.85, y0 + high * 0.42), (x - sleeve, y0 + high * 0.2)],
        fill,
    )  # fmt: skip
    canvas.text((x, y0 + high * 0.55), number, face, size, ink_for(fill))
    canvas.label_object("jersey", color, (x - sleeve, y0, x + sleeve, y1))
    ask = rng.choice(("what number is on the jersey?", "what number does the player wear?"))
    job.quiz.ask("jersey_number", ask, number, (f"number {number}",), held_out=held_out_pair("jersey", color))


def _tag(job: Job) -> None:
    rng, canvas = job.rng, job.canvas
    good = rng.choice([name for name in _GOODS if not canvas.colors_of(name)])
    draw = rng.random()
    price = f"${rng.randrange(1, 10)}" if draw < 0.2 else f"${rng.randrange(10, 100)}"
    if draw > 0.55:
        price = f"${rng.randrange(1, 10)}.{rng.choice(('25', '50', '75', '99'))}"
    face, size = job.fit(price, 0.8, tall=3.4)
    color = choose_color(
        rng, job.split, good, canvas.visible(("red", "yellow", "green", "orange", "purple", "brown"))
    )
    wide = fonts.width(face, size, price) + size * 0.7
    icon = max(size * 0.95, 17.0)
    high = icon * 2 + size * 1.6
    x, y = job.place(max(wide, icon * 2), high)
    y0 = y - high / 2
    canvas.icon(good, color, (x, y0 + icon), icon)
    box = (x - wide / 2, y0 + icon * 2 + size * 0.2, x + wide / 2, y0 + high)
    paper: RGB = rng.choice(((234, 230, 200), (234, 234, 234), (234, 214, 90)))
    canvas.rect(box, paper, outline=(70, 60, 50))
    canvas.text((x, (box[1] + box[3]) / 2), price, face, size, (26, 22, 22))
    canvas.label_object("tag", "white" if paper[2] > 150 else "yellow", box)
    ask = rng.choice((f"how much is the {good}?", f"what is the price of the {good}?"))
    bare = price.lstrip("$")
    job.quiz.ask("price", ask, price, (bare, f"{bare} dollars"), held_out=held_out_pair(good, color))


def _panel(job: Job, text: str, kind: str, color: str, fill: RGB, ink: RGB, radius: float = 0.2) -> None:
    """A plain panel with one line of text on it."""
    face, size = job.fit(text, 0.8, tall=1.7)
    wide, high = fonts.width(face, size, text) + size * 0.8, size * 1.6
    x, y = job.place(wide, high)
    box = (x - wide / 2, y - high / 2, x + wide / 2, y + high / 2)
    job.canvas.rect(box, fill, outline=shade(fill, 0.6), width=2, radius=size * radius)
    job.canvas.text((x, y), text, face, size, ink)
    job.canvas.label_object(kind, color, box)


def _clock(job: Job) -> None:
    rng = job.rng
    time = f"{rng.randrange(1, 13)}:{rng.randrange(0, 12) * 5:02d}"
    ink: RGB = rng.choice(((90, 232, 110), (235, 90, 70), (100, 200, 235)))
    _panel(job, time, "clock", "black", (22, 22, 26), ink)
    ask = rng.choice(("what time is on the clock?", "what time does the clock show?"))
    job.quiz.ask("clock_time", ask, time, (f"{time} am", f"{time} pm"))


def _ticket(job: Job) -> None:
    rng = job.rng
    number = number_of(rng, rng.choice((3, 4, 4)))
    fill: RGB = rng.choice(((234, 196, 150), (234, 180, 190)))
    _panel(job, number, "ticket", "mixed", fill, (40, 26, 22), 0)
    ask = rng.choice(("what is the ticket number?", "what number is on the ticket?"))
    job.quiz.ask("ticket_number", ask, number, (f"no {number}",))


def _gate(job: Job) -> None:
    rng = job.rng
    gate = rng.choice("abcdefgh") + str(rng.randrange(1, 30))
    _panel(job, gate.upper(), "gate", "yellow", (28, 28, 30), (235, 208, 50), 0)
    ask = rng.choice(("what is the gate number?", "which gate is shown?"))
    job.quiz.ask("gate_number", ask, gate, (f"gate {gate}",))


def _speed(job: Job) -> None:
    rng, canvas = job.rng, job.canvas
    limit = str(rng.randrange(1, 13) * 10)
    face, size = job.fit(limit, 0.5, tall=2.3, broad=2.3)
    half = max(fonts.width(face, size, limit) * 0.5, size * 0.5) + size * 0.55
    x, y = job.place(half * 2, half * 2)
    box = (x - half, y - half, x + half, y + half)
    canvas.ellipse(box, (234, 234, 234), outline=(208, 30, 30), width=max(3, size // 5))
    canvas.text((x, y), limit, face, size, (22, 22, 22))
    canvas.label_object("speed", "white", box)
    ask = rng.choice(("what is the speed limit?", "how fast may you drive?"))
    job.quiz.ask("speed_limit", ask, limit, (f"{limit} mph", f"{limit} km"))


def _shop(job: Job) -> None:
    rng, canvas = job.rng, job.canvas
    name, held = pick_word(job, 0.5)
    shown = name.upper()
    face, size = job.fit(shown, 0.8, tall=3.2)
    color = choose_color(rng, job.split, "shop", canvas.visible(_PLATE_COLORS[:7]))
    fill = canvas.jitter(color)
    wide, high = fonts.width(face, size, shown) + size, size * 3.0
    x, y = job.place(wide, high)
    x0, y0 = x - wide / 2, y - high / 2
    canvas.rect((x0, y0, x0 + wide, y0 + high), (188, 172, 150), outline=(110, 96, 80))
    canvas.rect((x0, y0, x0 + wide, y0 + size * 1.4), fill)
    stripe = wide / 8
    for k in range(8):
        tone: RGB = (232, 232, 232) if k % 2 else fill
        canvas.rect((x0 + k * stripe, y0 + size * 1.4, x0 + (k + 1) * stripe, y0 + size * 1.9), tone)
    canvas.rect((x - size * 0.4, y0 + size * 2.1, x + size * 0.4, y0 + high), (86, 66, 50))
    canvas.text((x, y0 + size * 0.7), shown, face, size, ink_for(fill))
    canvas.label_object("shop", color, (x0, y0, x0 + wide, y0 + high))
    ask = rng.choice(("what is the name of the shop?", "what is the shop called?"))
    job.quiz.ask("shop_name", ask, name, (f"{name} shop",), held_out=held or held_out_pair("shop", color))


def _book(job: Job) -> None:
    rng, canvas = job.rng, job.canvas
    words, held = [], False
    for _ in range(rng.choice((1, 2, 2, 2))):
        word, fresh = pick_word(job, 0.0)
        words.append(word)
        held = held or fresh
    shown = [job.case(word) for word in words]
    face, size = job.fit(max(shown, key=len), 0.75, tall=4.0)
    size = min(size, *(job.fit(line, 0.75)[1] for line in shown))
    color = choose_color(rng, job.split, "book", canvas.visible(_PLATE_COLORS))
    fill = canvas.jitter(color)
    wide = max(fonts.width(face, size, line) for line in shown) + size * 1.0
    high = min(max(wide * 1.2, size * 3.6), job.cell[3] - job.cell[1])
    x, y = job.place(wide, high)
    x0, y0 = x - wide / 2, y - high / 2
    canvas.rect((x0, y0, x0 + wide, y0 + high), fill, outline=shade(fill, 0.6), width=2)
    canvas.rect((x0, y0, x0 + size * 0.25, y0 + high), shade(fill, 0.65))
    for row, line in enumerate(shown):
        canvas.text((x + size * 0.1, y0 + high * 0.3 + row * size * 1.15), line, face, size, ink_for(fill))
    canvas.label_object("book", color, (x0, y0, x0 + wide, y0 + high))
    ask = rng.choice(("what is the title of the book?", "what is the book called?"))
    job.quiz.ask("book_title", ask, " ".join(words), held_out=held or held_out_pair("book", color))


def _bottle(job: Job) -> None:
    rng, canvas = job.rng, job.canvas
    word, held = pick_word(job, 0.5)
    shown = word.upper()
    face, size = job.fit(shown, 0.75, tall=4.0)
    color = choose_color(
        rng, job.split, "bottle", canvas.visible(("red", "green", "blue", "brown", "purple", "orange"))
    )
    fill = canvas.jitter(color)
    wide = fonts.width(face, size, shown) + size * 0.6
    high = min(max(wide * 1.3, size * 4), job.cell[3] - job.cell[1])
    x, y = job.place(wide, high)
    x0, y0 = x - wide / 2, y - high / 2
    canvas.rect((x - wide * 0.16, y0, x + wide * 0.16, y0 + high * 0.35), fill)
    canvas.rect((x - wide * 0.2, y0, x + wide * 0.2, y0 + high * 0.08), shade(fill, 0.6))
    canvas.rect((x0, y0 + high * 0.27, x0 + wide, y0 + high), fill, radius=wide * 0.12)
    middle = y0 + high * 0.64
    canvas.rect((x0, middle - size * 0.75, x0 + wide, middle + size * 0.75), (234, 230, 214))
    canvas.text((x, middle), shown, face, size, (30, 24, 24))
    canvas.label_object("bottle", color, (x0, y0, x0 + wide, y0 + high))
    ask = rng.choice(("what does the bottle say?", "what is written on the bottle?"))
    job.quiz.ask("bottle_label", ask, word, held_out=held or held_out_pair("bottle", color))


def _box(job: Job) -> None:
    rng, canvas = job.rng, job.canvas
    draw = rng.random()
    held = False
    if draw < 0.5:
        text, held = pick_word(job, 0.2)
    else:
        text = "".join(rng.choice(_LETTERS + _DIGITS) for _ in range(rng.choice((3, 4, 4))))
    shown = text.upper()
    face, size = job.fit(shown, 0.7, tall=3.2)
    wide, high = fonts.width(face, size, shown) + size * 1.2, size * 3
    x, y = job.place(wide, high)
    box = (x - wide / 2, y - high / 2, x + wide / 2, y + high / 2)
    canvas.rect(box, (172, 128, 84), outline=(110, 80, 50), width=2)
    canvas.rect((x - size * 0.2, box[1] + 2, x + size * 0.2, box[1] + size * 0.7), (208, 184, 140))
    canvas.text((x, y + size * 0.5), shown, face, size, (28, 22, 20))
    canvas.label_object("box", "brown", box)
    ask = rng.choice(("what is written on the box?", "what does the box say?"))
    job.quiz.ask("box_label", ask, text, held_out=held)


def _company(job: Job) -> None:
    """A company's sign, of which only memory can tell what is asked."""
    rng, canvas = job.rng, job.canvas
    (name,) = draw_names(rng, 1)
    names = [n for n in canvas.visible(_PLATE_COLORS) if n not in canvas.colors_of("sign")]
    color = choose_color(rng, job.split, "sign", names)
    draw_company(job, name, color)
    ask_company(job.quiz, name, f"company on the {color} sign", held_out_pair("sign", color))


_BUILDERS: tuple[Callable[[Job], None], ...] = (
    _bus, _plate, _plate, _jersey, _clock, _clock, _ticket, _ticket, _gate, _speed, _shop, _book, _bottle, _box,
)  # fmt: skip


def _builders(rng: Random, count: int) -> list[Callable[[Job], None]]:
    """Return what draws each of some objects: different kinds, more often signs and tags."""
    builders = list(dict.fromkeys(rng.sample(_BUILDERS, len(_BUILDERS))))[:count]
    for slot in range(count):
        draw = rng.random()
        if draw < 0.35:
            builders[slot] = _sign
        elif draw < 0.56:
            builders[slot] = _tag
    return builders


_BOARD = 0.6
"""Share of a picture's longer side that a board takes."""


def paint(canvas: Canvas, quiz: Quiz, split: str) -> int:
    """Draw a board in large print, often a company's sign, and three or four objects in small print beside it.

    Returns:
        The most questions to keep.
    """
    rng = canvas.rng
    wide, high = float(canvas.width), float(canvas.height)
    first = rng.random() < 0.5
    whole, share = (0.0, 0.0, wide, high), _BOARD if first else 1 - _BOARD
    parts = _cut(whole, share, down=high > wide)
    board, rest = parts if first else parts[::-1]
    draw_board = draw_menu if rng.random() < 0.5 else draw_score
    draw_board(canvas, quiz, _inside(board, 8), split)
    company = rng.random() < 0.92
    if company:
        row, rest = _cut(rest, 0.42, down=True)
        _company(Job(canvas, _inside(row, 2), large_size(canvas), split, quiz))
    cells = _halves(rest, rng.choice((3, 4, 4)))
    for cell, builder in zip(cells, _builders(rng, len(cells)), strict=True):
        builder(Job(canvas, _inside(cell, 3), small_size(canvas), split, quiz))
    _ask_carrier(canvas, quiz)
    return 5


def _cut(box: Box, share: float, *, down: bool) -> tuple[Box, Box]:
    """Cut a box in two, the first with a share of its height (down) or of its width."""
    x0, y0, x1, y1 = box
    if down:
        edge = y0 + (y1 - y0) * share
        return (x0, y0, x1, edge), (x0, edge, x1, y1)
    edge = x0 + (x1 - x0) * share
    return (x0, y0, edge, y1), (edge, y0, x1, y1)


def _halves(box: Box, count: int) -> list[Box]:
    """Cut a box into cells by halving the longer sides."""
    if count == 1:
        return [box]
    down = box[3] - box[1] > box[2] - box[0]
    first, second = _cut(box, (count // 2) / count, down=down)
    return _halves(first, count // 2) + _halves(second, count - count // 2)


def _ask_carrier(canvas: Canvas, quiz: Quiz) -> None:
    """Ask for the colour of the only one of its kind among the objects that carry text."""
    kinds = [kind for kind, _, _ in canvas.objects()]
    found = [(kind, color) for kind, color, _ in canvas.objects() if kind in _COLORED and kinds.count(kind) == 1]
    if found:
        kind, color = quiz.rng.choice(found)
        ask = f"what color is the {kind}?"
        quiz.ask("color_of_carrier", ask, color, held_out=held_out_pair(kind, color))


def _inside(box: Box, margin: float) -> Box:
    """Return a box without a margin in pixels on each side."""
    return box[0] + margin, box[1] + margin, box[2] - margin, box[3] - margin


def _image_id(split: str, index: int) -> str:
    """Return sixteen hexadecimal digits, as in OpenImages."""
    return f"{'a' if split == 'train' else 'b'}{index:015x}"


def _places(split: str, index: int, _: int) -> list[tuple[str, str]]:
    name = f"{_image_id(split, index)}.jpg"
    return [(f"train_images/{name}", f"twins/{name}")]


def _write(folder: Path, split: str, records: Iterable[Record]) -> None:
    data: list[Record] = []
    for record in records:
        image_id = _image_id(split, record["index"])
        for question in record["questions"]:
            data.append(
                {
                    "question_id": len(data) + (0 if split == "train" else 1_000_000),
                    "question": question["question"],
                    "image_id": image_id,
                    "image_classes": [],
                    "flickr_original_url": "",
                    "flickr_300k_url": "",
                    "image_width": record["width"],
                    "image_height": record["height"],
                    "answers": question["answers"],
                    "set_name": split,
                    "template": question["template"],
                    "held_out": question["held_out"],
                }
            )
    header = {"dataset_type": split, "dataset_name": "textvqa", "dataset_version": "0.5.1", "data": data}
    dump(folder / f"TextVQA_0.5.1_{split}.json", header)


STAND_IN = StandIn(paint=paint, places=_places, write=_write, weight=0.3)
