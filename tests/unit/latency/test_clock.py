from __future__ import annotations

import time

import pytest
import torch

from tempovlm.latency.clock import HostClock, stage_clock


def test_laps_tile_the_total(monkeypatch: pytest.MonkeyPatch) -> None:
    now_ms = [100.0]
    monkeypatch.setattr("tempovlm.latency.clock.now_ms", lambda: now_ms[0])
    clock = stage_clock(torch.device("cpu"), 3.0)
    assert isinstance(clock, HostClock)
    for stage, took_ms in (("a", 5.0), ("b", 7.0), ("a", 2.0)):
        now_ms[0] += took_ms
        clock.mark(stage)
    now_ms[0] += 10.0
    assert clock.elapsed_ms() == pytest.approx(27.0)
    assert not clock.is_device_busy(), "an operation on a CPU ends before its call returns"
    reading = clock.read()
    assert [(lap.stage, lap.duration_ms) for lap in reading.laps] == [
        ("queue", pytest.approx(3.0)),
        ("a", pytest.approx(5.0)),
        ("b", pytest.approx(7.0)),
        ("a", pytest.approx(2.0)),
    ]
    assert reading.total_ms == pytest.approx(17.0), "it ends with the last mark"
    assert (reading.stage_ms("a"), reading.laps_ms("b"), reading.stage_ms("never")) == (
        pytest.approx(7.0),
        pytest.approx((7.0,)),
        pytest.approx(0.0),
    )


def test_the_host_s_nanoseconds_become_milliseconds(monkeypatch: pytest.MonkeyPatch) -> None:
    now_ns = [5_000_000_000]
    monkeypatch.setattr(time, "perf_counter_ns", lambda: now_ns[0])
    clock = HostClock()
    now_ns[0] += 2_500_000
    assert clock.elapsed_ms() == pytest.approx(2.5)
