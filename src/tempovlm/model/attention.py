"""Causal self-attention with q/k norm over the full width and rotary positions.

Shapes: `B` batch, `T` tokens, `D` width, `H` heads, `W` head width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tempovlm.model.cache import KVCache
from tempovlm.model.config import ModelConfig
from tempovlm.model.layers import RMSNorm, has_kernels, norm_rotate


@dataclass(frozen=True, slots=True)
class Span:
    """The place of a forward pass in its sequence.

    Attributes:
        start: tokens already in the cache.
        cos: and `sin`: rotary tables for these tokens, (B, T, 1, W).
        mask: (B, 1, T, start + T), True where a token may look, or added to the scores; None means causal.
    """

    start: int
    cos: Tensor
    sin: Tensor
    mask: Tensor | None


class Attention(nn.Module):
    """One block's attention; `q_norm` and `k_norm` act on all heads at once, before they are split."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        width = config.width
        self.num_heads = config.num_heads
        self.norm = RMSNorm(width, config.norm_eps)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.q_norm = RMSNorm(width, config.norm_eps)
        self.k_norm = RMSNorm(width, config.norm_eps)
        self.out = nn.Linear(width, width, bias=False)

    def forward(self, x: Tensor, span: Span, cache: KVCache | None, step: int) -> Tensor:
        """Return the block's addition to (B, T, D); reads and writes entry `step` of the cache if there is one."""
        return self.out(self._mix(x, span, cache, step))

    def add_to(self, x: Tensor, span: Span, cache: KVCache | None, step: int) -> None:
        """Add the result of `forward` to (B, T, D) in place, within the product that computes it."""
        self.add_product(x, self._mix(x, span, cache, step))

    def add_product(self, x: Tensor, mixed: Tensor) -> None:
        """Add to (B, T, D) in place the output projection of gathered values (B, T, D)."""
        x.flatten(0, 1).addmm_(mixed.flatten(0, 1), self.out.weight.t())

    def _mix(self, x: Tensor, span: Span, cache: KVCache | None, step: int) -> Tensor:
        """Return the values that every token gathers: (B, T, D)."""
        return self.gather(self.qkv(self.norm(x)), span, cache, step)

    def gather(self, qkv: Tensor, span: Span, cache: KVCache | None, step: int) -> Tensor:
        """Return the values (B, T, D) that every token gathers by queries, keys and values (B, T, 3D)."""
        B, T, D = *qkv.shape[:2], qkv.shape[2] // 3
        has_room = cache is not None and span.start + T <= cache.capacity
        if cache is not None and has_room and has_kernels(qkv, self.q_norm.weight):
            from tempovlm.model.kernels import prefill

            norms, tables = (self.q_norm.weight, self.k_norm.weight), (span.cos, span.sin)
            queries = prefill.split(qkv, norms, tables, self.q_norm.eps, cache, step, span.start)
            q = queries.view(B, T, self.num_heads, -1).transpose(1, 2)
            k, v = cache.read(step, span.start + T)
        else:
            q, k, v = qkv.split(D, dim=-1)
            q = norm_rotate(self.q_norm, q, span.cos, span.sin).transpose(1, 2)
            k = norm_rotate(self.k_norm, k, span.cos, span.sin).transpose(1, 2)
            v = v.view(B, T, self.num_heads, -1).transpose(1, 2)
            if cache is not None:
                k, v = cache.write(step, span.start, k, v)
        causal = span.mask is None and T > 1
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=span.mask, is_causal=causal)
        return y.transpose(1, 2).reshape(B, T, D)


def causal_mask(valid: Tensor, num_queries: int) -> Tensor:
    """Return a boolean mask (B, 1, num_queries, K): the last `num_queries` of K tokens look back at valid ones.

    `valid` is (B, K). A padded query sees itself, so that no row of the softmax is empty.
    """
    K = valid.shape[1]
    square = torch.ones(num_queries, K, dtype=torch.bool, device=valid.device).tril(K - num_queries)
    own = torch.eye(num_queries, K, dtype=torch.bool, device=valid.device).roll(K - num_queries, 1)
    return (square & valid[:, None, None, :]) | own
