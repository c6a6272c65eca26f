"""A training pass under any knob setting: packed questions, all experts computed and masked, balance measured.

The same function as the model's own forward pass (a test holds them together), arranged for large batches on a
GPU. Shapes: `B` pictures, `C` crops of one, `I` image tokens, `S` packed text tokens, `D` width.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor

from tempovlm.core.knobs import KnobConfig, KnobSpace
from tempovlm.core.plan import Plan, Ranking, Step
from tempovlm.model.attention import Span
from tempovlm.model.config import ModelConfig
from tempovlm.model.decoder import Block, Decoder
from tempovlm.model.moe import MoE, best
from tempovlm.model.prompt import Tokenizer, feature_slots, image_tokens
from tempovlm.model.vision.tiling import Grid, choose_grid, cut_batch
from tempovlm.model.vlm import Molmo
from tempovlm.training.pictures import IGNORE, PictureBatch

ALIGN = 16
"""Rows are padded to a multiple of this, as fast attention under a mask demands."""


@dataclass(frozen=True, slots=True)
class Vision:
    """Output of the vision side for a batch of pictures with `C` crops, `U` of them distinct.

    Attributes:
        features: (B, U, P, features). tokens: (B·C, G, D). distinct: (B, U, G, D). grid: how all were cut.
    """

    features: Tensor
    tokens: Tensor
    distinct: Tensor
    grid: Grid


def see(model: Molmo, batch: PictureBatch, tier: str) -> Vision:
    """Run the vision side of a whole batch at a tier."""
    vision = model.config.vision
    grid = choose_grid(tier, batch.images.shape[1], batch.images.shape[2], vision)
    crops = cut_batch(batch.images, grid, vision, exact=True)
    B, U = crops.patches.shape[:2]
    features = model.vision(crops.patches.flatten(0, 1).to(model.vision.positions.dtype)).unflatten(0, (B, U))
    every = features[:, crops.index].flatten(0, 1)
    masks = crops.masks.expand(B, -1, -1).flatten(0, 1)
    tokens = model.projector(every, masks)
    distinct = tokens.unflatten(0, (B, -1))[:, :U]
    return Vision(features, tokens, distinct, grid)


def read(
    model: Molmo, batch: PictureBatch, seen: Vision, plan: Plan, tokenizer: Tokenizer
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return logits (A, V), targets (A,) and mask (B, S) of the answers' places, and the router's terms (2,)."""
    B, S = batch.tokens.shape
    device, vision = batch.tokens.device, model.config.vision
    image = torch.tensor([tokenizer.end, *image_tokens(seen.grid, vision, tokenizer)], device=device)
    length = image.shape[0]
    spare = -(length + S) % ALIGN
    tokens, segments, offsets = (F.pad(x, (0, spare)) for x in (batch.tokens, batch.segments, batch.offsets))
    stream = torch.cat((image.expand(B, -1), tokens), dim=1)
    width = stream.shape[1]
    slots = feature_slots(seen.grid, vision).to(device)
    places = torch.arange(B, device=device)[:, None] * width + torch.where(slots >= 0, slots + 1, 0)
    places = torch.where(slots >= 0, places, -1).flatten()
    x = model.embed(stream, seen.tokens, places)
    positions = torch.cat((torch.arange(length, device=device).expand(B, -1), length + offsets), dim=1)
    segments = torch.cat((torch.zeros(B, length, dtype=torch.long, device=device), segments), dim=1)
    padding = torch.arange(width, device=device) >= length
    segments = torch.where(padding & (segments == 0), -1, segments)
    mask = torch.zeros((), dtype=x.dtype, device=device).where(packed_mask(segments), -torch.inf)
    hidden, terms = forward_elastic(model.decoder, x, positions, plan, mask)
    answers = batch.targets != IGNORE
    return model.decoder.logits(hidden[:, length : length + S][answers]), batch.targets[answers], answers, terms


