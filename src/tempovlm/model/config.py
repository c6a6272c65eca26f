"""Sizes of a Molmo-style model, read from and written to the published `config.json` layout.

The pocket and MolmoE-1B are two values of `ModelConfig`; no other code tells them apart.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from tempovlm.core.errors import UserError
from tempovlm.core.shape import ModelShape

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


@dataclass(frozen=True, slots=True, kw_only=True)
class VisionConfig:
    """The vision transformer and the crop geometry.

    Attributes:
        crop_size: side of a square crop in pixels. patch_size: side of a patch in pixels.
        margins: overlap of neighbouring crops, in patches, at (top or left, bottom or right).
        feature_layers: which blocks' outputs are kept, counted from the end, as published.
        pool: side of the window of patches that attention pooling turns into one token.
    """

    crop_size: int = 336
    patch_size: int = 14
    margins: tuple[int, int] = (4, 4)
    width: int = 1024
    num_blocks: int = 23
    num_heads: int = 16
    mlp_width: int = 4096
    feature_layers: tuple[int, ...] = (-2, -9)
    pool: int = 2
    norm_eps: float = 1e-5

    @property
    def grid(self) -> int:
        """Patches along a side of a crop."""
        return self.crop_size // self.patch_size

    @property
    def num_patches(self) -> int:
        """Patches of a crop."""
        return self.grid**2

    @property
    def pooled(self) -> int:
        """Tokens along a side of a crop after pooling."""
        return self.grid // self.pool

    @property
    def window(self) -> int:
        """Patches along a side of the part of a crop that does not overlap its neighbours."""
        return self.grid - sum(self.margins)

    @property
    def patch_values(self) -> int:
        """Values of a patch: its pixels times three channels."""
        return self.patch_size**2 * 3

    @property
    def feature_blocks(self) -> tuple[int, ...]:
        """`feature_layers` as indices of blocks from the start."""
        return tuple(layer % self.num_blocks for layer in self.feature_layers)

    @property
    def feature_width(self) -> int:
        """Width of a patch's features: the kept layers, concatenated."""
        return self.width * len(self.feature_layers)


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """A whole model: decoder sizes here, the vision side in `vision`.

    `embedding_size` rows are predicted by the head; `additional_vocab_size` further rows are embedded only.
    """

    width: int = 2048
    num_blocks: int = 16
    num_heads: int = 16
    num_experts: int = 64
    top_k: int = 8
    expert_width: int = 1024
    embedding_size: int = 50304
    additional_vocab_size: int = 128
    rope_theta: float = 10000.0
    norm_eps: float = 1e-5
    max_sequence_length: int = 4096
    vision: VisionConfig = VisionConfig()

    @property
    def head_width(self) -> int:
        """Features of one attention head."""
        return self.width // self.num_heads

    @property
    def shape(self) -> ModelShape:
        """The numbers that plans, costs and the knob space need."""
        vision = self.vision
        return ModelShape(
            num_blocks=self.num_blocks,
            num_experts=self.num_experts,
            top_k=self.top_k,
            width=self.width,
            expert_width=self.expert_width,
            vocab_size=self.embedding_size,
            image_blocks=max(vision.feature_blocks) + 1,
            image_width=vision.width,
            image_mlp_width=vision.mlp_width,
            image_patches=vision.num_patches,
            patch_values=vision.patch_values,
            crop_tokens_side=vision.pooled,
        )

    @classmethod
    def from_hub(cls, fields: Mapping[str, Any]) -> ModelConfig:
        """Read the published layout of `config.json`.

        Raises:
            UserError: a field is missing, or asks for a variant that MolmoE does not use.
        """
        try:
            _check_variant(fields)
            _check_counts(fields)
            vision = fields["vision_backbone"]
            size, patch = vision["image_default_input_size"][0], vision["image_patch_size"]
            expert_width = fields.get("mlp_hidden_size") or fields["mlp_ratio"] * fields["d_model"]
            return cls(
                width=fields["d_model"],
                num_blocks=fields["n_layers"],
                num_heads=fields["n_heads"],
                num_experts=fields["moe_num_experts"],
                top_k=fields["moe_top_k"],
                expert_width=expert_width // 2,
                embedding_size=fields["embedding_size"],
                additional_vocab_size=fields["additional_vocab_size"],
                rope_theta=fields["rope_theta"],
                norm_eps=fields["layer_norm_eps"],
                max_sequence_length=fields["max_sequence_length"],
                vision=VisionConfig(
                    crop_size=size,
                    patch_size=patch,
                    margins=tuple(fields["overlap_margins"]),
                    width=vision["image_emb_dim"],
                    num_blocks=vision["image_num_layers"],
                    num_heads=vision["image_num_heads"],
                    mlp_width=vision["image_mlp_dim"],
                    feature_layers=tuple(fields["vit_layers"]),
                    pool=fields["image_pooling_h"],
                    norm_eps=vision["image_norm_eps"],
                ),
            )
        except KeyError as missing:
            raise UserError(f"config.json: field {missing} is missing; is this a Molmo checkpoint?") from None

    def to_hub(self) -> dict[str, Any]:
        """The published layout of `config.json`, as far as this code reads it."""
        vision = self.vision
        return {
            "model_type": "molmo",
            "d_model": self.width,
            "n_layers": self.num_blocks,
            "n_heads": self.num_heads,
            "moe_num_experts": self.num_experts,
            "moe_top_k": self.top_k,
            "mlp_hidden_size": 2 * self.expert_width,
            "embedding_size": self.embedding_size,
            "additional_vocab_size": self.additional_vocab_size,
            "rope_theta": self.rope_theta,
            "layer_norm_eps": self.norm_eps,
            "max_sequence_length": self.max_sequence_length,
            "overlap_margins": list(vision.margins),
            "vit_layers": list(vision.feature_layers),
            "image_pooling_h": vision.pool,
            "image_pooling_w": vision.pool,
            **_VARIANT,
            "vision_backbone": {
                "image_default_input_size": [vision.crop_size, vision.crop_size],
                "image_patch_size": vision.patch_size,
                "image_emb_dim": vision.width,
                "image_num_layers": vision.num_blocks,
                "image_num_heads": vision.num_heads,
                "image_mlp_dim": vision.mlp_width,
                "image_norm_eps": vision.norm_eps,
            },
        }


