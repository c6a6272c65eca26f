"""When requests come: by a recorded trace, by chance alone, or in bursts, at a load of the lanes.

Load is the rate of arrivals over the rate at which all lanes together answer at the native setting when the next
question is always there. A trace keeps its shape: its gaps are all stretched by one factor.

Shapes: `n` requests.
"""

from __future__ import annotations

import csv
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np

from tempovlm.core.errors import UserError
from tempovlm.lab.table import Floats

POISSON, BURSTS = "poisson", "bursts"
"""Arrivals that are drawn; any other name is that of a file."""

COLUMN = "TIMESTAMP"
"""Column of the time, as in the Azure traces of requests to language models."""

_MICROSECONDS = 26
"""Letters of a time with six decimals of a second; the traces have seven."""

_BUSY_RATE, _CALM_RATE, _BURST_REQUESTS = 10.0, 0.4, 40
"""Rates in a burst and between bursts, of a mean rate of 1, and the mean number of requests of a burst."""


def is_drawn(name: str) -> bool:
    """Whether arrivals of a name are drawn and not read."""
    return name in (POISSON, BURSTS)


def gaps_of(name: str, first: int, count: int | None, seed: int) -> Floats:
    """Return times between arrivals (n,), the first of them before the first request, with a mean of 1.

    Args:
        name: `poisson`, `bursts`, or the path of a trace.
        first: number of the first request, from 0.
        count: n; None takes the rest of a trace.
        seed: of what is drawn.

    Raises:
        UserError: the trace cannot be read, or has too few requests.
    """
    if is_drawn(name):
        rng, last = np.random.default_rng((seed, 1)), first + (DRAWN if count is None else count)
        gaps = (rng.exponential(size=last) if name == POISSON else _burst_gaps(rng, last))[first:]
    else:
        times_ms = read_trace(Path(name))
        chosen_ms = times_ms[first:] if count is None else times_ms[first : first + count]
        if len(chosen_ms) < max(2, count or 0):
            raise UserError(
                f"{name}: {len(times_ms)} requests, which leaves {len(chosen_ms)} from --first_request {first}; "
                "give a smaller one, or fewer by --num_requests (2 at least)"
            )
        gaps = np.diff(chosen_ms, prepend=chosen_ms[0])
        if not gaps.any():
            raise UserError(f"{name}: all of the requests come at once; choose others by --first_request")
    return gaps / gaps.mean()


DRAWN = 4000
"""Requests that are drawn by default."""


def arrival_times_ms(gaps: Floats, load: float, native_ms: float, lanes: int = 1) -> Floats:
    """Return arrival times (n,) at a load.

    Args:
        gaps: (n,) with a mean of 1.
        load: arrivals over answers in the same time, at the native setting with all lanes busy.
        native_ms: mean time of such an answer.
        lanes: that answer at once.
    """
    return np.cumsum(gaps) * native_ms / (lanes * load)


def _burst_gaps(rng: np.random.Generator, count: int) -> Floats:
    """Draw gaps of a Poisson process whose rate changes at random between two values.

    Source: W. Fischer and K. Meier-Hellstern, The Markov-modulated Poisson process (MMPP) cookbook, 1993.
    """
    share = (1 - _CALM_RATE) / (_BUSY_RATE - _CALM_RATE)  # of time in bursts, which makes the mean rate 1
    burst = _BURST_REQUESTS / _BUSY_RATE
    lengths = {True: burst, False: burst * (1 - share) / share}
    gaps, is_busy, left = np.empty(count), False, rng.exponential(lengths[False])
    for i in range(count):
        work, gap = rng.exponential(), 0.0
        while (needed := work / (_BUSY_RATE if is_busy else _CALM_RATE)) > left:
            work -= left * (_BUSY_RATE if is_busy else _CALM_RATE)
            gap, is_busy = gap + left, not is_busy
            left = rng.exponential(lengths[is_busy])
        gaps[i], left = gap + needed, left - needed
    return gaps


def read_trace(path: Path) -> Floats:
    """Read the arrival times (n,) of a trace in milliseconds, from the first on.

    Raises:
        UserError: the file cannot be read, has no such column, or a time is none or before that of the line above.
    """
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            times_ms = np.array(list(_times_ms(path, csv.reader(file))))
    except OSError as error:
        raise UserError(
            f"--arrivals {path}: cannot be read ({error.strerror or error}); give a CSV file with a column "
            f"{COLUMN}, {POISSON} or {BURSTS}"
        ) from None
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path}: no CSV file ({error})") from None
    if len(times_ms) < 2:
        raise UserError(f"{path}: {len(times_ms)} requests; two are the least")
    return times_ms - times_ms[0]


def _times_ms(path: Path, lines: Iterator[list[str]]) -> Iterator[float]:
    head = [name.strip() for name in next(lines, [])]
    if COLUMN not in head:
        raise UserError(f"{path}: no column {COLUMN} in its first line; give a trace with one")
    place, before_ms = head.index(COLUMN), -np.inf
    for number, line in enumerate(lines, 2):
        if not line:
            continue
        text = line[place].strip() if place < len(line) else ""
        try:
            at_ms = _since_epoch_ms(text[:_MICROSECONDS])
        except (ValueError, OverflowError):
            raise UserError(
                f"{path}: line {number}: {COLUMN} {text[:40]!r} is no time; write it as 2023-11-16 18:17:03.979960"
            ) from None
        if at_ms < before_ms:
            raise UserError(f"{path}: line {number}: earlier than the line above; sort the file by {COLUMN}")
        before_ms = at_ms
        yield at_ms


def _since_epoch_ms(text: str) -> float:
    moment = datetime.fromisoformat(text)
    known = moment if moment.tzinfo else moment.replace(tzinfo=UTC)
    return (known - datetime.fromtimestamp(0, UTC)) / timedelta(milliseconds=1)
