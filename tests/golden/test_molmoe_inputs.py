"""Prompts, crops, masks, indices and opened files, against numbers that the published preprocessing gave.

The published tiling and the tiers choose different grids, so the grids are forced on both sides. What needs the
published tokenizer reads it beside the repository or from TEMPOVLM_MOLMOE_FILES; nothing here writes numbers.
"""

from __future__ import annotations

import hashlib
import io
import json
import struct
import zlib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from molmoe_files import FILES, published
from tempovlm.model.config import MOLMOE_1B, ModelConfig
from tempovlm.model.prompt import (
    CONTROL_TOKENS,
    END,
    IMAGE_COLUMN,
    IMAGE_END,
    IMAGE_PATCH,
    IMAGE_START,
    PAD,
    Tokenizer,
    build_prompt,
    feature_slots,
    image_tokens,
    prompt_text,
)
from tempovlm.model.vision.image import open_image
from tempovlm.model.vision.tiling import Grid, cut_batch

VISION = MOLMOE_1B.vision
IDS = {IMAGE_START: 50280, IMAGE_END: 50281, IMAGE_PATCH: 50282, IMAGE_COLUMN: 50283}
STORE = json.loads(Path(__file__).with_name("molmoe_inputs.json").read_text())
PIXEL_TOLERANCE = 1e-6
"""Of a pixel from 0 to 1; normalisation divides it by about 0.27."""


def digest(values: np.ndarray) -> str:
    """Sixteen hex digits of whole numbers, whatever their type."""
    return hashlib.sha256(np.ascontiguousarray(values.astype("<i8")).tobytes()).hexdigest()[:16]


