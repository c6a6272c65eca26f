"""The three knobs and the list of legal settings of a model.

`plan` says which blocks a setting runs, `cost` what it costs.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import product

from tempovlm.core.checks import checked_integer, checked_text
from tempovlm.core.errors import UserError
from tempovlm.core.shape import ModelShape

TIERS = ("low", "medium", "high")
"""Vision tiers from the fewest crops to the most."""

KNOBS = ("tier", "top_k", "num_blocks")
"""The knobs' names, in the order of a setting's index."""

_TOP_K_OF_NATIVE = (0.5, 0.75, 1.0, 1.25, 1.5)
_BLOCKS_OF_ALL = (0.5, 0.625, 0.75, 0.875, 1.0)


@dataclass(frozen=True, slots=True, kw_only=True, order=False)
class KnobConfig:
    """One setting: vision `tier`, experts per token `top_k`, transformer blocks that run `num_blocks`.

    Raises:
        UserError: `tier` is not text, or another knob not an integer. `KnobSpace` checks whether they are legal.
    """

    tier: str
    top_k: int
    num_blocks: int

    def __post_init__(self) -> None:
        for name, value in (
            ("tier", checked_text("--tier", self.tier)),
            ("top_k", checked_integer("--top_k", self.top_k)),
            ("num_blocks", checked_integer("--num_blocks", self.num_blocks)),
        ):
            object.__setattr__(self, name, value)

    def __str__(self) -> str:
        return f"{self.tier}/k{self.top_k}/b{self.num_blocks}"


@dataclass(frozen=True)
class KnobSpace:
    """All legal settings of a model, in a fixed order, convertible to an index and back.

    The order is tier, then top-k, then blocks, each from cheap to expensive. `fingerprint` is stored with
    everything that holds an index, so that an index can never change its meaning.
    """

    tiers: tuple[str, ...]
    top_ks: tuple[int, ...]
    block_counts: tuple[int, ...]
    native_top_k: int

    @classmethod
    def for_model(cls, shape: ModelShape) -> KnobSpace:
        """Derive the space from a shape: half to one and a half times its top-k, half to all of its blocks.

        MolmoE-1B (16 blocks, 64 experts, top-8) has top-k 4, 6, 8, 10, 12 and blocks 8, 10, 12, 14, 16.
        """
        top_ks = {round(shape.top_k * f) for f in _TOP_K_OF_NATIVE}
        top_ks = {min(max(k, 1), shape.num_experts) for k in top_ks}
        blocks = {max(round(shape.num_blocks * f), min(2, shape.num_blocks)) for f in _BLOCKS_OF_ALL}
        return cls(TIERS, tuple(sorted(top_ks)), tuple(sorted(blocks)), shape.top_k)

    @cached_property
    def settings(self) -> tuple[KnobConfig, ...]:
        """All settings, in index order."""
        grid = product(self.tiers, self.top_ks, self.block_counts)
        return tuple(KnobConfig(tier=t, top_k=k, num_blocks=n) for t, k, n in grid)

    @property
    def native(self) -> KnobConfig:
        """The setting as trained: all crops, the trained top-k, all blocks."""
        return KnobConfig(tier=self.tiers[-1], top_k=self.native_top_k, num_blocks=self.block_counts[-1])

    @property
    def largest(self) -> KnobConfig:
        """The most expensive setting; above the trained top-k, accuracy need not rise."""
        return self.settings[-1]

    @property
    def cheapest(self) -> KnobConfig:
        """The cheapest setting."""
        return self.settings[0]

    def __len__(self) -> int:
        return len(self.settings)

    def __iter__(self) -> Iterator[KnobConfig]:
        return iter(self.settings)

    def __contains__(self, knobs: object) -> bool:
        return knobs in self._index

    @cached_property
    def _index(self) -> dict[KnobConfig, int]:
        return {knobs: i for i, knobs in enumerate(self.settings)}

    def index(self, knobs: KnobConfig) -> int:
        """Return the index of a setting.

        Raises:
            UserError: the setting is not in the space; names the knob and its legal values.
        """
        found = self._index.get(knobs)
        if found is None:
            self.validate(knobs)
            raise KeyError(knobs)
        return found

    def validate(self, knobs: KnobConfig) -> None:
        """Raise a `UserError` that names the first knob with an illegal value."""
        if not isinstance(knobs, KnobConfig):
            raise UserError(f"knobs {knobs!r}: must be a KnobConfig, such as the space's native")
        for name, value, legal in (
            ("tier", knobs.tier, self.tiers),
            ("top_k", knobs.top_k, self.top_ks),
            ("num_blocks", knobs.num_blocks, self.block_counts),
        ):
            if value not in legal:
                choices = ", ".join(str(v) for v in legal)
                raise UserError(f"--{name} {value}: not in the knob space of this model; choose from {choices}")

    @property
    def fingerprint(self) -> str:
        """Twelve hex digits that change when any legal value or the order changes."""
        text = json.dumps([self.tiers, self.top_ks, self.block_counts, self.native_top_k])
        return hashlib.sha256(text.encode()).hexdigest()[:12]
