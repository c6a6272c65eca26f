"""Questions about a handful of values that can be read off: sums, differences, ranks, counts under a condition.

Numbers on objects, prices of a menu, points of teams and bars of a chart share them, so that what is learned of
one helps with the others. They take one to four steps; the easier ones come with the harder.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from random import Random


@dataclass(frozen=True, slots=True)
class Entry:
    """Something with a value of its own: how it is named, its value (from 1 up), whether it is held out."""

    name: str
    value: int
    held: bool = False


@dataclass(frozen=True, slots=True)
class Asked:
    """A question about values: its way (a key of the phrases), its words, its answer, whether it is held out."""

    way: str
    question: str
    answer: int | str
    held: bool


WHOLE = 20
"""Amount from which values are taken away."""


def ask_values(rng: Random, entries: list[Entry], phrases: dict[str, str]) -> Iterator[Asked]:
    """Ask one question of each way that the phrases have and that the values allow.

    Args:
        rng: chooses what is asked about.
        entries: two or more with different values.
        phrases: from sum, three, difference, twice, less, left, range, ends, top_two, over, between and second to
            words with the places `{a}`, `{b}`, `{c}`, `{low}` and `{high}`.
    """
    picked = rng.sample(entries, min(3, len(entries)))
    a, b = picked[:2]
    c = picked[2] if len(picked) > 2 else None
    ordered = sorted(entries, key=lambda entry: -entry.value)
    found: dict[str, int | str] = {"sum": a.value + b.value, "twice": 2 * a.value + b.value}
    if a.value + b.value < WHOLE:
        found["left"] = WHOLE - a.value - b.value
    if c:
        found["three"] = a.value + b.value + c.value
        found["range"] = ordered[0].value - ordered[-1].value
        found["ends"] = ordered[0].value + ordered[-1].value
        found["top_two"] = ordered[0].value + ordered[1].value
        found["second"] = ordered[1].name
        if a.value + b.value > c.value:
            found["less"] = a.value + b.value - c.value
    held = a.held or b.held or (c is not None and c.held)
    names = {"a": a.name, "b": b.name, "c": c.name if c else ""}
    low, high = _levels(rng, [entry.value for entry in entries])
    names |= {"low": str(low), "high": str(high)}
    for way, phrase in phrases.items():
        if way == "difference":
            big, small = (a, b) if a.value > b.value else (b, a)
            asked = phrase.format(**names | {"a": big.name, "b": small.name})
            yield Asked(way, asked, big.value - small.value, held)
        elif way in ("over", "between"):
            inside = sum(low < entry.value and (way == "over" or entry.value < high) for entry in entries)
            yield Asked(way, phrase.format(**names), inside, any(entry.held for entry in entries))
        elif way in found:
            yield Asked(way, phrase.format(**names), found[way], held or any(entry.held for entry in entries))


def _levels(rng: Random, values: list[int]) -> tuple[int, int]:
    """Return a lower and an upper level, neither one of the values, that most often part them."""
    free = [level for level in range(1, max(values) + 2) if level not in values]
    inside = [level for level in free if min(values) < level < max(values)]
    low = rng.choice(inside or free)
    return low, rng.choice([level for level in range(low + 2, low + 9) if level not in values])


def near(rng: Random, right: int, count: int = 2) -> list[str]:
    """Return wrong numbers from 0 up that are near the right one."""
    return rng.sample([str(other) for other in range(max(0, right - 4), right + 5) if other != right], count)
