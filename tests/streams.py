"""Streams of answers that are read at the same time."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import zip_longest

from tempovlm.core.request import Answer
from tempovlm.engine.transcript import Token


def taking_turns(streams: Iterable[Iterator[Token | Answer]]) -> list[Answer]:
    """Read the streams by turns, one item each; their answers, in order."""
    items = zip(*zip_longest(*streams), strict=True)
    answers = [[item for item in some if isinstance(item, Answer)] for some in items]
    assert all(len(some) == 1 for some in answers)
    return [one for (one,) in answers]