def packed_mask(segments: Tensor) -> Tensor:
    """Return a mask (B, 1, T, T): a token looks back at the image (segment 0) and at its own segment."""
    T = segments.shape[1]
    causal = torch.ones(T, T, dtype=torch.bool, device=segments.device).tril()
    keys = segments[:, None, :]
    return (causal & ((keys == 0) | (keys == segments[:, :, None]))).unsqueeze(1)


def forward_elastic(
    decoder: Decoder, x: Tensor, positions: Tensor, plan: Plan, mask: Tensor
) -> tuple[Tensor, Tensor]:
    """Return hidden states (B, T, D) and the router's terms (2,), of which `moe_elastic` tells, over a plan."""
    cos, sin = decoder.rotary(positions)
    total = x.new_zeros(2, dtype=torch.float32)
    for block, top_k in plan.steps:
        x, terms = block_elastic(cast(Block, decoder.blocks[block]), x, Span(0, cos, sin, mask), top_k)
        total = total + terms
    return x, total / len(plan.steps)


def block_elastic(block: Block, x: Tensor, span: Span, top_k: int) -> tuple[Tensor, Tensor]:
    """Run one block over (B, T, D); also return its router's terms (2,)."""
    x = x + block.attention(x, span, None, 0)
    added, terms = moe_elastic(block.moe, x, top_k)
    return x + added, terms


def moe_elastic(moe: MoE, x: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """Return the experts' sum for (B, T, D), all experts computed; and two terms of the router, float32 (2,).

    The first is the load balance (Fedus et al. 2021, arXiv 2101.03961), 1 if all experts share alike. The second
    is the number of experts times the sum of a token's squared probabilities: 1 if they are all the same, and the
    number of experts if one has all. Its logarithm is what the router's collision entropy lacks to the highest.
    """
    flat = moe.norm(x).flatten(0, 1)
    scores = moe.scores(flat)
    probabilities, experts = scores.softmax(dim=-1), best(scores, top_k)
    weights = probabilities.gather(-1, experts)
    chosen = F.one_hot(experts, probabilities.shape[-1]).sum(1, dtype=torch.float32).mean(0) / top_k
    balance, collision = (chosen * probabilities.mean(0)).sum(), probabilities.square().sum(-1).mean()
    terms = probabilities.shape[-1] * torch.stack((balance, collision))
    return moe.dense(flat, weights.to(flat.dtype), experts).view_as(x), terms


def sample_setting(space: KnobSpace, draw: Tensor, share: float = 0.18) -> KnobConfig:
    """Draw a setting from uniform numbers: often native, largest or cheapest, else any other.

    `share` is that of settings with another top-k or depth than the native ones.
    """
    kind, size, *places = draw.tolist()
    tier = "high" if size < 0.5 else "medium" if size < 0.75 else "low"
    above = (kind - (1 - share)) / share if share else -1.0
    if above < 4 / 9:
        knobs = space.native if above < 0 else space.cheapest if above < 1 / 6 else space.largest
    else:
        _, *others = space.axes.values()
        drawn = (legal[int(place * len(legal))] for legal, place in zip(others, places, strict=True))
        knobs = KnobConfig.from_values((tier, *drawn))
    return replace(knobs, tier=tier)


def sample_plan(knobs: KnobConfig, ranking: Ranking, config: ModelConfig, generator: torch.Generator) -> Plan:
    """Return the setting's plan; in a quarter of the cases other inner blocks run, to favour no ranking."""
    plan = Plan.build(knobs, ranking, config.shape)
    if torch.rand((), generator=generator) < 0.75 or knobs.num_blocks == config.num_blocks:
        return plan
    inner = torch.randperm(config.num_blocks - 2, generator=generator)[: knobs.num_blocks - 2] + 1
    blocks = sorted({0, config.num_blocks - 1, *inner.tolist()})
    return Plan(knobs, tuple(Step(block, knobs.top_k) for block in blocks))
