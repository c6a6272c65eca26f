"""The whole model: crops and tokens in, logits out, under a plan that is an argument.

It holds only weights: no knob is stored here, no clock runs here.
Shapes: `C` crops, `P` patches, `G` tokens of a crop, `B` batch, `T` tokens, `D` width, `V` vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tempovlm.core.plan import Plan
from tempovlm.model.cache import KVCache
from tempovlm.model.config import ModelConfig
from tempovlm.model.decoder import Decoder
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
        no place. Features are added to the embedding of the patch token and do not replace it. Slots on the host
        are inspected there, without waiting for a GPU.
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
        """Return logits (B, V) after the last real token of each row of embeddings (B, T, D).

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
        """Return logits (B, V) after one more token (B,) a row, written to the cache at `start`.

        Without `positions` (B,) the token stands at `start`; a ragged batch gives both them and a mask.
        """
        if positions is None:
            positions = torch.full_like(tokens, start)
        x = self.decoder.embed(tokens.unsqueeze(1))
        hidden = self.decoder(x, positions.unsqueeze(1), plan, cache, start, mask)
        return self.decoder.logits(hidden[:, -1])
