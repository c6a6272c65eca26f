"""One decode step on a CPU for a model so narrow that a product takes less time than starting a torch operation.

It computes `Molmo.decode` in NumPy, whose calls start in a fraction of the time, on the cache's own memory
and on a copy of the decoder's weights. An array that shares memory with a tensor dangles when torch moves the
tensor's storage, as it does when a model is sent to another process. Batches and masks use the torch modules.
Shapes: `D` width, `H` heads, `W` head width, `T` tokens so far, `E` experts, `K` top-k, `F` expert width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from tempovlm.core.plan import Plan
from tempovlm.model.cache import KVCache
from tempovlm.model.decoder import Block, Decoder, is_plain

NARROW = 1024
"""Below this width, starting an operation, or waking a thread for it, costs more than the operation."""

Floats = NDArray[np.float32]


@dataclass(frozen=True, eq=False, slots=True)
class _Block:
    """A block's weights: norms (D,), `gate_up` (E, 2F, D), `down` (E, D, F), the rest (out, in)."""

    norm: Floats
    qkv: Floats
    qk_norm: Floats
    out: Floats
    moe_norm: Floats
    router: Floats
    gate_up: Floats
    down: Floats

    @classmethod
    def of(cls, block: Block) -> _Block:
        attention, moe = block.attention, block.moe
        return cls(
            _array(attention.norm.weight),
            _array(attention.qkv.weight),
            _array(torch.stack((attention.q_norm.weight, attention.k_norm.weight))),
            _array(attention.out.weight),
            _array(moe.norm.weight),
            _array(moe.router.weight),
            _array(moe.gate_up),
            _array(moe.down),
        )


@dataclass(frozen=True, eq=False, slots=True)
class NarrowDecoder:
    """Decodes token by token; made once for a model whose weights do not change any more."""

    decoder: Decoder
    blocks: tuple[_Block, ...]
    embedding: Floats
    norm: Floats
    head: Floats
    cos: Floats
    sin: Floats
    num_heads: int
    eps: float

    @classmethod
    def of(cls, decoder: object) -> NarrowDecoder | None:
        """For this decoder, or None where the usual way is the better one."""
        if not is_plain(decoder):
            return None
        weight = decoder.embedding
        if weight.device.type != "cpu" or weight.dtype != torch.float32 or weight.shape[1] >= NARROW:
            return None
        blocks = [block for block in decoder.blocks if isinstance(block, Block)]
        return cls(
            decoder,
            tuple(_Block.of(block) for block in blocks),
            _array(decoder.embedding),
            _array(decoder.norm.weight),
            _array(decoder.head.weight),
            _array(decoder.rotary.cos),
            _array(decoder.rotary.sin),
            blocks[0].attention.num_heads,
            decoder.norm.eps,
        )

    def __reduce__(self) -> tuple[Callable[[Decoder], NarrowDecoder | None], tuple[Decoder]]:
        """Copy: copies and other processes copy the weights again, from their own decoder."""
        return NarrowDecoder.of, (self.decoder,)

    def decode(self, token: int, plan: Plan, cache: KVCache, start: int) -> Tensor:
        """Return logits (1, V) after one more token, which is written to a cache of one row at `start`."""
        keys, values = cache.keys.numpy()[:, 0], cache.values.numpy()[:, 0]
        cos, sin = self.cos[start], self.sin[start]
        x = self.embedding[token]
        for i, (block, top_k) in enumerate(plan.steps):
            weights = self.blocks[block]
            x = self._attend(weights, x, keys[i], values[i], start, cos, sin)
            x = self._visit(weights, x, top_k)
        return torch.from_numpy(self.head.dot(self._scaled(x) * self.norm)).unsqueeze(0)

    def _attend(
        self, w: _Block, x: Floats, keys: Floats, values: Floats, start: int, cos: Floats, sin: Floats
    ) -> Floats:
        """Return (D,) after attention; `keys` and `values` are (H, capacity, W)."""
        H, D = self.num_heads, x.shape[0]
        qkv = w.qkv.dot(self._scaled(x) * w.norm)
        both = qkv[: 2 * D].reshape(2, D)
        scale = np.sqrt(np.einsum("ij,ij->i", both, both) / np.float32(D) + np.float32(self.eps))
        both = (both / scale[:, None] * w.qk_norm).reshape(2, H, -1)
        half = both.shape[-1] // 2
        turned = np.concatenate((-both[..., half:], both[..., :half]), axis=-1)
        query, key = both * cos + turned * sin
        keys[:, start] = key
        values[:, start] = qkv[2 * D :].reshape(H, -1)
        scores = np.matmul(keys[:, : start + 1], query[:, :, None])[:, :, 0] * np.float32(query.shape[-1] ** -0.5)
        shares = _softmax(scores)
        seen = np.matmul(shares[:, None], values[:, : start + 1])
        return x + w.out.dot(seen.reshape(D))

    def _visit(self, w: _Block, x: Floats, top_k: int) -> Floats:
        """Return (D,) after the `top_k` experts, whose weights are not renormalised."""
        normed = self._scaled(x) * w.moe_norm
        scores = w.router.dot(normed)
        probabilities = _softmax(scores)
        chosen = (-scores).argsort(kind="stable")[:top_k].tolist()  # as `moe.best`
        gate, up = np.split(np.stack([w.gate_up[expert].dot(normed) for expert in chosen]), 2, axis=1)
        silu = gate * (0.5 + 0.5 * np.tanh(0.5 * gate))
        hidden = silu * up * probabilities[chosen][:, None]
        out = x.copy()
        for expert, row in zip(chosen, hidden, strict=True):
            out += w.down[expert].dot(row)
        return out

    def _scaled(self, x: Floats) -> Floats:
        """Apply the root-mean-square norm without its weight."""
        return x / np.sqrt(x.dot(x) / np.float32(x.shape[0]) + np.float32(self.eps))


def _softmax(x: Floats) -> Floats:
    """Softmax over the last dimension."""
    x = np.exp(x - x.max(axis=-1, keepdims=True))
    return x / x.sum(axis=-1, keepdims=True)


def _array(weight: Tensor | nn.Parameter) -> Floats:
    return np.array(weight.detach().numpy())
