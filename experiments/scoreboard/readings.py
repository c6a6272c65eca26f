"""Read a figure from the content of a result file.

A path has steps with dots between them:

    rows.0.ms_median          a field of a record, or a place in a list
    coverage.*.p90            every value of a record or list
    test|held_out.r2          each of these fields
    candidates.{winner}.r2    the field that the file's own field `winner` names
    rows[name=vision_c1]      entries of a list whose field is this
    budgets[share>=0.5,used]  whose field is at least this, and whose other field is not null
    policies[*/best.pt]       fields of a record whose name matches this pattern
"""

from __future__ import annotations

import fnmatch
import math
import re
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any

from tempovlm.core.errors import UserError

Content = Any
"""Content of a result file, as `json.loads` returns it."""

_DIGITS = 9
"""Decimals of a measured value: enough to lose nothing, few enough that 0.06 × 100 is 6."""

_STEP = re.compile(r"(?:[^.\[]|\[[^\]]*\])+")
_SETTING = re.compile(r"(?:^|_)(?P<tier>low|medium|high)[/_]k(?P<top_k>\d+)[/_]b(?P<num_blocks>\d+)$")
"""Pattern at the end of the name of a benchmark's row about one of the 75 settings."""

_NUM_SETTINGS, _NUM_BUDGETS = 75, 5
_TIERS = ("low", "medium", "high")
_NOISE = 0.02
_STAGES = ("vision_encoder", "projector", "prefill", "decode_per_token")

_PICKS: dict[str, Callable[[list[float]], float]] = {
    "min": min,
    "max": max,
    "mean": lambda values: sum(values) / len(values),
}


class AbsentError(LookupError):
    """A file exists and lacks this value; the message names the field."""


def number(value: Any, name: str, scale: float = 1) -> float:
    """Return a stored number times `scale`.

    Raises:
        AbsentError: the file says that it was not measured.
        UserError: it is not a finite number.
    """
    if value is None:
        raise AbsentError(f"field {name} is empty")
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise UserError(f"field {name} is not a finite number but {value!r}")
    return round(value * scale, _DIGITS)


def select(content: Content, path: str) -> list[Any]:
    """Return everything at a path, at least one value.

    Raises:
        AbsentError: there is nothing.
    """
    found, walked = [content], ""
    for step in _STEP.findall(path):
        name, _, condition = step.removesuffix("]").partition("[")
        walked += f".{step}" if walked else step
        if name.startswith("{"):
            name = str(only(content, name.strip("{}")))
        try:
            found = [inner for outer in found for inner in _fields(outer, name)]
            if condition:
                found = [inner for outer in found for inner in _matching(outer, condition)]
        except (KeyError, IndexError, TypeError, ValueError):
            raise AbsentError(f"there is no field {walked}") from None
        if not found:
            raise AbsentError(f"there is no {walked}")
    return found


def only(content: Content, path: str) -> Any:
    """Return the only value at a path."""
    (found,) = select(content, path)
    return found


def value_at(content: Content, path: str, scale: float = 1) -> float:
    """Return the only number at a path, times `scale`."""
    return number(only(content, path), path, scale)


def _fields(outer: Any, name: str) -> list[Any]:
    if name == "*":
        return list(outer.values() if isinstance(outer, dict) else outer)
    return [outer[int(one) if isinstance(outer, list) else one] for one in name.split("|")]


def _matching(outer: Any, condition: str) -> Iterator[Any]:
    if isinstance(outer, dict):
        yield from (value for name, value in outer.items() if fnmatch.fnmatchcase(name, condition))
    else:
        yield from (entry for entry in outer if all(_holds(entry, one) for one in condition.split(",")))


def _holds(entry: Any, condition: str) -> bool:
    """Whether an entry fulfils `field=value`, `field>=number` or `field`, which must not be null then."""
    name, sign, wanted = re.fullmatch(r"(\w+)(>?=|)(.*)", condition).groups()  # type: ignore[union-attr]
    if sign == ">=":
        return number(entry[name], name) >= float(wanted)
    value = entry.get(name)
    if not sign:
        return value is not None
    return value == float(wanted) if isinstance(value, int | float) else str(value) == wanted


