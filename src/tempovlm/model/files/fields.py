"""Fields of a published `config.json`, read one by one: present, of the right type, in range."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tempovlm.core.checks import finite, integer, shown
from tempovlm.core.errors import UserError

MOST = 1 << 24
"""Larger sizes are typing errors, and would exhaust memory or time before anything else is found."""


class Fields:
    """A table of a file, and the names of its fields in messages."""

    def __init__(self, values: Any, where: str) -> None:
        """Wrap the content of `where`, a file or a table in it.

        Raises:
            UserError: it is not a table.
        """
        if not isinstance(values, Mapping):
            raise UserError(f"{where}: damaged, not a table of fields; copy it again from the model's folder")
        self.values, self.where = values, where

    def wrong(self, name: str, rule: str) -> UserError:
        """Return the error that a field breaks a rule."""
        return UserError(f"{self.where}: field {name} is {shown(repr(self.values.get(name)))}, {rule}")

    def get(self, name: str) -> Any:
        """Return the field unchanged.

        Raises:
            UserError: it is missing; the readers below raise it too.
        """
        if name not in self.values:
            raise UserError(f"{self.where}: field {name} is missing; is this a Molmo checkpoint?")
        return self.values[name]

    def table(self, name: str) -> Fields:
        """Return an inner table."""
        if not isinstance(self.get(name), Mapping):
            raise self.wrong(name, "not a table of fields")
        return Fields(self.get(name), f"{self.where}: {name}")

    def whole(self, name: str, least: int = 1, most: int = MOST) -> int:
        """Return a whole number."""
        value = integer(self.get(name))
        if value is None or value < least:
            raise self.wrong(name, f"not a whole number from {least} on")
        if value > most:
            raise self.wrong(name, f"above {most}, the most that is supported")
        return value

    def positive(self, name: str) -> float:
        """Return a finite number above 0."""
        value = finite(self.get(name))
        if value is None or value <= 0:
            raise self.wrong(name, "not a positive, finite number")
        return float(value)

    def list_of_whole(self, name: str, count: int | None = None) -> tuple[int, ...]:
        """Return whole numbers of any sign: `count` of them, or at least one."""
        value = self.get(name)
        if (
            not isinstance(value, list)
            or any(integer(one) is None for one in value)
            or len(value) != (count or len(value) or 1)
        ):
            raise self.wrong(name, f"not a list of {count or 'one or more'} whole numbers")
        return tuple(value)

    def fixed(self, name: str, ours: Any) -> None:
        """Check an optional field that has only one supported value."""
        if self.values.get(name) is not None and self.values[name] != ours:
            raise self.wrong(name, f"only {ours!r} is supported")
