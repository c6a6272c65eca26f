"""Families of models: which class a checkpoint is loaded as, and what the engine asks of it.

`docs/adding.md` says how to add one. Shapes: `C` crops, `P` patches, `G` tokens of a crop, `B` batch, `T` tokens,
`D` width, `V` vocabulary.
"""

from __future__ import annotations

import pkgutil
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from functools import lru_cache
from itertools import accumulate
from typing import Any, ClassVar, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from tempovlm.core.plan import Plan
from tempovlm.model.cache import KVCache
from tempovlm.model.config import ModelConfig
from tempovlm.model.files.fields import Fields
from tempovlm.model.prompt import Tokenizer
from tempovlm.model.vision.device_crops import stream_of

FAMILIES: dict[str, str] = {"molmo": "tempovlm.model.vlm:Molmo"}
"""`model_type` of `config.json` → the class, as module:name. Nothing else is ever imported for a checkpoint."""


class TokenDecoder(Protocol):
    """A decoder of tokens; a `torch.nn.Module`."""

    embedding: nn.Parameter
    """(N, D) one row for each token."""

    def __call__(
        self,
        x: Tensor,
        positions: Tensor,
        plan: Plan,
        cache: KVCache | None = None,
        start: int = 0,
        mask: Tensor | None = None,
        tick: Callable[[], None] | None = None,
    ) -> Tensor:
        """Run the plan's steps over embeddings (B, T, D) at positions (B, T); hidden states (B, T, D).

        Args:
            x: embeddings.
            positions: of the tokens in their rows.
            plan: its step `i`, a block and its top-k, owns entry `i` of the cache; no other block runs.
            cache: read, and written from `start` on; None keeps nothing.
            start: tokens that are in the cache.
            mask: (B, 1, T, start + T), True where a token may look; None means causal.
            tick: called before each block; it may raise, to end a request that is not wanted any more.
        """

    def embed(self, tokens: Tensor) -> Tensor:
        """Embed token ids (B, T) as (B, T, D)."""

    def logits(self, hidden: Tensor) -> Tensor:
        """Score the next token: hidden states (..., D) to (..., V)."""


