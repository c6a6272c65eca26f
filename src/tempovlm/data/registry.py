"""Collects the data sets that `sets` declares; every list of data sets comes from here."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from pkgutil import iter_modules

from tempovlm.core.errors import UserError
from tempovlm.data import sets
from tempovlm.data.dataset import DataSet
from tempovlm.testbed import stand_ins


def _collect() -> dict[str, DataSet]:
    modules = (import_module(f"{sets.__name__}.{one.name}") for one in iter_modules(sets.__path__))
    found: list[DataSet] = [module.DATA_SET for module in modules]
    return {one.name: one for one in sorted(found, key=lambda one: (one.order, one.name))}


DATASETS = _collect()
"""All data sets by name."""

GENERATED = tuple(name for name in DATASETS if name in stand_ins.NAMES)
"""Data sets with a generated stand-in."""

SCORED_TOGETHER = frozenset(name for name, one in DATASETS.items() if one.metric is None)
"""Data sets that only have a score of all answers together (CIDEr of captions)."""


def find(name: str) -> DataSet:
    """Return the data set of a name.

    Raises:
        UserError: There is none of that name.
    """
    if name not in DATASETS:
        raise UserError(f"unknown data set {name!r}; choose one of {', '.join(DATASETS)}")
    return DATASETS[name]


def check_datasets(names: Sequence[str], flag: str, *, together: bool = False) -> list[str]:
    """Return the names, each once and in order.

    Args:
        names: The user's names.
        flag: The flag's name, for the message.
        together: Whether data sets without a score for single answers are allowed.

    Raises:
        UserError: One is unknown, or not allowed.
    """
    for name in names:
        if name not in DATASETS:
            raise UserError(f"--{flag} {name}: unknown data set; choose from {', '.join(DATASETS)}")
        if name in SCORED_TOGETHER and not together:
            raise UserError(
                f"--{flag} {name}: captions are scored many at once, not answer by answer; tempovlm bench and "
                "test_adaptive_inference.py score them"
            )
    return list(dict.fromkeys(names))
