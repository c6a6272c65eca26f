"""Cut a picture into crops: the grid that a tier chooses for a picture, and its letterboxed, overlapping crops.

Shapes: `C` crops (the global crop first), `U` distinct crops, `P` patches of a crop,
`X` values of a patch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from tempovlm.core.checks import wrong_argument
from tempovlm.model.config import CLIP_MEAN, CLIP_STD, VisionConfig

CROPS_OF_TIER = {"low": (1, 1), "medium": (4, 6), "high": (9, 12)}
"""Range of tile crops of each tier, besides the global crop."""


@dataclass(frozen=True, slots=True)
class Grid:
    """Grid of tile crops of a picture, as rows × columns."""

    rows: int
    cols: int

    @property
    def num_crops(self) -> int:
        """Number of crops with the global one."""
        return 1 + self.rows * self.cols

    def canvas(self, vision: VisionConfig) -> tuple[int, int]:
        """Height and width in pixels of the canvas that the tiles cover."""
        window, margin = vision.window * vision.patch_size, sum(vision.margins) * vision.patch_size
        return window * self.rows + margin, window * self.cols + margin

    def kept(self, vision: VisionConfig) -> tuple[int, int]:
        """Rows and columns of pooled tokens that the tiles keep together, overlaps counted once."""
        window, margin = vision.window // vision.pool, sum(vision.margins) // vision.pool
        return window * self.rows + margin, window * self.cols + margin

    def num_tokens(self, vision: VisionConfig) -> int:
        """Vision tokens of the picture: those of the tiles and of the global crop."""
        rows, cols = self.kept(vision)
        return rows * cols + vision.pooled**2


@dataclass(frozen=True, slots=True)
class Crops:
    """Normalised patches, ready for the vision transformer.

    Attributes:
        patches: (U, P, X) float32; crops with equal pixels appear once.
        index: (C,) index of each crop among the U distinct ones.
        masks: (C, P) share of each patch that is picture; the published order, shifted by one crop.
        live: (U,) False for crops whose features are zeroed, see `live_crops`; None if that cannot happen.
    """

    patches: Tensor
    index: Tensor
    masks: Tensor
    grid: Grid
    live: Tensor | None = None

    def record_stream(self, stream: torch.cuda.Stream) -> None:
        """Keep the memory of what is on a device until work on another stream has ended that is started by now."""
        for one in (self.patches, self.index, self.masks, self.live):
            if one is not None and one.is_cuda:
                one.record_stream(stream)


def grids_of(tier: str) -> list[Grid]:
    """Return the grids in the tier's range.

    Raises:
        UserError: the tier is unknown.
    """
    if tier not in CROPS_OF_TIER:
        raise wrong_argument("tier", tier, f"unknown; choose from {', '.join(CROPS_OF_TIER)}")
    least, most = CROPS_OF_TIER[tier]
    return [Grid(r, c) for r in range(1, most + 1) for c in range(1, most // r + 1) if r * c >= least]


@lru_cache(maxsize=1024)
def choose_grid(tier: str, height: int, width: int, vision: VisionConfig) -> Grid:
    """Return the grid of the tier whose canvas is closest to the picture in log ratio; ties go to fewer crops.

    Raises:
        UserError: the tier is unknown.
    """

    def distance(grid: Grid) -> tuple[float, int, int]:
        canvas_height, canvas_width = grid.canvas(vision)
        mismatch = abs(math.log(canvas_width / canvas_height) - math.log(width / height))
        return round(mismatch, 9), grid.rows * grid.cols, grid.rows

    return min(grids_of(tier), key=distance)


def cut_crops(image: np.ndarray, tier: str, vision: VisionConfig, *, exact: bool = False) -> Crops:
    """Letterbox a picture (H, W, 3) uint8 to the tier's canvas and cut it into normalised crops.

    `exact` resizes in float32 as the published preprocessing does; otherwise uint8 is resized, which differs
    by about one of 255 levels at most and takes a fraction of the time.
    """
    grid = choose_grid(tier, image.shape[0], image.shape[1], vision)
    crops = cut_batch(torch.from_numpy(image).unsqueeze(0), grid, vision, exact=exact)
    patches = crops.patches[0]
    return Crops(patches, crops.index, crops.masks, grid, live_crops(patches) if exact else None)


def cut_tiles(image: np.ndarray, tier: str, vision: VisionConfig, *, exact: bool = False) -> Crops:
    """Like `cut_crops` after the global crop was cut, which is the same at every tier.

    `patches` and `live` are those of the tiles only, (U - 1, …), while `index` and `masks` are of all crops. Only
    for tiers of several tiles: a single tile equals the global crop.
    """
    height, width, _ = image.shape
    grid = choose_grid(tier, height, width, vision)
    planes = color_planes(torch.from_numpy(image).unsqueeze(0), exact=exact)
    patches = cut_canvases([letterbox(planes, *grid.canvas(vision))], vision)[0]
    index, masks = index_and_masks(height, width, grid, vision, planes.device)
    return Crops(patches, index, masks, grid, live_crops(patches) if exact else None)


def cut_batch(images: Tensor, grid: Grid, vision: VisionConfig, *, exact: bool) -> Crops:
    """Like `cut_crops` for pictures (B, H, W, 3) of one size on any device: `patches` (B, U, P, X), masks shared.

    Every crop counts as live: for training, where the published padding rule has no use.
    """
    planes = color_planes(images, exact=exact)
    canvases = [letterbox(planes, *size) for size in canvas_sizes(grid, vision)]
    index, masks = index_and_masks(images.shape[1], images.shape[2], grid, vision, images.device)
    return Crops(cut_canvases(canvases, vision), index, masks, grid)


def canvas_sizes(grid: Grid, vision: VisionConfig) -> tuple[tuple[int, int], ...]:
    """Return height and width of the canvases that distinct crops are cut from: the global crop's, the tiles'."""
    whole, tiled = (vision.crop_size, vision.crop_size), grid.canvas(vision)
    return (whole,) if tiled == whole else (whole, tiled)


def cut_canvases(canvases: Sequence[Tensor], vision: VisionConfig) -> Tensor:
    """Cut canvases (B, height, width, 3) into the patches of their crops, row by row: (B, U, P, X)."""
    size, step = vision.crop_size, vision.window * vision.patch_size
    cut = [canvas.unfold(1, size, step).unfold(2, size, step).permute(0, 1, 2, 4, 5, 3) for canvas in canvases]
    patches = [patchify(crops.flatten(1, 2), vision) for crops in cut]
    return patches[0] if len(patches) == 1 else torch.cat(patches, dim=1)


def index_and_masks(
    height: int, width: int, grid: Grid, vision: VisionConfig, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Return `Crops.index` and `Crops.masks` of a picture of this size."""
    *_, canvas = canvas_sizes(grid, vision)
    *_, rows, cols = fit(height, width, *canvas)
    down = _covered(rows, canvas[0], vision, device)
    across = _covered(cols, canvas[1], vision, device)
    pixels = down[:, None, :, None] * across[None, :, None, :]
    masks = shift_masks(pixels.reshape(-1, vision.num_patches) / vision.patch_size**2)
    if (grid.rows, grid.cols) == (1, 1):
        return torch.zeros(2, dtype=torch.long, device=device), masks
    return torch.arange(grid.num_crops, device=device), masks


