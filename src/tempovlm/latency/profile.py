"""The latency profile of a machine: every measurement of each knob setting, and the bounds computed from them.

A bound is a quantile over two distributions. First, the relative residuals of all settings together: single
settings
are measured too few times for a quantile of their own, and the relative spread is similar across settings. Second,
the lengths of answers, which are unknown in advance. The time to open a picture is known at the first
choice, so it is not part of the spread: totals are those of a picture that opens in the usual time. Totals
and remainders (prefill and decode) have separate bounds, because the sum of stages' quantiles is not the
quantile of their sum. Times are milliseconds, indices are those of the knob space. Never runs the engine.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from functools import cached_property
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from tempovlm.core.errors import UserError
from tempovlm.core.knobs import KnobSpace
from tempovlm.core.paths import write_whole
from tempovlm.latency.remembered import remembered

SCHEMA = "tempovlm.profile/3"

UPPER_LEVEL = 0.98
"""Share of answers that a bound should cover."""

MOST_LENGTHS = 12
"""Lengths of answers that a bound tells apart."""

MOST_OUTPUTS = 256
"""Distributions of answers' lengths whose tables are kept: 30 KB each."""

IN_FLIGHT = (2, 4, 8, 16)
"""Numbers of requests at once that are measured where answers share a device."""

SINGLE_PASS_SPREAD = 1.3
"""Assumed quantile of residuals if every setting was measured once, so that there are none."""

_log = logging.getLogger("tempovlm")


