from __future__ import annotations

import io
import struct
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tempovlm.core.errors import UserError
from tempovlm.model.vision import image as image_module
from tempovlm.model.vision.image import MAX_PIXELS, open_if, open_image

PIXELS = np.random.default_rng(0).integers(0, 256, (6, 9, 3), dtype=np.uint8)


def encoded(image: Image.Image, encoding: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, encoding, **options)
    return buffer.getvalue()


def png_header(width: int, height: int) -> bytes:
    """A PNG that claims a size and holds no pixels."""
    body = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + struct.pack(">I", 13)
        + body
        + struct.pack(">I", zlib.crc32(body))
        + struct.pack(">I", 8)
        + b"IDAT"
    )


EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n%%EOF\n"


def test_a_path_bytes_and_an_image_are_the_same(tmp_path: Path) -> None:
    image = Image.fromarray(PIXELS)
    path = tmp_path / "a.png"
    path.write_bytes(encoded(image))
    for source in (path, str(path), path.read_bytes(), image):
        pixels = open_image(source)
        assert (pixels.dtype, pixels.flags.writeable) == (np.uint8, True)
        np.testing.assert_array_equal(pixels, PIXELS)


@pytest.mark.parametrize("mode", ["L", "LA", "1", "P", "RGBA", "CMYK", "YCbCr", "HSV", "LAB", "I", "F", "I;16"])
def test_every_mode_becomes_rgb(mode: str) -> None:
    image = Image.fromarray(PIXELS)
    grey = np.asarray(image.convert("L"))
    converted = Image.fromarray(grey.astype(np.uint16) * 257) if mode == "I;16" else image.convert(mode)
    assert converted.mode == mode
    pixels = open_image(converted)
    assert (pixels.shape, pixels.dtype) == ((6, 9, 3), np.uint8)
    if mode in ("I", "F", "I;16", "L", "LA"):
        np.testing.assert_allclose(pixels[..., 0], grey, atol=1)


def test_deep_greys_are_scaled_not_clipped() -> None:
    ramp = np.linspace(0, 65535, 256).astype(np.uint16).reshape(1, -1)
    source = encoded(Image.fromarray(ramp))
    np.testing.assert_array_equal(open_image(source)[0, :, 0], np.arange(256))
    unit = Image.fromarray(np.linspace(0, 1, 5, dtype=np.float32).reshape(1, -1))
    assert open_image(unit)[0, :, 0].tolist() == [0, 64, 128, 191, 255]


def test_transparent_palette_gives_no_warning() -> None:
    image = Image.fromarray(PIXELS).convert("P")
    image.info["transparency"] = bytes(range(256))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert open_image(image).shape == PIXELS.shape


def test_cmyk_jpeg_and_first_frame() -> None:
    jpeg = encoded(Image.new("CMYK", (20, 10), (0, 255, 255, 0)), "JPEG")
    red = open_image(jpeg)[5, 10].astype(int)
    assert red[0] > 200 > 60 > red[1:].max()
    frames = [Image.new("RGB", (4, 4), color) for color in ("blue", "red")]
    gif = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert open_image(gif)[0, 0].tolist() == [0, 0, 255]


def test_upright_by_exif(tmp_path: Path) -> None:
    image = Image.fromarray(PIXELS)
    exif = image.getexif()
    exif[0x0112] = 6
    path = tmp_path / "turned.png"
    image.save(path, exif=exif)
    np.testing.assert_array_equal(open_image(path), np.rot90(PIXELS, -1))


