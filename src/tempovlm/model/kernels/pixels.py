"""A picture's pixels to the patches of its crops on CUDA, in two kernels: along its columns, then along its lines.

Both compute in float32 what the plain operations of `model/vision/device_crops.py` compute, one weighted sum along
each side, and the second one clamps, centres on the canvas, normalises and cuts too. No size is a constant of the
compilation, so that no picture waits for one.

Shapes: `H` × `W` pixels, `N` columns of all canvases, `T` taps of a line, `U` crops, `P` patches of a crop, `X`
values of a patch, `R` lines and `C` columns of a program.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from tempovlm.model.kernels.device import on_device

LINES, COLUMNS = 4, 64
"""Lines of the picture and columns of the result that one program of `across` makes."""

WHITE = tl.constexpr(255.0)


@dataclass(frozen=True, slots=True)
class Window:
    """The place of a fitted picture on a canvas, and the crops of the canvas.

    Attributes:
        column: its first one among those of all canvases.
        top: and `left`, `rows`, `cols`: of the fitted picture, in pixels.
        across: crops side by side. step: from one crop to the next, in pixels.
        patch: number of patches in crops of other canvases before its own.
    """

    column: int
    top: int
    left: int
    rows: int
    cols: int
    across: int
    step: int
    patch: int


@triton.jit(do_not_specialize=["height", "width", "columns", "taps"])
def _across(
    pixels_ptr, first_ptr, weights_ptr, out_ptr, height, width, columns, taps, R: tl.constexpr, C: tl.constexpr
):
    r, c = tl.program_id(0) * R + tl.arange(0, R), tl.program_id(1) * C + tl.arange(0, C)
    row, column, channel = r[:, None, None], c[None, :, None], tl.arange(0, 4)[None, None, :]
    inside = (row < height) & (column < columns) & (channel < 3)
    first = tl.load(first_ptr + c, mask=c < columns, other=0)
    begin = pixels_ptr + row.to(tl.int64) * width * 3 + channel
    total = tl.zeros((R, C, 4), dtype=tl.float32)
    for t in range(0, taps):
        weight = tl.load(weights_ptr + c * taps + t, mask=c < columns, other=0.0)
        source = tl.minimum(first + t, width - 1)
        x = tl.load(begin + source[None, :, None] * 3, mask=inside, other=0).to(tl.float32)
        total += weight[None, :, None] * tl.div_rn(x, WHITE)
    tl.store(out_ptr + (row.to(tl.int64) * columns + column) * 3 + channel, total, mask=inside)


@triton.jit(
    do_not_specialize=[
        "height", "columns", "taps", "column", "top", "left", "rows", "cols", "across", "step", "patch",
    ]
)  # fmt: skip
def _down(
    narrow_ptr, first_ptr, weights_ptr, means_ptr, deviations_ptr, out_ptr, height, columns, taps,
    column, top, left, rows, cols, across, step, patch,
    GRID: tl.constexpr, SIDE: tl.constexpr, X_PAD: tl.constexpr,
):  # fmt: skip
    place = tl.program_id(0)
    crop, own = place // (GRID * GRID), place % (GRID * GRID)
    i = tl.arange(0, X_PAD)
    is_value, channel = i < SIDE * SIDE * 3, i % 3
    y = crop // across * step + own // GRID * SIDE + i // (SIDE * 3) - top
    x = crop % across * step + own % GRID * SIDE + i // 3 % SIDE - left
    inside = is_value & (y >= 0) & (y < rows) & (x >= 0) & (x < cols)
    first = tl.load(first_ptr + y, mask=inside, other=0)
    total = tl.zeros((X_PAD,), dtype=tl.float32)
    for t in range(0, taps):
        weight = tl.load(weights_ptr + y * taps + t, mask=inside, other=0.0)
        source = tl.minimum(first + t, height - 1).to(tl.int64)
        total += weight * tl.load(
            narrow_ptr + (source * columns + column + x) * 3 + channel, mask=inside, other=0.0
        )
    total = tl.minimum(tl.maximum(total, 0.0), 1.0) - tl.load(means_ptr + channel)
    out = out_ptr + (place + patch).to(tl.int64) * (SIDE * SIDE * 3) + i
    tl.store(out, tl.div_rn(total, tl.load(deviations_ptr + channel)), mask=is_value)


@on_device
def across(pixels: Tensor, first: Tensor, weights: Tensor) -> Tensor:
    """Resize the lines of pixels (H, W, 3) uint8 to N columns: (H, N, 3) float32, from 0 to 1.

    Column `n` sums the pixels from `first[n]` on, with `weights[n]`: (N,) int32 and (N, T) float32.
    """
    (height, width, _), (columns, taps) = pixels.shape, weights.shape
    out = torch.empty(height, columns, 3, device=pixels.device)
    grid = (triton.cdiv(height, LINES), triton.cdiv(columns, COLUMNS))
    _across[grid](pixels, first, weights, out, height, width, columns, taps, LINES, COLUMNS)
    return out


@on_device
def down(
    narrow: Tensor, first: Tensor, weights: Tensor, shade: tuple[Tensor, Tensor], window: Window, out: Tensor, *,
    crops: int, grid: int, side: int,
) -> None:  # fmt: skip
    """Resize columns (H, N, 3) to lines, and write the patches of a canvas's crops to `out` (U, P, X).

    Args:
        narrow: of `across`.
        first: as there, of lines.
        weights: as there, of lines.
        shade: mean and deviation (3,) of the channels.
        window: what the canvas shows.
        out: patches of all crops.
        crops: of the canvas.
        grid: patches along the side of a crop.
        side: of a patch, in pixels.
    """
    place = (window.column, window.top, window.left, window.rows, window.cols, window.across, window.step)
    _down[(crops * grid * grid,)](
        narrow, first, weights, *shade, out, *narrow.shape[:2], weights.shape[1], *place, window.patch,
        grid, side, triton.next_power_of_2(side * side * 3),
    )  # fmt: skip
