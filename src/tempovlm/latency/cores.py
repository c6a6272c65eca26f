"""Models inside a latency estimator: each maps requests to the logarithms of their stages' times.

They are plain NumPy, so that predicting all settings takes a fraction of a millisecond and a checkpoint holds
arrays only. `lab.exp1_estimator` trains them.

Shapes: `n` requests, `S` stages, `L` levels, `F` features, `P` terms.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import numpy as np
from numpy.typing import NDArray

from tempovlm.latency.features import STAGES, CostTable, Floats, Workload

LEVELS = (0.5, 0.9, 0.99)
"""The quantiles that are predicted; the first is the median."""

_SMALLEST_MS = 1e-6
_SMALLEST_ERROR = 0.01
"""Smaller relative errors have equal weight when rates are fitted again."""

Arrays = dict[str, NDArray[Any]]


class Core(Protocol):
    """A model that an estimator can calibrate; a checkpoint can hold those in `SERVED`."""

    @property
    def kind(self) -> str:
        """The model's name in checkpoints and reports."""

    def log_ms(self, table: CostTable, workload: Workload) -> Floats:
        """Predict logarithms of milliseconds: (n, S, L), or (n, S, 1) for a model of medians only."""


def fit_rates(terms: Floats, observed: Floats, rounds: int = 0) -> Floats:
    """Fit rates (P,) >= 0 of terms (m, P) to observed times (m,) by the least squared relative error.

    Args:
        terms: (m, P).
        observed: (m,) milliseconds; values that are not finite or not positive are ignored.
        rounds: number of refits, each weighting a measurement's squared error by its last error: this tends
            to the least absolute relative error, which is robust to a slow period of the machine during some of
            the measurements (E. J. Schlossmacher, An iterative technique for absolute deviations
            curve fitting, 1973).
    """
    known = np.isfinite(observed) & (observed > 0)
    relative = terms[known] / observed[known, None]
    rates = _non_negative(relative, np.ones(len(relative)))
    for _ in range(rounds):
        weights = np.maximum(np.abs(relative @ rates - 1), _SMALLEST_ERROR) ** -0.5
        rates = _non_negative(relative * weights[:, None], weights)
    return rates


def _non_negative(matrix: Floats, wanted: Floats) -> Floats:
    """Solve matrix (m, P) @ x = wanted (m,) for x >= 0 by least squares."""
    from scipy.optimize import nnls

    if not len(matrix):
        return np.zeros(matrix.shape[1])
    scale = np.linalg.norm(matrix, axis=0)
    scale[scale == 0] = 1.0
    # A triangle of P rows has the same solution, so refits need not read all m rows.
    q, r = np.linalg.qr(matrix / scale)
    rates: Floats = nnls(r, q.T @ wanted)[0] / scale
    return rates


@dataclass(frozen=True, slots=True)
class RooflineCore:
    """A linear model with non-negative rates, one for each kind of operation.

    Attributes:
        rates: stage → (P,).
    """

    kind: ClassVar[str] = "roofline"
    rates: Mapping[str, Floats]

    @classmethod
    def fit(cls, table: CostTable, workload: Workload, observed: Floats) -> RooflineCore:
        """Fit to times (n, S) in milliseconds, NaN where one was not measured."""
        terms = table.terms(workload)
        return cls({stage: fit_rates(terms[stage], observed[:, i]) for i, stage in enumerate(STAGES)})

    def log_ms(self, table: CostTable, workload: Workload) -> Floats:
        """Predict medians: (n, S, 1)."""
        terms = table.terms(workload)
        times = np.stack([terms[stage] @ self.rates[stage] for stage in STAGES], axis=1)
        return np.log(np.maximum(times, _SMALLEST_MS))[..., None]

    def arrays(self) -> Arrays:
        """Return one array for each stage."""
        return {f"rates.{stage}": rates for stage, rates in self.rates.items()}

    @classmethod
    def from_arrays(cls, arrays: Arrays) -> RooflineCore:
        """Rebuild a core from its `arrays`."""
        return cls({stage: arrays[f"rates.{stage}"] for stage in STAGES})


@dataclass(frozen=True, slots=True)
class MlpCore:
    """Roofline times a correction: an MLP over standardised features with a median and increments above it.

    Attributes:
        roofline: baseline of the correction, so that the network has little to learn and extrapolates.
        centre: (F,) and `spread`: (F,) of the features.
        layers: (in, out) weights and (out,) biases; tanh between them; the last has S · L outputs.
    """

    kind: ClassVar[str] = "mlp"
    roofline: RooflineCore
    centre: Floats
    spread: Floats
    layers: tuple[tuple[NDArray[np.float32], NDArray[np.float32]], ...]

    def log_ms(self, table: CostTable, workload: Workload) -> Floats:
        """Predict (n, S, L); levels cannot cross, because each adds a positive step to the one before."""
        x = ((table.features(workload) - self.centre) / self.spread).astype(np.float32)
        for weight, bias in self.layers[:-1]:
            x = np.tanh(x @ weight + bias)
        weight, bias = self.layers[-1]
        out = (x @ weight + bias).reshape(len(x), len(STAGES), len(LEVELS)).astype(np.float64)
        # softplus; out[..., 0] is the median itself.
        out[..., 1:] = np.logaddexp(0.0, out[..., 1:])
        out[..., :1] += self.roofline.log_ms(table, workload)
        return out.cumsum(axis=-1)

    def arrays(self) -> Arrays:
        """Return rates, scaler and layers."""
        layers: Arrays = {}
        for i, (weight, bias) in enumerate(self.layers):
            layers |= {f"layers.{i}.weight": weight, f"layers.{i}.bias": bias}
        return {**self.roofline.arrays(), "centre": self.centre, "spread": self.spread, **layers}

    @classmethod
    def from_arrays(cls, arrays: Arrays) -> MlpCore:
        """Rebuild a core from its `arrays`."""
        count = sum(name.startswith("layers.") for name in arrays) // 2
        layers = tuple((arrays[f"layers.{i}.weight"], arrays[f"layers.{i}.bias"]) for i in range(count))
        return cls(RooflineCore.from_arrays(arrays), arrays["centre"], arrays["spread"], layers)


SERVED = (RooflineCore, MlpCore)
"""The cores that a checkpoint can hold."""


def core_from_arrays(kind: str, arrays: Arrays) -> Core:
    """Rebuild the core of a checkpoint.

    Raises:
        KeyError: the kind is unknown, or an array is missing.
    """
    return {core.kind: core for core in SERVED}[kind].from_arrays(arrays)
