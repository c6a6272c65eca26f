"""The whole model: crops and tokens in, logits out, under a plan that is an argument.

It holds weights and nothing else: no knob is stored here, no clock runs here.
Shapes: `C` crops, `P` patches, `G` tokens of a crop, `B` batch, `T` tokens, `D` width, `V` vocabulary; of a cache,
`S` blocks, `H` heads, `W` head width.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tempovlm.core.plan import Plan
from tempovlm.model.attention import Span
from tempovlm.model.cache import FullCache, KVCache
from tempovlm.model.config import ModelConfig
from tempovlm.model.decoder import Decoder
from tempovlm.model.prompt import Tokenizer, glance_places, glance_tokens
from tempovlm.model.vision.encoder import Projector, VisionTransformer


class Molmo(nn.Module):
    """A Molmo-style vision-language model of any size."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.vision = VisionTransformer(config.vision)
        self.projector = Projector(config)
        self.decoder = Decoder(config)

    def embed(self, tokens: Tensor, features: Tensor | None, slots: Tensor | None) -> Tensor:
        """Embed tokens (B, T) and add image features at their places; (B, T, D).

        `slots` holds, for each of the (C·G) feature rows, a flat index into B·T, or -1 for a feature that has
        no place. Features are added to, and do not replace, the embedding of the patch token. Slots on the host
        are looked through there, and a GPU is not waited for.
        """
        x = self.decoder.embed(tokens)
        if features is None or slots is None:
            return x
        used = (slots >= 0).nonzero().squeeze(1)
        places = slots.index_select(0, used).to(x.device, non_blocking=True)
        flat = x.reshape(-1, x.shape[-1])
        rows = features.reshape(-1, features.shape[-1])
        rows = rows.index_select(0, used.to(x.device, non_blocking=True)).to(x.dtype)
        return flat.index_add(0, places, rows).view_as(x)

    def prefill(
        self,
        x: Tensor,
        plan: Plan,
        cache: KVCache | None,
        lengths: Tensor | None = None,
    ) -> Tensor:
        """Logits (B, V) after the last real token of each row of embeddings (B, T, D).

        `lengths` (B,) gives the real tokens of rows padded on the right; None means that all are real.
        """
        B, T, _ = x.shape
        steps = torch.arange(T, device=x.device)
        if lengths is None:
            hidden = self.decoder(x, steps.expand(B, T), plan, cache)
            return self.decoder.logits(hidden[:, -1])
        positions = torch.minimum(steps.expand(B, T), (lengths - 1).unsqueeze(1))
        hidden = self.decoder(x, positions, plan, cache)
        return self.decoder.logits(hidden[torch.arange(B, device=x.device), lengths - 1])

    def decode(
        self,
        tokens: Tensor,
        plan: Plan,
        cache: KVCache,
        start: int,
        positions: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        """Logits (B, V) after one more token (B,) a row, written to the cache at `start`.

        Without `positions` (B,) the token stands at `start`; a ragged batch gives both them and a mask.
        """
        if positions is None:
            positions = torch.full_like(tokens, start)
        x = self.decoder.embed(tokens.unsqueeze(1))
        hidden = self.decoder(x, positions.unsqueeze(1), plan, cache, start, mask)
        return self.decoder.logits(hidden[:, -1])

    def glance_tokens(self, question: str, style: str, tokenizer: Tokenizer) -> Tensor:
        """The stream (T,) of the global crop's places and a question, with room for one more token."""
        return glance_tokens(question, style, self.config, tokenizer)

    @torch.no_grad()
    def read_glances(self, glance: Tensor | None, tokens: Tensor, num_blocks: int) -> tuple[Tensor, Tensor]:
        """Read global crops and questions with the first blocks; keys and values (S, B, H, T, W).

        Args:
            glance: (B, G, D) projected tokens of the global crops; None without pictures.
            tokens: (B, T) streams of `glance_tokens`, padded on the right.
            num_blocks: that read, `S`.
        """
        x = self.decoder.embed(tokens)
        if glance is not None:
            x = x.index_add(1, glance_places(self.config).to(x.device), glance.to(x.dtype))
        B, T, _ = x.shape
        cache = KVCache.allocate(self.config, num_blocks, B, T, x)
        cos, sin = self.decoder.rotary(torch.arange(T, device=x.device).expand(B, T))
        for i, block in enumerate(self.decoder.first(num_blocks)):
            x = block(x, Span(0, cos, sin, None), cache, i, self.config.top_k)
        return cache.keys, cache.values

    def read_after(self, x: Tensor, keys: Tensor, values: Tensor, lengths: Tensor) -> Tensor:
        """Run the blocks of `read_glances` over one more embedding a row; its states (B, D), with gradients.

        Args:
            x: (B, D) embeddings, in the type of the keys.
            keys: (S, B, H, T, W) of what was read.
            values: likewise.
            lengths: (B,) real tokens of each row.
        """
        T, row = keys.shape[3], lengths.unsqueeze(1)
        place = torch.arange(T + 1, device=x.device)
        seen = (place < row) | (place == T)
        cos, sin = self.decoder.rotary(row)
        span = Span(T, cos, sin, seen[:, None, None, :])
        cache, x = FullCache(keys, values), x.unsqueeze(1)
        for i, block in enumerate(self.decoder.first(len(keys))):
            x = block.differentiable(x, span, cache, i, self.config.top_k)
        return x[:, 0]
