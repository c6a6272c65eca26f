"""What a row of the results table is: a name, two targets, the file that answers it, and how to read it there.

Pure values and functions on the content of files. It knows neither where files lie nor how a table looks; the rows
themselves are in the modules beside it.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from tempovlm.core.errors import UserError

Content = Any
"""What a result file holds, as `json.loads` gives it."""

Measure = Callable[[Content], "Reading"]

NO_SEED = "–"
"""Where the seed document sets no target."""

_DIGITS = 9
"""Decimals of a measured value: enough to lose nothing, few enough that 0.06 × 100 is 6."""

_COMPARISONS = {"≤": operator.le, "≥": operator.ge, "<": operator.lt, ">": operator.gt}


class AbsentError(LookupError):
    """A file is there and does not hold this value; the message says which field."""


@dataclass(frozen=True, slots=True)
class Bound:
    """A target that a machine can check.

    Attributes:
        sign: how the value must compare; `any` where the target is that the value is reported.
        limit: what it is compared with.
    """

    sign: Literal["≤", "≥", "<", ">", "any"]
    limit: float = 0.0

    def holds(self, value: float) -> bool:
        """Whether a measured value keeps it."""
        return self.sign == "any" or bool(_COMPARISONS[self.sign](value, self.limit))

    def text(self, unit: str) -> str:
        """As people write it."""
        return "reported" if self.sign == "any" else f"{self.sign} {self.limit:g} {unit}".strip()


REPORTED = Bound("any")


@dataclass(frozen=True, slots=True)
class Reading:
    """A measured value, and the value of the other bound where a target has two of which one is enough."""

    value: float
    other: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """A result file of the repository.

    Attributes:
        path: from the repository's root; a folder stands for the Parquet files in it.
        command: what makes it.
        model: what its stamp's model must begin with; None where any will do.
        hardware: `cpu`, or a part of the device's name that the stamp must have; None where any will do.
        needs_shipped_weights: whether its figures mean nothing for other weights than the shipped pocket's.
        stamp: `file` for a stamp at the top or in each entry, `fields` for a file whose own fields are one.
    """

    path: str
    command: str
    model: str | None = None
    hardware: str | None = None
    needs_shipped_weights: bool = False
    stamp: Literal["file", "fields"] = "file"


@dataclass(frozen=True, slots=True)
class Target:
    """A row of the results table.

    Attributes:
        experiment: its table. name: fixed, in snake case. about: what is measured, in words.
        seed: the seed document's target, as text.
        bound: this project's target. other: a second bound; where it holds, the first need not.
        text: this project's target in words, where the bound alone does not say it.
        measure: from the file's content to the value.
    """

    experiment: str
    name: str
    about: str
    bound: Bound
    unit: str
    source: Source
    measure: Measure
    seed: str = NO_SEED
    other: Bound | None = None
    text: str | None = None

    @property
    def our_target(self) -> str:
        """This project's target as text."""
        return self.text or self.bound.text(self.unit)


def is_met(target: Target, reading: Reading | None) -> bool | None:
    """Whether a reading keeps its target; None without one. Every verdict of the report comes from here."""
    if reading is None:
        return None
    if target.bound.holds(reading.value):
        return True
    return target.other is not None and reading.other is not None and target.other.holds(reading.other)


def number(value: Any, name: str, scale: float = 1.0) -> float:
    """A stored number times `scale`.

    Raises:
        AbsentError: the file says that it was not measured.
        UserError: it is no finite number.
    """
    if value is None:
        raise AbsentError(f"field {name} is empty")
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise UserError(f"field {name} is no finite number but {value!r}")
    return round(value * scale, _DIGITS)


def look_up(content: Content, *path: str | int) -> Any:
    """The value at a path of names and places.

    Raises:
        AbsentError: there is nothing; names the path.
    """
    value = content
    for step in path:
        try:
            value = value[step]
        except (KeyError, IndexError, TypeError):
            raise AbsentError(f"there is no field {dotted(path)}") from None
    return value


def dotted(path: tuple[str | int, ...]) -> str:
    """A path as a message names it."""
    return ".".join(map(str, path))


def value_at(content: Content, *path: str | int, scale: float = 1.0) -> float:
    """The number at a path, times `scale`."""
    return number(look_up(content, *path), dotted(path), scale)


def field(*path: str | int, scale: float = 1.0) -> Measure:
    """A measure: the number at a path."""
    return lambda content: Reading(value_at(content, *path, scale=scale))


def row_named(content: Content, name: str) -> Any:
    """The entry of `rows` with this name.

    Raises:
        AbsentError: there is none.
    """
    for row in look_up(content, "rows"):
        if isinstance(row, dict) and row.get("name") == name:
            return row
    raise AbsentError(f"there is no row {name}")


def extreme(pick: Callable[[list[float]], float], values: list[float], name: str) -> float:
    """The least or the greatest of some values.

    Raises:
        AbsentError: there are none.
    """
    if not values:
        raise AbsentError(f"there is no value of {name}")
    return pick(values)
