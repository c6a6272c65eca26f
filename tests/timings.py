"""Clocks for tests: what they read depends on what was done, and never on the machine that runs them."""

from __future__ import annotations

from collections.abc import Mapping

import pytest

READERS = tuple(
    f"tempovlm.{name}.now_ms"
    for name in ("latency.clock", "control.guard", "engine.engine", "engine.watch", "engine.work")
)
"""Where requests and policies are timed."""

TICK_MS = 1.0


class Ticks:
    """A clock that goes on by a tick whenever it is read, and by what a test says that something took."""

    def __init__(self) -> None:
        self.passed_ms = 0.0

    def __call__(self) -> float:
        self.passed_ms += TICK_MS
        return self.passed_ms

    def wait(self, took_ms: float) -> None:
        """Let time pass."""
        self.passed_ms += took_ms

    @classmethod
    def everywhere(cls, patch: pytest.MonkeyPatch) -> Ticks:
        """Such a clock in place of the machine's, in this process and for one test."""
        ticks = cls()
        for name in READERS:
            patch.setattr(name, ticks)
        return ticks


def untold_ms(timings_ms: Mapping[str, float], total: str = "total") -> float:
    """What of the total no stage has.

    Ticks make it one, whatever the stages: the total is read after the last border.
    """
    return timings_ms[total] - sum(value for name, value in timings_ms.items() if name != total)


UNTOLD_MS = TICK_MS


def stages_add_up(timings_ms: Mapping[str, float], total: str = "total") -> bool:
    """Whether stages that a device's clock timed make up most of the total, and no more than it.

    None was forgotten and none counted twice; what a busy host loses between two stages is neither.
    """
    return 0.5 <= 1 - untold_ms(timings_ms, total) / timings_ms[total] <= 1.01
