from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import tiny_model
from tempovlm.model.config import MOLMOE_1B, POCKET, VisionConfig
from tempovlm.model.vision import device_crops
from tempovlm.model.vision.device_crops import cut_by_kernels, cut_on_device, resize, taps
from tempovlm.model.vision.tiling import CROPS_OF_TIER, Crops, Grid, cut_batch, cut_canvases, cut_crops

CPU = torch.device("cpu")
TOLERANCE = 1e-5
SHAPES = (
    (1, 1),
    (1, 500),
    (7, 5),
    (13, 2000),
    (40, 3000),
    (3000, 40),
    (84, 112),
    (336, 336),
    (480, 640),
    (640, 427),
    (997, 1003),
    (1080, 1920),
    (3024, 4032),
)


def assert_alike(found: Crops, exact: Crops) -> None:
    assert (found.grid, found.patches.shape) == (exact.grid, exact.patches.shape)
    assert torch.equal(found.index, exact.index)
    assert torch.equal(found.masks, exact.masks)
    torch.testing.assert_close(found.patches, exact.patches, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_crops_are_those_of_the_exact_mode(shape: tuple[int, int]) -> None:
    """At the tier with most pixels; large pictures take the time that the host's own resizing takes."""
    image = tiny_model.picture(0, *shape)
    exact = cut_crops(image, "high", MOLMOE_1B.vision, exact=True)
    assert_alike(cut_on_device(image, "high", MOLMOE_1B.vision, CPU, exact=True), exact)


@pytest.mark.parametrize("tier", CROPS_OF_TIER)
@pytest.mark.parametrize("vision", [MOLMOE_1B.vision, POCKET.vision], ids=["molmoe-1b", "pocket"])
def test_every_tier_of_both_models(tier: str, vision: VisionConfig) -> None:
    image = tiny_model.picture(1, 150, 211)
    found = cut_on_device(image, tier, vision, CPU, exact=True)
    assert_alike(found, cut_crops(image, tier, vision, exact=True))
    sliver = tiny_model.picture(1, 3000, 40)
    assert_alike(cut_on_device(sliver, tier, vision, CPU, exact=True), cut_crops(sliver, tier, vision, exact=True))
    assert len(found.patches) == found.grid.num_crops - (tier == "low")


@pytest.mark.parametrize(
    ("size", "length"), [(1, 9), (9, 1), (40, 37), (37, 40), (500, 500), (1920, 995), (4032, 336)]
)
def test_taps_are_the_weights_of_torch(size: int, length: int) -> None:
    """What interpolating single lit pixels gives, to the bit."""
    table = F.interpolate(torch.eye(size)[None, None], (size, length), mode="bilinear", antialias=True)[0, 0].T
    assert torch.equal(taps(size, (length,), CPU).apply(torch.eye(size)), table)


@pytest.mark.parametrize(("shape", "grid"), [((60, 45), Grid(2, 1)), ((5, 90), Grid(1, 1))], ids=str)
def test_the_kernels_cut_as_the_plain_operations(shape: tuple[int, int], grid: Grid) -> None:
    pytest.importorskip("triton")
    vision, device = tiny_model.CONFIG.vision, torch.device("cuda" if torch.cuda.is_available() else "cpu")
    image = tiny_model.picture(4, *shape)
    found = cut_by_kernels(image, grid, vision, device)
    exact = cut_batch(torch.from_numpy(image).unsqueeze(0), grid, vision, exact=True).patches[0]
    torch.testing.assert_close(found.cpu(), exact, rtol=0, atol=TOLERANCE)


def test_strips_meet_without_a_seam(monkeypatch: pytest.MonkeyPatch) -> None:
    pixels, sizes = torch.from_numpy(tiny_model.picture(2, 101, 60)), [(20, 12), (50, 30)]
    whole = resize(pixels, sizes, CPU)
    monkeypatch.setattr(device_crops, "STRIP_VALUES", 7 * 60 * 3)
    for strips, one in zip(resize(pixels, sizes, CPU), whole, strict=True):
        torch.testing.assert_close(strips, one, rtol=0, atol=1e-6)


def test_very_long_pictures_are_cut_on_the_host() -> None:
    image = tiny_model.picture(3, 2, device_crops.MAX_SIDE + 1)
    found = cut_on_device(image, "medium", POCKET.vision, CPU, exact=True)
    expected = cut_crops(image, "medium", POCKET.vision, exact=True).patches
    torch.testing.assert_close(found.patches, expected)
    assert found.live is not None


def test_only_the_exact_mode_takes_crops_for_padding(monkeypatch: pytest.MonkeyPatch) -> None:
    def with_minus_one(canvases: Sequence[Tensor], vision: VisionConfig) -> Tensor:
        patches = cut_canvases(canvases, vision)
        patches[:, 2, 3, 4] = -1
        return patches

    monkeypatch.setattr(device_crops, "cut_canvases", with_minus_one)
    image = tiny_model.picture()
    assert cut_on_device(image, "medium", POCKET.vision, CPU).live is None
    live = cut_on_device(image, "medium", POCKET.vision, CPU, exact=True).live
    assert live is not None
    assert live.tolist() == [i != 2 for i in range(live.numel())]
