"""Keeps the finished rows of a replay in a file beside its figures, so that a kill costs one row at most.

A replay takes as long as its requests come. The same flags go on after the rows that the file has; other flags are
refused. Once the figures are written, the file is removed.

Shapes: `n` requests.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tempovlm.core.errors import UserError
from tempovlm.core.paths import write_whole
from tempovlm.lab.bench.summary import rounded
from tempovlm.lab.queueing.shares import blocks_of, share_row
from tempovlm.lab.queueing.simulate import Outcome
from tempovlm.lab.queueing.study import DIGITS, Key, head_of, tail_of
from tempovlm.lab.table import Floats

SCHEMA = "tempovlm.replay_journal/1"

_FIELDS = ("setting", "end_ms", "score", "arrival_ms")


@dataclass(frozen=True, eq=False, slots=True)
class Replayed:
    """Holds what a server did with the requests of a row.

    Attributes:
        outcome: how each ended. pace: see `replay.pace`.
    """

    outcome: Outcome
    pace: float | None


def journal_of(figures: Path) -> Path:
    """Return the path of the journal of a file of figures."""
    return figures.with_name(f"{figures.stem}.unfinished.json")


class Journal:
    """The finished rows.

    Attributes:
        path: None keeps nothing. native_ms: mean time of a native answer at first; None before it is known.
    """

    def __init__(self, figures: Path | None, conditions: Mapping[str, Any]) -> None:
        """Take up what is there.

        Args:
            figures: the file that is written in the end.
            conditions: on which all rows depend, as JSON has them.

        Raises:
            UserError: the file holds rows of other conditions, or is damaged.
        """
        self.path = None if figures is None else journal_of(figures)
        self.native_ms: float | None = None
        self._conditions, self._rows = rounded(dict(conditions), DIGITS), dict[Key, dict[str, Any]]()
        if self.path is not None and self.path.exists():
            self._read(self.path)

    def _read(self, path: Path) -> None:
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
            before, self.native_ms = dict(record["conditions"]), float(record["native_ms"])
            self._rows = {_key_of(row): row for row in record["rows"]}
            for row in self._rows.values():
                _replayed(row, np.zeros(len(row["setting"])))
                if len({len(row[name]) for name in _FIELDS}) > 1:
                    raise ValueError(f"{row['policy']}: lists of different lengths")
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path}: damaged ({error!r}); remove it to begin anew") from None
        differs = [name for name, value in self._conditions.items() if before.get(name) != value]
        if differs:
            raise UserError(
                f"{path}: holds rows of a replay with another {', '.join(differs)}; repeat that command to finish "
                "it, remove the file, or give another --json"
            )

    def __len__(self) -> int:
        return len(self._rows)

    def __contains__(self, key: Key) -> bool:
        return key in self._rows

    def find(self, key: Key, budget_ms: Floats) -> Replayed:
        """Return a row that is there; `budget_ms` (n,) are the budgets of its requests."""
        return _replayed(self._rows[key], budget_ms)

    def start(self, native_ms: float) -> None:
        """Remember how fast native answers are, and write the file.

        Raises:
            UserError: the file cannot be written; said before a row is asked for.
        """
        self.native_ms = native_ms
        self._write()

    def keep(self, key: Key, found: Replayed) -> None:
        """Add a row, and write the file.

        Raises:
            UserError: the file cannot be written.
        """
        outcome = found.outcome
        end_ms = [value if math.isfinite(value) else None for value in outcome.end_ms.tolist()]
        each = {name: getattr(outcome, name).tolist() for name in _FIELDS} | {"end_ms": end_ms}
        shares = share_row(outcome, blocks_of(len(outcome.setting)))
        told = rounded({**shares, "pace": found.pace, **each}, DIGITS)
        self._rows[key] = {**head_of(key), **tail_of(key), **told}  # a load as given finds its row again
        self._write()

    def _write(self) -> None:
        if self.path is not None:
            record = {"schema": SCHEMA, "conditions": self._conditions, "native_ms": self.native_ms}
            rows = ",\n  ".join(json.dumps(row, allow_nan=False) for row in self._rows.values())
            write_whole(self.path, f'{json.dumps(record)[:-1]}, "rows": [\n  {rows}\n ]}}\n')

    def close(self) -> None:
        """Remove the file, since the figures are written."""
        if self.path is not None:
            self.path.unlink(missing_ok=True)


def _key_of(row: Mapping[str, Any]) -> Key:
    return row["arrivals"], row["load"], row["policy"], row["price"], row["discipline"]


def _replayed(row: Mapping[str, Any], budget_ms: Floats) -> Replayed:
    setting, end_ms, score, arrival_ms = (row[name] for name in _FIELDS)
    ends_ms = np.array([math.inf if value is None else value for value in end_ms], dtype=float)
    came_ms = np.array(arrival_ms, dtype=float)
    outcome = Outcome(
        np.array(setting, dtype=np.int64), ends_ms, np.array(score, dtype=float), came_ms + budget_ms, came_ms
    )
    return Replayed(outcome, row["pace"])
