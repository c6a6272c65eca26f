"""Floating-point operations and bytes of a plan, computed from a shape so that estimates can extrapolate.

Counts matrix products and attention; norms, activations and routing's sort are left out (under 2 % of the
operations of either model).
"""

from __future__ import annotations

from dataclasses import dataclass

from tempovlm.core.plan import Plan
from tempovlm.core.shape import ModelShape

FEATURE_LAYERS = 2
"""Layers of the vision transformer whose outputs are kept side by side."""


@dataclass(frozen=True, slots=True)
class Cost:
    """Operations and bytes moved, for each stage that runs the model.

    A multiply-add is two operations. Bytes are weights and cache entries, each read once for a forward pass.
    """

    flops: dict[str, float]
    bytes: dict[str, float]

    @property
    def total_flops(self) -> float:
        """Operations of the whole answer."""
        return sum(self.flops.values())

    @property
    def total_bytes(self) -> float:
        """Bytes of the whole answer."""
        return sum(self.bytes.values())


def plan_cost(
    plan: Plan,
    shape: ModelShape,
    num_crops: int,
    vision_tokens: int,
    text_tokens: int,
    output_tokens: int,
    *,
    distinct_crops: int | None = None,
    value_bytes: int = 2,
) -> Cost:
    """The cost of one answer.

    Args:
        plan: which blocks run, with how many experts.
        shape: sizes of the model.
        num_crops: crops that are pooled and projected, the global one included.
        vision_tokens: image features that reach the decoder.
        text_tokens: all other tokens of the prompt.
        output_tokens: generated tokens; the prefill makes the first.
        distinct_crops: crops that pass through the vision transformer. Default: `num_crops`.
        value_bytes: bytes of a weight.
    """
    prompt = vision_tokens + text_tokens
    crops = num_crops if distinct_crops is None else distinct_crops
    vision_weights, projector_weights = _vision_weights(shape), _projector_weights(shape)
    steps = range(prompt + 1, prompt + output_tokens)
    flops = {
        "vision_encoder": crops * _vision_flops(shape),
        "projector": num_crops * _projector_flops(shape),
        "prefill": _forward_flops(plan, shape, prompt, prompt * (prompt + 1) / 2),
        "decode": sum(_forward_flops(plan, shape, 1, context) for context in steps),
    }
    values = {
        "vision_encoder": vision_weights if crops else 0,
        "projector": projector_weights if num_crops else 0,
        "prefill": _forward_values(plan, shape, prompt, 0),
        "decode": sum(_forward_values(plan, shape, 1, context) for context in steps),
    }
    return Cost(flops, {stage: float(count * value_bytes) for stage, count in values.items()})


def active_parameters(plan: Plan, shape: ModelShape) -> int:
    """Return the decoder weights that one generated token uses: the plan's blocks and experts, and the head."""
    return int(_forward_values(plan, shape, tokens=1, context=0))


def image_parameters(shape: ModelShape) -> int:
    """Return the weights that a picture's crops use: the vision transformer's running blocks and the projector."""
    return int(_vision_weights(shape) + _projector_weights(shape))


def _vision_weights(shape: ModelShape) -> float:
    width = shape.image_width
    block = 4 * width * width + 2 * width * shape.image_mlp_width
    return shape.patch_values * width + shape.image_blocks * block


def _vision_flops(shape: ModelShape) -> float:
    """Return the operations of one crop in the vision transformer, its class token included."""
    width, tokens = shape.image_width, shape.image_patches + 1
    block = 4 * width * width + 2 * width * shape.image_mlp_width
    attention = 4 * tokens * tokens * width
    embedding = 2 * shape.image_patches * shape.patch_values * width
    return embedding + shape.image_blocks * (2 * tokens * block + attention)


def _projector_weights(shape: ModelShape) -> float:
    features, width = FEATURE_LAYERS * shape.image_width, shape.image_width
    return 3 * features * width + width * width + 2 * width * shape.width + shape.width**2


def _projector_flops(shape: ModelShape) -> float:
    """Return the operations of attention pooling and projection of one crop."""
    features, width = FEATURE_LAYERS * shape.image_width, shape.image_width
    tokens = shape.crop_tokens_side**2
    keys_values = 2 * shape.image_patches * features * 2 * width
    attention = 4 * shape.image_patches * width
    per_token = features * width + width * width + 2 * width * shape.width + shape.width**2
    return keys_values + attention + 2 * tokens * per_token


def _forward_flops(plan: Plan, shape: ModelShape, tokens: int, pairs: float) -> float:
    """Return the decoder's operations: `tokens` tokens, `pairs` (query, key) pairs in all, one token's logits."""
    width = shape.width
    attention = 4 * pairs * width
    shared = 4 * width * width + width * shape.num_experts
    total = 2.0 * width * shape.vocab_size
    for step in plan.steps:
        experts = step.top_k * 3 * width * shape.expert_width
        total += 2 * tokens * (shared + experts) + attention
    return total


def _forward_values(plan: Plan, shape: ModelShape, tokens: int, context: int) -> float:
    """Return the weights and cache entries that a pass reads; no two visits share an expert until all are read."""
    width = shape.width
    total = float(width * shape.vocab_size)
    for step in plan.steps:
        visited = min(shape.num_experts, tokens * step.top_k)
        total += 4 * width * width + width * shape.num_experts
        total += visited * 3 * width * shape.expert_width + 2 * context * width
    return total
