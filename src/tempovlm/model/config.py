"""Sizes of a Molmo-style model, read from and written to the published `config.json` layout.

The pocket and MolmoE-1B are two values of `ModelConfig`; no other code tells them apart.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from tempovlm.core.shape import ModelShape
from tempovlm.model.files.fields import MOST, Fields

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


@dataclass(frozen=True, slots=True, kw_only=True)
class VisionConfig:
    """The vision transformer and the crop geometry.

    Attributes:
        crop_size: side of a square crop in pixels. patch_size: side of a patch in pixels.
        margins: overlap of neighbouring crops, in patches, at (top or left, bottom or right).
        feature_layers: blocks whose outputs are kept, counted from the end, as published.
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
    model_type: ClassVar[str] = "molmo"

    @property
    def kv_heads(self) -> int:
        """Heads of the keys and values that a token leaves in the cache."""
        return self.num_heads

    @property
    def head_width(self) -> int:
        """Features of one attention head."""
        return self.width // self.num_heads

    @property
    def shape(self) -> ModelShape:
        """Return the numbers that plans, costs and the knob space need."""
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
    def from_hub(cls, values: Mapping[str, Any], where: str = "config.json") -> ModelConfig:
        """Read the published layout of `config.json`; `where` names the file in messages.

        Raises:
            UserError: a field is missing, of a wrong type or value, does not fit another, or asks for a variant
                that MolmoE does not use; names it.
        """
        fields = Fields(values, where)
        for name, ours in (_VARIANT | _VARIANT_UNWRITTEN).items():
            fields.fixed(name, ours)
        width, heads = fields.whole("d_model"), fields.whole("n_heads")
        if width % heads or width // heads % 2:
            raise fields.wrong("n_heads", f"which does not divide d_model {width} into heads of an even width")
        fields.fixed("n_kv_heads", heads)
        fields.fixed("head_dim", width // heads)
        experts, top_k = fields.whole("moe_num_experts"), fields.whole("moe_top_k")
        if top_k > experts:
            raise fields.wrong("moe_top_k", f"more than moe_num_experts, {experts}")
        return cls(
            width=width,
            num_blocks=fields.whole("n_layers", most=MOST_BLOCKS),
            num_heads=heads,
            num_experts=experts,
            top_k=top_k,
            expert_width=_expert_width(fields, width),
            embedding_size=fields.whole("embedding_size"),
            additional_vocab_size=fields.whole("additional_vocab_size", least=0),
            rope_theta=fields.positive("rope_theta"),
            norm_eps=fields.positive("layer_norm_eps"),
            max_sequence_length=fields.whole("max_sequence_length"),
            vision=_vision_from_hub(fields),
        )

    def to_hub(self) -> dict[str, Any]:
        """Return the published layout of `config.json`, as far as this code reads it."""
        vision = self.vision
        return {
            "model_type": self.model_type,
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


_VARIANT_UNWRITTEN: dict[str, Any] = {
    "alibi": False,
    "always_start_with_space": True,
    "attention_layer_norm_with_affine": True,
    "attn_logit_softcapping": None,
    "clip_qkv": None,
    "final_logit_softcapping": None,
    "include_bias": False,
    "layer_norm_with_affine": True,
    "message_formatting": "role",
    "moe_interleave": False,
    "moe_shared_expert": False,
    "multi_query_attention": False,
    "normalize_input_embeds": False,
    "rope": True,
    "rope_impl": "llama",
    "scale_logits": False,
    "use_cls_feature": False,
    "use_col_tokens": True,
}
"""Further fields of published files, of which another value would give other answers."""

MOST_BLOCKS = 1024
"""Limit of blocks of a decoder or a vision transformer; each takes time to build before weights are read."""


def _expert_width(fields: Fields, width: int) -> int:
    """Limit of half of the hidden width, which includes the gate's units."""
    name = "mlp_hidden_size" if fields.values.get("mlp_hidden_size") is not None else "mlp_ratio"
    hidden = fields.positive(name) * (1 if name == "mlp_hidden_size" else width)
    if hidden % 2 or not 2 <= hidden <= MOST:
        raise fields.wrong(name, f"which makes experts of hidden width {hidden:g}, not an even number from 2 on")
    return int(hidden) // 2


def _vision_from_hub(fields: Fields) -> VisionConfig:
    """Return the vision side: its own table, and the fields outside of it."""
    own = fields.table("vision_backbone")
    for name, ours in _VISION_VARIANT.items():
        own.fixed(name, ours)
    size, patch = own.list_of_whole("image_default_input_size", 2), own.whole("image_patch_size", most=MOST_PIXELS)
    if size[0] != size[1] or not 0 < size[0] <= MOST_PIXELS or size[0] % patch:
        raise own.wrong("image_default_input_size", f"not a square of whole patches of image_patch_size {patch}")
    grid, pool = size[0] // patch, fields.whole("image_pooling_h")
    if grid % pool:
        raise fields.wrong("image_pooling_h", f"which does not divide a crop's {grid} patches a side")
    fields.fixed("image_pooling_w", pool)
    margins = fields.list_of_whole("overlap_margins", 2)
    if min(margins) < 0 or sum(margins) >= grid or any(margin % pool for margin in margins):
        rule = f"not two multiples of image_pooling_h {pool} that leave some of a crop's {grid} patches a side"
        raise fields.wrong("overlap_margins", rule)
    blocks, layers = own.whole("image_num_layers", most=MOST_BLOCKS), fields.list_of_whole("vit_layers")
    if not all(-blocks <= layer < blocks for layer in layers):
        raise fields.wrong("vit_layers", f"of which not all are among image_num_layers {blocks}")
    width, heads = own.whole("image_emb_dim"), own.whole("image_num_heads")
    if width % heads:
        raise own.wrong("image_num_heads", f"which does not divide image_emb_dim {width}")
    own.fixed("image_num_key_value_heads", heads)
    own.fixed("image_head_dim", width // heads)
    own.fixed("image_num_pos", grid**2 + 1)
    own.fixed("image_pos_patch_size", patch)
    return VisionConfig(
        crop_size=size[0],
        patch_size=patch,
        margins=(margins[0], margins[1]),
        width=width,
        num_blocks=blocks,
        num_heads=heads,
        mlp_width=own.whole("image_mlp_dim"),
        feature_layers=layers,
        pool=pool,
        norm_eps=own.positive("image_norm_eps"),
    )


_VISION_VARIANT = {"image_mlp_activations": "quick_gelu", "image_model_type": "openai", "resize_mode": "default"}

MOST_PIXELS = 4096
"""Limit of a crop's side; a vision transformer looks at all pairs of its patches."""


MOLMOE_1B = ModelConfig()
"""allenai/MolmoE-1B-0924: 7.2 B parameters, about 1.1 B of them active for a token."""

POCKET = replace(
    MOLMOE_1B,
    width=192,
    num_heads=6,
    num_experts=32,
    expert_width=24,
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
