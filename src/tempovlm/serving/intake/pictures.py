"""Pictures of requests: their bytes out of data URLs, and their sizes before a pixel is decoded."""

from __future__ import annotations

import io
import re
import warnings
from collections import deque
from dataclasses import dataclass
from functools import cache
from statistics import median

import pybase64
from PIL import Image, PngImagePlugin

from tempovlm.core.units import now_ms
from tempovlm.model.vision.image import MAX_PIXELS, open_image
from tempovlm.serving.errors import ApiError, invalid

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "AVIF")
"""Formats that are read; each further decoder is more code that strangers reach."""

_DATA_URL = re.compile(r"data:(?P<kind>[\w.+-]+/[\w.+-]+)?(?:;[\w-]+=[\w-]+)*;base64,", re.IGNORECASE)

MOST_TEXT_BYTES = 4 << 20
"""Text of a PNG, unpacked, with which it is read; the library allows 64 MB, which takes it a third of a second."""

_MEGA = 1_000_000
_SIDE = 1024
_ROUGHNESS = 32
_RECENT = 8
_TIMED = ("JPEG", "PNG", "WEBP")
_QUICKEST = {"compress_level": 1, "method": 0}
"""Encodes PNG and WEBP at once to be timed; stronger compression takes as long to decode."""


@dataclass(frozen=True, slots=True)
class Picture:
    """A picture that came with a request, not decoded; `param` is the field that it came in."""

    data: bytes
    format: str
    width: int
    height: int
    param: str = ""

    @property
    def num_bytes(self) -> int:
        """Bytes of its pixels, once it is decoded."""
        return 3 * self.width * self.height

    @property
    def megapixels(self) -> float:
        """Millions of pixels."""
        return self.width * self.height / _MEGA


def from_data_url(url: str, param: str) -> bytes:
    """Return the bytes of a data URL.

    Raises:
        ApiError: it is no data URL in base64.
    """
    found = _DATA_URL.match(url)
    if found is None:
        raise invalid(
            "the picture must be a data URL in base64, such as data:image/png;base64,iVBORw0…",
            param,
            "invalid_image_url",
        )
    if found["kind"] and not found["kind"].lower().startswith(("image/", "application/octet-stream")):
        raise invalid(f"{found['kind']}: no picture; send an image", param, "invalid_image_url")
    try:
        return pybase64.b64decode(url[found.end() :], validate=True)  # 8 times as fast as the standard library
    except ValueError:
        raise invalid("the picture's data URL is not valid base64", param, "invalid_image_url") from None


def look(data: bytes, param: str) -> Picture:
    """Read a picture's format and size from its header.

    Raises:
        ApiError: it is no picture of a format that is read, or has too many pixels or none.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(io.BytesIO(data), formats=readable()) as image:
                picture = Picture(data, image.format or "", *image.size, param)
    except Image.DecompressionBombError:
        raise _too_large(param) from None
    except Exception:  # noqa: BLE001 - decoders raise many kinds on damaged headers; their texts hold addresses
        message = f"not an image that can be read; send {', '.join(FORMATS)}"
        raise invalid(message, param, "invalid_image") from None
    if picture.width * picture.height > MAX_PIXELS:
        raise _too_large(param)
    if not picture.width * picture.height:
        raise invalid("the picture has no area", param, "invalid_image")
    return picture


def limit_text() -> None:
    """Have no picture of this process unpack more than `MOST_TEXT_BYTES` of text, which its header may hold."""
    PngImagePlugin.MAX_TEXT_MEMORY = MOST_TEXT_BYTES


@cache
def readable() -> tuple[str, ...]:
    """Those of the formats for which the library was built with a decoder."""
    Image.init()
    return tuple(one for one in FORMATS if one in Image.OPEN)


def _too_large(param: str) -> ApiError:
    most = f"{MAX_PIXELS / _MEGA:.0f} million pixels"
    return ApiError(400, "image_too_large", f"the picture has more than {most}; scale it down first", param)


class OpeningTimes:
    """Says how long a picture takes to be decoded, from its header and its bytes.

    By format, a decoder takes a time for each pixel and one for each byte. Both are measured on a smooth and a
    rough picture of a megapixel; answers about larger ones correct them.
    """

    def __init__(self) -> None:
        """Measure this machine, in a few tenths of a second."""
        smooth = Image.linear_gradient("L").resize((_SIDE, _SIDE)).convert("RGB")
        rough = Image.merge("RGB", [Image.effect_noise((_SIDE, _SIDE), _ROUGHNESS)] * 3)
        self._costs_ms = {kind: _costs_ms(smooth, rough, kind) for kind in _TIMED}
        self._ratios: deque[float] = deque(maxlen=_RECENT)

    def of(self, picture: Picture | None) -> float:
        """Return the expected milliseconds; 0 without a picture."""
        if picture is None:
            return 0.0
        return self._plain_ms(picture) * max(1.0, median(self._ratios) if self._ratios else 1.0)

    def observe(self, picture: Picture, took_ms: float) -> None:
        """Learn from an answer, whose picture took so long to be decoded and cut."""
        if picture.megapixels >= 1:
            self._ratios.append(took_ms / self._plain_ms(picture))

    def _plain_ms(self, picture: Picture) -> float:
        of_pixels_ms, of_bytes_ms = self._costs_ms.get(picture.format) or min(self._costs_ms.values())
        return picture.megapixels * of_pixels_ms + len(picture.data) / _MEGA * of_bytes_ms


def _costs_ms(smooth: Image.Image, rough: Image.Image, kind: str) -> tuple[float, float]:
    """Return what a megapixel and a megabyte take."""
    (small, least_ms), (large, most_ms) = (_opening(one, kind) for one in (smooth, rough))
    of_bytes_ms = max(0.0, most_ms - least_ms) / (large - small)
    return max(0.0, least_ms - small * of_bytes_ms) * _MEGA / _SIDE**2, of_bytes_ms


def _opening(image: Image.Image, kind: str) -> tuple[float, float]:
    """Return the megabytes of a picture's file, and how long it takes to open: the faster of two runs."""
    file = io.BytesIO()
    image.save(file, kind, **_QUICKEST)
    taken_ms = []
    for _ in range(2):
        start_ms = now_ms()
        open_image(file.getvalue())
        taken_ms.append(now_ms() - start_ms)
    return len(file.getvalue()) / _MEGA, min(taken_ms)
