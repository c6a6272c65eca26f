"""A controller that uses the model's own first blocks to read a glance of the picture and the question.

The glance is the global crop, pooled and projected as at the lowest tier. Its features from the vision transformer
serve every tier, but its projection depends slightly on the tiling, which is not chosen yet. It
takes the place of the image features; the question follows in the model's own format, and last comes a
budget token. Attention is causal, so only that token depends on the budget: glance and question are
read once and serve every budget. The blocks belong to the model, are frozen and are passed to
every call; this module owns only the budget's encoding and the heads. The caller charges the time to
the control stage.

Shapes: `B` requests, `G` tokens of the glance, `T` tokens of glance and question, `D` decoder width, `S` blocks,
`H` heads, `W` head width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from tempovlm.control.encoding import LatencyBudgetEncoder
from tempovlm.control.networks import HIDDEN_DIM, KnobLogits
from tempovlm.model.attention import Span
from tempovlm.model.cache import KVCache
from tempovlm.model.config import ModelConfig
from tempovlm.model.decoder import Block
from tempovlm.model.prompt import IMAGE_COLUMN, IMAGE_END, IMAGE_PATCH, IMAGE_START, Tokenizer, prompt_text
from tempovlm.model.vlm import Molmo

NUM_BLOCKS = 2
"""Default number of blocks that read."""


@dataclass(frozen=True, slots=True)
class Reading:
    """Keys and values (S, B, H, T, W) of glances and questions after the first blocks, and real tokens (B,)."""

    keys: Tensor
    values: Tensor
    lengths: Tensor

    def take(self, rows: Tensor) -> Reading:
        """Select some of the requests."""
        return Reading(self.keys[:, rows], self.values[:, rows], self.lengths[rows])


@dataclass(frozen=True)
class _Read(KVCache):
    """A read-only view of keys and values, so that gradients can pass through the last token."""

    def write(self, step: int, start: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:  # noqa: ARG002
        """Return the cached keys and values, followed by the new ones (B, H, 1, W)."""
        return torch.cat((self.keys[step], key), dim=2), torch.cat((self.values[step], value), dim=2)


def glance_tokens(question: str, style: str, config: ModelConfig, tokenizer: Tokenizer) -> Tensor:
    """Return the tokens (T,) of the global crop and the question; the crop's are the same for every question."""
    side = config.vision.pooled
    start, end, patch, column = (tokenizer.ids[n] for n in (IMAGE_START, IMAGE_END, IMAGE_PATCH, IMAGE_COLUMN))
    picture = [start, *([patch] * side + [column]) * side, end]
    return torch.tensor([tokenizer.end, *picture, *tokenizer.encode(prompt_text(question, style))])


def glance_places(config: ModelConfig) -> Tensor:
    """Return the places (G,) of the glance's tokens in the stream."""
    cell = torch.arange(config.vision.pooled)
    return (2 + (len(cell) + 1) * cell[:, None] + cell[None, :]).flatten()


def pad_tokens(streams: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Return streams of different lengths as tokens (B, T), padded on the right with 0, and lengths (B,)."""
    lengths = torch.tensor([len(stream) for stream in streams])
    return nn.utils.rnn.pad_sequence(streams, batch_first=True), lengths


class LLMBasedController(nn.Module):
    """Chooses all three knobs from the state of the model's first blocks after glance, question and budget."""

    def __init__(
        self,
        width: int,
        hidden_dim: int = HIDDEN_DIM,
        *,
        num_blocks: int = NUM_BLOCKS,
        num_tiers: int = 3,
        num_top_ks: int = 5,
        num_block_counts: int = 5,
    ) -> None:
        """Make a controller for decoders of width `width`, whose first `num_blocks` blocks read."""
        super().__init__()
        self.sizes = {
            "width": width,
            "hidden_dim": hidden_dim,
            "num_blocks": num_blocks,
            "num_tiers": num_tiers,
            "num_top_ks": num_top_ks,
            "num_block_counts": num_block_counts,
        }
        self.num_blocks = num_blocks
        self.budget = LatencyBudgetEncoder(hidden_dim)
        self.token = nn.Linear(hidden_dim, width)
        self.norm = nn.LayerNorm(width)
        self.hidden = nn.Linear(width + hidden_dim, hidden_dim)
        self.heads = nn.ModuleList(
            nn.Linear(hidden_dim, size) for size in (num_tiers, num_top_ks, num_block_counts)
        )

    def forward(
        self, model: Molmo, glance: Tensor | None, tokens: Tensor, lengths: Tensor, budget_ms: Tensor
    ) -> KnobLogits:
        """Return logits of tiers (B, 3), top-ks (B, 5) and depths (B, 5).

        Args:
            model: its blocks read; it is not trained.
            glance: (B, G, D) tokens of the global crop as projected at the lowest tier; None without pictures.
            tokens: (B, T) streams of `glance_tokens`, padded on the right.
            lengths: (B,) number of real tokens.
            budget_ms: (B,).
        """
        return self.decide(model, self.read(model, glance, tokens, lengths), budget_ms)

    @torch.no_grad()
    def read(self, model: Molmo, glance: Tensor | None, tokens: Tensor, lengths: Tensor) -> Reading:
        """Run the blocks over glance and question; all budgets share the result."""
        decoder = model.decoder
        x = decoder.embed(tokens)
        if glance is not None:
            places = glance_places(model.config).to(x.device)
            x = x.index_add(1, places, glance.to(x.dtype))
        B, T, _ = x.shape
        positions = torch.arange(T, device=x.device).expand(B, T)
        cache = KVCache.allocate(model.config, self.num_blocks, B, T, x)
        cos, sin = decoder.rotary(positions)
        span = Span(0, cos, sin, None)
        for i, block in enumerate(self._blocks(model)):
            x = block(x, span, cache, i, model.config.top_k)
        return Reading(cache.keys, cache.values, lengths)

    def decide(self, model: Molmo, reading: Reading, budget_ms: Tensor) -> KnobLogits:
        """Return logits (B, 3), (B, 5) and (B, 5) under budgets (B,), given the result of `read`."""
        encoded = self.budget(budget_ms)
        x = self.token(encoded).unsqueeze(1).to(reading.keys.dtype)
        T = reading.keys.shape[3]
        place = torch.arange(T + 1, device=x.device)
        seen = (place < reading.lengths.unsqueeze(1)) | (place == T)
        cos, sin = model.decoder.rotary(reading.lengths.unsqueeze(1))
        span = Span(T, cos, sin, seen[:, None, None, :])
        cache = _Read(reading.keys, reading.values)
        for i, block in enumerate(self._blocks(model)):
            x = _run_block(block, x, span, cache, i, model.config.top_k)
        found = torch.cat((self.norm(x[:, 0].float()), encoded), dim=-1)
        hidden = nn.functional.gelu(self.hidden(found))
        return KnobLogits(*(head(hidden) for head in self.heads))

    def _blocks(self, model: Molmo) -> list[Block]:
        return [cast(Block, block) for block in model.decoder.blocks[: self.num_blocks]]


def _run_block(block: Block, x: Tensor, span: Span, cache: KVCache, step: int, top_k: int) -> Tensor:
    """Run a block over (B, 1, D); for gradients, with the one implementation of experts that has them."""
    if not torch.is_grad_enabled():
        return block(x, span, cache, step, top_k)
    x = x + block.attention(x, span, cache, step)
    flat = block.moe.norm(x).view(-1, x.shape[-1])
    return x + block.moe.dense(flat, *block.moe.route(flat, top_k)).view_as(x)
