"""Finds how many threads are fastest on this machine: by stage and size of its work, and for whole answers."""

from __future__ import annotations

import random
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from tempovlm.control.guard import Guard
from tempovlm.core.knobs import KnobConfig
from tempovlm.core.request import Request
from tempovlm.engine.cpu.crew import STAGES, Counts, Crew
from tempovlm.engine.engine import Engine

ROUNDS = 5
"""Answers by each number of threads, at each of two settings."""

WORTH = 0.95
"""More threads are taken where the time falls to this share of that of fewer: each one may meet a neighbour."""


@dataclass(frozen=True, slots=True)
class _Timed:
    """An answer: times of stages, and sizes of the work that the kernels had."""

    timings_ms: Mapping[str, float]
    sizes: Mapping[str, int]


def choose_threads(engine: Engine, requests: Iterator[Request]) -> Counts:
    """Return the threads of each stage, which the engine has from then on; nothing where it has no choice.

    Answers at the cheapest and the native setting are timed by every number of threads in turn, on the same
    pictures. A stage gets what was fastest for it at each of the two sizes of its work, unless whole native
    answers were faster by one number for all. Where too few cores were free to try, nothing is chosen.
    """
    crew = None if engine.runner.stages is None else engine.runner.stages.crew
    tried = [] if crew is None else _numbers(crew.most_free)
    if crew is None or len(tried) < 2:
        return {}
    equal: list[Counts] = [dict.fromkeys(STAGES, ((0, threads),)) for threads in tried]
    chosen: Counts = {}
    try:
        small = _answers(engine, crew, requests, engine.space.cheapest, equal)
        large = _answers(engine, crew, requests, engine.space.native, equal)
        if all(small) and all(large):
            by_stage = {stage: _pairs(stage, (small, large), tried) for stage in STAGES}
            either = [by_stage, equal[_fastest([_median(one, "total") for one in large])]]
            again = _answers(engine, crew, requests, engine.space.native, either)
            faster = all(again) and _median(again[1], "total") < WORTH * _median(again[0], "total")
            chosen = either[faster]
    finally:
        crew.use(chosen)
    return chosen


def _numbers(most: int) -> list[int]:
    """Return the powers of two below the most, and the most."""
    return [1 << i for i in range((most - 1).bit_length())] + [most]


def _answers(
    engine: Engine, crew: Crew, requests: Iterator[Request], knobs: KnobConfig, options: Sequence[Counts]
) -> list[list[_Timed]]:
    """Answer by all options in turn; of each, return the answers whose stages had all their threads."""
    found: list[list[_Timed]] = [[] for _ in options]
    guard, order = Guard.fixed(knobs, engine.space), list(range(len(options)))
    shuffle = random.Random(0).shuffle
    with engine.runner.measured():
        for _ in range(ROUNDS):
            request = next(requests)
            shuffle(order)
            for option in order:
                crew.use(options[option])
                timings_ms = engine.answer(request, guard).timings_ms
                if not crew.held_back:
                    found[option].append(_Timed(timings_ms, dict(crew.sizes)))
    return found


def _pairs(stage: str, works: Sequence[list[list[_Timed]]], tried: Sequence[int]) -> tuple[tuple[int, int], ...]:
    """Return the median size of each of the works of a stage, and the threads that were fastest for it."""
    found = {}
    for timed in works:
        size = statistics.median_low(one.sizes[stage] for some in timed for one in some)
        found[size] = tried[_fastest([_median(some, stage) for some in timed])]
    return tuple(sorted(found.items()))


def _fastest(times_ms: Sequence[float]) -> int:
    """Return the place of the first time that no later one beats by enough."""
    return next(i for i, time_ms in enumerate(times_ms) if min(times_ms[i:]) >= WORTH * time_ms)


def _median(some: Sequence[_Timed], stage: str) -> float:
    return statistics.median(one.timings_ms[stage] for one in some)
