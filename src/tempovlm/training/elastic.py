"""A training pass under any knob setting: packed questions, all experts computed and masked, balance measured.

The same function as the model's own forward pass (a test holds them together), arranged for large batches on a
GPU: what depends on a picture's size or is looked up comes first, and nothing after it waits for the device.
Shapes: `B` pictures, `C` crops of one, `U` distinct ones, `I` image tokens, `S` packed text tokens, `T` both,
`A` places of answers, `D` width, `E` experts.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor

from tempovlm.core.knobs import KnobConfig, KnobSpace
from tempovlm.core.plan import Plan, Ranking, Step
from tempovlm.model.attention import Attention, Span
from tempovlm.model.config import ModelConfig
from tempovlm.model.decoder import Block, Decoder
from tempovlm.model.layers import HAS_TRITON
from tempovlm.model.moe import MoE, best
from tempovlm.model.prompt import Tokenizer, feature_slots, image_tokens
from tempovlm.model.vision.tiling import Crops, Grid, choose_grid, cut_batch
from tempovlm.model.vlm import Molmo
from tempovlm.training.pictures import IGNORE, PictureBatch

ALIGN = 16
"""Rows are padded to a multiple of this, as fast attention under a mask demands."""


@dataclass(frozen=True, slots=True)
class Vision:
    """Output of the vision side for a batch of pictures.

    Attributes:
        features: (B, U, P, features). tokens: (B·C, G, D). distinct: (B, U, G, D). grid: how all were cut.
    """

    features: Tensor
    tokens: Tensor
    distinct: Tensor
    grid: Grid


@dataclass(frozen=True, slots=True)
class Stream:
    """The tokens of a batch: those of the picture, which are the same in all rows, then its packed questions.

    Attributes:
        image: (I,) ids. text: (B, S) ids, padded. positions: (B, T) places for the rotary embedding.
        segments: (B, T) int32, 0 for the picture, a number for each question, -1 for padding.
        used: (B·I',) rows of features that have a place. places: (B·I',) those places in B·T.
        answers: (A,) places in B·T whose next token is part of an answer. targets: (A,) that token; those to be
            ignored have an answer of 0.
    """

    image: Tensor
    text: Tensor
    positions: Tensor
    segments: Tensor
    used: Tensor
    places: Tensor
    answers: Tensor
    targets: Tensor


def see(model: Molmo, batch: PictureBatch, tier: str) -> Vision:
    """Run the vision side of a whole batch at a tier."""
    return encode(model, cut(model, batch, tier))


def cut(model: Molmo, batch: PictureBatch, tier: str) -> Crops:
    """Cut the pictures of a batch for a tier, in the type of the model's weights."""
    vision = model.config.vision
    grid = choose_grid(tier, batch.images.shape[1], batch.images.shape[2], vision)
    crops = cut_batch(batch.images, grid, vision, exact=True)
    return replace(crops, patches=crops.patches.to(model.vision.positions.dtype))


def encode(model: Molmo, crops: Crops) -> Vision:
    """Run the vision side over cut pictures."""
    B, U = crops.patches.shape[:2]
    features = model.vision(crops.patches.flatten(0, 1)).unflatten(0, (B, U))
    C = len(crops.index)
    every = features if C == U else features.index_select(1, crops.index)
    masks = crops.masks.expand(B, -1, -1).flatten(0, 1)
    tokens = model.projector(every.flatten(0, 1), masks)
    return Vision(features, tokens, tokens.unflatten(0, (B, C))[:, :U], crops.grid)


