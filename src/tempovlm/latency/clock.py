"""Clocks for the stages of a request: a mark at each border, so that the stages tile the whole request.

On a CPU a mark reads the host's clock. On CUDA it records an event, and the events are read once, at the end:
marking does not wait for the device. The total is a reading of the host's clock apart from the stages, so that
they can be checked against it; it ends with the last mark, whatever the reader of a stream does after that.
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
    """The time between two marks, given to the stage that the second one names."""

    stage: str
    duration_ms: float


@dataclass(frozen=True, slots=True)
class Reading:
    """A finished request: its laps in order, and its total by a clock of its own."""

    laps: tuple[Lap, ...]
    total_ms: float

    def stage_ms(self, stage: str) -> float:
        """The time of all laps of a stage."""
        return sum((lap.duration_ms for lap in self.laps if lap.stage == stage), 0.0)

    def laps_ms(self, stage: str) -> tuple[float, ...]:
        """The single laps of a stage."""
        return tuple(lap.duration_ms for lap in self.laps if lap.stage == stage)


class StageClock(Protocol):
    """Starts when it is made: a request is accepted."""

    def mark(self, stage: str, at: torch.cuda.Event | None = None) -> None:
        """End a lap: the time since the last mark was spent on `stage`.

        It ends now, or at a device's event, recorded with timing, after which other work was started already.
        """

    def elapsed_ms(self) -> float:
        """Time since acceptance, the work already given to the device included: waits for it."""

    def is_device_busy(self) -> bool:
        """Whether work given to the device goes on, so that the host has time; waits for nothing."""

    def read(self) -> Reading:
        """The laps and the total up to the last mark, at which the device must have been waited for."""


def stage_clock(device: torch.device, queued_ms: float = 0.0) -> StageClock:
    """Start a clock for a device, whose first lap is the `queued_ms` that the request waited before."""
    return CudaClock(device, queued_ms) if device.type == "cuda" else HostClock(queued_ms)


class HostClock:
    """Marks are readings of the host's clock; right where operations end before their call returns."""

    def __init__(self, queued_ms: float = 0.0) -> None:
        self._start_ms = now_ms() - queued_ms
        self._total_ms = queued_ms
        self._stages = [QUEUE]
        self._borders_ms = [self._start_ms, now_ms()]

    def mark(self, stage: str, at: torch.cuda.Event | None = None) -> None:
        """End a lap of `stage`."""
        del at  # a host has no device's events
        self._stages.append(stage)
        self._borders_ms.append(now_ms())
        self._total_ms = self.elapsed_ms()

    def elapsed_ms(self) -> float:
        """Time since acceptance."""
        return now_ms() - self._start_ms

    def is_device_busy(self) -> bool:
        """Never."""
        return False

    def read(self) -> Reading:
        """The laps and the total."""
        spans = zip(self._stages, self._borders_ms, self._borders_ms[1:], strict=False)
        return Reading(tuple(Lap(stage, end - start) for stage, start, end in spans), self._total_ms)


class CudaClock:
    """Marks are events on the current stream.

    While the host works and the device idles, an event is stamped as soon as it is recorded, so that laps of
    host stages come out right too.
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
        """Time since acceptance; waits for the device."""
        self._stream.synchronize()
        return now_ms() - self._start_ms

    def is_device_busy(self) -> bool:
        """Whether the stream has work left."""
        return not self._stream.query()

    def read(self) -> Reading:
        """The laps and the total; waits for the last mark, not for what was started after it."""
        self._events[-1].synchronize()
        spans = zip(self._stages, self._events, self._events[1:], strict=False)
        laps = (Lap(stage, start.elapsed_time(end)) for stage, start, end in spans)
        return Reading((self._queued, *laps), self._total_ms)
