"""Dense labels: the content of each patch of a canvas, from a scene's boxes, and their loss.

For each half of a patch the character in it, for each patch the object and its colour. With them a model learns
to read in minutes, and hardly at all without. Shapes: `B` pictures, `N` boxes, `R` × `Q` patches of a
canvas, `C` crops, `P` patches of a crop, `G` pooled tokens of a crop.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tempovlm.model.config import ModelConfig, VisionConfig
from tempovlm.model.vision.tiling import Grid, fit
from tempovlm.testbed.lexicon import CHARSET, COLORS, SHAPES
from tempovlm.training.pictures import PictureBatch

NOTHING_WEIGHT = 0.1
"""Weight of the class 'nothing here', which most patches are."""

_ALL = slice(None)
MIN_COVER = 0.3
"""Share of a cell that a box must cover to be its label."""


@dataclass(frozen=True, slots=True)
class DenseLabels:
    """Class of each cell, 0 for nothing: `chars` (B·C, P, 2), `shapes` and `colors` (B·C, P)."""

    chars: Tensor
    shapes: Tensor
    colors: Tensor


def dense_labels(batch: PictureBatch, grid: Grid, vision: VisionConfig, pictures: slice = _ALL) -> DenseLabels:
    """Return the labels of all crops of some pictures, in the order in which their patches are cut."""
    parts = []
    for canvas, whole in (((vision.crop_size,) * 2, True), (grid.canvas(vision), False)):
        if not whole and (grid.rows, grid.cols) == (1, 1):
            break
        scale, top, left, _, _ = fit(batch.images.shape[1], batch.images.shape[2], *canvas)
        shift = _shift(left, top, batch.images.device)
        cells = (canvas[0] // vision.patch_size, canvas[1] // vision.patch_size)
        boxes = batch.char_boxes[pictures] * scale + shift
        chars = _label(boxes, (batch.char_ids[pictures],), cells, vision.patch_size, 2)
        boxes = batch.shape_boxes[pictures] * scale + shift
        kinds = (batch.shape_ids[pictures], batch.color_ids[pictures])
        shapes = _label(boxes, kinds, cells, vision.patch_size, 1)
        stacked = torch.stack([chars[0][..., 0::2], chars[0][..., 1::2], *shapes], dim=-1)
        g, w = vision.grid, vision.window
        parts.append(stacked.unfold(1, g, w).unfold(2, g, w).permute(0, 1, 2, 4, 5, 3).flatten(1, 2))
    labels = torch.cat(parts, dim=1).flatten(2, 3).flatten(0, 1)  # B·C, P, 4
    return DenseLabels(labels[..., :2], labels[..., 2], labels[..., 3])


@lru_cache(maxsize=256)
def _shift(left: int, top: int, device: torch.device) -> Tensor:
    """Return what is added to boxes (4,); kept, because copying from the host waits for the device."""
    return torch.tensor([left, top, left, top], device=device)


def _label(boxes: Tensor, ids: tuple[Tensor, ...], cells: tuple[int, int], patch: int, split: int) -> list[Tensor]:
    """Return, for each list of ids, the class of the box covering most of each cell, (B, R, Q·split), or 0.

    Later boxes lie above earlier ones, so of two with equal cover the later one counts.
    """
    width = patch / split
    rows = _overlap(boxes[..., 1], boxes[..., 3], cells[0], float(patch)) / patch  # B, N, R
    cols = _overlap(boxes[..., 0], boxes[..., 2], cells[1] * split, width) / width
    order = torch.arange(boxes.shape[1], device=boxes.device) * 1e-4
    cover = rows[..., None] * cols[:, :, None, :]  # B, N, R, Q
    cover = torch.where((cover > MIN_COVER) & (ids[0] >= 0)[..., None, None], cover, -1.0)
    best, which = (cover + order[:, None, None]).max(dim=1)
    found = best > 0
    labels = []
    for values in ids:
        picked = values.gather(1, which.flatten(1)).view_as(which) + 1
        labels.append(torch.where(found, picked, 0))
    return labels


def _overlap(low: Tensor, high: Tensor, count: int, size: float) -> Tensor:
    """Return the length that each interval (B, N) shares with each of `count` cells of a line, (B, N, count)."""
    start = torch.arange(count, device=low.device) * size
    return (torch.minimum(high[..., None], start + size) - torch.maximum(low[..., None], start)).clamp_min(0)


class DenseHead(nn.Module):
    """Linear read-outs of the labels from patch features and from pooled tokens; dropped after training."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        classes = 2 * (len(CHARSET) + 1) + len(SHAPES) + 1 + len(COLORS) + 1
        self.pool, self.side = config.vision.pool, config.vision.pooled
        self.from_patches = nn.Linear(config.vision.feature_width, classes)
        self.from_tokens = nn.Linear(config.width, classes * config.vision.pool**2)

    def forward(self, features: Tensor, tokens: Tensor, labels: DenseLabels) -> tuple[Tensor, Tensor, Tensor]:
        """Return losses from features (B·C, P, ·) and tokens (B·C, G, D); character accuracy from the tokens."""
        s, p = self.side, self.pool
        windows = self.from_tokens(tokens).view(-1, s, s, p, p, self.from_patches.out_features)
        patches = windows.permute(0, 1, 3, 2, 4, 5).flatten(3, 4).flatten(1, 2)
        patches = patches.reshape(tokens.shape[0], s * p * s * p, -1)
        pooled, accuracy = _loss(patches, labels)
        return _loss(self.from_patches(features), labels)[0], pooled, accuracy


def _loss(scores: Tensor, labels: DenseLabels) -> tuple[Tensor, Tensor]:
    """Return summed cross-entropies with 'nothing' weighed down; accuracy over the cells with a character."""
    n = len(CHARSET) + 1
    first, second, shape, color = scores.float().split([n, n, len(SHAPES) + 1, len(COLORS) + 1], dim=-1)
    chars = torch.stack((first, second), dim=-2)
    total = torch.zeros((), device=scores.device)
    for logits, target in ((chars, labels.chars), (shape, labels.shapes), (color, labels.colors)):
        weight = torch.ones(logits.shape[-1], device=scores.device)
        weight[:1].fill_(NOTHING_WEIGHT)  # assigned, it would be copied from the host
        total = total + F.cross_entropy(logits.flatten(0, -2), target.flatten(), weight)
    held = labels.chars > 0
    right = (chars.argmax(-1) == labels.chars) & held
    return total, right.sum() / held.sum().clamp_min(1)
