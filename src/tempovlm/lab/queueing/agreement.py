"""Compares what a server did with what the simulator says of the same requests.

Differences are the server's shares less the simulated ones, in points. Where the simulation is at hand request by
request, the interval of a difference is that of the paired requests; where only its shares are (a file), it is the
server's own interval less the simulated share, which is wider.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from tempovlm.core.errors import UserError
from tempovlm.lab.bench.summary import rounded
from tempovlm.lab.queueing.shares import SHARES, blocks_of, difference_interval
from tempovlm.lab.queueing.simulate import Outcome
from tempovlm.lab.queueing.study import (
    DIGITS,
    Inputs,
    Key,
    add_rows,
    budget_classes,
    cell_of,
    conditions_of,
    head_of,
    key_of,
    tail_of,
)
from tempovlm.lab.queueing.world import Traffic

Row = Mapping[str, Any]

_NAMES = ("arrivals", "load", "budget_ms", "policy", "price", "discipline")
_SAME = ("budgets_ms", "native_ms", "lanes", "first_request", "seed")
_POINTS = 100.0

_SAME_SPEED = 1.1
"""Factor by which native answers over HTTP may take more or less than in the results."""


def _name_of(row: Row) -> tuple[Any, ...]:
    return tuple(rounded(row[name], DIGITS) for name in _NAMES)


def _key_of_row(row: Row) -> Key:
    return row["arrivals"], row["load"], row["policy"], row["price"], row["discipline"]


def read_simulated(path: Path, inputs: Inputs) -> list[Row]:
    """Read the rows that `simulate.py` wrote about the requests of a replay.

    Raises:
        UserError: the file cannot be read, is of other requests, or lacks a row.
    """
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
        rows, theirs = {_name_of(row): row for row in report["rows"]}, report["conditions"]
        theirs = {**theirs, "num_requests": dict(theirs["num_requests"])}
    except OSError as error:
        raise UserError(f"--simulated {path}: cannot be read ({error.strerror or error})") from None
    except (ValueError, KeyError, TypeError):
        raise UserError(f"--simulated {path}: no figures of simulate.py; write them by its --json") from None
    ours = rounded(conditions_of(inputs), DIGITS)
    for name in _SAME:
        if theirs.get(name) != ours[name]:
            raise _other(path, name, theirs.get(name), ours[name])
    for name, count in ours["num_requests"].items():
        if theirs["num_requests"].get(name) != count:
            raise _other(path, f"requests of {name}", theirs["num_requests"].get(name), count)
    for arrivals, load in inputs.cells:
        for plan in inputs.plans:
            key = key_of(arrivals, load, plan)
            budget_ms = inputs.budgets_ms[0] if len(inputs.budgets_ms) == 1 else None
            if _name_of({**head_of(key), "budget_ms": budget_ms, **tail_of(key)}) not in rows:
                named = " ".join(str(part) for part in key if part is not None)
                raise UserError(f"--simulated {path}: no row of {named}; simulate it with the same flags")
    return list(rows.values())


def _other(path: Path, name: str, theirs: Any, ours: Any) -> UserError:
    return UserError(
        f"--simulated {path}: {name} {theirs} there and {ours} here; give simulate.py the same flags and results"
    )


class Agreement:
    """Collects what the simulator says beside what a server did."""

    def __init__(self, inputs: Inputs, simulated: Sequence[Row] | None = None) -> None:
        """Compare with rows of a file, or simulate the same requests if there are none."""
        self._inputs, self._rows = inputs, simulated
        self._own: dict[str, Any] = {"rows": [], "kinds": []}
        self._paced: dict[str, Any] = {"rows": [], "kinds": []}
        self._intervals: dict[tuple[Any, ...], list[float]] = {}

    def add(self, traffic: Traffic, outcomes: Mapping[Key, Outcome], paces: Mapping[Key, float | None]) -> None:
        """Simulate the requests of one cell: at the server's pace, and at the results' if no file says how.

        Args:
            traffic: the requests.
            outcomes: what the server did with them, by plan.
            paces: its times over those of the results, by plan.
        """
        plans = {key_of(*head, plan)[2:]: plan for head in self._inputs.cells for plan in self._inputs.plans}
        slowed = {
            key: self._inputs.simulate(plans[key[2:]], replace(traffic, service_ms=traffic.service_ms * pace))
            for key in outcomes
            if (pace := paces[key]) is not None
        }
        add_rows(self._paced, self._inputs, traffic, slowed)
        if self._rows is not None:
            return
        simulated = {key: self._inputs.simulate(plans[key[2:]], traffic) for key in outcomes}
        add_rows(self._own, self._inputs, traffic, simulated)
        blocks = blocks_of(len(traffic))
        for key, outcome in outcomes.items():
            for budget_ms, mask in budget_classes(self._inputs.budgets_ms, traffic):
                row = {**head_of(key), "budget_ms": budget_ms, **tail_of(key)}
                self._intervals[_name_of(row)] = difference_interval(outcome, simulated[key], blocks, mask)

    def found(self, live: Sequence[Row], paces: Mapping[Key, float | None]) -> dict[str, Any]:
        """Return the simulated rows, the differences of the server's rows to them, and the order of the policies.

        Args:
            live: rows of the server.
            paces: its times over those of the results, by plan; a difference to the simulator may be one of speed.
        """
        simulated = {_name_of(row): row for row in (self._own["rows"] if self._rows is None else self._rows)}
        pairs = [(row, simulated[_name_of(row)]) for row in live if _name_of(row) in simulated]
        paced = {_name_of(row): row for row in self._paced["rows"]}
        return {
            "simulated": [other for _, other in pairs],
            "differences": [
                self._difference(row, other) | _at_pace(row, paces[_key_of_row(row)], paced)
                for row, other in pairs
            ],
            "orders": self._orders(pairs),
        }

    def _difference(self, live: Row, simulated: Row) -> dict[str, Any]:
        interval = self._intervals.get(_name_of(live))
        if interval is None:
            interval = [end - simulated["right_on_time"] for end in live["interval"]]
        return {
            **{name: live[name] for name in (*_NAMES, "requests")},
            **{name: _POINTS * (live[name] - simulated[name]) for name in SHARES},
            "interval": [_POINTS * end for end in interval],
        }

    def _orders(self, pairs: Sequence[tuple[Row, Row]]) -> list[dict[str, Any]]:
        """Return the plans from best to worst at each load, as the server and as the simulator has them."""
        budget_ms = self._inputs.budgets_ms[0] if len(self._inputs.budgets_ms) == 1 else None
        result = []
        for name, load in self._inputs.cells:
            own = [
                pair
                for pair in pairs
                if (pair[0]["arrivals"], pair[0]["load"]) == (Path(name).name, load)
                and (pair[0]["budget_ms"] is None) == (budget_ms is None)
            ]
            live, simulated = (_ranked([pair[at] for pair in own]) for at in (0, 1))
            head = {"arrivals": Path(name).name, "load": load}
            result.append({**head, "live": live, "simulated": simulated, "same": live == simulated})
        return result


def _at_pace(live: Row, pace: float | None, paced: Mapping[tuple[Any, ...], Row]) -> dict[str, Any]:
    """Return a row's pace, and its differences to the simulator with lane times that are that much longer."""
    other = paced.get(_name_of(live))
    found = {name: None if other is None else _POINTS * (live[name] - other[name]) for name in SHARES}
    return {"pace": pace, "at_pace": found.pop("right_on_time"), "shares_at_pace": found}


