"""A knob setting made concrete for one model: which blocks run, each with how many experts per token.

A plan is passed as an argument, never stored on a model: two requests with different plans interleave on one
model. It is hashable, so it can key a cache of captured graphs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from tempovlm.core.errors import UserError
from tempovlm.core.knobs import KnobConfig
from tempovlm.core.shape import ModelShape


class Step(NamedTuple):
    """One block to run and its experts per token."""

    block: int
    top_k: int


@dataclass(frozen=True, slots=True)
class Ranking:
    """Blocks from the most important to the least; a permutation of `range(num_blocks)`."""

    order: tuple[int, ...]

    def __post_init__(self) -> None:
        if sorted(self.order) != list(range(len(self.order))):
            raise UserError(f"ranking {self.order}: must name each block from 0 to {len(self.order) - 1} once")

    @classmethod
    def evenly_spaced(cls, num_blocks: int) -> Ranking:
        """Return a ranking for a model of unknown importances: dropped blocks are spread over the depth.

        Blocks are added farthest-first from those already chosen (ties to the earlier), starting with the
        two ends, so every prefix covers the depth as evenly as it can.
        """
        chosen = list(dict.fromkeys((0, num_blocks - 1)))
        while len(chosen) < num_blocks:
            rest = (b for b in range(num_blocks) if b not in chosen)
            chosen.append(max(rest, key=lambda b: (min(abs(b - c) for c in chosen), -b)))
        return cls(tuple(chosen))

    def blocks(self, num_blocks: int) -> tuple[int, ...]:
        """Return the blocks that run at a depth, ascending: both ends always, then the best of the others.

        Sets nest: the blocks of a smaller depth are among those of a larger one.
        """
        ends = {0, len(self.order) - 1}
        inner = [block for block in self.order if block not in ends]
        return tuple(sorted(ends.union(inner[: max(num_blocks - len(ends), 0)])))


@dataclass(frozen=True, slots=True)
class Plan:
    """A setting made concrete; the decoder loops over `steps`."""

    knobs: KnobConfig
    steps: tuple[Step, ...]

    @classmethod
    def build(cls, knobs: KnobConfig, ranking: Ranking, shape: ModelShape) -> Plan:
        """Pick the blocks by the ranking and give each the setting's top-k.

        Raises:
            UserError: the ranking is for another number of blocks.
        """
        if len(ranking.order) != shape.num_blocks:
            raise UserError(f"the ranking has {len(ranking.order)} blocks, the model {shape.num_blocks}")
        return cls(knobs, tuple(Step(block, knobs.top_k) for block in ranking.blocks(knobs.num_blocks)))

    @property
    def blocks(self) -> tuple[int, ...]:
        """The blocks that run, ascending."""
        return tuple(step.block for step in self.steps)
