"""The features that the networks read of a request: one definition for training and for serving.

A question is the mean of its tokens' embeddings; a picture is the mean and the maximum of its projected tokens.
Shapes: `N` tokens that exist, `L` width of an embedding, `C` crops, `G` tokens of a crop, `D` their
width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Row = NDArray[np.float32]


class Embeds(Protocol):
    """Turns token ids into embeddings."""

    @property
    def embedding(self) -> Tensor:
        """Return the embeddings (N, L) of token ids."""


class HasDecoder(Protocol):
    """A model whose decoder embeds tokens."""

    @property
    def decoder(self) -> Embeds:
        """A decoder that embeds tokens."""


class Encodes(Protocol):
    """Turns text into token ids."""

    def encode(self, text: str) -> list[int]:
        """Return the ids of plain text."""


def question_ids(tokenizer: Encodes, question: str) -> list[int]:
    """Return the token ids of a question as within a prompt, after a space."""
    return tokenizer.encode(f" {question.strip()}")


def token_vectors(model: HasDecoder) -> Tensor:
    """Copy all token embeddings (N, L) to the host, where a question is read faster than on a device."""
    return model.decoder.embedding.detach().float().cpu()


def language_feature(vectors: Tensor, ids: Sequence[int]) -> Row:
    """(L,) mean of a question's tokens among all tokens' embeddings (N, L); zeros without any token."""
    if not ids:
        return np.zeros(vectors.shape[1], np.float32)
    mean: Row = np.add.reduce(vectors.numpy().take(ids, axis=0), axis=0) / np.float32(len(ids))
    return mean


@torch.inference_mode()
def pooled(tokens: Tensor) -> Tensor:
    """Pool projected tokens (C, G, D) to their mean and maximum (2 · D,), float32, on their device."""
    flat = tokens.flatten(0, 1)
    return torch.cat((flat.mean(dim=0, dtype=torch.float32), flat.amax(dim=0)))


def vision_feature(tokens: Tensor) -> Row:
    """(2 · D,) of projected tokens (C, G, D), on the host."""
    if tokens.dtype != torch.float32 or tokens.is_cuda:
        return pooled(tokens).cpu().numpy()
    crops = tokens.numpy()  # NumPy starts its operations sooner than torch
    flat = crops.reshape(-1, crops.shape[-1])
    mean = np.full(len(flat), 1 / len(flat), np.float32).dot(flat)
    return np.concatenate((mean, np.maximum.reduce(np.maximum.reduce(crops, axis=0), axis=0)))


def glance_feature(tokens: Tensor) -> Row:
    """Return the same feature (2 · D,) of the global crop alone, the first of (C, G, D)."""
    return vision_feature(tokens[:1])


def vision_width(token_width: int) -> int:
    """Return the width of a vision feature of tokens (…, D)."""
    return 2 * token_width