def read_figure(
    content: Content,
    path: str,
    *,
    scale: float = 1,
    minus: str | None = None,
    over: str | None = None,
    pick: str | None = None,
    needs: str | None = None,
) -> float:
    """Return the figure at a path.

    Args:
        content: of the file.
        path: to a number, or to several that `pick` combines: min, max or mean.
        scale: factor of the numbers.
        minus: path to a number to subtract.
        over: path to the numbers to divide by, one each.
        pick: see `path`.
        needs: `path=value` that must hold in the file, else the figure is absent.

    Raises:
        AbsentError: it is absent; names the field.
        UserError: it is not a number.
    """
    if needs is not None:
        field, wanted = needs.split("=")
        if (value := only(content, field)) != wanted:
            raise AbsentError(f"field {field} is {value}, not {wanted}")
    if over is not None:
        pairs = zip(select(content, path), select(content, over), strict=True)
        values = [scale * (number(value, path) / number(base, over)) for value, base in pairs]
    else:
        values = [number(value, path, scale) for value in select(content, path)]
    if pick is None and len(values) != 1:
        raise AbsentError(f"there are {len(values)} of {path}, not one")
    value = _PICKS[pick or "max"](values)
    return value if minus is None else number(value - read_figure(content, minus, scale=scale, pick=pick), path)


def reversals(content: Content, column: str, *knobs: str) -> float:
    """Count pairs of the 75 settings, neighbours along one knob, of which the larger is faster beyond the noise.

    Raises:
        AbsentError: not all settings are there.
    """
    times_ms: dict[tuple[int, ...], float] = {}
    for row in select(content, "rows.*"):
        if match := _SETTING.search(str(row.get("name"))):
            tier, top_k, num_blocks = match.groups()
            times_ms[_TIERS.index(tier), int(top_k), int(num_blocks)] = value_at(row, column)
    if len(times_ms) != _NUM_SETTINGS:
        raise AbsentError(f"it has rows for {len(times_ms)} of {_NUM_SETTINGS} settings")
    count = 0
    for axis in map(list(_SETTING.groupindex).index, knobs):
        following = dict(pairwise(sorted({setting[axis] for setting in times_ms})))
        for setting, time_ms in times_ms.items():
            if setting[axis] in following:
                larger = (*setting[:axis], following[setting[axis]], *setting[axis + 1 :])
                count += times_ms[larger] < time_ms * (1 - _NOISE)
    return float(count)


def settings(content: Content) -> float:
    """Count the settings that a profile has rows for."""
    names = _SETTING.groupindex
    return float(len({tuple(only(row, name) for name in names) for row in select(content, "*")}))


def coverage_gap(content: Content, level: float) -> float:
    """Return how far the worst stage's coverage is off its level, in points."""
    shares = [only(content, f"coverage.test.{stage}")[str(level)] for stage in _STAGES]
    return max(number(abs(number(share, "coverage") - level), "coverage", 100) for share in shares)


def budgets_won(content: Content, checkpoint: str) -> float:
    """Return the percentage of budgets where the gain over the static mixture has an interval above zero."""
    lows = _lower_ends(content, checkpoint, "against_mixture")
    return number(sum(low > 0 for low in lows) / len(lows), "by_budget", 100)


def budgets_above_table(content: Content, checkpoint: str) -> float:
    """Return the number of budgets where the gain over the table at the same budget has an interval above zero."""
    return float(sum(low > 0 for low in _lower_ends(content, checkpoint, "at_same_budget.table")))


def _lower_ends(content: Content, checkpoint: str, gain: str) -> list[float]:
    """Return the lower end of a gain's interval at each budget; there must be enough of them."""
    found = select(content, f"policies[{checkpoint}].by_budget.*.{gain}.interval.0")
    if len(found) < _NUM_BUDGETS:
        raise AbsentError(f"it judges {len(found)} budgets of at least {_NUM_BUDGETS}")
    return [number(low, "interval") for low in found]


COMPUTED: dict[str, Callable[..., float]] = {
    "reversals": reversals,
    "settings": settings,
    "coverage_gap": coverage_gap,
    "budgets_won": budgets_won,
    "budgets_above_table": budgets_above_table,
}
"""Readings that a path cannot express, by their name in `targets.toml`."""
