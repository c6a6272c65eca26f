"""Small worlds of requests that share a lane, whose right answers are known by construction."""

from __future__ import annotations

from functools import partial

import numpy as np
from decision_worlds import COST_MS, SPACE, K

from tempovlm.control.forecast import Forecast
from tempovlm.control.price import Price
from tempovlm.control.queue import Schedule
from tempovlm.lab.queueing.world import Traffic, World
from tempovlm.lab.table import Table

CHANCE = np.linspace(0.5, 0.9, K)[np.argsort(np.argsort(COST_MS))]
"""(K,) of a right answer, rising with the cost."""


def world(count: int = 60, laps: int = 4, spread: float = 0.0, seed: int = 0) -> World:
    """Questions whose answers are coins, and as many timed pictures with the same times, but for a spread."""
    rng = np.random.default_rng(seed)
    judged = Table.of(SPACE, (rng.random((count, K)) < CHANCE).astype(float), COST_MS)
    train = Table.of(SPACE, np.tile(CHANCE, (count, 1)), COST_MS)
    slow = np.exp(rng.normal(0, spread, (3, laps, 1))) if spread else np.ones((3, laps, 1))
    return World(judged, train, slow * COST_MS, [rng.integers(3, size=1) for _ in range(count)])


def traffic(of: World, arrival_ms: np.ndarray, budget_ms: float = 72.0, seed: int = 0) -> Traffic:
    """Requests about random questions, which take the first picture's times."""
    rng = np.random.default_rng(seed)
    count = len(arrival_ms)
    laps = of.laps_ms.reshape(-1, K)
    return Traffic(
        np.asarray(arrival_ms, dtype=float),
        np.full(count, budget_ms),
        rng.integers(len(of.judged), size=count),
        laps[rng.integers(len(laps), size=count)],
    )


def door(price: Price, lanes: int = 1, *, looks_ahead: bool = True) -> partial[Schedule]:
    """Make schedules of lanes with a price."""
    forecast = Forecast() if looks_ahead and price.is_derived else None
    return partial(Schedule, lanes, 10**6, 10**6, price=price, forecast=forecast)