_VARIANT: dict[str, Any] = {
    "activation_type": "swiglu",
    "attention_layer_norm": True,
    "block_type": "moe",
    "crop_mode": "overlap-and-resize-c2",
    "image_padding_embed": "pad_and_partial_pad",
    "image_pooling_2d": "attention-meanq",
    "image_projector": "mlp",
    "layer_norm_type": "rms",
    "norm_after": False,
    "qkv_bias": False,
    "use_position_ids": True,
    "weight_tying": False,
}
"""The one variant of the family that this code implements."""


_COUNTS = (
    "d_model",
    "n_layers",
    "n_heads",
    "moe_num_experts",
    "moe_top_k",
    "embedding_size",
    "max_sequence_length",
)


def _check_counts(fields: Mapping[str, Any]) -> None:
    for name in _COUNTS:
        if not isinstance(fields[name], int) or fields[name] < 1:
            raise UserError(f"config.json: field {name} is {fields[name]!r}, not a whole number from 1 on")


def _check_variant(fields: Mapping[str, Any]) -> None:
    for name, ours in _VARIANT.items():
        if fields.get(name, ours) != ours:
            raise UserError(f"config.json: {name} is {fields[name]!r}; only {ours!r} is supported (MolmoE-1B)")


MOLMOE_1B = ModelConfig()
"""allenai/MolmoE-1B-0924: 7.2 B parameters, about 1.1 B of them active for a token."""

POCKET = replace(
    MOLMOE_1B,
    width=192,
    num_heads=6,
    num_experts=16,
    expert_width=48,
    embedding_size=1024,
    additional_vocab_size=0,
    max_sequence_length=1024,
    vision=VisionConfig(
        crop_size=96,
        patch_size=8,
        margins=(2, 2),
        width=128,
        num_blocks=6,
        num_heads=4,
        mlp_width=512,
        feature_layers=(-1, -4),
    ),
)
"""The embedded small model: the same architecture, sized for a laptop's CPU."""

PRESETS = {"pocket": POCKET, "molmoe-1b": MOLMOE_1B}