def _covered(length: int, canvas: int, vision: VisionConfig, device: torch.device) -> Tensor:
    """Count, along one side, the picture's pixel lines in each patch of each tile: (tiles, patches) float32."""
    size, step = vision.crop_size, vision.window * vision.patch_size
    lines, start = torch.zeros(canvas, device=device), (canvas - length) // 2
    lines[start : start + length].fill_(1)  # a number that is assigned would be copied from the host
    return lines.unfold(0, size, step).unflatten(1, (vision.grid, vision.patch_size)).sum(-1)


def live_crops(patches: Tensor) -> Tensor:
    """Return a mask (U,) of the crops that the published model does not take for padding, from (U, P, X) patches.

    It pads batches with crops of -1 and recognises them by that value: one value of exactly -1 zeroes the features
    of a whole crop. Resizing in float32 hits -1 now and then; no level of a uint8 picture is normalised to it.
    """
    # numpy, because torch takes several times as long for this reduction on a CPU.
    return torch.from_numpy((patches.flatten(1).numpy() != -1).all(1))


def shift_masks(tile_masks: Tensor) -> Tensor:
    """Turn masks of tiles (tiles, P) into (C, P): a row of -1 comes last, though the global crop is first.

    The released model was trained with its masks shifted by one crop; exactness needs the same shift.
    """
    return torch.cat((tile_masks, tile_masks.new_full((1, tile_masks.shape[1]), -1.0)))


