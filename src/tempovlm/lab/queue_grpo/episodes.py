"""Episodes of a shared lane: consecutive arrivals, with questions of the training, at the schedule that serves.

Every sample of an episode has the same arrivals, questions and lane times, so that samples differ by what their
policies say alone. A server knows earlier arrivals, and so does an episode's schedule.

Shapes: `n` requests of an episode, `K` settings.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np

from tempovlm.control.forecast import Forecast
from tempovlm.control.learned.policies import ValuePolicy
from tempovlm.control.queue import Schedule
from tempovlm.control.select import Ints
from tempovlm.lab.queueing.arrivals import arrival_times_ms
from tempovlm.lab.queueing.choosers import Chooser, of_scores
from tempovlm.lab.queueing.simulate import simulate
from tempovlm.lab.queueing.world import Traffic, World, draw_traffic
from tempovlm.lab.table import Floats

REMEMBERED = 256
"""Arrivals before an episode that its forecast knows."""

MANY = 10**9
"""Requests that may wait: deadlines alone limit who waits."""


def chooser_of(name: str, expected: Floats, usual: Floats) -> Chooser:
    """Make the policy of a network in the simulator, of accuracies (n, K) and those of an ordinary question."""
    return replace(of_scores(name, expected, len(usual)), usual=usual, tie=ValuePolicy.tie)


@dataclass(frozen=True, eq=False, slots=True, kw_only=True)
class Episode:
    """Some requests, and who came before them.

    Attributes:
        rows: (n,) questions by the policy's numbers. world: theirs alone, in this order.
        traffic: the requests. past_ms, past_budget_ms: arrivals before them.
    """

    rows: Ints
    world: World
    traffic: Traffic
    past_ms: Floats
    past_budget_ms: Floats

    def earned(self, expected: Floats, usual: Floats) -> Floats:
        """Return what each request earns (n,), its score if it is answered in time, under the derived price.

        Args:
            expected: (n, K) accuracies, by which they are admitted, priced and answered.
            usual: (K,) accuracies of an ordinary question, which price the time of others.
        """
        return simulate(
            self.world, self.traffic, chooser_of("sample", expected, usual), self._schedule
        ).right_on_time

    def _schedule(self) -> Schedule:
        forecast = Forecast()
        for at_ms, budget_ms in zip(self.past_ms.tolist(), self.past_budget_ms.tolist(), strict=True):
            forecast.came(at_ms, at_ms + budget_ms)
            forecast.began(at_ms)
        return Schedule(most_waiting=MANY, most_of_owner=MANY, forecast=forecast)


@dataclass(frozen=True, eq=False, slots=True, kw_only=True)
class Source:
    """Questions, arrivals, loads and budgets, of which episodes are drawn.

    Attributes:
        world: whose judged questions are asked. gaps: between arrivals, with a mean of 1 over the whole trace.
        loads, budgets_ms: of which each episode, and each request, has one. length: n, at most all questions.
        offset: number of the world's first question among those that the policy knows.
    """

    world: World
    gaps: Floats
    loads: Sequence[float]
    budgets_ms: Sequence[float]
    length: int
    offset: int = 0

    def draw(self, rng: np.random.Generator) -> Episode:
        """Draw an episode."""
        length = min(self.length, len(self.world.judged), len(self.gaps))
        rows = rng.choice(len(self.world.judged), length, replace=False)
        begin, load = int(rng.integers(len(self.gaps) - length + 1)), float(rng.choice(self.loads))
        asked = replace(
            self.world,
            judged=self.world.judged.take(rows),
            stands_for=[self.world.stands_for[row] for row in rows],
        )
        seed = int(rng.integers(2**31))
        traffic = draw_traffic(asked, self.gaps[begin : begin + length], load, self.budgets_ms, seed)
        times_ms = partial(arrival_times_ms, load=load, native_ms=self.world.native_ms)
        past = times_ms(self.gaps[max(0, begin - REMEMBERED) : begin])
        past_ms = past - past[-1] if len(past) else past
        budgets_ms = rng.choice(np.asarray(self.budgets_ms, dtype=float), size=len(past))
        return Episode(
            rows=self.offset + rows, world=asked, traffic=traffic, past_ms=past_ms, past_budget_ms=budgets_ms
        )
