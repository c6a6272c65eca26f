"""Compares the times that requests among others are told, and those that the guard learns by, with the clock."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from tempovlm.control.guard import Guard
from tempovlm.control.margin import OnlineMargin
from tempovlm.core.knobs import KnobConfig
from tempovlm.core.request import Answer, Request
from tempovlm.engine.calibration import FAR_MS, MIN_PASSES, measure, measure_shared
from tempovlm.engine.engine import Engine
from tempovlm.latency.profile import LatencyProfile, OutputLength

Ratios = dict[str, list[float]]


@dataclass(frozen=True)
class WatchedGuard(Guard):
    """A guard that keeps what answers among others teach it.

    Attributes:
        ratios: forecasts over the time that answers took since the last other one joined.
    """

    ratios: Ratios = field(default_factory=dict)

    def observe_among(self, took_ms: float, calibrated_ms: float, spread: float) -> None:
        """Keep the forecasts, as they were before this answer, and learn."""
        assert self.crowd is not None
        if took_ms > 0:
            calibrated = calibrated_ms / took_ms
            self.ratios["calibrated"] = [calibrated]
            self.ratios["median"] = [self.crowd.middle * calibrated]
            self.ratios["bound"] = [self.crowd.factor * spread * calibrated]
        super().observe_among(took_ms, calibrated_ms, spread)


class Predictions:
    """Answers requests with a deadline far away, at given settings; compares what was foreseen with the clock."""

    def __init__(self, engine: Engine, profile: LatencyProfile) -> None:
        self._engine, self._profile, self._crowd = engine, profile, OnlineMargin()
        self._own, self._lock, self._answers = threading.local(), threading.Lock(), 0
        self._joining: Ratios = {"median": [], "bound": []}
        self._joined: Ratios = {"median": [], "bound": [], "calibrated": []}

    def _guard(self, knobs: KnobConfig) -> WatchedGuard:
        """Return the guard of a setting for the thread that asks; all guards learn together."""
        guards: dict[KnobConfig, WatchedGuard] = self._own.__dict__.setdefault("guards", {})
        if knobs not in guards:
            plain = Guard.fixed(knobs, self._engine.space, self._profile)
            guards[knobs] = WatchedGuard(
                plain.policy, plain.space, plain.choices, plain.profile, crowd=self._crowd
            )
        return guards[knobs]

    def answer(self, request: Request, knobs: KnobConfig) -> Answer:
        """Answer a request, alone or among others as it comes."""
        guard = self._guard(knobs)
        answer = self._engine.answer(replace(request, budget_ms=FAR_MS), guard)
        with self._lock:
            self._answers += 1
            is_whole = answer.num_output_tokens == request.max_new_tokens
            if guard.ratios and is_whole and answer.predicted is not None:
                told, total_ms = answer.predicted, answer.timings_ms["total"]
                self._joining["median"].append(told.p50_ms / total_ms)
                self._joining["bound"].append(told.upper_ms / total_ms)
                for name, ratios in guard.ratios.items():
                    self._joined[name] += ratios
        guard.ratios.clear()
        return answer

    def summary(self) -> dict[str, Any] | None:
        """Return quantiles of predicted over taken, and the share within the bound; None if nobody joined."""
        num = len(self._joining["bound"])
        if not num:
            return None
        return {
            "num": num,
            "share": num / self._answers,
            "at_joining": _quantiles(self._joining),
            "after_the_last_joined": _quantiles(self._joined),
            "learned": {"factor": self._crowd.factor, "middle": self._crowd.middle},
        }


def _quantiles(ratios: Ratios) -> dict[str, Any]:
    """Return the tenth, middle and ninetieth percentile of each list, and how many bounds were kept."""
    found: dict[str, Any] = {}
    for name, values in ratios.items():
        p10, p50, p90 = np.quantile(values, (0.1, 0.5, 0.9)).tolist()
        found[name] = {"p10": p10, "p50": p50, "p90": p90}
    return found | {"within_bound": float(np.mean(np.array(ratios["bound"]) >= 1))}


def calibrated(engine: Engine, tokens: int, pictures: Sequence[Any]) -> LatencyProfile | None:
    """Measure answers of some tokens, alone and together; None where requests are not answered together."""
    if engine.company is None or not engine.company.has_rows:
        return None
    output = OutputLength.exactly(tokens)
    alone = measure(engine, output, passes=MIN_PASSES, pictures=pictures)
    shared = measure_shared(engine, output, pictures=pictures)
    return LatencyProfile("", engine.space, output, alone, None, {}, shared=shared)
