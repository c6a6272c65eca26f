"""The OLMoE decoder: a loop over the steps of a plan.

A block that is not in the plan is not run, in prefill and decode alike, and owns no cache entry.
Shapes: `B` batch, `T` tokens, `D` width, `V` vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeGuard, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tempovlm.core.plan import Plan
from tempovlm.model.attention import Attention, Span
from tempovlm.model.cache import KVCache
from tempovlm.model.config import ModelConfig
from tempovlm.model.layers import RMSNorm, Rotary, has_kernels
from tempovlm.model.moe import MoE

BROKEN = -1
"""Stands for the token if a logit is NaN or +inf, or all are -inf; the host finds out when it reads the tokens."""


class Block(nn.Module):
    """Attention, then experts; each adds to the residual stream."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.attention = Attention(config)
        self.moe = MoE(config)

    def forward(self, x: Tensor, span: Span, cache: KVCache | None, step: int, top_k: int) -> Tensor:
        """Return (B, T, D) from (B, T, D)."""
        x = x + self.attention(x, span, cache, step)
        return x + self.moe(x, top_k)

    def differentiable(self, x: Tensor, span: Span, cache: KVCache | None, step: int, top_k: int) -> Tensor:
        """As `forward`; where gradients are wanted, by the one way to run the experts that has them everywhere."""
        if not torch.is_grad_enabled():
            return self(x, span, cache, step, top_k)
        x = x + self.attention(x, span, cache, step)
        flat = self.moe.norm(x).view(-1, x.shape[-1])
        return x + self.moe.dense(flat, *self.moe.route(flat, top_k)).view_as(x)

    def advance(self, x: Tensor, span: Span, cache: KVCache | None, step: int, top_k: int) -> None:
        """Like `forward`, but in place, with sums fused into the products; only if `has_kernels`."""
        self.attention.add_to(x, span, cache, step)
        self.moe.add_to(x, top_k)


def is_plain(decoder: object) -> TypeGuard[Decoder]:
    """Whether a decoder is this one, so that `narrow` and the kernels compute the same; a subclass may differ."""
    return type(decoder) is Decoder and all(type(block) is Block for block in decoder.blocks)


class Decoder(nn.Module):
    """Token embedding, blocks, final norm and head."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        rows = config.embedding_size + config.additional_vocab_size
        self.embedding = nn.Parameter(torch.empty(rows, config.width))
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.num_blocks))
        self.norm = RMSNorm(config.width, config.norm_eps)
        self.head = nn.Linear(config.width, config.embedding_size, bias=False)
        self.rotary = Rotary(config.head_width, config.rope_theta, config.max_sequence_length)

    def embed(self, tokens: Tensor) -> Tensor:
        """Return embeddings (B, T, D) of token ids (B, T)."""
        return F.embedding(tokens, self.embedding)

    def forward(
        self,
        x: Tensor,
        positions: Tensor,
        plan: Plan,
        cache: KVCache | None = None,
        start: int = 0,
        mask: Tensor | None = None,
        tick: Callable[[], None] | None = None,
    ) -> Tensor:
        """Run the plan's blocks over embeddings (B, T, D); return hidden states before the final norm."""
        cos, sin = self.rotary(positions)
        span = Span(start, cos, sin, mask)
        if has_kernels(x, self.embedding):
            x = x.clone()  # keeps the caller's tensor unchanged
            for i, (index, top_k) in enumerate(plan.steps):
                block = self.blocks[index]
                assert isinstance(block, Block)
                block.advance(x, span, cache, i, top_k)
            return x
        for i, (index, top_k) in enumerate(plan.steps):
            if tick is not None:
                tick()
            x = self.blocks[index](x, span, cache, i, top_k)
        return x

    def first(self, count: int) -> list[Block]:
        """The first blocks."""
        return [cast(Block, block) for block in self.blocks[:count]]

    def block(self, index: int) -> Block:
        """Return the block of a step."""
        return cast(Block, self.blocks[index])

    def logits(self, hidden: Tensor) -> Tensor:
        """Apply final norm and head: (..., D) to (..., V)."""
        return self.head(self.norm(hidden))
