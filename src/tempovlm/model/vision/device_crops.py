"""Cut a decoded picture on the device that holds the model: uploaded once as bytes, resized and cut there.

The result equals that of the exact mode of `tiling.cut_crops`. Resizing is the antialiased bilinear interpolation
of torch: every pixel of the result is a weighted sum along one side, then along the other, with triangular weights
(the separable filter of Pillow, which torch follows). On CUDA two kernels compute it (`model/kernels/pixels.py`).
Where there are none, the sums are weighted embedding bags: one launch for the columns of both canvases and one for
the rows of each, one product for each tap, and float32 whatever the settings of matrix products are. torch's own
interpolation on CUDA rounds the weights differently and refuses strong reductions for lack of shared memory. Small
tables of taps are made on the host and kept for pictures of the same size. Nothing here waits for the device.

Shapes: `U` distinct crops, `P` patches of a crop, `X` values of a patch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from tempovlm.model.config import VisionConfig
from tempovlm.model.layers import HAS_TRITON
from tempovlm.model.vision.tiling import (
    Crops,
    Grid,
    canvas_sizes,
    choose_grid,
    cut_canvases,
    cut_crops,
    fit,
    index_and_masks,
    mean_and_std,
    on_canvas,
)

MAX_SIDE = 1 << 16
"""Pictures with a longer side are cut on the host: their tables of taps would be larger than the picture."""

STRIP_VALUES = 1 << 24
"""Values of a picture that are in float32 at a time; limits the memory for large pictures."""


@dataclass(frozen=True, slots=True)
class Taps:
    """For each line of a result, the neighbouring lines of a picture that it sums, with their weights.

    Attributes:
        first: (N,) int32, the first line of the picture that each of `N` lines sums.
        weights: (N, T) float32, of that line and those after it; 0 where a line sums fewer than `T`.
    """

    first: Tensor
    weights: Tensor

    def apply(self, lines: Tensor) -> Tensor:
        """Apply the taps: (lines, values) float32 to (N, values)."""
        steps = torch.arange(self.weights.shape[1], device=lines.device)
        sources = (self.first[:, None] + steps).clamp_(max=len(lines) - 1)
        return F.embedding_bag(sources, lines, mode="sum", per_sample_weights=self.weights)


def cut_on_device(
    image: np.ndarray, tier: str, vision: VisionConfig, device: torch.device, *, exact: bool = False
) -> Crops:
    """Like `cut_crops` for a picture (H, W, 3) uint8 in host memory, with every tensor on the device.

    Pixels are those of the exact mode within rounding; `exact` adds the published padding rule, see `live_crops`.
    """
    height, width = image.shape[:2]
    grid = choose_grid(tier, height, width, vision)
    sizes = canvas_sizes(grid, vision)
    shapes = [fit(height, width, *size)[3:] for size in sizes]
    # torch blurs a single column in a way that no taps along the column reproduce.
    if max(height, width) > MAX_SIDE or any(cols == 1 for _, cols in shapes):
        return _sent(cut_crops(image, tier, vision, exact=exact), device)
    if device.type == "cuda" and HAS_TRITON:
        patches = cut_by_kernels(image, grid, vision, device)
    else:
        fitted = resize(torch.from_numpy(image), shapes, device)
        canvases = [on_canvas(one.unsqueeze(0), *size) for one, size in zip(fitted, sizes, strict=True)]
        patches = cut_canvases(canvases, vision)[0]
    index, masks = _index_and_masks(height, width, grid, vision, device, stream_of(device))
    return Crops(patches, index, masks, grid, (patches != -1).flatten(1).all(1) if exact else None)


def cut_by_kernels(image: np.ndarray, grid: Grid, vision: VisionConfig, device: torch.device) -> Tensor:
    """Return the patches (U, P, X) of a picture (H, W, 3) uint8 in host memory, on the device."""
    from tempovlm.model.kernels.pixels import Window, across, down

    (height, width, _), stream = image.shape, stream_of(device)
    sizes = canvas_sizes(grid, vision)
    fits = [fit(height, width, *size)[1:] for size in sizes]
    tables = taps(width, tuple(cols for *_, cols in fits), device, stream)
    narrow = across(to_device(torch.from_numpy(image), device), tables.first, tables.weights)
    grids = [(1, 1), (grid.rows, grid.cols)][: len(sizes)]
    out = torch.empty(sum(r * c for r, c in grids), vision.num_patches, vision.patch_values, device=device)
    column = patch = 0
    for (top, left, rows, cols), (r, c) in zip(fits, grids, strict=True):
        window = Window(column, top, left, rows, cols, c, vision.window * vision.patch_size, patch)
        lines = taps(height, (rows,), device, stream)
        down(
            narrow, lines.first, lines.weights, mean_and_std(device), window, out,
            crops=r * c, grid=vision.grid, side=vision.patch_size,
        )  # fmt: skip
        column, patch = column + cols, patch + r * c * vision.num_patches
    return out


def resize(pixels: Tensor, sizes: Sequence[tuple[int, int]], device: torch.device) -> list[Tensor]:
    """Resize pixels (H, W, 3) uint8 on the host to several (rows, cols): each (rows, cols, 3) from 0 to 1.

    Width first, as torch does on a CPU, strip by strip. Both sides have the same scale, so that the other
    order would pass as many values between the two steps.
    """
    height, width = pixels.shape[:2]
    stream = stream_of(device)
    across = taps(width, tuple(cols for _, cols in sizes), device, stream)
    # A tensor, because CUDA divides by a number of the host by multiplying with its rounded inverse.
    white = torch.full((), 255.0, device=device)
    strips = []
    for strip in pixels.split(max(STRIP_VALUES // (3 * width), 1)):
        lines = torch.empty(width, len(strip), 3, device=device)
        torch.div(to_device(strip, device).transpose(0, 1), white, out=lines)
        strips.append(across.apply(lines.flatten(1)).unflatten(1, (-1, 3)))
    narrow = strips[0] if len(strips) == 1 else torch.cat(strips, dim=1)
    fitted = []
    for (rows, cols), part in zip(sizes, narrow.split([cols for _, cols in sizes]), strict=True):
        lines = part.transpose(0, 1).flatten(1)
        fitted.append(taps(height, (rows,), device, stream).apply(lines).clamp_(0, 1).view(rows, cols, 3))
    return fitted


def stream_of(device: torch.device) -> int:
    """Return the current stream's number: tables are kept for each, so that none is used before it is there."""
    return torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0


