"""The fixed list of what this project promised in numbers: every row of the results table, in its order."""

from __future__ import annotations

from tempovlm.evaluation.targets import deciding, engine, exp8, measuring, pocket
from tempovlm.evaluation.targets.base import AbsentError, Bound, Reading, Source, Target, is_met
from tempovlm.evaluation.targets.kept import KEPT

__all__ = ["TARGETS", "AbsentError", "Bound", "Reading", "Source", "Target", "is_met", "sources"]

_ALL = (*pocket.ROWS, *engine.ROWS, *measuring.ROWS, *deciding.ROWS, *exp8.ROWS)

TARGETS: tuple[Target, ...] = tuple(target for target in _ALL if target.name in KEPT)


def sources() -> tuple[Source, ...]:
    """The result files of all rows, each once, in the order of their first row."""
    return tuple(dict.fromkeys(target.source for target in TARGETS))
