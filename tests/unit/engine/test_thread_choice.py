"""A calibration finds the threads of each stage."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import tiny_model
from tempovlm.cli.calibrate import threads_text
from tempovlm.engine.calibration import profile_path, stored_profile
from tempovlm.engine.cpu.crew import STAGES, Counts, Crew
from tempovlm.engine.cpu.thread_choice import choose_threads
from tempovlm.engine.engine import Engine
from tempovlm.engine.environment import collect_stamp, fingerprint
from tempovlm.engine.forks import FORKS

SPACE = tiny_model.make_profile().space
REQUESTS: Any = itertools.repeat(None)
SIZES = {"vision_encoder": (2, 13), "projector": (2, 13), "prefill": (100, 700)}


@pytest.fixture(autouse=True)
def threads_are_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FORKS, "threads", lambda count: count)


def crew_of(cores: int, most: int, free: Callable[[], int] | None = None) -> Crew:
    crew = Crew(2, most, {})
    crew._cores = SimpleNamespace(count=cores, look=free or (lambda: cores))  # type: ignore[assignment]
    return crew


def choose(
    crew: Crew, stage_ms: Callable[[str, int, int], float], total: Callable[[float], float] = float
) -> Counts:
    """Choose for an engine whose stages take a function of the stage, the size of its work and its threads."""

    def answer(_: object, guard: Any) -> SimpleNamespace:
        large = SPACE.settings[guard.choices[0]] == SPACE.native
        timings_ms = {}
        for stage in STAGES:
            size = SIZES[stage][large]
            timings_ms[stage] = stage_ms(stage, size, crew.threads(stage, size))
        return SimpleNamespace(timings_ms=timings_ms | {"total": total(sum(timings_ms.values()))})

    runner = SimpleNamespace(stages=SimpleNamespace(crew=crew), measured=nullcontext)
    engine: Any = SimpleNamespace(runner=runner, space=SPACE, answer=answer)
    return choose_threads(engine, REQUESTS)


def test_each_stage_gets_what_is_fastest_for_it_at_either_size() -> None:
    def stage_ms(stage: str, size: int, threads: int) -> float:
        best = {"vision_encoder": 2 if size == 2 else 8, "projector": 1, "prefill": 4}[stage]
        return 10.0 if threads == best else 20.0

    crew = crew_of(8, 16)
    found = choose(crew, stage_ms)
    assert found == {
        "vision_encoder": ((2, 2), (13, 8)),
        "projector": ((2, 1), (13, 1)),
        "prefill": ((100, 4), (700, 4)),
    }
    assert [crew.threads("vision_encoder", size) for size in (1, 2, 12, 13, 20)] == [2, 2, 2, 8, 8]


def test_more_threads_must_be_worth_it() -> None:
    crew = crew_of(4, 4)
    found = choose(crew, lambda *_: 10.0 - 0.1 * _[2])
    assert {threads for pairs in found.values() for _, threads in pairs} == {1}


def test_one_number_for_all_stages_where_whole_answers_are_faster_so() -> None:
    crew = crew_of(2, 2)

    def total(_: float) -> float:  # answers lose more by changes than stages win
        counts = {crew.threads(stage, SIZES[stage][1]) for stage in STAGES}
        return 10.0 if counts == {1} else 20.0

    def stage_ms(stage: str, _: int, threads: int) -> float:
        return 5.0 if (stage == "prefill") == (threads == 2) else 6.0

    found = choose(crew, stage_ms, total)
    assert found == dict.fromkeys(STAGES, ((0, 1),))


def test_nothing_is_chosen_beside_busy_processes_or_without_a_choice() -> None:
    busy = crew_of(4, 4, lambda: 1)
    assert choose(busy, lambda *_: 1.0) == {}
    assert busy.threads("prefill", 300) == 1
    busy._cores = SimpleNamespace(count=4, look=lambda: 4)  # type: ignore[assignment]
    assert busy.threads("prefill", 300) == 2, "the usual number once they have gone"
    one = crew_of(1, 4)
    assert choose(one, lambda *_: 1.0) == {}
    torch_alone: Any = SimpleNamespace(runner=SimpleNamespace(stages=None))
    assert choose_threads(torch_alone, REQUESTS) == {}


def test_a_broken_measurement_leaves_the_usual_number() -> None:
    crew = crew_of(2, 2)

    def stage_ms(*_: object) -> float:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        choose(crew, stage_ms)
    assert crew.counts == {}


def test_a_stored_calibration_gives_its_threads(
    engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TEMPOVLM_CACHE_DIR", str(tmp_path))
    about = {"model": "tiny", "weights_hash": "w", "device": engine.device, "dtype": engine.runner.dtype}
    stamp = collect_stamp(space=engine.space, **about)
    threads = {"prefill": ((100, 1), (700, 2))}
    made = tiny_model.make_profile(engine.space)
    replace(made, fingerprint=fingerprint(stamp), threads=threads).save(profile_path(stamp))
    crew = crew_of(2, 2)
    with monkeypatch.context() as patch:  # the engine is the session's
        patch.setattr(engine, "runner", replace(engine.runner, stages=SimpleNamespace(crew=crew)))
        found = stored_profile(engine, stamp, made.output)
    assert found is not None
    assert found.threads == threads == crew.counts


def test_a_calibration_is_told_with_its_threads() -> None:
    threads = {"vision_encoder": ((2, 2), (13, 8)), "prefill": ((100, 4), (700, 4))}
    assert threads_text(threads) == "vision_encoder 2 to 8, prefill 4"