def test_damaged_exif_is_ignored() -> None:
    source = encoded(Image.fromarray(PIXELS), "JPEG", exif=b"Exif\x00\x00II*\x00\xff\xff\xff\xff broken")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert open_image(source).shape == PIXELS.shape


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("missing.png", None, "no such file"),
        ("empty.png", b"", "empty"),
        ("text.png", b"this is no picture" * 20, "not an image"),
        ("program.png", EPS, "EPS pictures are programs"),
        ("cut.png", encoded(Image.fromarray(np.tile(PIXELS, (40, 40, 1))))[:900], "truncated or damaged"),
        ("cut.jpg", encoded(Image.fromarray(np.tile(PIXELS, (40, 40, 1))), "JPEG")[:2000], "truncated or damaged"),
        ("header.png", encoded(Image.fromarray(PIXELS))[:20], "damaged image"),
        ("large.png", png_header(10_000, 5_001), "limit is 50 million"),
        ("vast.png", png_header(100_000, 100_000), "50 million"),
    ],
)
def test_bad_files_are_named_in_one_line(name: str, content: bytes | None, message: str, tmp_path: Path) -> None:
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserError, match=message) as caught:
            open_image(path)
    assert name in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_directory_and_a_null_byte(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is a directory"):
        open_image(tmp_path)
    with pytest.raises(UserError, match="cannot be read"):
        open_image("a\0b.png")


def test_a_name_stays_as_it_was_given() -> None:
    with pytest.raises(UserError, match=r"https://example\.com/a\.png: pictures are not downloaded; save it"):
        open_image("https://example.com/a.png")
    with pytest.raises(UserError, match="the picture's path is empty"):
        open_image("")
    with pytest.raises(UserError, match=r"~nobody-of-that-name/a\.png: no such user"):
        open_image("~nobody-of-that-name/a.png")


@pytest.mark.parametrize("source", [3, ["a.png"], {"path": "a.png"}, io.BytesIO(b""), torch.zeros(4, 4, 3)])
def test_other_things_are_no_pictures(source: object) -> None:
    with pytest.raises(UserError, match=f"of type {type(source).__name__} is no picture; give a path"):
        open_image(source)  # type: ignore[arg-type]


def test_a_file_without_an_end_or_of_another_kind_is_not_read_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(image_module, "MAX_BYTES", 1000)
    film = tmp_path / "film.mp4"
    with film.open("wb") as file:
        file.truncate(1 << 40)
    for path in (film, Path("/dev/zero")):
        with pytest.raises(UserError, match=f"{path}: more than .* name an image file"):
            open_image(path)


def test_bytes_are_checked_too() -> None:
    for source in (b"", b"nonsense", png_header(10_000, 5_001)):
        with pytest.raises(UserError, match="bytes"):
            open_image(source)


def test_the_limit_itself_is_allowed() -> None:
    image = Image.new("1", (MAX_PIXELS // 5000, 5000))
    assert open_image(image).shape == (5000, MAX_PIXELS // 5000, 3)
    with pytest.raises(UserError, match="limit"):
        open_image(Image.new("1", (MAX_PIXELS // 5000 + 1, 5000)))


def test_pixels_are_taken_as_they_are() -> None:
    pixels = np.arange(105, dtype=np.uint8).reshape(5, 7, 3)
    assert open_image(pixels) is pixels
    flipped = open_image(pixels[:, ::-1])
    assert flipped.flags.c_contiguous
    np.testing.assert_array_equal(flipped, pixels[:, ::-1])


@pytest.mark.parametrize(
    "pixels",
    [
        np.zeros((4, 4), np.uint8),
        np.zeros((4, 4, 4), np.uint8),
        np.zeros((4, 4, 3)),
        np.zeros((0, 4, 3), np.uint8),
    ],
    ids=["grey", "rgba", "floats", "empty"],
)
def test_other_arrays_are_refused(pixels: np.ndarray) -> None:
    with pytest.raises(UserError, match="the picture's pixels"):
        open_image(pixels)


@pytest.mark.parametrize("band_pixels", [1, 20, 36, 1000])
def test_a_large_picture_is_copied_by_bands(band_pixels: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(image_module, "_LARGE_PIXELS", PIXELS.shape[0] * PIXELS.shape[1])
    monkeypatch.setattr(image_module, "_BAND_PIXELS", band_pixels)
    found = open_image(encoded(Image.fromarray(PIXELS)))
    assert (found == PIXELS).all()
    assert found.flags.writeable
    assert found.flags.c_contiguous


def test_a_picture_that_may_not_be_opened_is_not_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    file = io.BytesIO()
    Image.fromarray(PIXELS).save(file, "PNG")
    asked: list[int] = []
    np.testing.assert_array_equal(open_if(file.getvalue(), lambda count: asked.append(count) is None), PIXELS)
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", lambda _: pytest.fail("it was decoded"))
    for source in (file.getvalue(), Image.open(file), PIXELS):
        assert open_if(source, lambda count: asked.append(count) is not None) is None
    assert asked == [PIXELS.shape[0] * PIXELS.shape[1]] * 4
