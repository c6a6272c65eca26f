"""Moves an estimator to another device, or to a model of another size, with at most a few dozen measurements.

On the new device a stage is either the same function up to scale and exponent (affine in logarithms, shrunk
towards
a pure scale), or bound by something else, and then a linear roofline fitted to the new measurements alone is
better; or a mixture of both. Leave-one-out errors decide this for each stage.

Shapes: `n` measurements, `S` stages, `L` levels, `P` terms.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from tempovlm.core.errors import UserError
from tempovlm.latency.conformal import conformal_quantile, margins
from tempovlm.latency.cores import LEVELS, RooflineCore, fit_rates
from tempovlm.latency.estimator import Adaptation, Estimator, StageTimes, compose_total
from tempovlm.latency.features import STAGES, CostTable, Floats, Ints, Workload

_SLOPE_PRIOR = 0.04
"""(0.05 / 0.25)²: relative noise of a measurement over the expected deviation of the exponent from 1."""

_WEIGHTS = (0.0, 0.5, 1.0)
_ROUNDS = 8
"""Rounds of `fit_rates`: a few dozen measurements can all fall into a slow period."""

_FEWEST_FOR_RATES = 4
"""With fewer measurements a linear model fits all of them exactly, and its error cannot be estimated."""


@dataclass(frozen=True, slots=True)
class Measurements:
    """Requests that were timed.

    Attributes:
        ms: (n, S) milliseconds, NaN if a stage was not measured.
        steps: (n,) decode steps: output tokens - 1.
    """

    workload: Workload
    ms: Floats
    steps: Floats

    def __len__(self) -> int:
        return len(self.ms)

    def take(self, rows: Ints | NDArray[np.bool_]) -> Self:
        """Select some of the requests."""
        arrays = {field.name: getattr(self, field.name)[rows] for field in fields(self)[1:]}
        return replace(self, workload=self.workload.take(rows), **arrays)

    @property
    def log_ms(self) -> Floats:
        """The logarithms (n, S), NaN if a stage was not measured or took no time."""
        return np.log(np.where(self.ms > 0, self.ms, np.nan))

    @property
    def total_ms(self) -> Floats:
        """Return the totals (n,) of stages and steps; missing stages take no time."""
        known = np.where(np.isnan(self.ms), 0.0, self.ms)
        return np.where(np.isnan(self.ms[:, STAGES.index("prefill")]), np.nan, compose_total(known, self.steps))


def recalibrate(
    estimator: Estimator,
    measurements: Measurements,
    *,
    table: CostTable | None = None,
    stamp: Mapping[str, Any] | None = None,
) -> Estimator:
    """Move an estimator to another device.

    Args:
        estimator: of the old device; it is not changed.
        measurements: on the new device, best chosen by `choose_measurements`; without any the
            estimator is returned unchanged.
        table: costs of the model there, if it is another model with the same knob space.
        stamp: stamp of the measurements.

    Raises:
        UserError: the knob spaces differ.
    """
    table = table or estimator.table
    if table.space.fingerprint != estimator.space.fingerprint:
        raise UserError("the measurements are of another knob space than the estimator's")
    old = replace(estimator, table=table, adaptation=None)
    if not len(measurements):
        return replace(old, stamp=stamp or estimator.stamp)
    fits = _fit(old, measurements)
    offset, slope, weight = (np.array([getattr(fit, name) for fit in fits]) for name in _NUMBERS)
    rates = RooflineCore({stage: fit.rates for stage, fit in zip(STAGES, fits, strict=True)})
    moved = replace(
        old,
        adaptation=Adaptation(offset, slope, weight, rates),
        margins=_new_margins(old, measurements, fits),
        stamp=stamp or estimator.stamp,
    )
    return replace(moved, total_margins=_new_total_margins(moved, measurements))


_NUMBERS = ("offset", "slope", "weight")


@dataclass(frozen=True, slots=True)
class _Fit:
    """Return one stage's `Adaptation`, and the leave-one-out error (n,) of each measurement."""

    offset: float
    slope: float
    weight: float
    rates: Floats
    errors: Floats


def _fit(old: Estimator, measurements: Measurements) -> list[_Fit]:
    predicted = old.raw_log_ms(measurements.workload)[..., 0]
    terms, observed = old.table.terms(measurements.workload), measurements.log_ms
    fits = []
    for i, stage in enumerate(STAGES):
        known = np.isfinite(observed[:, i])
        if not known.any():
            still = float(old.margins[i, 0])
            fits.append(_Fit(still, 1.0, 0.0, np.zeros(terms[stage].shape[1]), np.empty(0)))
            continue
        fits.append(_fit_stage(predicted[known, i], observed[known, i], terms[stage][known]))
    return fits


