"""The targets, read from `targets.toml`: the result file, the path in it, and the bound."""

from __future__ import annotations

import operator
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from experiments.scoreboard.readings import COMPUTED, Content, read_figure

NO_SEED = "–"
"""Shown if the seed document sets no target."""

_COMPARISONS = {"≤": operator.le, "≥": operator.ge, "<": operator.lt, ">": operator.gt}


@dataclass(frozen=True, slots=True)
class Bound:
    """A target that a machine can check.

    Attributes:
        sign: comparison; `reported` if the value is only to be reported.
        limit: number to compare with.
    """

    sign: str
    limit: float = 0.0

    @classmethod
    def parse(cls, text: str) -> Bound:
        """Read `≤ 5` or `reported`."""
        sign, _, limit = text.partition(" ")
        if sign not in (*_COMPARISONS, "reported"):
            raise ValueError(f"{text}: no bound")
        return cls(sign, float(limit or 0))

    def holds(self, value: float) -> bool:
        """Whether a measured value meets it."""
        return self.sign == "reported" or bool(_COMPARISONS[self.sign](value, self.limit))

    def text(self, unit: str) -> str:
        """Return the bound as text."""
        return "reported" if self.sign == "reported" else f"{self.sign} {self.limit:g} {unit}".strip()


@dataclass(frozen=True, slots=True)
class Reading:
    """A measured value, and the value of the second bound, if the target has two of which one is enough."""

    value: float
    other: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """A result file of the repository.

    Attributes:
        path: from the repository's root; a folder stands for the Parquet files in it.
        model: prefix of the stamp's model; None allows any.
        hardware: `cpu`, or a part of the device's name in the stamp; None allows any.
        shipped: whether its figures only count for the shipped pocket's weights.
        fields: whether its own fields are its stamp.
    """

    path: str
    model: str | None = None
    hardware: str | None = None
    shipped: bool = False
    fields: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """A row of the results table.

    Attributes:
        experiment: its table. name: fixed, in snake case. about: the figure in words.
        seed: the seed document's target, as text.
        bound: this project's target. other: a second bound and its path; if it holds, the first need not.
        ours: this project's target in words, if the bound alone is not enough.
        figure: arguments of `read_figure`. read: name and arguments of a computed reading instead.
    """

    experiment: str
    name: str
    about: str
    bound: Bound
    source: Source
    figure: Mapping[str, Any]
    read: tuple[Any, ...] = ()
    unit: str = ""
    seed: str = NO_SEED
    other: tuple[str, Bound] | None = None
    ours: str | None = None

    @property
    def our_target(self) -> str:
        """This project's target as text."""
        return self.ours or self.bound.text(self.unit)

    def measure(self, content: Content) -> Reading:
        """Read the value from the file's content.

        Raises:
            AbsentError: it is not there.
            UserError: it is no number.
        """
        if self.read:
            name, *words = self.read
            return Reading(COMPUTED[name](content, *words))
        other = None if self.other is None else read_figure(content, self.other[0])
        return Reading(read_figure(content, **self.figure), other)

    def is_met(self, reading: Reading | None) -> bool | None:
        """Whether a reading meets the target; None without one. Every verdict of the report comes from here."""
        if reading is None:
            return None
        if self.bound.holds(reading.value):
            return True
        return self.other is not None and reading.other is not None and self.other[1].holds(reading.other)


_FIGURE = ("path", "scale", "minus", "over", "pick", "needs")


def _target(experiment: str, files: Mapping[str, Source], row: dict[str, Any]) -> Target:
    """Build a row of the table; an unused key is an error."""
    figure = {name: row.pop(name) for name in _FIGURE if name in row}
    second = row.pop("or", None)
    return Target(
        experiment=experiment,
        bound=Bound.parse(row.pop("bound")),
        source=files[row.pop("file")],
        figure=figure,
        read=tuple(row.pop("read", ())),
        other=second and (second["path"], Bound.parse(second["bound"])),
        **row,
    )


def _load(path: Path) -> tuple[Target, ...]:
    record = tomllib.loads(path.read_text(encoding="utf-8"))
    files = {name: Source(**fields) for name, fields in record["files"].items()}
    return tuple(_target(one["name"], files, row) for one in record["experiment"] for row in one["rows"])


TARGETS = _load(Path(__file__).with_name("targets.toml"))
"""Every row of the results table, in its order."""


def sources() -> tuple[Source, ...]:
    """Return the result files of all rows, each once, in the order of their first row."""
    return tuple(dict.fromkeys(target.source for target in TARGETS))
