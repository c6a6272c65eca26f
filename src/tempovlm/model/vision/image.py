"""Read a file, bytes or a PIL image to an array of pixels; every possible fault raises an error of one line."""

from __future__ import annotations

import io
import os
import stat
import struct
import warnings
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from tempovlm.core.errors import UserError
from tempovlm.core.paths import expanded

MAX_PIXELS = 50_000_000
"""Larger pictures are refused from the header, before any pixel is decoded."""

MAX_BYTES = 1 << 30
"""Larger files are not read: that many pixels in the widest common type take 0.6 GB."""

_LARGE_PIXELS, _BAND_PIXELS = 2_000_000, 1 << 18
"""A picture from which on it is copied by bands, and the pixels of a band."""

_DECODE_ERRORS = (
    OSError,
    SyntaxError,
    ValueError,
    TypeError,
    IndexError,
    EOFError,
    OverflowError,
    struct.error,
    zlib.error,
)
"""Exceptions that the library's decoders raise on damaged data."""

_PROGRAMS = ("EPS",)
"""Formats that the library would pass to an interpreter, if the machine has one."""


def open_image(source: str | Path | bytes | Image.Image | np.ndarray) -> np.ndarray:
    """Return the (H, W, 3) uint8 RGB pixels of a picture, upright by its EXIF orientation; such arrays unchanged.

    Transparency is dropped by a plain conversion, as in the published preprocessing. Deeper greys are scaled
    to 8 bits. Of an animation the first frame is used.

    Raises:
        UserError: the picture cannot be read, or is too large; names the source.
    """
    pixels = open_if(source, lambda _: True)
    assert pixels is not None
    return pixels


def open_if(
    source: str | Path | bytes | Image.Image | np.ndarray, may: Callable[[int], bool]
) -> np.ndarray | None:
    """Like `open_image`, if `may`, asked with the number of pixels before any is decoded, says True; else None."""
    if isinstance(source, np.ndarray):
        pixels = _checked(source)
        return pixels if may(pixels.shape[0] * pixels.shape[1]) else None
    if isinstance(source, Image.Image):
        return _pixels(source, "the picture", may)
    if isinstance(source, bytes | bytearray | memoryview):
        name, data = "the picture's bytes", bytes(source)
    elif isinstance(source, str | os.PathLike):
        name, data = str(source), _read(source)
    else:
        raise UserError(
            f"a value of type {type(source).__name__} is no picture; give a path, encoded bytes, a PIL image or "
            "uint8 pixels of shape (height, width, 3)"
        )
    if not data:
        raise UserError(f"{name}: the file is empty")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            image = Image.open(io.BytesIO(data))
    except UnidentifiedImageError:
        raise UserError(
            f"{name}: not an image that can be read; use PNG, JPEG, WebP or another common format"
        ) from None
    except Image.DecompressionBombError:
        raise UserError(f"{name}: more than {MAX_PIXELS / 1e6:.0f} million pixels; scale it down first") from None
    except _DECODE_ERRORS as error:
        raise UserError(f"{name}: damaged image ({error})") from None
    with image:
        if image.format in _PROGRAMS:
            raise UserError(f"{name}: {image.format} pictures are programs and are not run; save it as PNG")
        return _pixels(image, name, may)


def _read(name: str | os.PathLike[str]) -> bytes:
    """Read the bytes of a file; messages name it as it was given."""
    if not str(name):
        raise UserError("the picture's path is empty; name an image file")
    path, data = expanded(Path(name)), None
    try:
        with path.open("rb") as file:
            about = os.fstat(file.fileno())
            if not stat.S_ISREG(about.st_mode):
                data = file.read(MAX_BYTES + 1)
            elif about.st_size <= MAX_BYTES:
                data = file.read()
    except FileNotFoundError:
        if "://" in str(name):
            raise UserError(f"{name}: pictures are not downloaded; save it and give its path") from None
        raise UserError(f"{name}: no such file") from None
    except IsADirectoryError:
        raise UserError(f"{name}: is a directory; name an image file") from None
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise UserError(f"{str(name)!r}: cannot be read ({reason})") from None
    if data is None or len(data) > MAX_BYTES:
        raise UserError(f"{name}: more than {MAX_BYTES / 1e9:.1f} GB, too much for a picture; name an image file")
    return data


def _checked(pixels: np.ndarray) -> np.ndarray:
    """Return decoded pixels whose memory torch can share."""
    if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] != 3:
        raise UserError(
            f"the picture's pixels: {pixels.dtype} of shape {pixels.shape}; give uint8 of shape (height, width, 3)"
        )
    _check_size(pixels.shape[1], pixels.shape[0], "the picture's pixels")
    return np.require(pixels, requirements=("C", "W"))


def _check_size(width: int, height: int, name: str) -> None:
    if width * height > MAX_PIXELS:
        raise UserError(
            f"{name}: {width} × {height} is {width * height / 1e6:.1f} million pixels, the limit is "
            f"{MAX_PIXELS / 1e6:.0f} million; scale it down first"
        )
    if width == 0 or height == 0:
        raise UserError(f"{name}: {width} × {height} pixels; the picture has no area")


def _pixels(image: Image.Image, name: str, may: Callable[[int], bool]) -> np.ndarray | None:
    _check_size(*image.size, name)
    if not may(image.width * image.height):
        return None
    try:
        image.load()
        return _copied(_to_rgb(_upright(image)))
    except _DECODE_ERRORS as error:
        raise UserError(f"{name}: truncated or damaged image ({error})") from None


def _copied(image: Image.Image) -> np.ndarray:
    """Return a writable copy (H, W, 3) of RGB pixels: torch shares its memory.

    The library's way to an array holds two more copies. A large picture goes by bands, which need none and stay in
    the processor's caches.
    """
    width, height = image.size
    if width * height < _LARGE_PIXELS:
        return np.array(image)
    pixels, rows = np.empty((height, width, 3), np.uint8), max(1, _BAND_PIXELS // width)
    for top in range(0, height, rows):
        band = image.crop((0, top, width, min(top + rows, height)))
        pixels[top : top + rows] = np.asarray(band)
    return pixels


def _upright(image: Image.Image) -> Image.Image:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if image.getexif().get(ExifTags.Base.Orientation, 1) == 1:  # the library would copy the picture
                return image
            return ImageOps.exif_transpose(image)
    except _DECODE_ERRORS:  # damaged metadata hides only the orientation; the pixels are whole
        return image


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "RGB":
        return image
    if image.mode == "F" or image.mode.startswith("I"):
        return _scaled_grey(image).convert("RGB")
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")
    return image.convert("RGB")


def _scaled_grey(image: Image.Image) -> Image.Image:
    """Scale greys of more than 8 bits, which a plain conversion would clip at 255, to 8 bits."""
    grey: np.ndarray = np.nan_to_num(np.asarray(image, dtype=np.float32))
    if image.mode == "F":
        grey = grey * 255 if grey.max(initial=0) <= 1 else grey
    elif image.mode.startswith("I;16") or grey.max(initial=0) > 255:
        grey = grey / 257
    return Image.fromarray(np.clip(grey.round(), 0, 255).astype(np.uint8))
