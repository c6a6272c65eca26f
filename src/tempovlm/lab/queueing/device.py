"""Answers requests in a simulation: by lanes that take one each, or by a device that all in flight share.

A shared device reads the pictures and prompts of all who came, one after the other, before it makes the next token
for all; both take the factors of the number in flight (`control.joining`). So whoever joins moves the ends of all.

Shapes: `K` settings.
"""

from __future__ import annotations

import heapq
import math
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Protocol

import numpy as np

from tempovlm.control.joining import AT_A_TIME, SharedDevice
from tempovlm.core.errors import UserError
from tempovlm.core.knobs import KnobSpace
from tempovlm.core.paths import read_json
from tempovlm.lab.table import Floats
from tempovlm.latency.profile import LatencyProfile, Sharing

_LEAST_MS = 1e-9
"""Work below it is done: what is left of it is rounding."""


@dataclass(frozen=True, eq=False)
class SharedTimes:
    """Holds the times of requests that share a device.

    Attributes:
        sharings: factors by number in flight, ascending.
        step_share: (K,) of an answer's time alone that its steps take.
        steps: of an answer, after its first token. seats: requests in flight.
    """

    sharings: tuple[Sharing, ...]
    step_share: Floats
    steps: int
    seats: int = AT_A_TIME

    @classmethod
    def read(cls, path: Path, space: KnobSpace) -> SharedTimes:
        """Read them from a calibration's file.

        Raises:
            UserError: it is none of this knob space, or measures no requests in flight together.
        """
        remedy = "give the file of a calibration, which `tempovlm calibrate` names"
        try:
            profile = LatencyProfile.from_json(read_json(path, remedy), space)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"--shared_profile {path}: cannot be read ({error}); {remedy}") from None
        counts = sorted({one.in_flight for one in profile.shared})
        found = tuple(one for one in map(profile.sharing, counts) if one is not None)
        if not found:
            raise UserError(f"--shared_profile {path}: no requests in flight together were measured; leave it out")
        steps, settings = max(0, round(profile.output.mean) - 1), range(len(space))
        share = [steps * profile.step_ms(i) / profile.p50_total_ms(i) for i in settings]
        return cls(found, np.clip(share, 0.0, 1.0), steps)

    @cached_property
    def device(self) -> SharedDevice:
        """The device, as a schedule knows it."""
        return SharedDevice(self.seats, self._sharing)

    def _sharing(self, in_flight: int) -> Sharing:
        return next((one for one in self.sharings if one.most >= in_flight), self.sharings[-1])

    def stretch(self, in_flight: int) -> Floats:
        """(K,) the time of an answer among some in flight over that alone, without its waiting for them."""
        factors = self.device.factors(in_flight)
        return factors.reading * (1 - self.step_share) + factors.step * self.step_share

    def lane_share(self, in_flight: int) -> Floats:
        """(K,) what an answer adds to the device's work over its time alone."""
        factors = self.device.factors(in_flight)
        return factors.reading * (1 - self.step_share) + factors.step * self.step_share / max(1, in_flight)


class Device(Protocol):
    """Answers requests, which are numbers."""

    @property
    def next_ms(self) -> float:
        """When the next answer ends if nobody comes; infinite if none is given."""

    def begin(self, request: int, setting: int, takes_ms: float, now_ms: float) -> None:
        """Begin an answer that takes so long alone."""

    def end(self) -> tuple[float, int]:
        """End the next answer; return when, and whose it is."""


class Lanes:
    """Answers that do not touch each other; whoever lets them begin counts the lanes."""

    def __init__(self) -> None:
        self._ends: list[tuple[float, int]] = []

    @property
    def next_ms(self) -> float:
        """When the next answer ends; infinite if none is given."""
        return self._ends[0][0] if self._ends else math.inf

    def begin(self, request: int, setting: int, takes_ms: float, now_ms: float) -> None:  # noqa: ARG002
        """Begin an answer that takes so long."""
        heapq.heappush(self._ends, (now_ms + takes_ms, request))

    def end(self) -> tuple[float, int]:
        """End the next answer; return when, and whose it is."""
        return heapq.heappop(self._ends)


@dataclass(slots=True)
class Rest:
    """Holds the rest of an answer in flight, by its times alone: reading, and steps of so long each."""

    reading_ms: float
    step_ms: float
    steps: float
    whole_ms: float

    @property
    def unread(self) -> float:
        """The share of its reading that is left."""
        return self.reading_ms / self.whole_ms if self.whole_ms > 0 else 0.0


class Shared:
    """Answers in flight together.

    Attributes:
        rests: by request, in the order in which they came.
    """

    def __init__(self, times: SharedTimes) -> None:
        self._times, self._now_ms = times, 0.0
        self.rests: dict[int, Rest] = {}

    def begin(self, request: int, setting: int, takes_ms: float, now_ms: float) -> None:
        """Begin an answer that takes so long alone."""
        self._pass_to(now_ms)
        share, steps = float(self._times.step_share[setting]), self._times.steps
        reading_ms = takes_ms * (1 - share) if steps else takes_ms
        self.rests[request] = Rest(reading_ms, takes_ms * share / max(steps, 1), float(steps), reading_ms)

    @property
    def next_ms(self) -> float:
        """When the next answer ends if nobody comes; infinite if none is given."""
        return self._now_ms + min(self._lefts_ms().values(), default=math.inf)

    def end(self) -> tuple[float, int]:
        """End the next answer; return when, and whose it is."""
        lefts_ms = self._lefts_ms()
        request = min(lefts_ms, key=lambda one: lefts_ms[one])
        self._pass_to(self._now_ms + lefts_ms[request])
        del self.rests[request]
        return self._now_ms, request

    def rests_at(self, now_ms: float) -> dict[int, Rest]:
        """Return what is left at a time before the next end."""
        self._pass_to(now_ms)
        return self.rests

    def _lefts_ms(self) -> dict[int, float]:
        """Return how long each answer still takes if nobody comes and nobody ends."""
        factors = self._times.device.factors(len(self.rests))
        reading_ms, step_ms = 0.0, factors.step * max((one.step_ms for one in self.rests.values()), default=0.0)
        own_ms = dict[int, float]()
        for request, one in self.rests.items():
            reading_ms += factors.reading * one.reading_ms
            own_ms[request] = reading_ms
        return {
            request: reading_ms + one.steps * step_ms if one.steps else own_ms[request]
            for request, one in self.rests.items()
        }

    def _pass_to(self, now_ms: float) -> None:
        """Let time pass, in which nobody comes or ends."""
        left_ms, self._now_ms = now_ms - self._now_ms, max(now_ms, self._now_ms)
        factors = self._times.device.factors(len(self.rests))
        for one in self.rests.values():
            read_ms = min(one.reading_ms, max(left_ms, 0.0) / factors.reading)
            one.reading_ms = one.reading_ms - read_ms if one.reading_ms - read_ms > _LEAST_MS else 0.0
            left_ms -= factors.reading * read_ms
        step_ms = factors.step * max((one.step_ms for one in self.rests.values()), default=0.0)
        if left_ms > 0 and step_ms > 0:
            for one in self.rests.values():
                one.steps = max(0.0, one.steps - left_ms / step_ms)
