"""Typefaces of the generated pictures and the geometry of their glyphs.

Finds the font files and measures glyphs.
All faces are free (OFL or public) and come with Pillow or with small packages, so no file is shipped here.
"""

from __future__ import annotations

from functools import lru_cache
from importlib import resources

from PIL import ImageFont

from tempovlm.core.errors import UserError

_FILES: dict[str, tuple[str, str, int]] = {
    "roboto": ("fontpkg_roboto", "Roboto[wdth,wght].ttf", 400),
    "roboto-bold": ("fontpkg_roboto", "Roboto[wdth,wght].ttf", 700),
    "arvo": ("fontpkg_arvo", "Arvo-Regular.ttf", 0),
    "arvo-bold": ("fontpkg_arvo", "Arvo-Bold.ttf", 0),
    "mono": ("fontpkg_dm_mono", "DMMono-Medium.ttf", 0),
    "condensed": ("fontpkg_fjalla_one", "FjallaOne-Regular.ttf", 0),
    "serif": ("fontpkg_crimson_text", "CrimsonText-Bold.ttf", 0),
}

FACES: tuple[str, ...] = ("default", *_FILES)
"""Names of the faces; any of them may be used above 17 px."""

SMALL_FACES: tuple[str, ...] = ("default", "roboto", "roboto-bold", "mono", "arvo-bold")
"""Faces that stay legible when a 12 px em is shrunk to about 8 px."""


@lru_cache(maxsize=1024)
def face(name: str, size: int) -> ImageFont.FreeTypeFont:
    """Load one face at one size.

    Args:
        name: An entry of `FACES`.
        size: Em size in pixels.

    Raises:
        UserError: The package that holds the face is not installed.
    """
    if name == "default":
        font = ImageFont.load_default(size=size)
        if not isinstance(font, ImageFont.FreeTypeFont):
            raise UserError("Pillow was built without FreeType; install a Pillow wheel from PyPI")
        return font
    package, filename, weight = _FILES[name]
    try:
        path = resources.files(package) / "files" / filename
        font = ImageFont.truetype(str(path), size, layout_engine=ImageFont.Layout.BASIC)
    except (ModuleNotFoundError, OSError) as error:
        wheel = package.replace("_", "-")
        raise UserError(f"the font package {wheel} is missing; run: pip install {wheel}") from error
    if weight:
        font.set_variation_by_axes([100, weight] if _width_first(font) else [weight, 100])
    return font


def _width_first(font: ImageFont.FreeTypeFont) -> bool:
    """Whether the first variation axis is the width (its default is 100, that of the weight is 400)."""
    return int(font.get_variation_axes()[0]["default"] or 0) == 100


@lru_cache(maxsize=65536)
def glyph(name: str, size: int, char: str) -> tuple[float, int, int, int, int]:
    """Advance and ink box (x0, y0, x1, y1; baseline at y = 0, y down) of one glyph, in pixels."""
    font = face(name, size)
    x0, y0, x1, y1 = font.getbbox(char, anchor="ls")
    return float(font.getlength(char)), int(x0), int(y0), int(x1), int(y1)


@lru_cache(maxsize=4096)
def cap_height(name: str, size: int) -> int:
    """Height of a capital letter above the baseline, in pixels."""
    return -glyph(name, size, "H")[2]


def width(name: str, size: int, text: str) -> float:
    """Width of a line of text in pixels (without kerning, so an upper bound within a pixel or two)."""
    return sum(glyph(name, size, char)[0] for char in text)
