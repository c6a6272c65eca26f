"""The sizes of a model that plans and costs are computed from; no weights, no torch."""

from __future__ import annotations

from dataclasses import dataclass

FINE, FINE_LIMIT, COARSE = 64, 512, 128
"""(a, b, c): padded lengths are multiples of a up to b, and of c above."""


def padded_length(length: int) -> int:
    """Return the length that a prompt is padded to for a captured graph."""
    step = FINE if length <= FINE_LIMIT else COARSE
    return -(-length // step) * step


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelShape:
    """Sizes of a Molmo-style model.

    Widths count features, `image_*` describes the vision transformer, `crop_tokens_side` is the side of a
    crop's pooled grid (12 for MolmoE-1B: 144 tokens a crop).
    """

    num_blocks: int
    num_experts: int
    top_k: int
    width: int
    expert_width: int
    vocab_size: int
    image_blocks: int
    image_width: int
    image_mlp_width: int
    image_patches: int
    patch_values: int
    crop_tokens_side: int
