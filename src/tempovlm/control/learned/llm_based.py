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
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from tempovlm.control.learned.encoding import LatencyBudgetEncoder
from tempovlm.control.learned.networks import HIDDEN_DIM, KnobLogits

NUM_BLOCKS = 2
"""Default number of blocks that read."""


class Sizes(Protocol):
    """Sizes of a decoder."""

    @property
    def width(self) -> int:
        """Features of a token."""

    @property
    def num_blocks(self) -> int:
        """Transformer blocks that there are."""


@runtime_checkable
class FirstBlocks(Protocol):
    """A model whose first blocks read for a controller; `model/vlm.py` has one.

    Names no submodule: from Python 3.12 on, `isinstance` does not find those of a torch module.
    """

    @property
    def config(self) -> Sizes:
        """Sizes of the decoder."""

    def glance_tokens(self, question: str, style: str, tokenizer: Any) -> Tensor:
        """Return the stream (T,) of the glance's places and the question, with room for one more token.

        The tokenizer is the model's own; each family has its class.
        """

    def read_glances(self, glance: Tensor | None, tokens: Tensor, num_blocks: int) -> tuple[Tensor, Tensor]:
        """Return keys and values (S, B, H, T, W) of glances (B, G, D) and streams (B, T), without gradients."""

    def read_after(self, x: Tensor, keys: Tensor, values: Tensor, lengths: Tensor) -> Tensor:
        """Return the state (B, D) of one more embedding (B, D) after `lengths` (B,) tokens; it has gradients."""


@dataclass(frozen=True, slots=True)
class Reading:
    """Keys and values (S, B, H, T, W) of glances and questions after the first blocks, and real tokens (B,)."""

    keys: Tensor
    values: Tensor
    lengths: Tensor

    def take(self, rows: Tensor) -> Reading:
        """Select some of the requests."""
        return Reading(self.keys[:, rows], self.values[:, rows], self.lengths[rows])


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
        self, model: FirstBlocks, glance: Tensor | None, tokens: Tensor, lengths: Tensor, budget_ms: Tensor
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

    def read(self, model: FirstBlocks, glance: Tensor | None, tokens: Tensor, lengths: Tensor) -> Reading:
        """Run the blocks over glance and question: what every budget shares."""
        return Reading(*model.read_glances(glance, tokens, self.num_blocks), lengths)

    def decide(self, model: FirstBlocks, reading: Reading, budget_ms: Tensor) -> KnobLogits:
        """Logits (B, 3), (B, 5) and (B, 5) under budgets (B,), given what was read."""
        encoded = self.budget(budget_ms)
        token = self.token(encoded).to(reading.keys.dtype)
        state = model.read_after(token, reading.keys, reading.values, reading.lengths)
        found = torch.cat((self.norm(state.float()), encoded), dim=-1)
        hidden = nn.functional.gelu(self.hidden(found))
        return KnobLogits(*(head(hidden) for head in self.heads))