@lru_cache(maxsize=128)
def taps(size: int, lengths: tuple[int, ...], device: torch.device, stream: int = 0) -> Taps:
    """Return the taps that resize `size` lines to each of some lengths, one result after the other."""
    del stream  # part of the key only
    parts = [_taps(size, length) for length in lengths]
    weights = np.zeros((sum(lengths), max(part.shape[1] for _, part in parts)), np.float32)
    end = 0
    for _, part in parts:
        weights[end : end + len(part), : part.shape[1]] = part
        end += len(part)
    first = np.concatenate([one for one, _ in parts]).astype(np.int32)
    return Taps(*(to_device(torch.from_numpy(array), device) for array in (first, weights)))


def _taps(size: int, length: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the first line that each of `length` lines sums, and the weights (length, T) from there on.

    Each step is rounded to float32 as torch rounds it on a CPU: far from the origin a centre is only exact to a
    thousandth of a line, and other roundings would give other weights.
    """
    one, half = np.float32(1), np.float32(0.5)
    scale = np.float32(size) / np.float32(length)
    reach, inverse = max(scale, one), one / max(scale, one)
    centres = scale * (np.arange(length, dtype=np.float32) + half)
    first = np.maximum((centres - reach + half).astype(np.int64), 0)
    counts = np.minimum((centres + reach + half).astype(np.int64), size) - first
    sources = first[:, None] + np.arange(counts.max())
    is_tap = sources < (first + counts)[:, None]
    distances = np.abs((sources.astype(np.float32) - centres[:, None] + half) * inverse)
    weights = np.where(is_tap, np.maximum(one - distances, 0), 0).astype(np.float32)
    # A running sum adds from left to right; `sum` would add in another order.
    weights /= np.cumsum(weights, axis=1, dtype=np.float32)[:, -1:]
    return first, weights


@lru_cache(maxsize=128)
def _index_and_masks(
    height: int, width: int, grid: Grid, vision: VisionConfig, device: torch.device, stream: int
) -> tuple[Tensor, Tensor]:
    """Make the table on the host, where its many small steps take less time than their launches, and cache it."""
    del stream  # part of the key only
    index, masks = index_and_masks(height, width, grid, vision, torch.device("cpu"))
    return to_device(index, device), to_device(masks, device)


def _sent(crops: Crops, device: torch.device) -> Crops:
    return replace(
        crops,
        patches=to_device(crops.patches, device),
        index=to_device(crops.index, device),
        masks=to_device(crops.masks, device),
        live=None if crops.live is None else to_device(crops.live, device),
    )


def to_device(values: Tensor, device: torch.device) -> Tensor:
    """Copy host memory to a device; to CUDA through pinned memory, so that the host does not wait.

    torch keeps pinned memory for later use, and reuses it only after the copies from it have ended. NumPy copies
    by one thread: torch would wake others, which takes longer than the copy of a picture where they have slept.
    """
    if device.type != "cuda":
        return values.to(device)
    pinned = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
    np.copyto(pinned.numpy(), values.numpy())
    return pinned.to(device, non_blocking=True)