def _fit_stage(x: Floats, y: Floats, terms: Floats) -> _Fit:
    """Choose among scale, scale and exponent, and mixtures with a linear model, by leave-one-out error."""
    n = len(x)
    lines = {affine: _line(x, y, affine=affine) for affine in (False, True)}
    if n < _FEWEST_FOR_RATES:
        offset, slope = lines[False]
        return _Fit(offset, slope, 0.0, np.zeros(terms.shape[1]), y - offset - slope * x)
    left_out = {affine: np.empty(n) for affine in lines}
    linear = np.empty(n)
    for i in range(n):
        rest = np.delete(np.arange(n), i)
        for affine, errors in left_out.items():
            offset, slope = _line(x[rest], y[rest], affine=affine)
            errors[i] = offset + slope * x[i]
        linear[i] = np.log(max(terms[i] @ fit_rates(terms[rest], np.exp(y[rest]), _ROUNDS), 1e-6))
    trials = {
        (affine, weight): y - ((1 - weight) * by_line + weight * linear)
        for affine, by_line in left_out.items()
        for weight in _WEIGHTS
    }
    affine, weight = min(trials, key=lambda trial: float(np.abs(trials[trial]).mean()))
    offset, slope = lines[affine]
    return _Fit(offset, slope, weight, fit_rates(terms, np.exp(y), _ROUNDS), trials[affine, weight])


def _line(x: Floats, y: Floats, *, affine: bool) -> tuple[float, float]:
    """Fit offset and slope of y over x; the slope is 1, or a ridge estimate shrunk towards 1."""
    slope = 1.0
    if affine:
        spread = x - x.mean()
        slope += float(spread @ (y - x)) / (float(spread @ spread) + _SLOPE_PRIOR)
    return float(np.median(y - slope * x)), slope


def _new_margins(old: Estimator, measurements: Measurements, fits: list[_Fit]) -> Floats:
    """Compute (S, L): the spread of the leave-one-out errors, or at least the old device's if they are too few."""
    logs = old.raw_log_ms(measurements.workload)
    observed = measurements.log_ms
    result = np.zeros_like(old.margins)
    for s, fit in enumerate(fits):
        known = np.isfinite(observed[:, s])
        inherited = old.margins[s] - old.margins[s, 0]
        for i in range(1, len(LEVELS)):
            spread = (logs[known, s, i] - logs[known, s, 0]).astype(np.float64)
            scores = fit.errors - spread
            bound = conformal_quantile(scores, LEVELS[i])
            seen = float(scores.max()) if len(scores) else -math.inf
            result[s, i] = bound if math.isfinite(bound) else max(seen, float(inherited[i]))
    return result


def _new_total_margins(moved: Estimator, measurements: Measurements) -> Floats | None:
    """Compute (L,) as for stages; never below the old margins, because the fit has seen these measurements."""
    fresh = total_margins(moved.predict(measurements.workload), measurements)
    if moved.total_margins is None:
        return fresh
    return np.concatenate((fresh[:1], np.maximum(fresh[1:], moved.total_margins[1:])))


def total_margins(times: StageTimes, measurements: Measurements) -> Floats:
    """Compute margins (L,) by which the logarithms of median totals cover the measured ones at each level."""
    predicted = np.log(compose_total(times.ms[..., 0], measurements.steps))
    observed = np.log(measurements.total_ms)[:, None]
    return margins(observed, np.repeat(predicted[:, None, None], len(LEVELS), axis=2), LEVELS)[0]


def choose_measurements(
    table: CostTable, pool: Workload, count: int, seed: int = 0, images: NDArray[np.str_] | None = None
) -> Ints:
    """Choose requests to measure, each as far as possible from those before it in standardised features.

    Args:
        table: costs of the new device's model.
        pool: (n,) requests that could be measured.
        count: number to choose.
        seed: chooses the first one.
        images: (n,) names of the pictures. Each picture is then chosen equally often, because one
            picture is measured at one time and a device has slow periods.

    Source: T. F. Gonzalez, Clustering to minimize the maximum intercluster distance, 1985 (farthest first).
    """
    group = np.arange(len(pool)) if images is None else np.unique(images, return_inverse=True)[1]
    times_chosen = np.zeros(len(pool), dtype=np.int64)
    features = table.features(pool)
    points = (features - features.mean(axis=0)) / np.maximum(features.std(axis=0), 1e-9)
    chosen = [int(np.random.default_rng(seed).integers(len(points)))]
    distance = np.full(len(points), np.inf)
    while len(chosen) < min(count, len(points)):
        distance = np.minimum(distance, ((points - points[chosen[-1]]) ** 2).sum(axis=1))
        distance[chosen] = -1.0
        times_chosen[group[chosen[-1]]] += 1
        often = times_chosen[group]
        fresh = often == often[distance >= 0].min()
        chosen.append(int(np.where(fresh, distance, -1.0).argmax()))
    return np.array(chosen[:count], dtype=np.int64)