def picture(height: int, width: int) -> np.ndarray:
    """A picture by integer arithmetic, so that its pixels are the same everywhere."""
    y, x, c = np.ogrid[:height, :width, :3]
    return ((7 * x + 13 * y + 85 * c + x * y // 64 + (x // 50 * 31) ^ (y // 40 * 17)) % 256).astype(np.uint8)


def kinds(masks: np.ndarray) -> np.ndarray:
    """What the model tells apart in a mask: 0 padding, 1 partly padded, 2 picture, 3 the row of -1."""
    return np.select([masks == -1, masks == 0, masks == 1], [3, 0, 2], 1)


def probes(patches: np.ndarray) -> np.ndarray:
    """Places of 48 values spread over (C, P, X) patches."""
    return np.linspace(0, patches.size - 1, 48).astype(np.int64)


def describe(patches: np.ndarray, masks: np.ndarray, tokens: np.ndarray, slots: np.ndarray) -> dict[str, Any]:
    """What is stored of one picture's inputs: whole numbers by hash, real ones by probes and sums."""
    return {
        "num_crops": len(patches),
        "tokens": digest(tokens),
        "slots": digest(np.where(slots < 0, -1, slots)),
        "mask_kinds": digest(kinds(masks)),
        "mask_sums": [float(value) for value in masks.astype(np.float64).sum(-1)],
        "pixel_sums": [float(value) for value in patches.astype(np.float64).sum((-1, -2))],
        "pixels": [float(value) for value in patches.reshape(-1)[probes(patches)]],
    }


def ours(height: int, width: int, grid: Grid) -> dict[str, Any]:
    crops = cut_batch(torch.from_numpy(picture(height, width)).unsqueeze(0), grid, VISION, exact=True)
    tokens = image_tokens(grid, VISION, SimpleNamespace(ids=IDS))  # type: ignore[arg-type]
    slots = feature_slots(grid, VISION).view(-1, VISION.pooled**2)
    patches = crops.patches[0][crops.index]
    return describe(patches.numpy(), crops.masks.numpy(), np.array(tokens), slots.numpy())


@pytest.mark.parametrize("case", STORE["pictures"], ids=lambda case: f"{case['size']}-{case['grid']}")
def test_inputs_are_the_published_ones(case: dict[str, Any]) -> None:
    found, stored = ours(*case["size"], Grid(*case["grid"])), case["inputs"]
    for exact in ("num_crops", "tokens", "slots", "mask_kinds"):
        assert found[exact] == stored[exact], exact
    np.testing.assert_allclose(found["mask_sums"], stored["mask_sums"], rtol=1e-6)
    np.testing.assert_allclose(found["pixels"], stored["pixels"], rtol=0, atol=PIXEL_TOLERANCE / 0.26)
    count = VISION.num_patches * VISION.patch_values
    np.testing.assert_allclose(found["pixel_sums"], stored["pixel_sums"], rtol=0, atol=count * 1e-7)


def test_twelve_shapes_and_every_tier_are_stored() -> None:
    sizes = {tuple(case["size"]) for case in STORE["pictures"]}
    assert len(sizes) >= 12
    assert {(1, 1), (40, 3000), (3024, 4032)} <= sizes
    assert {case["grid"][0] * case["grid"][1] for case in STORE["pictures"]} >= {1, 4, 6, 9, 12}


def drawn() -> Image.Image:
    return Image.fromarray(picture(30, 50))


def deep_png(values: np.ndarray) -> bytes:
    """A PNG of (H, W, 3) uint16 colours, which the image library reads but does not write."""
    height, width, _ = values.shape
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    chunks = [
        (b"IHDR", struct.pack(">IIBBBBB", width, height, 16, 2, 0, 0, 0)),
        (b"IDAT", zlib.compress(rows)),
        (b"IEND", b""),
    ]
    parts = [struct.pack(">I", len(b)) + n + b + struct.pack(">I", zlib.crc32(n + b)) for n, b in chunks]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def file_bytes(kind: str) -> bytes:
    """A small file of a kind, written without loss."""
    rgb, encoding, options = drawn(), "PNG", {}
    if kind == "rgba":
        image = Image.merge("RGBA", (*rgb.split(), Image.fromarray(picture(30, 50)[..., 1])))
    elif kind.startswith("palette"):
        image = Image.fromarray(picture(30, 50)[..., 0], "L").copy()
        image.putpalette([(5 * i + 91 * (i % 3)) % 256 for i in range(768)])
        if kind == "palette, transparent":
            options["transparency"] = bytes(range(256))
    elif kind == "grey, alpha":
        image = Image.merge("LA", (rgb.getchannel(0), rgb.getchannel(1)))
    elif kind == "16-bit colour":
        return deep_png(picture(30, 50).astype(np.uint16) * 200 + 77)
    elif kind == "cmyk":
        image, encoding = Image.merge("CMYK", (*rgb.split(), rgb.getchannel(0))), "TIFF"
    else:
        image = rgb
        exif = image.getexif()
        exif[0x0112] = int(kind.removeprefix("turned "))
        options["exif"] = exif
    buffer = io.BytesIO()
    image.save(buffer, encoding, **options)
    return buffer.getvalue()


@pytest.mark.parametrize("case", STORE["files"], ids=lambda case: case["kind"])
def test_files_open_as_published(case: dict[str, Any]) -> None:
    pixels = open_image(file_bytes(case["kind"]))
    assert list(pixels.shape) == case["shape"]
    assert digest(pixels) == case["pixels"]


def test_deep_greys_are_scaled_where_the_published_code_clips() -> None:
    """On purpose: a plain conversion turns nearly every 16-bit grey into white."""
    values = picture(30, 50)[..., 0]
    buffer = io.BytesIO()
    Image.fromarray(values.astype(np.uint16) * 257).save(buffer, "PNG")
    assert (open_image(buffer.getvalue()) == values[..., None]).all()


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    assert FILES is not None
    return Tokenizer.load(FILES / "tokenizer.json")


@published
@pytest.mark.parametrize("case", STORE["prompts"], ids=lambda case: f"{case['style']}: {case['question'][:24]!r}")
def test_prompts_are_the_published_ones(case: dict[str, Any], tokenizer: Tokenizer) -> None:
    assert prompt_text(case["question"], case["style"]) == case["text"]
    prompt = build_prompt(case["question"], case["style"], None, MOLMOE_1B, tokenizer, 16)
    assert prompt.tokens.tolist() == case["tokens"]
    grid = Grid(2, 3)
    with_image = build_prompt(case["question"], case["style"], grid, MOLMOE_1B, tokenizer, 16)
    assert digest(with_image.tokens.numpy()) == case["with_image"]
    assert with_image.slots is not None
    assert digest(with_image.slots.numpy()) == STORE["slots_2x3"]


@published
def test_the_published_ids_and_sizes(tokenizer: Tokenizer) -> None:
    assert tokenizer.ids == {PAD: 1, END: 50279, **IDS}
    assert FILES is not None
    assert ModelConfig.from_hub(json.loads((FILES / "config.json").read_text())) == MOLMOE_1B
    processor = json.loads((FILES / "preprocessor_config.json").read_text())
    assert processor["base_image_input_size"] == [VISION.crop_size] * 2
    assert processor["image_token_length_h"] == VISION.pooled


@published
@pytest.mark.parametrize("name", [*CONTROL_TOKENS, "<|image|>"])
@pytest.mark.parametrize("frame", ["{}", "what is {}?", "a{}b", "{}{}", " {} ", "<{}>", "\n{}", "é{}"])
def test_typed_text_never_becomes_a_control_token(name: str, frame: str, tokenizer: Tokenizer) -> None:
    control = {*tokenizer.ids.values(), 50284}
    text = frame.replace("{}", name)
    tokens = tokenizer.encode(text)
    assert not control & set(tokens), tokens
    assert tokenizer.decode(tokens) == text
    prompt = build_prompt(text, "vqa2", Grid(1, 1), MOLMOE_1B, tokenizer, 1).tokens.tolist()
    assert prompt.count(tokenizer.ids[IMAGE_PATCH]) == Grid(1, 1).num_tokens(VISION)
    assert prompt.count(tokenizer.end) == 1
