"""Requests at a door, event by event: the schedule that serves says who waits, and the rule that serves chooses.

Two kinds of events move time: a request comes, and an answer ends. When one comes, `control.queue.Schedule` admits
or refuses it; when a lane is free, the most urgent of those that wait is let in, and `control.select.best` takes a
setting among those whose bound fits what is left of its budget, at the price of lane time that `control.price`
derives from those who wait. It is refused before it takes any lane time if nothing fits; or if nothing is worth
the price, and it has waited for at most `control.queue.AT_ONCE` of its budget. Bounds are those of a calibration
times the factor that `control.margin` learns from service times, never from waiting.

An answer that has begun runs to its end, also beyond its deadline. Nobody asks again after a refusal.

Shapes: `n` requests, `N` questions, `K` settings.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tempovlm.control.margin import OnlineMargin
from tempovlm.control.price import Envelope
from tempovlm.control.queue import AT_ONCE, End, Schedule, Stay
from tempovlm.control.select import best
from tempovlm.core.progress import Advance, silent
from tempovlm.lab.queueing import clairvoyant
from tempovlm.lab.queueing.choosers import Chooser
from tempovlm.lab.queueing.world import Traffic, World
from tempovlm.lab.table import Floats

_REPORT_EVERY = 256
"""Requests between two reports of what is done."""

REFUSED = -1
"""Stands for a refusal among settings."""


@dataclass(frozen=True, eq=False, slots=True)
class Outcome:
    """Holds how each request ended.

    Attributes:
        setting: (n,) that answered it; `REFUSED` where none did. end_ms: (n,) when the answer was there, or the
            refusal. score: (n,) of the answer, from 0 to 1; 0 where there is none.
        deadline_ms, arrival_ms: (n,).
    """

    setting: NDArray[np.int64]
    end_ms: Floats
    score: Floats
    deadline_ms: Floats
    arrival_ms: Floats

    @property
    def answered(self) -> NDArray[np.bool_]:
        """(n,) who got an answer."""
        return self.setting != REFUSED

    @property
    def refused_late(self) -> NDArray[np.bool_]:
        """(n,) who were told that they get none when more than `AT_ONCE` of their budgets had passed."""
        budget_ms = self.deadline_ms - self.arrival_ms
        return ~self.answered & (self.end_ms - self.arrival_ms > AT_ONCE * budget_ms)

    @property
    def refused(self) -> NDArray[np.bool_]:
        """(n,) who were told at once that they get none."""
        return ~self.answered & ~self.refused_late

    @property
    def late(self) -> NDArray[np.bool_]:
        """(n,) who got an answer after the deadline, or were refused late."""
        return np.where(self.answered, self.end_ms > self.deadline_ms, self.refused_late)

    @property
    def on_time(self) -> NDArray[np.bool_]:
        """(n,) who got one in time."""
        return self.answered & (self.end_ms <= self.deadline_ms)

    @property
    def right_on_time(self) -> Floats:
        """(n,) score of the answers in time, 0 for the rest."""
        return np.where(self.on_time, self.score, 0.0)


class _Run:
    """The state of one simulation."""

    def __init__(self, world: World, traffic: Traffic, chooser: Chooser, schedule: Schedule) -> None:
        self.world, self.traffic, self.chooser = world, traffic, chooser
        self.schedule, self.margin = schedule, OnlineMargin()
        self.ends: list[tuple[float, int]] = []  # of the answers that have begun
        self.stays: dict[Stay, int] = {}
        self.begun: set[int] = set()
        self.deadline_ms = traffic.arrival_ms + traffic.budget_ms
        self.setting = np.full(len(traffic), REFUSED, dtype=np.int64)
        self.end_ms = traffic.arrival_ms.copy()
        self.usual_ms = np.where(chooser.allowed, world.usual_ms, np.inf)
        self.bound_ms = np.where(chooser.allowed, world.bound_ms, np.inf)
        self.least_ms = float(self.bound_ms.min())
        self.envelope: Envelope | None = None
        self.gains: list[Envelope] = []
        if chooser.has_price:
            self.envelope = Envelope.of(chooser.mean_scores, self.usual_ms)
            self.gains = _envelopes(np.asarray(chooser.scores[-1]), self.usual_ms)


def simulate(
    world: World,
    traffic: Traffic,
    chooser: Chooser,
    make_schedule: Callable[[], Schedule] = Schedule,
    advance: Advance = silent,
) -> Outcome:
    """Let all requests of some traffic come, and return how they ended.

    Args:
        world: what answers and times are.
        traffic: who comes when.
        chooser: the policy.
        make_schedule: makes the door's schedule, with its lanes, its discipline and the price of lane time.
        advance: told of what is done.
    """
    if chooser.plans:
        return _follow_plan(world, traffic, chooser, advance)
    run = _Run(world, traffic, chooser, make_schedule())
    arrivals, count = traffic.arrival_ms.tolist(), len(traffic)
    coming = 0
    while coming < count or run.ends:
        if run.ends and (coming == count or run.ends[0][0] <= arrivals[coming]):
            _end(run, *heapq.heappop(run.ends))
        else:
            _come(run, coming, arrivals[coming])
            coming += 1
            if coming % _REPORT_EVERY == 0:
                advance(coming, count)
    return _outcome(world, traffic, run.setting, run.end_ms)


def _envelopes(scores: Floats, usual_ms: Floats) -> list[Envelope]:
    """Return the envelope of each row of scores (N, K); equal rows share one."""
    rows, places = np.unique(scores, axis=0, return_inverse=True)
    made = [Envelope.of(row, usual_ms) for row in rows]
    return [made[place] for place in places.ravel()]


def _outcome(world: World, traffic: Traffic, setting: NDArray[np.int64], end_ms: Floats) -> Outcome:
    answered = setting != REFUSED
    score = np.where(answered, world.judged.accuracy[traffic.question, setting], 0.0)
    return Outcome(setting, end_ms, score, traffic.arrival_ms + traffic.budget_ms, traffic.arrival_ms)


def _come(run: _Run, request: int, now_ms: float) -> None:
    """Admit a request, or refuse it; it begins at once where a lane is free."""
    stay = _stay(run, request, now_ms)
    run.stays[stay] = request
    if not run.schedule.admit(stay, now_ms):
        out = run.schedule.admit_instead(stay, now_ms) or stay
        run.end_ms[run.stays.pop(out)] = now_ms
    _begin_all(run, now_ms)


def _stay(run: _Run, request: int, now_ms: float) -> Stay:
    """Return what the schedule is told of a request, as the server tells it."""
    if not run.chooser.is_guarded:
        return Stay(now_ms, math.inf, 0.0)
    factor = run.margin.factor
    return Stay(
        now_ms,
        float(run.deadline_ms[request]),
        run.least_ms * (factor if len(run.schedule) else 1.0),  # only answers tell that a slow time is over
        expected_ms=factor * float(run.usual_ms.min()),
        gains=run.gains[run.traffic.question[request]].stretched(factor) if run.gains else None,
        usual=None if run.envelope is None else run.envelope.stretched(factor),
    )


def _end(run: _Run, now_ms: float, request: int) -> None:
    """End an answer: its lane takes the next request, and the margin learns how long it took."""
    stay = next(one for one in run.schedule.inside if run.stays[one] == request)
    run.schedule.end(stay, now_ms)
    del run.stays[stay]
    run.begun.discard(request)
    index = int(run.setting[request])
    took_ms = float(run.traffic.service_ms[request, index])
    run.margin.observe(took_ms, float(run.bound_ms[index]), float(run.usual_ms[index]))
    _begin_all(run, now_ms)


def _begin_all(run: _Run, now_ms: float) -> None:
    """Begin whoever was let in; where one is refused, its lane takes another one."""
    while new := [one for one in run.schedule.inside if run.stays[one] not in run.begun]:
        stay = new[0]
        request = run.stays[stay]
        index = _choose(run, stay, request, now_ms)
        if index == REFUSED:
            run.end_ms[request] = now_ms
            run.schedule.end(stay, now_ms)
            del run.stays[stay]
            continue
        run.begun.add(request)
        times_ms = (run.margin.factor * float(table[index]) for table in (run.usual_ms, run.bound_ms))
        run.schedule.expect(stay, End(*(now_ms + time_ms for time_ms in times_ms)))
        run.setting[request] = index
        run.end_ms[request] = now_ms + run.traffic.service_ms[request, index]
        heapq.heappush(run.ends, (float(run.end_ms[request]), request))


def _choose(run: _Run, stay: Stay, request: int, now_ms: float) -> int:
    """Return the setting of a request that begins, or `REFUSED`.

    As in a server, what fits by the calibrated bounds alone is tried where nobody waits.
    """
    chooser, factor = run.chooser, run.margin.factor
    if not chooser.is_guarded:
        return int(np.flatnonzero(chooser.allowed)[0])
    left_ms = float(run.deadline_ms[request]) - now_ms
    if factor * run.least_ms > left_ms:
        is_tried = not run.schedule.waiting and run.least_ms <= left_ms
        return int(np.argmin(run.bound_ms)) if is_tried else REFUSED
    if chooser.leaves:
        left_ms = min(left_ms, max(run.schedule.most_ms(now_ms, stay), factor * run.least_ms))
    fits = run.bound_ms * factor <= left_ms
    place, row = chooser.place(left_ms), run.traffic.question[request]
    scores, price_per_ms = chooser.scores[place, row], 0.0
    if run.envelope is not None:
        price_per_ms = run.schedule.lane_price(now_ms, stay).per_ms(run.envelope, factor)
        if stay.may_be_refused(now_ms) and not run.gains[row].is_worth(price_per_ms):
            return REFUSED
    index = int(best(scores, fits, run.usual_ms, price_per_ms, chooser.tie))
    if chooser.settled is None:
        return index
    per_tier = run.world.judged.per_tier
    of_tier = fits & (np.arange(len(fits)) // per_tier == index // per_tier)
    return int(best(chooser.settled[place, row], of_tier, run.usual_ms, price_per_ms, chooser.tie))


def _follow_plan(world: World, traffic: Traffic, chooser: Chooser, advance: Advance) -> Outcome:
    """Let a clairvoyant plan for all requests, and one lane follow the plan as times turn out."""
    accuracy = np.asarray(chooser.scores[0], dtype=np.float64)[traffic.question]
    order = np.argsort(traffic.arrival_ms + traffic.budget_ms, kind="stable")
    planned = clairvoyant.plan(
        traffic.arrival_ms[order], traffic.budget_ms[order], accuracy[order], world.times_ms, advance=advance
    )
    setting, end_ms = np.full(len(traffic), REFUSED, dtype=np.int64), traffic.arrival_ms.copy()
    free_ms = -math.inf
    for place, request in enumerate(order):
        begin_ms = max(free_ms, float(traffic.arrival_ms[request]))
        index = planned.choice(place, begin_ms - float(traffic.arrival_ms[request]))
        if index != clairvoyant.REFUSE:
            setting[request] = index
            free_ms = end_ms[request] = begin_ms + float(traffic.service_ms[request, index])
    return _outcome(world, traffic, setting, end_ms)
