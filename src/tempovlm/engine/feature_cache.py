"""A bounded cache of picture features, keyed by the content of the crops.

A hit is a picture whose crops, as the vision transformer would see them, are equal value for value, so that its
features are equal too. Off by default, because a hit does not measure the vision encoder. A look-up waits for
the device once, which the stage's clock counts. A cache serves one model, whose weights must not change.

Shapes: `U` distinct crops, `P` patches of a crop, `X` values of a patch, `F` features of a patch.
"""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from tempovlm.core.checks import checked_megabytes

BYTES_OF_MB = 1_000_000

LANES = 2
"""Independent digests of a crop; 64 bits each."""


class ContentDigest:
    """Computes a digest of crops on their device, keyed by secret random weights of this process.

    Multilinear hashing (Lemire and Kaser 2014, "Strongly universal string hashing is fast"): the values' bits as
    integers of 16 or 32 bits times random 64-bit weights, summed modulo 2⁶⁴. Two different crops collide with a
    probability of at most 2⁻³³ for each of the `LANES` digests, even if chosen on purpose.
    """

    def __init__(self) -> None:
        self._weights: Tensor | None = None

    def __call__(self, patches: Tensor) -> bytes:
        """Return the digest of (U, P, X); waits for the device."""
        words = patches.flatten(1).contiguous()
        words = words.view(torch.int16 if words.element_size() == 2 else torch.int32)
        weights = self._weights
        if weights is None or weights.shape[1] != words.shape[1] or weights.device != words.device:
            weights = self._weights = _random_words(words.shape[1], words.device)
        sums = torch.stack([(words * lane).sum(dim=1) for lane in weights], dim=1)
        return sums.cpu().numpy().tobytes()


def _random_words(count: int, device: torch.device) -> Tensor:
    """Return (LANES, count) random 64-bit integers from the system, not from a generator with a guessable seed."""
    drawn = torch.frombuffer(bytearray(os.urandom(LANES * count * 8)), dtype=torch.int64)
    return drawn.view(LANES, count).to(device)


class FeatureCache:
    """The most recently used features.

    Attributes:
        max_bytes: limit for all features together. hits, misses: look-ups so far.
    """

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self.hits = self.misses = 0
        self._digest = ContentDigest()
        self._entries: OrderedDict[bytes, Tensor] = OrderedDict()
        self._bypasses = 0

    @classmethod
    def of(cls, megabytes: float) -> FeatureCache | None:
        """Return a cache of this many megabytes; None for 0.

        Raises:
            UserError: the size is negative or not finite.
        """
        size = checked_megabytes(megabytes)
        return cls(int(size * BYTES_OF_MB)) if size else None

    @property
    def num_bytes(self) -> int:
        """Bytes that the features take."""
        return sum(entry.nbytes for entry in self._entries.values())

    def features(self, patches: Tensor, encode: Callable[[Tensor], Tensor]) -> Tensor:
        """Return features (U, P, F) of crops (U, P, X), from `encode` on a miss; read-only."""
        if self._bypasses:
            return encode(patches)
        key = self._digest(patches)
        found = self._entries.get(key)
        if found is not None:
            self.hits += 1
            self._entries.move_to_end(key)
            return found
        self.misses += 1
        made = encode(patches)
        if made.nbytes <= self.max_bytes:
            self._entries[key] = made
            while self.num_bytes > self.max_bytes:
                self._entries.popitem(last=False)
        return made

    @contextmanager
    def bypassed(self) -> Iterator[None]:
        """Encode everything while the block runs: for measurements."""
        self._bypasses += 1
        try:
            yield
        finally:
            self._bypasses -= 1
