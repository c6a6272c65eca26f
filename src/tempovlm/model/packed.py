"""Prompts of several requests in one pass, one after the other and without padding.

Products, norms and experts see the tokens of all prompts at once, so that weights are read once for all of them.
Attention looks at one prompt at a time. In a cache of rows (`run_rows`) new tokens of several sequences, prompts
or the next token of each, pass the blocks together.

Shapes: `B` prompts or sequences, `T` tokens of a prompt, `N` tokens of all, `D` width, `H` heads, `W` head width,
`V` vocabulary, `R` entries of a cache of rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from tempovlm.core.plan import Plan, Step
from tempovlm.model.attention import Span
from tempovlm.model.cache import KVCache
from tempovlm.model.config import ModelConfig
from tempovlm.model.decoder import Decoder
from tempovlm.model.layers import has_kernels

WITHOUT_PLANS = (SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH)
"""Ways to attend that plan nothing for a new length; cuDNN would, for tens of milliseconds."""

HEAD_MULTIPLE, WIDEST_HEAD = 8, 256
"""Flash attention takes heads whose width is a multiple of the first and at most the second number."""


def can_run_rows(config: ModelConfig) -> bool:
    """Whether the attention of `run_rows` takes a model's heads."""
    return config.head_width % HEAD_MULTIPLE == 0 and config.head_width <= WIDEST_HEAD


def read_packed(decoder: Decoder, prompts: Sequence[Tensor], plan: Plan, caches: Sequence[KVCache]) -> Tensor:
    """Return logits (B, V) after the last token of each prompt, and fill the prompts' caches.

    Args:
        decoder: runs the plan's blocks.
        prompts: embeddings (T, D) of each.
        plan: of all of them.
        caches: of each prompt, for one row.
    """
    lengths = [len(one) for one in prompts]
    x = torch.cat(list(prompts)).unsqueeze(0)
    places = torch.arange(max(lengths), device=x.device).unsqueeze(0)
    cos, sin = decoder.rotary(places)
    spans = [Span(0, cos[:, :length], sin[:, :length], None) for length in lengths]
    is_fused = has_kernels(x, decoder.embedding)
    for step, (index, top_k) in enumerate(plan.steps):
        block = decoder.block(index)
        attention = block.attention
        parts = attention.qkv(attention.norm(x)).split(lengths, dim=1)
        of_each = zip(parts, spans, caches, strict=True)
        with sdpa_kernel(list(WITHOUT_PLANS)) if is_fused else nullcontext():
            mixed = torch.cat([attention.gather(*one, step) for one in of_each], dim=1)
        if is_fused:
            attention.add_product(x, mixed)
            block.moe.add_to(x, top_k)
        else:
            x = x + attention.out(mixed)
            x = x + block.moe(x, top_k)
    return decoder.logits(torch.cat([x[:, end - 1] for end in accumulate(lengths)]))


@dataclass(frozen=True, slots=True)
class Pack:
    """New tokens of several sequences, one sequence after the other, and their places in a cache of rows.

    Attributes:
        places: (N,) int64, the place of each token in its sequence.
        entries: (N,) int64, its entry in the cache; negative for a token that is not kept.
        ends: (B + 1,) int32, 0, and where the new tokens of each sequence end.
        starts: (B + 1,) int32, the first entry of each sequence in the cache, and a number that is not read.
        used: (B,) int32, entries of each sequence with its new tokens.
        longest: bound of the new tokens of one sequence. most_used: bound of the entries of one.
        limits: (blocks, B) int32, experts a token of each sequence in each block, 0 where it skips the block, if
            every sequence has one new token; None if all follow the same steps.
    """

    places: Tensor
    entries: Tensor
    ends: Tensor
    starts: Tensor
    used: Tensor
    longest: int
    most_used: int
    limits: Tensor | None = None


def run_rows(
    decoder: Decoder, x: Tensor, steps: Sequence[Step], pack: Pack, keys: Tensor, values: Tensor
) -> Tensor:
    """Run steps over embeddings (N, D) in place; return hidden states before the final norm.

    Only if `has_kernels` and `can_run_rows`.

    Args:
        decoder: runs the blocks.
        x: the new tokens' embeddings.
        steps: blocks and experts a token; with limits, of all sequences together.
        pack: places of the tokens.
        keys: after norm and rotation, (blocks, R, D); entry i belongs to block i.
        values: as `keys`.
    """
    from tempovlm.model.kernels import prefill

    tables = decoder.rotary.cos[pack.places], decoder.rotary.sin[pack.places]
    D, W = x.shape[1], tables[0].shape[1]
    runs = None if pack.limits is None else (pack.limits > 0).to(x.dtype).unsqueeze(-1)
    for index, top_k in steps:
        block = decoder.block(index)
        attention = block.attention
        norms = attention.q_norm.weight, attention.k_norm.weight
        qkv = attention.qkv(attention.norm(x))
        own_keys, own_values = keys[index], values[index]
        q = prefill.split_rows(qkv, norms, tables, attention.q_norm.eps, pack.entries, own_keys, own_values)
        # Unlike other ways to attend, this one plans nothing for a new length, and takes lengths on the device.
        mixed = torch.ops.aten._flash_attention_forward(
            q.view(-1, D // W, W), own_keys.view(-1, D // W, W), own_values.view(-1, D // W, W),
            pack.ends, pack.starts, pack.longest, pack.most_used, 0.0, pack.longest > 1, False,
            scale=W**-0.5, seqused_k=pack.used,
        )[0].view(-1, D)  # fmt: skip
        if runs is not None:
            mixed.mul_(runs[index])
        x.addmm_(mixed, attention.out.weight.t())
        block.moe.add_to(x, top_k, None if pack.limits is None else pack.limits[index])
    return x
