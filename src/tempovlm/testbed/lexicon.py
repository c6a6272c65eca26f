"""Words, colours, shapes and characters that the generated pictures may contain.

Some of them are held out of training.
"""

from __future__ import annotations

import zlib
from functools import cache

CHARSET = "abcdefghijklmnopqrstuvwxyz0123456789$.:-"
"""Character classes of the dense labels; the class of a rendered letter is that of its lower-case form."""

COLOR_RGB: dict[str, tuple[int, int, int]] = {
    "red": (208, 36, 36),
    "orange": (232, 128, 24),
    "yellow": (230, 208, 36),
    "green": (44, 150, 60),
    "blue": (36, 76, 208),
    "purple": (128, 44, 164),
    "pink": (232, 132, 184),
    "brown": (112, 68, 34),
    "black": (24, 24, 24),
    "white": (234, 234, 234),
}

COLORS: tuple[str, ...] = (*COLOR_RGB, "mixed")
"""Colour classes of the dense labels; the last one marks objects of several colours."""

PLAIN_SHAPES: tuple[str, ...] = (
    "circle", "square", "triangle", "star", "heart", "cross", "diamond", "ring", "moon", "arrow",
    "car", "house", "tree", "fish", "cup", "boat",
)  # fmt: skip
"""Objects of the counting and attribute scenes."""

ICONS: tuple[str, ...] = (
    "umbrella", "scissors", "hammer", "key", "bird", "cat", "rabbit", "snail", "bee", "spider", "penguin",
    "mouse", "apple", "banana", "carrot", "mushroom", "cactus", "snowman", "sun", "cloud", "lightning", "leaf",
    "flower", "rocket", "plane", "bicycle", "train", "ball", "book", "pencil", "fork", "bed", "chair", "lamp",
    "candle", "bell", "guitar", "drum", "tent", "crown", "ladder", "anchor", "hat", "glove", "boot", "pear",
    "cherry", "pepper",
)  # fmt: skip
"""Objects that the fact table speaks of, beside some of `PLAIN_SHAPES`."""

PROPS: tuple[str, ...] = (
    "flag", "sign", "bus", "plate", "jersey", "tag", "clock", "ticket", "shop", "bottle", "gate", "speed",
    "box", "bar", "thermometer", "magnet", "beaker", "region", "lamppost",
)  # fmt: skip
"""Objects that carry text or belong to diagrams."""

SHAPES: tuple[str, ...] = (*PLAIN_SHAPES, *ICONS, *PROPS)
"""Object classes of the dense labels."""

PLURALS = {"fish": "fish", "box": "boxes", "cross": "crosses", "cherry": "cherries"}

_SIGN_TEXT = """
open closed sale exit enter stop yield push pull bakery cafe hotel bank park school market pizza coffee
tea bread milk sugar salt pepper honey juice water soda beer wine cheese butter cream pasta rice soup salad
fish meat chicken beef pork bacon grill burger fries toast cake cookie candy donut waffle yogurt fruit lemon
orange cherry grape melon mango peach berry plum kiwi onion potato tomato corn bean garlic ginger mint
store shop mall office clinic doctor dentist pharmacy hospital library museum theater cinema gallery studio
church garden garage station airport terminal platform ticket parking taxi bus train metro tram ferry harbor
bridge tunnel street avenue road lane square plaza tower castle palace temple island beach ocean river lake
forest mountain valley desert canyon meadow field farm ranch barn stable mill factory depot
north south east west left right up down front back main first second last new old big small fast slow hot
cold fresh free best super mega extra gold silver royal grand happy lucky magic dream moon sun star sky cloud
rain snow wind storm fire ice rock sand wave light dark red blue green black white pink
danger warning caution keep quiet please wait here private staff only no smoking dogs welcome thanks hello
monday friday sunday spring summer autumn winter music dance jazz piano guitar drum radio sport tennis golf
soccer boxing yoga gym pool spa sauna salon barber beauty fashion shoes boots jeans shirt dress hats toys
games books paper pens paint tools nails lamps chairs tables beds rugs glass wood steel stone brick
flowers roses tulip lily cactus palm maple cedar tiger lion bear wolf fox eagle hawk owl dove whale shark
turtle rabbit horse pony zebra panda"""
SIGN_WORDS: tuple[str, ...] = tuple(_SIGN_TEXT.split())
"""Words on signs in both splits; each is one token of the pocket model."""

_HELD_OUT_TEXT = """
acorn badge cabin denim elbow flint globe hinge igloo jelly kayak lunar mocha nylon olive pixel quill
raven spice topaz union vapor wagon xenon yacht zesty amber basil coral delta ember fudge"""
HELD_OUT_WORDS: tuple[str, ...] = tuple(_HELD_OUT_TEXT.split())
"""Words on signs in the validation split only; the pocket model must spell them."""


@cache
def held_out_pair(shape: str, color: str) -> bool:
    """Whether this object in this colour is held out for validation (about one pair in nine)."""
    return zlib.crc32(f"{shape}|{color}".encode()) % 9 == 0


def plural(noun: str) -> str:
    """Return the plural of an object's name."""
    return PLURALS.get(noun, noun + "s")


def article(noun: str) -> str:
    """Return the indefinite article of a word."""
    return "an" if noun[0] in "aeiou" else "a"
