"""Clocks for the stages of a request: a mark at each border, so that the stages cover the whole request.

On a CPU a mark reads the host's clock. On CUDA it records an event, and the events are read once, at the end:
marking does not wait for the device. The total is read from the host's clock separately from the stages, so that
they can be checked against it; it ends with the last mark, even if a stream's reader continues later.
Stages are only names here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from tempovlm.core.units import now_ms

if TYPE_CHECKING:
    import torch

QUEUE = "queue"
"""The stage before a request's own work begins: the one that a clock begins with."""


@dataclass(frozen=True, slots=True)
class Lap:
    """The time between two marks, assigned to the stage that the second one names."""

    stage: str
    duration_ms: float


@dataclass(frozen=True, slots=True)
class Reading:
    """A finished request: its laps in order, and its total, which is measured separately."""

    laps: tuple[Lap, ...]
    total_ms: float

    def stage_ms(self, stage: str) -> float:
        """Return the time of all laps of a stage."""
        return sum((lap.duration_ms for lap in self.laps if lap.stage == stage), 0.0)

    def laps_ms(self, stage: str) -> tuple[float, ...]:
        """Return the single laps of a stage."""
        return tuple(lap.duration_ms for lap in self.laps if lap.stage == stage)


class StageClock(Protocol):
    """Starts when it is made: the request is accepted."""

    def mark(self, stage: str, at: torch.cuda.Event | None = None) -> None:
        """End a lap: the time since the last mark belongs to `stage`.

        It ends now, or at a device event that was recorded with timing before further work was started.
        """

    def elapsed_ms(self) -> float:
        """Return the time since acceptance, including work already given to the device: waits for it."""

    def is_device_busy(self) -> bool:
        """Whether work given to the device goes on, so that the host has time; waits for nothing."""

    def read(self) -> Reading:
        """Return the laps and the total up to the last mark; the device must have been waited for."""


def stage_clock(device: torch.device, queued_ms: float = 0.0) -> StageClock:
    """Start a clock for a device, whose first lap is the `queued_ms` that the request waited before."""
    return CudaClock(device, queued_ms) if device.type == "cuda" else HostClock(queued_ms)


class HostClock:
    """Marks read the host's clock; valid if operations end before their call returns."""

    def __init__(self, queued_ms: float = 0.0) -> None:
        self._start_ms = now_ms() - queued_ms
        self._total_ms = queued_ms
        self._stages = [QUEUE]
        self._borders_ms = [self._start_ms, now_ms()]

    def mark(self, stage: str, at: torch.cuda.Event | None = None) -> None:
        """End a lap of `stage`."""
        del at  # a host has no device events
        self._stages.append(stage)
        self._borders_ms.append(now_ms())
        self._total_ms = self.elapsed_ms()

    def elapsed_ms(self) -> float:
        """Return the time since acceptance."""
        return now_ms() - self._start_ms

    def is_device_busy(self) -> bool:
        """Never."""
        return False

    def read(self) -> Reading:
        """Return the laps and the total."""
        spans = zip(self._stages, self._borders_ms, self._borders_ms[1:], strict=False)
        return Reading(tuple(Lap(stage, end - start) for stage, start, end in spans), self._total_ms)


class CudaClock:
    """Marks are events on the current stream.

    While the host works and the device idles, an event is stamped as soon as it is recorded, so that laps of
    host stages are correct too.
    """

    def __init__(self, device: torch.device, queued_ms: float = 0.0) -> None:
        import torch

        self._device = device
        self._stream = torch.cuda.current_stream(device)
        self._stages: list[str] = []
        self._events = [self._event()]
        self._queued = Lap(QUEUE, queued_ms)
        self._start_ms, self._total_ms = now_ms() - queued_ms, queued_ms

    def _event(self) -> torch.cuda.Event:
        import torch

        event = torch.cuda.Event(enable_timing=True)
        event.record(self._stream)
        return event

    def mark(self, stage: str, at: torch.cuda.Event | None = None) -> None:
        """End a lap of `stage`."""
        self._stages.append(stage)
        self._events.append(at or self._event())
        self._total_ms = now_ms() - self._start_ms

    def elapsed_ms(self) -> float:
        """Return the time since acceptance; waits for the device."""
        self._stream.synchronize()
        return now_ms() - self._start_ms

    def is_device_busy(self) -> bool:
        """Whether the stream has work left."""
        return not self._stream.query()

    def read(self) -> Reading:
        """Return the laps and the total; waits for the last mark, not for work that was started after it."""
        self._events[-1].synchronize()
        spans = zip(self._stages, self._events, self._events[1:], strict=False)
        laps = (Lap(stage, start.elapsed_time(end)) for stage, start, end in spans)
        return Reading((self._queued, *laps), self._total_ms)