def _ranked(rows: Sequence[Row]) -> list[str]:
    """Return the plans of some rows, the best one first."""
    return [_plan_name(row) for row in sorted(rows, key=lambda row: -float(row["right_on_time"]))]


def _plan_name(row: Row) -> str:
    return " ".join(str(row[name]) for name in _NAMES[3:] if row[name] is not None)


def render_agreement(report: Mapping[str, Any]) -> str:
    """Render the differences for a terminal."""
    lines = [
        f"{'server - simulator, points':<37}  {'policy':<34}{'right on time':>24}{'on time':>9}{'refused':>9}"
        f"{'pace':>7}{'at that pace':>14}"
    ]
    for row in report["differences"]:
        low, high = row["interval"]
        share = f"{row['right_on_time']:+.1f} ({low:+.1f}, {high:+.1f})"
        lines.append(
            f"{cell_of(row)}{_plan_name(row)[-33:]:<34}{share:>24}"
            f"{row['on_time']:>+9.1f}{row['refused']:>+9.1f}"
            + ("" if row["pace"] is None else f"{row['pace']:>7.2f}{row['at_pace']:>+14.1f}")
        )
    most, most_paced = (
        max((abs(row[name]) for row in report["differences"] if row[name] is not None), default=math.nan)
        for name in ("right_on_time", "at_pace")
    )
    same = sum(one["same"] for one in report["orders"])
    lines.append(
        f"largest difference {most:.1f} points, {most_paced:.1f} at the server's pace; "
        f"same order at {same} of {len(report['orders'])} loads"
    )
    about = report["conditions"]
    lines.append(
        f"native answers: {about['live_native_ms']:.1f} ms over HTTP, {about['native_ms']:.1f} ms in the results; "
        f"99 of 100 requests were sent within {about['sent_late_p99_ms']:.1f} ms; {about['failed']} failed"
    )
    if not 1 / _SAME_SPEED < about["live_native_ms"] / about["native_ms"] < _SAME_SPEED:
        lines.append(
            "the results are not of this server's speed: time it again while nothing else runs "
            "(run_core_experiment.py --latency_only)"
        )
    return "\n".join(lines) + "\n"
