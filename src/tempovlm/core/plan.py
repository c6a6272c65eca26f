"""A knob setting made concrete for one model: which blocks run, each with how many experts per token.

A plan is passed as an argument, never stored on a model: two requests with different plans interleave on one
model. It is hashable, so it can key a cache of captured graphs.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from tempovlm.core.checks import finite, integer, shown
from tempovlm.core.errors import UserError
from tempovlm.core.knobs import KnobConfig
from tempovlm.core.paths import expanded, read_json
from tempovlm.core.shape import ModelShape

SCORE_KEYS = ("merged_scores", "merged", "train_scores", "importance_scores", "scores")
"""Fields of a ranking's file that may hold scores, in order of preference; else the object itself has them."""

_REMEDY = "give a JSON list of blocks, the most important first; docs/adding.md has the forms"


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

    @property
    def digest(self) -> str:
        """Twelve hex digits that change when the order does."""
        return hashlib.sha256(repr(self.order).encode()).hexdigest()[:12]

    def blocks(self, num_blocks: int) -> tuple[int, ...]:
        """Return the blocks that run at a depth, ascending: both ends always, then the best of the others.

        Sets nest: the blocks of a smaller depth are among those of a larger one.
        """
        ends = {0, len(self.order) - 1}
        inner = [block for block in self.order if block not in ends]
        return tuple(sorted(ends.union(inner[: max(num_blocks - len(ends), 0)])))


def find_ranking(wanted: str | Path | Sequence[int] | Ranking, num_blocks: int) -> Ranking:
    """Return a ranking that is given as blocks, or as the path of a file for `read_ranking`.

    Raises:
        UserError: it is neither, or not a ranking of the model's blocks.
    """
    if isinstance(wanted, str | Path):
        return read_ranking(expanded(wanted), num_blocks)
    order = wanted.order if isinstance(wanted, Ranking) else wanted
    if not isinstance(order, Iterable) or isinstance(order, Mapping | bytes):
        raise UserError(f"ranking {shown(wanted)}: give blocks, the most important first, or the path of a file")
    return checked_ranking(order, num_blocks, "ranking")


def read_ranking(path: Path, num_blocks: int) -> Ranking:
    """Read the blocks by importance from a JSON file, in any of these forms.

    - a list of blocks, the most important first, by itself or as the field `ranking`, which counts most;
    - scores, higher is more important: `{"0": 0.5, ...}`, by themselves or as one of `SCORE_KEYS`; ties go to the
      earlier block.

    The two ends may be left out: they run at every depth.

    Raises:
        UserError: missing, damaged, or of a model with another number of blocks; names file and place.
    """
    record = read_json(path, _REMEDY, _once)
    if isinstance(record, list):
        return checked_ranking(record, num_blocks, str(path))
    if not isinstance(record, Mapping) or not record:
        raise UserError(f"{path}: holds no ranking; {_REMEDY}")
    if isinstance(record.get("ranking"), list):
        return checked_ranking(record["ranking"], num_blocks, f"{path}: field ranking")
    key = next((name for name in SCORE_KEYS if isinstance(record.get(name), Mapping)), None)
    where = f"{path}: field {key}" if key else str(path)
    scores: dict[int, float] = {}
    for name, value in (record[key] if key else record).items():
        if not name.isdecimal() or str(int(name)) != name or int(name) >= num_blocks:
            raise UserError(f"{where}: {shown(repr(name))} is no block; expected 0 to {num_blocks - 1}")
        if finite(value) is None:
            raise UserError(f"{where}: the score of block {name} is {shown(repr(value))}, not a finite number")
        scores[int(name)] = value
    order: list[int] = sorted(scores, key=lambda block: (-scores[block], block))
    return checked_ranking(order, num_blocks, where)


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Make an object of a JSON file, in which no field may stand twice."""
    record = dict(pairs)
    if len(record) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for i, name in enumerate(names) if name in names[:i])
        raise ValueError(f"field {shown(repr(twice))} stands there twice")
    return record


def checked_ranking(order: Iterable[object], num_blocks: int, where: str) -> Ranking:
    """Make a ranking of blocks, of which the two ends may be left out.

    Raises:
        UserError: one is no block, stands there twice, or is missing; names its place.
    """
    places: dict[int, int] = {}
    for place, given in enumerate(order, start=1):
        block = integer(given)
        if block is None or not 0 <= block < num_blocks:
            what = f"{shown(repr(given))} at place {place} is no block of this model"
            raise UserError(f"{where}: {what}; expected 0 to {num_blocks - 1}")
        if block in places:
            raise UserError(f"{where}: block {block} stands at places {places[block]} and {place}; name it once")
        places[block] = place
    missing = [block for block in range(1, num_blocks - 1) if block not in places]
    if missing:
        raise UserError(
            f"{where}: block {missing[0]} is missing; name each of the model's {num_blocks} blocks once (the "
            "first and the last may be left out)"
        )
    ends = [block for block in dict.fromkeys((0, num_blocks - 1)) if block not in places]
    return Ranking((*ends, *places))


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
