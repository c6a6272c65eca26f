"""Collects the data sets that `sets` declares; every list of data sets comes from here."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from pkgutil import iter_modules

from tempovlm.core.errors import UserError
from tempovlm.data import sets
from tempovlm.data.dataset import DataSet
from tempovlm.data.own import SUFFIXES, OwnSet, describe, is_own, own_name, version_of
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


_own: dict[str, OwnSet] = {}
"""Files of your own questions that were named, by their name in results."""

_OWN_FILE = f"or give a file of your own questions ({', '.join(SUFFIXES)})"


def find(name: str) -> DataSet:
    """Return the data set of a name.

    Raises:
        UserError: There is none of that name.
    """
    if name not in DATASETS:
        raise UserError(f"unknown data set {name!r}; choose one of {', '.join(DATASETS)}, {_OWN_FILE}")
    return DATASETS[name]


def find_own(name: str) -> OwnSet | None:
    """Your own questions, by the path of their file or by the name of one that was named before; None for others.

    Raises:
        UserError: The file is missing or wrong, or has the name of a data set.
    """
    if not is_own(name):
        return _own.get(name)
    known = _own.get(own_name(name))
    return known if known is not None and known.version == version_of(Path(name)) else _opened(name, None)


def _opened(name: str, score: str | None) -> OwnSet:
    """The questions of a file, read where they are not known or are to be scored by another rule."""
    known = _own.get(own_name(name))
    if known is not None and (known.version, known.score) == (version_of(Path(name)), score):
        return known
    if own_name(name) in DATASETS:
        raise UserError(f"{name}: a data set is called {own_name(name)}; give the file another name")
    _own[own_name(name)] = found = OwnSet.read(Path(name), score)
    return found


def is_known(name: str) -> bool:
    """Whether results may be of this data set: a declared one, or your own that was named."""
    return name in DATASETS or name in _own


def task_of(name: str) -> str | None:
    """'vqa', 'multiple_choice' or 'caption'; None of an unknown data set."""
    if name in DATASETS:
        return DATASETS[name].task
    return _own[name].task if name in _own else None


def check_datasets(
    names: Sequence[str], flag: str, *, together: bool = False, score: str | None = None
) -> list[str]:
    """The names that results have, each once and in order; files of your own questions are read and checked.

    How a file that is read anew is scored is told on stderr.

    Args:
        names: The names and files that the user gave.
        flag: Its name, for the message.
        together: Whether data sets whose answers have no score of their own will do.
        score: The rule to score your own questions by; None leaves it to their file.

    Raises:
        UserError: One is unknown, or not allowed.
    """
    checked: dict[str, str] = {}
    for name in names:
        before = _own.get(own_name(name))
        own = _opened(name, score) if is_own(name) else _own.get(name)
        if own is not None and own is not before:
            sys.stderr.write(f"{name}: {own.count}; {describe(own.samples)}\n")
        if own is None and name not in DATASETS:
            raise UserError(f"--{flag} {name}: unknown data set; choose from {', '.join(DATASETS)}, {_OWN_FILE}")
        if own is None and score is not None:
            raise UserError(f"--score {score}: {name} has a rule of its own; give it with your own questions")
        if name in SCORED_TOGETHER and not together:
            raise UserError(
                f"--{flag} {name}: captions are scored many at once, not answer by answer; tempovlm bench and "
                "test_adaptive_inference.py score them"
            )
        place = name if own is None else str(own.path)
        known_name = name if own is None else own.name
        if checked.setdefault(known_name, place) != place:
            raise UserError(f"--{flag} {name}: results would mix it up with {checked[known_name]}; rename one")
    return list(checked)
