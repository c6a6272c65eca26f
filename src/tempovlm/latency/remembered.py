"""A memory of a bounded number of computed values."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import TypeVar

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")


def remembered(values: dict[K, V], key: K, make: Callable[[], V], most: int) -> V:
    """Return the value of a key, made where it is not known; of more than `most` values the oldest is forgotten.

    Threads may share the values: two that miss the same one both make it, and get the same.
    """
    found = values.get(key)
    if found is None:
        found = values.setdefault(key, make())
        while len(values) > most:
            values.pop(list(values)[0], None)  # noqa: RUF015 - the list is taken in one step, beside other threads
    return found
