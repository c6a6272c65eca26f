from __future__ import annotations

import logging
import multiprocessing
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import tiny_model
from tempovlm.control.guard import Guard
from tempovlm.core import machine
from tempovlm.core.machine import _busy_ticks, busy_cores, machine_lock
from tempovlm.core.request import Answer, Request
from tempovlm.core.stamp import Stamp
from tempovlm.engine import calibration
from tempovlm.engine.calibration import PICTURE_SIZES, measure, obtain_profile, profile_path, sample_requests
from tempovlm.engine.engine import Engine
from tempovlm.engine.environment import collect_stamp, fingerprint
from tempovlm.latency.profile import OutputLength
from tempovlm.model.prompt import Tokenizer
from tempovlm.model.vision.image import open_image

OUTPUT = OutputLength.exactly(2)
FEW = tiny_model.SPACE.subset({"tier": ["low"], "top_k": [2, 4], "num_blocks": [3, 4, 6]})


@pytest.fixture
def narrow(engine: Engine, tiny_folder: Path) -> Engine:
    """The engine with six settings, which are soon measured."""
    return Engine(engine.runner.model, Tokenizer.load(tiny_folder / "tokenizer.json"), space=FEW, name="tiny")


@pytest.fixture
def stamp(engine: Engine) -> Stamp:
    return collect_stamp(
        model="tiny", weights_hash="w", space=engine.space, device=torch.device("cpu"), dtype=torch.float32
    )


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TEMPOVLM_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Calibrations become a made-up profile's measurements; the list grows by one for each."""
    calls: list[int] = []

    def made_up(engine: Engine, *_: object, **__: object) -> object:
        calls.append(1)
        return tiny_model.make_profile(engine.space).measurements

    monkeypatch.setattr(calibration, "measure", made_up)
    return calls


def test_every_setting_is_measured_in_shuffled_order(narrow: Engine) -> None:
    seen: list[tuple[int, int]] = []
    rows = measure(narrow, OUTPUT, passes=1, advance=lambda done, total: seen.append((done, total)))
    size = len(narrow.space)
    assert seen[-1] == (2 * size, 2 * size)
    order = [row.setting for row in rows]
    assert sorted(order) == [*range(size)]
    assert order != sorted(order)
    for row in rows:
        assert 0 < row.prefix_ms < row.total_ms
        assert row.open_ms > 0
        assert len(row.step_ms) == row.num_output_tokens - 1 <= 1


