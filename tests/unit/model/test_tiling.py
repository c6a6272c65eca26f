from __future__ import annotations

import numpy as np
import pytest
import torch

import tiny_model
from tempovlm.core.errors import UserError
from tempovlm.model.config import CLIP_MEAN, CLIP_STD, MOLMOE_1B, POCKET, VisionConfig
from tempovlm.model.prompt import feature_slots
from tempovlm.model.vision.tiling import (
    CROPS_OF_TIER,
    Grid,
    canvas_sizes,
    choose_grid,
    color_planes,
    cut_canvases,
    cut_crops,
    fit,
    index_and_masks,
    letterbox,
    live_crops,
    shift_masks,
)

BOTH = pytest.mark.parametrize("vision", [MOLMOE_1B.vision, POCKET.vision], ids=["molmoe-1b", "pocket"])
SHAPES = ((1, 1), (40, 3000), (3000, 40), (84, 112), (112, 84), (90, 90), (60, 180))


@BOTH
@pytest.mark.parametrize("tier", CROPS_OF_TIER)
@pytest.mark.parametrize("shape", SHAPES)
def test_the_grid_is_in_range_and_no_other_is_closer(
    tier: str, shape: tuple[int, int], vision: VisionConfig
) -> None:
    def mismatch(grid: Grid) -> float:
        height, width = grid.canvas(vision)
        return abs(np.log(width / height) - np.log(shape[1] / shape[0]))

    grid = choose_grid(tier, *shape, vision)
    least, most = CROPS_OF_TIER[tier]
    legal = [Grid(r, c) for r in range(1, most + 1) for c in range(1, most + 1) if least <= r * c <= most]
    assert grid in legal
    best = min(mismatch(one) for one in legal)
    assert mismatch(grid) <= best + 1e-8
    assert grid.num_crops == 1 + min(one.rows * one.cols for one in legal if mismatch(one) <= best + 1e-8)


def test_an_unknown_tier_is_named() -> None:
    with pytest.raises(UserError, match=r"tier='huge'.*low, medium, high"):
        choose_grid("huge", 10, 10, POCKET.vision)


@BOTH
@pytest.mark.parametrize("grid", [Grid(1, 1), Grid(1, 4), Grid(2, 3), Grid(4, 3)])
def test_every_place_of_the_kept_tokens_is_filled_once(grid: Grid, vision: VisionConfig) -> None:
    slots = feature_slots(grid, vision)
    used = slots[slots >= 0]
    assert len(slots) == grid.num_crops * vision.pooled**2
    assert len(used) == len(used.unique()) == grid.num_tokens(vision)
    rows, cols = grid.kept(vision)
    assert int(used.max()) == vision.pooled * (vision.pooled + 1) + 2 + rows * (cols + 1) - 1


def test_fast_and_exact_differ_by_about_a_level() -> None:
    image = tiny_model.picture(1, 150, 210)
    fast, exact = (cut_crops(image, "medium", POCKET.vision, exact=exact) for exact in (False, True))
    levels = (fast.patches - exact.patches).abs().max() * max(CLIP_STD) * 255
    assert 0 < levels < 1.5
    assert torch.equal(fast.masks, exact.masks)


def test_one_tile_is_the_global_crop_and_passes_once() -> None:
    crops = cut_crops(tiny_model.picture(), "low", POCKET.vision)
    assert (len(crops.patches), crops.index.tolist(), len(crops.masks)) == (1, [0, 0], 2)
    assert (crops.masks[1] == -1).all()


def test_masks_stand_one_crop_too_early() -> None:
    masks = shift_masks(torch.tensor([[0.25], [0.5]]))
    assert masks.tolist() == [pytest.approx([0.25]), pytest.approx([0.5]), [-1]]


def test_letterbox_centres_on_black_and_normalises_after() -> None:
    canvas = letterbox(color_planes(torch.full((1, 10, 40, 3), 255, dtype=torch.uint8), exact=True), 33, 40)
    assert (canvas[0, :, 20, 0] > 0).nonzero()[:, 0].tolist() == list(range(11, 21))
    black = -np.array(CLIP_MEAN) / np.array(CLIP_STD)
    white = (1 - np.array(CLIP_MEAN)) / np.array(CLIP_STD)
    np.testing.assert_allclose(canvas[0, 0, 0], black, rtol=1e-5)
    np.testing.assert_allclose(canvas[0, 15, 20], white, rtol=1e-5)


@BOTH
@pytest.mark.parametrize("grid", [Grid(1, 1), Grid(2, 3), Grid(12, 1)])
def test_masks_are_the_shares_of_patches_that_are_picture(grid: Grid, vision: VisionConfig) -> None:
    """Against a canvas whose pixels are 1 where there is picture, cut as the picture is."""
    height, width = 211, 307
    *_, canvas = canvas_sizes(grid, vision)
    _, top, left, rows, cols = fit(height, width, *canvas)
    pixels = torch.zeros(1, *canvas, 3)
    pixels[:, top : top + rows, left : left + cols] = 1
    shares = cut_canvases([pixels], vision)[0].mean(-1)
    index, masks = index_and_masks(height, width, grid, vision, torch.device("cpu"))
    torch.testing.assert_close(masks[:-1], shares)
    for value in (0, 1):  # the two that the model tells from all others
        assert torch.equal(masks[:-1] == value, (shares - value).abs() < 1e-6)
    assert (len(index), len(masks)) == (grid.num_crops,) * 2


def test_sizes_are_truncated_in_float32() -> None:
    """The product is a whole number in float32 and just below it in float64, or the other way round."""
    differ = 0
    for height in range(1, 2000, 7):
        for width in (641, 1023, 1920):
            *_, rows, cols = fit(height, width, 336, 560)
            scale = min(np.float32(336) / np.float32(height), np.float32(560) / np.float32(width))
            single = (int(np.float32(height) * scale), int(np.float32(width) * scale))
            assert (rows, cols) == (max(single[0], 1), max(single[1], 1))
            differ += single != (int(height * float(scale)), int(width * float(scale)))
    assert differ, "none of these sizes tells the two apart"


def test_a_value_of_minus_one_makes_a_crop_count_as_padding() -> None:
    patches = torch.randn(3, 4, 5)
    patches[1, 2, 3] = -1.0
    assert live_crops(patches).tolist() == [True, False, True]


def test_no_level_of_a_picture_is_normalised_to_minus_one() -> None:
    """Why crops of the fast mode need no check."""
    levels = torch.arange(256, dtype=torch.uint8).view(1, 16, 16, 1).expand(1, 16, 16, 3)
    canvas = letterbox(color_planes(levels, exact=False), 16, 16)
    assert (canvas + 1).abs().min() > 1e-3
    assert cut_crops(tiny_model.picture(), "medium", POCKET.vision).live is None
    crops = cut_crops(tiny_model.picture(), "medium", POCKET.vision, exact=True)
    assert crops.live is not None
    assert crops.live.shape == (len(crops.patches),)


@torch.inference_mode()
def test_a_crop_that_counts_as_padding_has_features_of_zero() -> None:
    model = tiny_model.build_model()
    patches = torch.randn(2, model.config.vision.num_patches, model.config.vision.patch_values)
    plain, masked = model.vision(patches), model.vision(patches, torch.tensor([True, False]))
    torch.testing.assert_close(masked[0], plain[0])
    assert not masked[1].any()
    assert plain[1].any()
