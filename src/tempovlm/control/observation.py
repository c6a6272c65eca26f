"""What the networks see of a request: one definition for training and for serving.

A question is the mean of its tokens' embeddings, a picture the mean and the largest of its projected tokens. Knows
no network. Shapes: `T` tokens, `L` width of an embedding, `C` crops, `G` tokens of a crop, `D` width of a token.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor


class Embeds(Protocol):
    """Turns token ids (T,) into embeddings (T, L)."""

    def embed(self, tokens: Tensor) -> Tensor:
        """(T,) ids to (T, L)."""


class HasDecoder(Protocol):
    """A model whose decoder embeds tokens."""

    @property
    def decoder(self) -> Embeds:
        """What reads tokens."""


class Encodes(Protocol):
    """Turns text into token ids."""

    def encode(self, text: str) -> list[int]:
        """Ids of plain text."""


def question_ids(tokenizer: Encodes, question: str) -> list[int]:
    """Token ids of a question as it stands within a prompt, after a space."""
    return tokenizer.encode(f" {question.strip()}")


@torch.inference_mode()
def language_feature(model: HasDecoder, ids: Sequence[int]) -> Tensor:
    """(L,) mean embedding of a question's tokens, float32 on the CPU; that of token 0, zeroed, without any."""
    device = _device(model)
    tokens = torch.tensor(list(ids) or [0], device=device)
    mean = model.decoder.embed(tokens).float().mean(dim=0)
    return (mean if ids else torch.zeros_like(mean)).cpu()


def _device(model: HasDecoder) -> torch.device | None:
    embedding = getattr(model.decoder, "embedding", None)
    return embedding.device if isinstance(embedding, Tensor) else None


@torch.inference_mode()
def vision_feature(tokens: Tensor) -> Tensor:
    """(2 · D,) mean and largest value over projected tokens (C, G, D), float32 on the CPU."""
    flat = tokens.reshape(-1, tokens.shape[-1]).float()
    return torch.cat((flat.mean(dim=0), flat.amax(dim=0))).cpu()


def glance_feature(tokens: Tensor) -> Tensor:
    """(2 · D,) the same of the global crop alone, the first of (C, G, D)."""
    return vision_feature(tokens[:1])


def vision_width(token_width: int) -> int:
    """Length of a vision feature of tokens (…, D)."""
    return 2 * token_width