def fit(height: int, width: int, canvas_height: int, canvas_width: int) -> tuple[float, int, int, int, int]:
    """Return the place of a picture in a canvas: scale, top and left border, height and width, in pixels.

    Scale and scaled size are computed in float32 and the size is truncated, as published.
    """
    scale = min(np.float32(canvas_height / height), np.float32(canvas_width / width))
    # numpy before 2 multiplies a Python int by a float32 in float64, which can truncate to another size.
    rows, cols = max(int(np.float32(height) * scale), 1), max(int(np.float32(width) * scale), 1)
    return float(scale), (canvas_height - rows) // 2, (canvas_width - cols) // 2, rows, cols


def color_planes(images: Tensor, *, exact: bool) -> Tensor:
    """Turn (B, H, W, 3) uint8 pictures into (B, 3, H, W): float32 in [0, 1] for exact resizing, else unchanged."""
    planes = images.permute(0, 3, 1, 2)
    return planes.contiguous().float().div_(255) if exact else planes


def letterbox(planes: Tensor, height: int, width: int) -> Tensor:
    """Fit (B, 3, H, W) planes into a canvas by antialiased bilinear resizing in their type; see `on_canvas`."""
    *_, rows, cols = fit(planes.shape[2], planes.shape[3], height, width)
    fitted = F.interpolate(planes, (rows, cols), mode="bilinear", antialias=True)
    fitted = fitted.clamp_(0, 1) if fitted.is_floating_point() else fitted.float().div_(255)
    return on_canvas(fitted.permute(0, 2, 3, 1), height, width)


def on_canvas(fitted: Tensor, height: int, width: int) -> Tensor:
    """Centre pixels (B, rows, cols, 3) from 0 to 1 on a black canvas: (B, height, width, 3).

    The canvas is normalised after padding.
    """
    rows, cols = fitted.shape[1:3]
    top, left = (height - rows) // 2, (width - cols) // 2
    canvas = torch.zeros(fitted.shape[0], height, width, 3, device=fitted.device)
    canvas[:, top : top + rows, left : left + cols] = fitted
    mean, std = mean_and_std(fitted.device)
    return canvas.sub_(mean).div_(std)


@lru_cache(maxsize=16)
def mean_and_std(device: torch.device) -> tuple[Tensor, Tensor]:
    """Return the channels' means and deviations; cached, because copying them to a device waits for it."""
    with torch.inference_mode(mode=False):
        return torch.tensor(CLIP_MEAN, device=device), torch.tensor(CLIP_STD, device=device)


def patchify(crops: Tensor, vision: VisionConfig) -> Tensor:
    """Turn (B, C, S, S, 3) pixels into (B, C, P, X) patches, values ordered row, column, channel."""
    g, p = vision.grid, vision.patch_size
    patches = crops.reshape(*crops.shape[:2], g, p, g, p, 3).permute(0, 1, 2, 4, 3, 5, 6)
    return patches.reshape(*crops.shape[:2], g * g, p * p * 3)