class VisionLanguageModel(nn.Module, ABC):
    """A model that the engine can run: crops and tokens in, logits out, under a plan that is an argument.

    Attributes:
        config_class: reads and writes `config.json`. tokenizer_class: reads `tokenizer.json` and writes prompts.
        config: sizes.
        vision: patches (U, P, patch values) to features (U, P, F); a second argument (U,), True for the crops that
            count, may be None or left out, and features of the others are 0; `tick`, a function that is called
            before each block and may raise, may be None or left out.
        projector: features (C, P, F) and shares of real pixels (C, P) to tokens (C, G, D).
        decoder: tokens to logits.
    """

    config_class: ClassVar[type[ModelConfig]]
    tokenizer_class: ClassVar[type[Tokenizer]]
    config: ModelConfig
    vision: nn.Module
    projector: nn.Module
    decoder: TokenDecoder

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config

    @abstractmethod
    def fill_tables(self) -> None:
        """Fill what no checkpoint stores, after an allocation without values."""

    @abstractmethod
    def hub_views(self) -> dict[str, Tensor]:
        """Return the published name of every tensor → its place in the model, without gradients."""

    def embed(self, tokens: Tensor, features: Tensor | None, slots: Tensor | None) -> Tensor:
        """Embed tokens (B, T) and add image features at their places; (B, T, D).

        `slots` holds, for each of the (C·G) feature rows, a flat index into B·T, or -1 for a feature that has
        no place. Features are added to, and do not replace, the embedding of the patch token. Slots on the host
        are looked through there once, and a GPU is not waited for.
        """
        x = self.decoder.embed(tokens)
        if features is None or slots is None:
            return x
        if torch.is_inference_mode_enabled() and not slots.is_cuda:
            used, places = _kept_used(slots, x.device, stream_of(x.device))
        else:
            used, places = _used(slots, x.device)
        flat = x.reshape(-1, x.shape[-1])
        rows = features.reshape(-1, features.shape[-1])
        rows = rows.index_select(0, used).to(x.dtype)
        return flat.index_add(0, places, rows).view_as(x)

    @torch.inference_mode()
    def embed_packed(self, prompts: Sequence[tuple[Tensor, Tensor | None, Tensor | None]]) -> list[Tensor]:
        """Embed several prompts in one call, which starts as much work as for one; return (T, D) of each.

        A prompt is its tokens (T,) and, as for `embed`, its features and their slots; tokens and slots are on the
        host.
        """
        device, lengths = self.decoder.embedding.device, [len(tokens) for tokens, *_ in prompts]
        rows, used, places = list[Tensor](), list[np.ndarray](), list[np.ndarray]()
        num_rows = 0
        for (_, features, slots), begin in zip(prompts, accumulate(lengths, initial=0), strict=False):
            if features is not None and slots is not None:
                own, at = _used_on_host(slots)
                rows.append(features.flatten(0, 1))
                used.append(own + num_rows)
                places.append(at + begin)
                num_rows += len(rows[-1])
        parts = [np.concatenate([tokens.numpy() for tokens, *_ in prompts]), *used, *places]
        numbers = torch.empty(sum(map(len, parts)), dtype=torch.int64, pin_memory=device.type == "cuda")
        np.concatenate(parts, out=numbers.numpy())
        count = sum(map(len, used))
        tokens, use, place = numbers.to(device, non_blocking=True).split([sum(lengths), count, count])
        x = self.decoder.embed(tokens.unsqueeze(0))[0]
        if rows:
            every = torch.cat(rows) if len(rows) > 1 else rows[0]
            x = x.index_add(0, place, every.index_select(0, use).to(x.dtype))
        return list(x.split(lengths))

    def prefill(
        self,
        x: Tensor,
        plan: Plan,
        cache: KVCache | None,
        lengths: Tensor | None = None,
        tick: Callable[[], None] | None = None,
    ) -> Tensor:
        """Logits (B, V) after the last real token of each row of embeddings (B, T, D).

        `lengths` (B,) gives the real tokens of rows padded on the right; None means that all are real. `tick` is
        called before each block, and may raise.
        """
        B, T, _ = x.shape
        steps = torch.arange(T, device=x.device)
        if lengths is None:
            hidden = self.decoder(x, steps.expand(B, T), plan, cache, tick=tick)
            return self.decoder.logits(hidden[:, -1])
        positions = torch.minimum(steps.expand(B, T), (lengths - 1).unsqueeze(1))
        hidden = self.decoder(x, positions, plan, cache, tick=tick)
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


def _used(slots: Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return the rows of features that have a place, and their places, on a device."""
    used = (slots >= 0).nonzero().squeeze(1)
    places = slots.index_select(0, used).to(device, non_blocking=True)
    return used.to(device, non_blocking=True), places


@lru_cache(maxsize=64)
def _used_on_host(slots: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Return as `_used`, as arrays, which are kept for prompts with the same tensor of slots."""
    used, places = _used(slots, torch.device("cpu"))
    return used.numpy(), places.numpy()


@lru_cache(maxsize=64)
def _kept_used(slots: Tensor, device: torch.device, stream: int) -> tuple[Tensor, Tensor]:
    """Return `_used`, kept for prompts with the same tensor of slots, as all about pictures of one grid have."""
    del stream  # part of the key only
    return _used(slots, device)


def class_of(model_type: str) -> type[VisionLanguageModel]:
    """Import the class of one of `FAMILIES`."""
    return pkgutil.resolve_name(FAMILIES[model_type])


def family_of(values: Any, where: str) -> type[VisionLanguageModel]:
    """Return the class that a `config.json` names; one without `model_type` is Molmo's.

    Args:
        values: of the file.
        where: the file's name in messages.

    Raises:
        UserError: the file holds no table, or names another family.
    """
    fields = Fields(values, where)
    name = fields.values.get("model_type") or ModelConfig.model_type
    if not isinstance(name, str) or name not in FAMILIES:
        raise fields.wrong("model_type", f"only {', '.join(map(repr, FAMILIES))} is supported")
    return class_of(name)
