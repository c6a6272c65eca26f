"""Prompts of several requests in one pass, one after the other and without padding.

Products, norms and experts see the tokens of all prompts at once, so that weights are read once for all of them.
Attention looks at one prompt at a time.

Shapes: `B` prompts, `T` tokens of a prompt, `N` tokens of all, `D` width, `V` vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from itertools import accumulate

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from tempovlm.core.plan import Plan
from tempovlm.model.attention import Span
from tempovlm.model.cache import KVCache
from tempovlm.model.decoder import Decoder
from tempovlm.model.layers import has_kernels


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
        # cuDNN would plan every new length anew, for tens of milliseconds.
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION) if is_fused else nullcontext():
            mixed = torch.cat([attention.gather(*one, step) for one in of_each], dim=1)
        if is_fused:
            attention.add_product(x, mixed)
            block.moe.add_to(x, top_k)
        else:
            x = x + attention.out(mixed)
            x = x + block.moe(x, top_k)
    return decoder.logits(torch.cat([x[:, end - 1] for end in accumulate(lengths)]))
