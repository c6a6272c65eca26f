"""Requests at a door, event by event: the schedule that serves says who waits, and the rule that serves chooses.

Two kinds of events move time: a request comes, and an answer ends. When one comes, `Schedule` admits or
refuses it; when a lane is free, the most urgent of those that wait is let in, and `control.select.best` takes a
setting among those whose bound fits what is left of its budget, at the price of lane time that `control.price`
derives from those who wait. It is refused before it takes any lane time if nothing fits; or if nothing is worth
the price, and it has waited for at most `AT_ONCE` of its budget. Bounds are those of a calibration
times the factor that `control.margin` learns from service times, never from waiting.

Where requests share a device (`world.shared`), those that are let in are in flight together. One takes a setting
that is expected in time after the reading of the others, and that makes none of them late; it waits where there is
none. Its lane time is what it adds to the device's work.

An answer that has begun runs to its end, also beyond its deadline. Nobody asks again after a refusal.

Shapes: `n` requests, `N` questions, `K` settings.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from tempovlm.control.joining import Forecast, Need
from tempovlm.control.margin import OnlineMargin
from tempovlm.control.price import Envelope
from tempovlm.control.queue.door import End
from tempovlm.control.queue.schedule import AT_ONCE, Schedule, Stay
from tempovlm.control.select import Mask, best
from tempovlm.core.progress import Advance, silent
from tempovlm.lab.queueing import clairvoyant
from tempovlm.lab.queueing.choosers import Chooser
from tempovlm.lab.queueing.device import Device, Lanes, Shared, SharedTimes
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
        self.shared = world.shared if chooser.is_guarded else None
        self.device: Device = Lanes() if self.shared is None else Shared(self.shared)
        self.stays: dict[Stay, int] = {}
        self.begun: set[int] = set()
        self.deadline_ms = traffic.arrival_ms + traffic.budget_ms
        self.setting = np.full(len(traffic), REFUSED, dtype=np.int64)
        self.end_ms = traffic.arrival_ms.copy()
        self.usual_ms = np.where(chooser.allowed, world.usual_ms, np.inf)
        self.bound_ms = np.where(chooser.allowed, world.bound_ms, np.inf)
        self.least_ms = float(self.bound_ms.min())
        self._gains: dict[int, tuple[Envelope, list[Envelope]]] = {}

    def costs_ms(self, in_flight: int) -> Floats:
        """(K,) lane times with some in flight."""
        return self.usual_ms if self.shared is None else self.usual_ms * self.shared.lane_share(in_flight)

    def gains(self, in_flight: int) -> tuple[Envelope, list[Envelope]] | None:
        """Return what an ordinary question gains with lane time, and each question; None without a price."""
        if not self.chooser.has_price:
            return None
        if in_flight not in self._gains:
            costs_ms, scores = self.costs_ms(in_flight), np.asarray(self.chooser.scores[-1])
            self._gains[in_flight] = (
                Envelope.of(self.chooser.mean_scores, costs_ms),
                _envelopes(scores, costs_ms),
            )
        return self._gains[in_flight]

    @property
    def in_flight(self) -> int:
        """Requests in flight with one more, by whose factors times are; 1 on lanes."""
        return 1 if self.shared is None else min(len(self.begun) + 1, self.shared.seats)


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
    while coming < count or run.device.next_ms < math.inf:
        if run.device.next_ms < math.inf and (coming == count or run.device.next_ms <= arrivals[coming]):
            _end(run, *run.device.end())
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
    _foresee(run, now_ms)
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
    factor, gains = run.margin.factor, run.gains(run.in_flight)
    return Stay(
        now_ms,
        float(run.deadline_ms[request]),
        factor * run.least_ms,
        expected_ms=factor * float(run.usual_ms.min()),
        gains=None if gains is None else gains[1][run.traffic.question[request]].stretched(factor),
        usual=None if gains is None else gains[0].stretched(factor),
        among=None if run.shared is None else _among(run, run.shared, float(run.deadline_ms[request])),
    )


def _among(run: _Run, shared: SharedTimes, deadline_ms: float) -> Need:
    """Return what a request needs at least beside others, by a deadline that its bound keeps."""
    return _need(run, shared, int(run.usual_ms.argmin()), deadline_ms)


def _need(run: _Run, shared: SharedTimes, index: int, deadline_ms: float) -> Need:
    """Return what an answer at a setting needs."""
    reserve_ms = run.margin.factor * float(run.bound_ms[index] - run.usual_ms[index])
    usual_ms, share = run.margin.factor * float(run.usual_ms[index]), float(shared.step_share[index])
    return Need(
        (1 - share) * usual_ms, share * usual_ms / max(shared.steps, 1), shared.steps, deadline_ms, 1.0, reserve_ms
    )


def _foresee(run: _Run, now_ms: float) -> list[Need]:
    """Tell the schedule what those in flight still need, and return it; nothing on lanes."""
    if run.shared is None or not isinstance(run.device, Shared):
        return []
    rests, found = run.device.rests_at(now_ms), []
    for stay in run.schedule.inside:
        request = run.stays[stay]
        if request in rests:
            whole = _need(run, run.shared, int(run.setting[request]), stay.deadline_ms)
            rest = rests[request]
            need = replace(whole, reading_ms=rest.unread * whole.reading_ms, steps=math.ceil(rest.steps))
            run.schedule.share(stay, need)
            found.append(need)
    return found


def _end(run: _Run, now_ms: float, request: int) -> None:
    """End an answer: its lane takes the next request, and the margin learns how long it took."""
    stay = next(one for one in run.schedule.inside if run.stays[one] == request)
    run.schedule.end(stay, now_ms)
    del run.stays[stay]
    run.begun.discard(request)
    run.end_ms[request] = now_ms
    index = int(run.setting[request])
    took_ms = float(run.traffic.service_ms[request, index])
    run.margin.observe(took_ms, float(run.bound_ms[index]), float(run.usual_ms[index]))
    _begin_all(run, now_ms)


def _begin_all(run: _Run, now_ms: float) -> None:
    """Begin whoever was let in; where one is refused, its lane takes another one."""
    put_off = set[Stay]()
    while new := [one for one in run.schedule.inside if run.stays[one] not in run.begun and one not in put_off]:
        stay = new[0]
        request = run.stays[stay]
        index = _choose(run, stay, request, now_ms)
        if index == REFUSED and _may_wait(run, request, now_ms):
            put_off.add(stay)
            continue
        if index == REFUSED:
            run.end_ms[request] = now_ms
            run.schedule.end(stay, now_ms)
            del run.stays[stay]
            continue
        run.begun.add(request)
        run.setting[request] = index
        if run.shared is None:
            times_ms = (run.margin.factor * float(table[index]) for table in (run.usual_ms, run.bound_ms))
            run.schedule.expect(stay, End(*(now_ms + time_ms for time_ms in times_ms)))
        run.device.begin(request, index, float(run.traffic.service_ms[request, index]), now_ms)


def _may_wait(run: _Run, request: int, now_ms: float) -> bool:
    """Whether a request that finds no place beside those in flight can still be in time behind them."""
    ends = bool(run.begun) and run.shared is not None
    return ends and run.margin.factor * run.least_ms <= float(run.deadline_ms[request]) - now_ms


def _choose(run: _Run, stay: Stay, request: int, now_ms: float) -> int:
    """Return the setting of a request that begins, or `REFUSED`."""
    chooser, factor = run.chooser, run.margin.factor
    if not chooser.is_guarded:
        return int(np.flatnonzero(chooser.allowed)[0])
    left_ms = float(run.deadline_ms[request]) - now_ms
    needs, most_ms = _foresee(run, now_ms), math.inf
    if chooser.leaves:
        most_ms = max(run.schedule.most_ms(now_ms, stay), factor * run.least_ms)
    if run.shared is None:
        left_ms = min(left_ms, most_ms)
        fits = run.bound_ms * factor <= left_ms
    else:
        fits = _fitting(run, run.shared, needs, left_ms, now_ms)
        fits &= run.bound_ms * factor * run.shared.lane_share(run.in_flight) <= most_ms
    if not fits.any():
        return REFUSED
    place, row = chooser.place(left_ms), run.traffic.question[request]
    scores, price_per_ms = chooser.scores[place, row], 0.0
    gains, costs_ms = run.gains(run.in_flight), run.costs_ms(run.in_flight)
    if gains is not None:
        price_per_ms = run.schedule.lane_price(now_ms, stay).per_ms(gains[0], factor)
        if stay.may_be_refused(now_ms) and not gains[1][row].is_worth(price_per_ms):
            return REFUSED
    index = int(best(scores, fits, costs_ms, price_per_ms, chooser.tie))
    if chooser.settled is None:
        return index
    per_tier = run.world.judged.per_tier
    of_tier = fits & (np.arange(len(fits)) // per_tier == index // per_tier)
    return int(best(chooser.settled[place, row], of_tier, costs_ms, price_per_ms, chooser.tie))


def _fitting(run: _Run, shared: SharedTimes, needs: list[Need], left_ms: float, now_ms: float) -> Mask:
    """(K,) settings that are in time beside those in flight, and make none late that is in time without."""
    count, factor = len(needs) + 1, run.margin.factor
    before, after = shared.device.factors(len(needs)), shared.device.factors(count)
    own_ms = factor * after.spread * run.bound_ms * shared.stretch(count)
    read_ms, forecast = sum(one.reading_ms for one in needs), Forecast.of(needs, before, now_ms)
    fits: Mask = after.spread * after.reading * read_ms + own_ms <= left_ms
    usual_ms, bound_ms = (factor * np.where(run.chooser.allowed, one, 0.0) for one in (run.usual_ms, run.bound_ms))
    all_read_ms = after.reading * (read_ms + (1 - shared.step_share) * usual_ms)
    step_ms = max((one.step_ms for one in needs), default=0.0)
    steps_ms = after.step * np.maximum(step_ms, shared.step_share * usual_ms / max(shared.steps, 1))
    fits &= after.spread * (all_read_ms + shared.steps * steps_ms) + bound_ms - usual_ms <= left_ms
    for one in needs:
        if not forecast.is_lost(one):
            end_ms = now_ms + after.spread * (all_read_ms + one.steps * steps_ms) + one.reserve_ms
            fits &= end_ms <= one.deadline_ms
    return fits


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