@dataclass(frozen=True, slots=True)
class OutputLength:
    """Distribution of answer lengths: `counts[n - 1]` answers have `n` generated tokens, with the end token."""

    counts: tuple[int, ...] = (1,) * 8

    @classmethod
    def exactly(cls, length: int) -> OutputLength:
        """Return the distribution in which every answer has this many tokens."""
        return cls((0,) * (length - 1) + (1,))

    def capped(self, most: int) -> OutputLength:
        """The same answers where `most` tokens is the end of the longer ones."""
        if most >= len(self.counts):
            return self
        return OutputLength((*self.counts[: most - 1], sum(self.counts[most - 1 :])))

    def points(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Lengths and how many answers have them; of many lengths, each of `MOST_LENGTHS` parts' longest."""
        lengths = [n for n, count in enumerate(self.counts, start=1) if count]
        parts = np.array_split(lengths, min(len(lengths), MOST_LENGTHS))
        numbers = (sum(self.counts[n - 1] for n in part) for part in parts)
        return tuple(int(part[-1]) for part in parts), tuple(numbers)

    @property
    def mean(self) -> float:
        """Mean tokens of an answer."""
        return sum(n * count for n, count in enumerate(self.counts, start=1)) / sum(self.counts)

    @property
    def upper(self) -> int:
        """Tokens that `UPPER_LEVEL` of answers do not exceed."""
        covered = np.cumsum(self.counts) >= UPPER_LEVEL * sum(self.counts)
        return int(covered.argmax()) + 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Measurement:
    """One timed answer.

    Attributes:
        setting: index in the knob space.
        total_ms: acceptance to last token.
        prefix_ms: acceptance to the choice of top-k and depth.
        open_ms: reading and decoding the picture's file, a part of the prefix.
        step_ms: the decode steps after the first token.
        num_output_tokens: generated tokens.
    """

    setting: int
    total_ms: float
    prefix_ms: float
    open_ms: float
    step_ms: tuple[float, ...]
    num_output_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class SharedMeasurement:
    """Requests of one setting that were answered at once.

    Attributes:
        setting: index in the knob space. in_flight: number of requests.
        first_ms: from their start to the last one's first token, for each of them.
        step_ms: median from one token to the next.
    """

    setting: int
    in_flight: int
    first_ms: float
    step_ms: float


@dataclass(frozen=True, slots=True)
class Factor:
    """A factor on times alone that was measured at a short and at a long one; between them the product is linear.

    So it never falls from the one to the other, unless the measured products do.

    Attributes:
        short_ms, long_ms: the times alone. at_short, at_long: the factors on them, and beyond them.
    """

    short_ms: float
    at_short: float
    long_ms: float
    at_long: float

    @classmethod
    def through(cls, points: Iterable[tuple[float, float]]) -> Factor:
        """Return the factor through pairs of a time and a factor: of the shortest and the longest time."""
        ordered = sorted(points)
        return cls(*ordered[0], *ordered[-1])

    def on(self, alone_ms: float) -> float:
        """Return the product of a time alone and its factor."""
        if alone_ms >= self.long_ms:
            return alone_ms * self.at_long
        if alone_ms <= self.short_ms:
            return alone_ms * self.at_short
        share = (alone_ms - self.short_ms) / (self.long_ms - self.short_ms)
        return (1 - share) * self.short_ms * self.at_short + share * self.long_ms * self.at_long


@dataclass(frozen=True, slots=True)
class Sharing:
    """Times of requests in flight together, as factors on their times alone.

    Attributes:
        most: requests in flight that the factors hold for.
        reading: on the time from the opened picture to the first token, which those of all requests add up to.
        step: on the time of a token, which all share. spread: on both, for a bound.
    """

    most: int
    reading: Factor
    step: Factor
    spread: float


@dataclass(frozen=True)
class LatencyProfile:
    """The measurements of a machine and the tables made from them.

    Attributes:
        fingerprint: of the machine, the versions and the model; a profile with another one is not used.
        space: the knob space that indices belong to.
        output: answer lengths that predictions assume.
        busy_cores: cores that others used when the measurement began; None if unknown.
        stamp: where and when it was measured, for readers.
        threads: of each stage on a CPU, pairs of a size of its work and the threads from that size on.
        shared: measurements of requests in flight together; none where each is answered alone.
    """

    fingerprint: str
    space: KnobSpace
    output: OutputLength
    measurements: tuple[Measurement, ...]
    busy_cores: float | None
    stamp: Mapping[str, Any]
    threads: Mapping[str, tuple[tuple[int, int], ...]] = field(default_factory=dict)
    shared: tuple[SharedMeasurement, ...] = ()

    def __post_init__(self) -> None:
        measured = {m.setting for m in self.measurements}
        if measured != set(range(len(self.space))):
            raise UserError(f"the profile measures {len(measured)} settings, the knob space has {len(self.space)}")

    def for_lengths(self, output: OutputLength) -> LatencyProfile:
        """The same measurements with the tables of other lengths of answers."""
        if output == self.output:
            return self
        return remembered(self._others, output, lambda: replace(self, output=output), MOST_OUTPUTS)

    @cached_property
    def _others(self) -> dict[OutputLength, LatencyProfile]:
        return {}

    def part(self, space: KnobSpace) -> LatencyProfile:
        """The measurements of a subset of the settings."""
        places = {self.space.index(knobs): i for i, knobs in enumerate(space)}
        kept = (replace(m, setting=places[m.setting]) for m in self.measurements if m.setting in places)
        shared = (replace(m, setting=places[m.setting]) for m in self.shared if m.setting in places)
        return replace(self, space=space, measurements=tuple(kept), shared=tuple(shared))

    def sharing(self, in_flight: int) -> Sharing | None:
        """Return the factors for a number of requests in flight; None if none were measured.

        They are those of the next larger number that was measured; beyond, of the largest.
        """
        return next((one for one in self._sharings if one.most >= in_flight), (self._sharings or (None,))[-1])

    @cached_property
    def _sharings(self) -> tuple[Sharing, ...]:
        """Factors by number in flight, with the spread of the setting whose bursts differ most."""
        found = []
        for most in sorted({m.in_flight for m in self.shared}):
            ratios: dict[int, list[tuple[float, float]]] = {}
            for m in self.shared:
                if m.in_flight == most:
                    step = m.step_ms / self._steps[m.setting] if self._steps[m.setting] > 0 else 1.0
                    ratios.setdefault(m.setting, []).append((m.first_ms / self.p50_reading_ms(m.setting), step))
            medians = {setting: np.median(pairs, axis=0).tolist() for setting, pairs in ratios.items()}
            spread = max(float(np.max(np.divide(pairs, medians[setting]))) for setting, pairs in ratios.items())
            reading = Factor.through((self.p50_reading_ms(one), factors[0]) for one, factors in medians.items())
            token = Factor.through((self._steps[one], factors[1]) for one, factors in medians.items())
            found.append(Sharing(most, reading, token, spread))
        return tuple(found)

    def in_company(self, sharing: Sharing) -> LatencyProfile:
        """Return the profile of answers that are given among others."""
        if sharing not in self._companies:
            given = {one.name: getattr(self, one.name) for one in fields(LatencyProfile)}
            self._companies[sharing] = ProfileInCompany(**given, alone=self, factors=sharing)
        return self._companies[sharing]

    @cached_property
    def _companies(self) -> dict[Sharing, LatencyProfile]:
        return {}

    def upper_total_ms(self, index: int) -> float:
        """Return the upper bound from acceptance to last token: covers `UPPER_LEVEL` of answers of any length."""
        return self._upper_totals[index]

    def upper_remainder_ms(self, index: int) -> float:
        """Return the upper bound of prefill and decode: covers `UPPER_LEVEL` of answers of any length."""
        return self._upper_remainders[index]

    def p50_total_ms(self, index: int) -> float:
        """Return the median from acceptance to last token, at the mean output length."""
        return self._p50_totals[index]

    def p50_remainder_ms(self, index: int) -> float:
        """Return the median of prefill and decode, at the mean output length."""
        return self._p50_remainders[index]

    def p50_reading_ms(self, index: int) -> float:
        """Return the median from the opened picture to the first token."""
        return self._p50_totals[index] - (self.output.mean - 1) * self._steps[index] - self.open_ms

    def p50_prefix_ms(self, index: int) -> float:
        """Return the median from acceptance to the choice of top-k and depth."""
        return self._p50_prefixes[index]

    def p50_picture_ms(self, index: int) -> float:
        """Return the median from the opened picture to the choice of top-k and depth."""
        return self._p50_prefixes[index] - self.open_ms

    @cached_property
    def usual_picture(self) -> float:
        """Ratio to `p50_picture_ms` that `UPPER_LEVEL` of measurements keep; 1 where nothing is done before."""
        medians_ms = [self.p50_picture_ms(i) for i in range(len(self.space))]
        samples_ms = [[m.prefix_ms - m.open_ms for m in group] for group in self._by_setting]
        return float(np.quantile(residual_ratios(samples_ms, medians_ms), UPPER_LEVEL))

    def step_ms(self, index: int) -> float:
        """Return the median decode step after the first token."""
        return self._steps[index]

    @cached_property
    def open_ms(self) -> float:
        """Median time to read and decode a picture of the usual size."""
        return float(np.median([m.open_ms for m in self.measurements]))

    @cached_property
    def _by_setting(self) -> list[list[Measurement]]:
        groups: list[list[Measurement]] = [[] for _ in range(len(self.space))]
        for measurement in self.measurements:
            groups[measurement.setting].append(measurement)
        return groups

    @cached_property
    def _steps(self) -> tuple[float, ...]:
        """Median step of settings that run the same blocks and experts; the tier hardly affects a step.

        If no answer had a second token, the step of the whole profile in proportion to the blocks.
        """
        pooled: dict[tuple[int, int], list[float]] = {}
        per_block: list[float] = []
        for measurement in self.measurements:
            knobs = self.space.settings[measurement.setting]
            pooled.setdefault((knobs.top_k, knobs.num_blocks), []).extend(measurement.step_ms)
            per_block += [step / knobs.num_blocks for step in measurement.step_ms]
        block_ms = float(np.median(per_block)) if per_block else 0.0
        return self._smooth([pooled[k.top_k, k.num_blocks] or [block_ms * k.num_blocks] for k in self.space])

    def _samples(self, value: Callable[[Measurement], float], length: float) -> list[list[float]]:
        """Return each setting's measured values, converted to an output length with its step."""
        return [
            [max(value(m) + (length - m.num_output_tokens) * step, 0.0) for m in group]
            for group, step in zip(self._by_setting, self._steps, strict=True)
        ]

    def _medians(self, value: Callable[[Measurement], float]) -> tuple[float, ...]:
        """Medians at the mean output length: of the first token, and a step for each later one.

        Both never fall when a knob rises, and so neither does their sum; no length makes it negative.
        """
        later, first = self.output.mean - 1, self._smooth(self._samples(value, 1))
        return tuple(first_ms + later * step for first_ms, step in zip(first, self._steps, strict=True))

    @cached_property
    def _upper_totals(self) -> tuple[float, ...]:
        return self._upper(self._total_ms)

    @cached_property
    def _upper_remainders(self) -> tuple[float, ...]:
        return self._upper(_remainder_ms)

    @cached_property
    def _p50_totals(self) -> tuple[float, ...]:
        return self._medians(self._total_ms)

    @cached_property
    def _p50_remainders(self) -> tuple[float, ...]:
        return self._medians(_remainder_ms)

    @cached_property
    def _p50_prefixes(self) -> tuple[float, ...]:
        return self._smooth([[m.prefix_ms + self._opening_ms(m) for m in group] for group in self._by_setting])

    def _total_ms(self, measurement: Measurement) -> float:
        return measurement.total_ms + self._opening_ms(measurement)

    def _opening_ms(self, measurement: Measurement) -> float:
        """Return the correction to the usual time of opening the picture: a PNG takes longer than a JPEG."""
        return self.open_ms - measurement.open_ms

    def _upper(self, value: Callable[[Measurement], float]) -> tuple[float, ...]:
        """Quantiles over residuals and lengths, with residuals around a setting's others or the smoothed medians.

        The larger of the two is used; each is smoothed, so that more work never gets a lower bound.
        """
        samples, medians = self._samples(value, self.output.mean), self._medians(value)
        lengths, numbers = self.output.points()
        counts, longer = np.array(numbers, dtype=float), np.array(lengths) - self.output.mean
        expected_ms = np.array(medians)[:, None] + longer * np.array(self._steps)[:, None]  # (settings, lengths)
        bounds_ms = []
        for ratios in (residual_ratios(samples), residual_ratios(samples, medians)):
            level = min(math.ceil((len(ratios) + 1) * UPPER_LEVEL) / len(ratios), 1.0)
            values_ms = np.array(ratios)[:, None] * expected_ms[:, None]  # (settings, residuals, lengths)
            weights = np.tile(counts, len(ratios))
            bounds_ms.append(weighted_quantile(values_ms.reshape(len(medians), -1), weights, level))
        return self._monotone(np.maximum(*bounds_ms))

    def _smooth(self, samples: list[list[float]]) -> tuple[float, ...]:
        """Medians that never fall when a knob rises."""
        return self._monotone(np.array([median(values) for values in samples]))

    def _monotone(self, table: np.ndarray) -> tuple[float, ...]:
        """A table, (settings,), that never falls when a knob rises: more work cannot take less time.

        Midway between the smallest monotone table above the given one and the largest one below it, so that noise
        is pulled neither up nor down.
        """
        above = table.reshape(self.space.shape)
        below = np.flip(above)
        for axis in range(above.ndim):
            above = np.maximum.accumulate(above, axis=axis)
            below = np.minimum.accumulate(below, axis=axis)
        return tuple(float(value) for value in ((above + np.flip(below)) / 2).flat)

    def to_json(self) -> dict[str, Any]:
        """Return a JSON object with every measurement; the tables are computed again when it is read."""
        rows = [
            [
                m.setting,
                *(round(t, 4) for t in (m.total_ms, m.prefix_ms, m.open_ms)),
                m.num_output_tokens,
                [round(step, 4) for step in m.step_ms],
            ]
            for m in self.measurements
        ]
        body: dict[str, Any] = {
            "schema": SCHEMA,
            "fingerprint": self.fingerprint,
            "knob_space": self.space.fingerprint,
            "output": asdict(self.output),
            "busy_cores": self.busy_cores,
            "stamp": dict(self.stamp),
            "threads": {stage: [list(pair) for pair in pairs] for stage, pairs in self.threads.items()},
            "columns": ["setting", "total_ms", "prefix_ms", "open_ms", "num_output_tokens", "step_ms"],
            "measurements": rows,
        }
        if self.shared:
            body["shared_columns"] = ["setting", "in_flight", "first_ms", "step_ms"]
            body["shared"] = [
                [m.setting, m.in_flight, round(m.first_ms, 4), round(m.step_ms, 4)] for m in self.shared
            ]
        return {**body, "digest": _digest(body)}

    @classmethod
    def from_json(cls, record: Mapping[str, Any], space: KnobSpace) -> LatencyProfile:
        """Return a stored profile.

        Raises:
            UserError: it belongs to another knob space, or its content is damaged.
        """
        body = {name: value for name, value in record.items() if name != "digest"}
        if record.get("schema") != SCHEMA:
            raise UserError("the profile is of another version")
        if record.get("digest") != _digest(body):
            raise UserError("the profile's content is damaged")
        if record["knob_space"] != space.fingerprint:
            raise UserError("the profile belongs to another knob space")
        measurements = tuple(
            Measurement(
                setting=setting,
                total_ms=total_ms,
                prefix_ms=prefix_ms,
                open_ms=open_ms,
                num_output_tokens=length,
                step_ms=tuple(steps),
            )
            for setting, total_ms, prefix_ms, open_ms, length, steps in record["measurements"]
        )
        shared = tuple(
            SharedMeasurement(setting=setting, in_flight=in_flight, first_ms=first_ms, step_ms=step_ms)
            for setting, in_flight, first_ms, step_ms in record.get("shared", ())
        )
        output = OutputLength(tuple(record["output"]["counts"]))
        threads = {stage: tuple((size, n) for size, n in pairs) for stage, pairs in record["threads"].items()}
        about = (record["busy_cores"], record["stamp"], threads, shared)
        return cls(record["fingerprint"], space, output, measurements, *about)

    def save(self, path: Path) -> None:
        """Write the profile atomically.

        Raises:
            UserError: the folder cannot be written to.
        """
        write_whole(path, json.dumps(self.to_json()) + "\n")


@dataclass(frozen=True, kw_only=True)
class ProfileInCompany(LatencyProfile):
    """The tables of answers among others: medians by the factors, and bounds in proportion to their medians.

    They are made from tables that are there already, because a request may need them while others wait.

    Attributes:
        alone: the profile of answers alone. factors: on its times.
    """

    alone: LatencyProfile
    factors: Sharing

    def for_lengths(self, output: OutputLength) -> LatencyProfile:
        """As the profile of answers alone."""
        return self.alone.for_lengths(output).in_company(self.factors)

    @cached_property
    def usual_picture(self) -> float:
        """As that of answers alone."""
        return self.alone.usual_picture

    @cached_property
    def open_ms(self) -> float:
        """As that of answers alone: a caller opens its picture."""
        return self.alone.open_ms

    @cached_property
    def _steps(self) -> tuple[float, ...]:
        return tuple(map(self.factors.step.on, self._of_alone(self.alone.step_ms)))

    @cached_property
    def _p50_prefixes(self) -> tuple[float, ...]:
        pictures_ms, alone_ms = (
            self._of_alone(one) for one in (self.alone.p50_picture_ms, self.alone.p50_reading_ms)
        )
        return tuple(
            self.open_ms + in_proportion(picture_ms, self.factors.reading.on(one_ms), one_ms)
            for picture_ms, one_ms in zip(pictures_ms, alone_ms, strict=True)
        )

    @cached_property
    def _p50_totals(self) -> tuple[float, ...]:
        later, reading = self.output.mean - 1, self._of_alone(self.alone.p50_reading_ms)
        return tuple(
            self.open_ms + self.factors.reading.on(first_ms) + later * step_ms
            for first_ms, step_ms in zip(reading, self._steps, strict=True)
        )

    @cached_property
    def _p50_remainders(self) -> tuple[float, ...]:
        return tuple(total - prefix for total, prefix in zip(self._p50_totals, self._p50_prefixes, strict=True))

    @cached_property
    def _upper_totals(self) -> tuple[float, ...]:
        alone, open_ms = self.alone, self.open_ms
        return tuple(
            open_ms
            + in_proportion(alone.upper_total_ms(i) - open_ms, own_ms - open_ms, alone.p50_total_ms(i) - open_ms)
            for i, own_ms in enumerate(self._p50_totals)
        )

    @cached_property
    def _upper_remainders(self) -> tuple[float, ...]:
        alone = self.alone
        return tuple(
            in_proportion(alone.upper_remainder_ms(i), own_ms, alone.p50_remainder_ms(i))
            for i, own_ms in enumerate(self._p50_remainders)
        )

    def _of_alone(self, table: Callable[[int], float]) -> list[float]:
        return [table(i) for i in range(len(self.space))]


def in_proportion(bound_ms: float, median_ms: float, of_ms: float) -> float:
    """Return the bound that is to one median as `bound_ms` is to the median `of_ms`."""
    return bound_ms * median_ms / of_ms if of_ms > 0 else bound_ms


def load_profile(path: Path, space: KnobSpace, fingerprint: str, output: OutputLength) -> LatencyProfile | None:
    """Return the stored profile of this machine and model; None if there is none or it cannot be used.

    A damaged file is reported, so that the user knows why the machine is measured again. Measurements serve
    any output length; the tables are computed for `output`.
    """
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        profile = LatencyProfile.from_json(record, space)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        _log.warning("%s: the stored calibration cannot be read (%s); measuring again", path, error)
        return None
    return replace(profile, output=output) if profile.fingerprint == fingerprint else None


def residual_ratios(samples: Sequence[Sequence[float]], centres: Sequence[float] | None = None) -> list[float]:
    """Return each value over its centre, pooled over settings.

    Without `centres` a value's centre is the median of its setting's other values: leaving the value itself out
    keeps a small sample from looking steadier than the next answer will be (as in the jackknife+, Barber et al.
    2021). If every setting was measured once there is no spread, and `SINGLE_PASS_SPREAD` replaces it.
    """
    ratios = []
    for setting, values in enumerate(samples):
        if len(values) < 2:
            continue
        for i, value in enumerate(values):
            others = [*values[:i], *values[i + 1 :]]
            centre = median(others) if centres is None else centres[setting]
            if centre > 0:
                ratios.append(value / centre)
    return ratios or [SINGLE_PASS_SPREAD]


def weighted_quantile(values: np.ndarray, weights: np.ndarray, level: float) -> np.ndarray:
    """Return of each row, (..., N), the least value such that `level` of the weights, (N,), is at or below it."""
    order = np.argsort(values)
    reached = np.cumsum(weights[order], axis=-1) >= level * weights.sum() * (1 - 1e-12)
    at = np.take_along_axis(order, reached.argmax(axis=-1)[..., None], axis=-1)
    return np.asarray(np.take_along_axis(values, at, axis=-1)[..., 0])


def _remainder_ms(measurement: Measurement) -> float:
    return measurement.total_ms - measurement.prefix_ms


def _digest(body: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()[:16]
