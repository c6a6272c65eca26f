"""A preallocated key-value cache that has entries only for the blocks of its plan.

Shapes: `S` steps of the plan, `B` batch, `H` heads, `T` capacity in tokens, `W` head width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tempovlm.model.config import ModelConfig


@dataclass(frozen=True, slots=True)
class KVCache:
    """Keys (after norm and rotation) and values, each (S, B, H, T, W)."""

    keys: Tensor
    values: Tensor

    @classmethod
    def allocate(cls, config: ModelConfig, num_steps: int, batch: int, capacity: int, like: Tensor) -> KVCache:
        """Room for `capacity` tokens in each of `num_steps` blocks, of the type and device of `like`."""
        shape = (num_steps, batch, config.kv_heads, capacity, config.head_width)
        return cls(
            torch.zeros(shape, dtype=like.dtype, device=like.device),
            torch.zeros(shape, dtype=like.dtype, device=like.device),
        )

    @property
    def capacity(self) -> int:
        """Capacity in tokens."""
        return self.keys.shape[3]

    def write(self, step: int, start: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Store (B, H, T, W) keys and values from position `start`; return all entries up to their end."""
        end = start + key.shape[2]
        self.keys[step, :, :, start:end] = key
        self.values[step, :, :, start:end] = value
        return self.read(step, end)

    def read(self, step: int, end: int) -> tuple[Tensor, Tensor]:
        """Return keys and values (B, H, end, W) of the first `end` tokens."""
        return self.keys[step, :, :, :end], self.values[step, :, :, :end]


@dataclass(frozen=True)
class FullCache(KVCache):
    """Keys and values that are never written, so that gradients pass through the tokens that follow."""

    def write(self, step: int, start: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:  # noqa: ARG002
        """Return those that are there, and the new ones (B, H, T, W) after them."""
        return torch.cat((self.keys[step], key), dim=2), torch.cat((self.values[step], value), dim=2)