def test_it_waits_where_an_answer_with_a_deadline_waits(narrow: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    budgets_ms: list[float | None] = []
    answer = Engine.answer

    def asked(self: Engine, request: Request, guard: Guard | None = None) -> Answer:
        budgets_ms.append(request.budget_ms)
        found = answer(self, request, guard)
        assert found.budget_met
        return found

    monkeypatch.setattr(Engine, "answer", asked)
    measure(narrow, OutputLength.exactly(1), passes=1)
    assert budgets_ms
    assert None not in budgets_ms


def test_a_slow_machine_gets_fewer_passes(narrow: Engine) -> None:
    rows = measure(narrow, OutputLength.exactly(1), passes=4, limit_ms=0.0)
    assert len(rows) == calibration.MIN_PASSES * len(narrow.space)


def test_pictures_are_of_the_usual_sizes() -> None:
    requests = sample_requests(0, 4)
    sizes = {open_image(next(requests).images[0]).shape[1::-1] for _ in range(60)}
    assert sizes == set(PICTURE_SIZES)


def test_measured_once_and_stored(engine: Engine, stamp: Stamp, cache: Path, counted: list[int]) -> None:
    first = obtain_profile(engine, stamp, OUTPUT, progress=False)
    assert profile_path(stamp).is_relative_to(cache)
    again = obtain_profile(engine, stamp, OUTPUT, progress=False)
    assert len(counted) == 1
    assert again.upper_total_ms(3) == pytest.approx(first.upper_total_ms(3), abs=1e-3)
    obtain_profile(engine, stamp, OUTPUT, force=True, progress=False)
    assert len(counted) == 2


@pytest.mark.usefixtures("cache")
def test_a_damaged_file_is_measured_again(
    engine: Engine, stamp: Stamp, counted: list[int], caplog: pytest.LogCaptureFixture
) -> None:
    obtain_profile(engine, stamp, OUTPUT, progress=False)
    profile_path(stamp).write_text('{"half')
    with caplog.at_level(logging.WARNING, "tempovlm"):
        obtain_profile(engine, stamp, OUTPUT, progress=False)
    assert len(counted) == 2
    assert sum("measuring again" in message for message in caplog.messages) == 1
    obtain_profile(engine, stamp, OUTPUT, progress=False)
    assert len(counted) == 2


@pytest.mark.usefixtures("counted")
def test_a_cache_that_cannot_be_written_keeps_the_profile_in_memory(
    engine: Engine, stamp: Stamp, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    blocked = tmp_path / "a file"
    blocked.write_text("")
    monkeypatch.setenv("TEMPOVLM_CACHE_DIR", str(blocked / "cache"))
    with caplog.at_level(logging.WARNING, "tempovlm"):
        profile = obtain_profile(engine, stamp, OUTPUT, progress=False)
    assert profile.upper_total_ms(0) > 0
    assert any("kept in memory" in message for message in caplog.messages)


@pytest.mark.usefixtures("cache")
def test_ctrl_c_leaves_nothing_and_frees_the_lock(
    engine: Engine, stamp: Stamp, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(calibration, "measure", interrupted)
    with pytest.raises(KeyboardInterrupt):
        obtain_profile(engine, stamp, OUTPUT, progress=False)
    assert not profile_path(stamp).exists()
    with machine_lock() as waited:
        assert not waited


@pytest.mark.usefixtures("cache")
def test_a_busy_machine_is_told(
    engine: Engine,
    stamp: Stamp,
    counted: list[int],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(machine, "busy_cores", lambda: 1.5)
    with caplog.at_level(logging.WARNING, "tempovlm"):
        profile = obtain_profile(engine, stamp, OUTPUT, progress=False)
    assert any("busy: others use 1.5 cores" in message for message in caplog.messages)
    assert (profile.busy_cores, len(counted)) == pytest.approx((1.5, 1))


def _hold(ready: object, release: object) -> None:
    with machine_lock():
        ready.set()  # type: ignore[attr-defined]
        release.wait(60)  # type: ignore[attr-defined]


@pytest.fixture
def holder(cache: Path) -> Iterator[object]:  # noqa: ARG001 - the lock lies in it
    """Another process that holds the lock; set the yielded event to release it."""
    context = multiprocessing.get_context("fork")
    ready, release = context.Event(), context.Event()
    process = context.Process(target=_hold, args=(ready, release))
    process.start()
    assert ready.wait(60)
    yield release
    release.set()
    process.join()


def test_the_second_process_waits_and_takes_what_the_first_stored(
    engine: Engine,
    stamp: Stamp,
    counted: list[int],
    holder: object,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    warn = calibration._log.warning

    def first_ends(message: str, *args: object) -> None:
        warn(message, *args)
        made = tiny_model.make_profile(engine.space)
        replace(made, fingerprint=fingerprint(stamp)).save(profile_path(stamp))
        holder.set()  # type: ignore[attr-defined]

    monkeypatch.setattr(calibration._log, "warning", first_ends)
    profile = obtain_profile(engine, stamp, OUTPUT, progress=False)
    assert profile.fingerprint == fingerprint(stamp)
    assert not counted
    assert [message for message in caplog.messages if "waiting" in message]


def test_the_load_of_others_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    ticks, seconds = iter((1000, 1000 + 3 * os.sysconf("SC_CLK_TCK"))), iter((10.0, 12.0))
    slept: list[float] = []
    made_up = SimpleNamespace(perf_counter=lambda: next(seconds), sleep=slept.append)
    monkeypatch.setattr(machine, "time", made_up)
    monkeypatch.setattr(machine, "_busy_ticks", lambda: next(ticks))
    assert busy_cores(5.0) == pytest.approx(1.5), "three core-seconds in two seconds"
    assert slept == [pytest.approx(0.005)]
    monkeypatch.setattr(machine, "_busy_ticks", lambda: None)
    assert busy_cores(5.0) is None


def test_the_kernel_s_counters_only_grow() -> None:
    counts = [_busy_ticks() for _ in range(3)]
    assert counts == [None] * 3 or counts == sorted(counts)


def test_the_fingerprint_follows_what_latency_depends_on(stamp: Stamp) -> None:
    changed = (
        replace(stamp, threads=stamp.threads + 1),
        replace(stamp, device="cuda/bfloat16"),
        replace(stamp, weights="other"),
        replace(stamp, knob_space="other"),
        replace(stamp, torch="0"),
        replace(stamp, tempovlm="0"),
        replace(stamp, hardware="other"),
    )
    assert len({fingerprint(one) for one in (stamp, *changed)}) == 1 + len(changed)
    assert fingerprint(replace(stamp, created="later", data_source="synthetic", commit=None)) == fingerprint(stamp)