def pack(batch: PictureBatch, grid: Grid, config: ModelConfig, tokenizer: Tokenizer, num_answers: int) -> Stream:
    """Lay out a batch's tokens for pictures cut by a grid, with room for `num_answers` places of answers."""
    B, S = batch.tokens.shape
    device = batch.tokens.device
    image, slots = _layout(grid, config, tokenizer, device)
    length, spare = len(image), -(len(image) + S) % ALIGN
    text, segments, offsets = (F.pad(x, (0, spare)) for x in (batch.tokens, batch.segments, batch.offsets))
    segments = torch.where(segments == 0, -1, segments).to(torch.int32)
    row = torch.arange(B, device=device)[:, None]
    lacking = num_answers - len(batch.answers)
    answers = (batch.answers // S) * (length + S + spare) + length + batch.answers % S
    return Stream(
        image,
        text,
        torch.cat((torch.arange(length, device=device).expand(B, -1), length + offsets), dim=1),
        F.pad(segments, (length, 0)),
        (row * (grid.num_crops * config.vision.pooled**2) + slots[0]).flatten(),
        (row * (length + S + spare) + slots[1]).flatten(),
        F.pad(answers, (0, lacking)),
        F.pad(batch.targets.flatten().index_select(0, batch.answers), (0, lacking), value=IGNORE),
    )


@lru_cache(maxsize=64)
def _layout(grid: Grid, config: ModelConfig, tokenizer: Tokenizer, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return the ids (I,) of a picture's tokens, and (2, I') its features that have a place, and those places.

    Kept, because copying from the host waits for the device.
    """
    image = torch.tensor([tokenizer.end, *image_tokens(grid, config.vision, tokenizer)])
    slots = feature_slots(grid, config.vision)
    used = (slots >= 0).nonzero().squeeze(1)
    return image.to(device), torch.stack((used, slots[used] + 1)).to(device)


def read(
    model: Molmo, batch: PictureBatch, seen: Vision, plan: Plan, tokenizer: Tokenizer
) -> tuple[Tensor, Tensor, Tensor]:
    """Return logits (A, V) and targets (A,) of a batch's answers, and the router's terms (2,)."""
    stream = pack(batch, seen.grid, model.config, tokenizer, len(batch.answers))
    logits, terms = read_stream(model, seen.tokens, stream, plan)
    return logits, stream.targets, terms


def read_stream(model: Molmo, features: Tensor, stream: Stream, plan: Plan) -> tuple[Tensor, Tensor]:
    """Return logits (A, V) at the answers' places, and the router's terms (2,), of `router_terms`."""
    decoder = model.decoder
    image, text = decoder.embed(stream.image), decoder.embed(stream.text)
    x = torch.cat((image.expand(len(text), -1, -1), text), dim=1)
    rows = features.flatten(0, 1).index_select(0, stream.used).to(x.dtype)
    x = x.flatten(0, 1).index_add(0, stream.places, rows).view_as(x)
    hidden, terms = forward_elastic(decoder, x, stream.positions, plan, stream.segments)
    return decoder.logits(hidden.flatten(0, 1).index_select(0, stream.answers)), terms


def packed_mask(segments: Tensor) -> Tensor:
    """Return a mask (B, 1, T, T): a token looks back at the image (segment 0) and at its own segment."""
    T = segments.shape[1]
    causal = torch.ones(T, T, dtype=torch.bool, device=segments.device).tril()
    keys = segments[:, None, :]
    return (causal & ((keys == 0) | (keys == segments[:, :, None]))).unsqueeze(1)


def forward_elastic(
    decoder: Decoder, x: Tensor, positions: Tensor, plan: Plan, segments: Tensor
) -> tuple[Tensor, Tensor]:
    """Return hidden states (B, T, D) and the router's terms (2,), means over a plan."""
    cos, sin = decoder.rotary(positions)
    mask = None
    if not _has_attention(decoder.block(0).attention, x):
        mask = torch.zeros((), dtype=x.dtype, device=x.device).where(packed_mask(segments), -torch.inf)
    sums = []
    for index, top_k in plan.steps:
        block = cast(Block, decoder.blocks[index])
        x = x + attend(block.attention, x, Span(0, cos, sin, mask), segments)
        added, summed = moe_elastic(block.moe, x, top_k)
        x = x + added
        sums.append(summed)
    return x, router_terms(torch.stack(sums), x.shape[0] * x.shape[1])


def _has_attention(attention: Attention, x: Tensor) -> bool:
    """Whether a kernel attends without a mask in memory."""
    if not (x.is_cuda and HAS_TRITON):
        return False
    from tempovlm.model.kernels.attention import fits

    return fits(x.shape[-1], attention.num_heads)


def attend(attention: Attention, x: Tensor, span: Span, segments: Tensor) -> Tensor:
    """Return one block's attention over (B, T, D): by a kernel, unless `span` has a mask."""
    if span.mask is not None:
        return attention(x, span, None, 0)
    from tempovlm.model.kernels.attention import packed_attention

    norms = attention.q_norm.weight, attention.k_norm.weight
    qkv = attention.qkv(attention.norm(x))
    return attention.out(packed_attention(qkv, norms, (span.cos, span.sin), segments, attention.q_norm.eps))


def moe_elastic(moe: MoE, x: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """Return the experts' sum for (B, T, D), all experts computed, and what `router_terms` needs of the router.

    That is (3, E), float32, sums over the tokens: those that chose an expert, its probabilities, their squares.
    """
    flat = moe.norm(x).flatten(0, 1)
    if flat.is_cuda and HAS_TRITON:
        from tempovlm.model.kernels.routing import route

        gates, sums = route(flat, moe.router.weight, top_k)
    else:
        scores = moe.scores(flat)
        probabilities = scores.softmax(dim=-1)
        chosen = torch.zeros_like(scores).scatter(-1, best(scores, top_k), 1.0)
        gates = (chosen * probabilities).to(flat.dtype)
        sums = torch.stack((chosen.sum(0), probabilities.sum(0), probabilities.square().sum(0)))
    return moe.weighted(flat, gates).view_as(x), sums


def router_terms(sums: Tensor, tokens: int) -> Tensor:
    """Return two terms of the routers (2,), means over blocks, from sums (blocks, 3, E) over a number of tokens.

    The first is the load balance (Fedus et al. 2021, arXiv 2101.03961), 1 if all experts share alike. The second
    is the number of experts times the sum of a token's squared probabilities: 1 if they are all the same, and the
    number of experts if one has all. Its logarithm is what the router's collision entropy lacks to the highest.
    """
    chosen, mass, squares = sums.unbind(1)
    shares = chosen / chosen.sum(-1, keepdim=True)
    balance, collision = (shares * mass).sum(-1), squares.sum(-1)
    return sums.shape[-1] * torch.stack((balance.mean(), collision.mean())) / tokens


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
