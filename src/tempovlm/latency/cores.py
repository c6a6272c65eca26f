"""The models that may stand inside an estimator: each maps requests to the logarithms of their stages' times.

Plain NumPy, so that asking for all settings costs a fraction of a millisecond and a checkpoint is arrays and
nothing else. How they are trained is `lab.exp1_estimator.train`'s business.

Shapes: `n` requests, `S` stages, `L` levels, `F` features, `P` terms, `H` hidden units, `T` trees, `N` tree nodes.
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
"""Relative errors below it weigh alike when rates are fitted again."""

Arrays = dict[str, NDArray[Any]]


class Core(Protocol):
    """What the estimator needs of a model."""

    kind: ClassVar[str]

    def log_ms(self, table: CostTable, workload: Workload) -> Floats:
        """Logarithms of milliseconds: (n, S, L), or (n, S, 1) where it knows the median only."""

    def arrays(self) -> Arrays:
        """Everything that it is made of."""


def fit_rates(terms: Floats, observed: Floats, rounds: int = 0) -> Floats:
    """Non-negative rates (P,) that fit terms (m, P) to observed times (m,) with the least squared relative error.

    Args:
        terms: (m, P).
        observed: (m,) milliseconds; what is not finite or not positive does not count.
        rounds: how often to fit again, each time with a measurement's square divided by its error of the time
            before: towards the least absolute relative error, which a slow spell of the machine during some of
            the measurements does not move (E. J. Schlossmacher, An iterative technique for absolute deviations
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
    """The x >= 0 (P,) with the least squared error of matrix (m, P) @ x against wanted (m,)."""
    from scipy.optimize import nnls

    if not len(matrix):
        return np.zeros(matrix.shape[1])
    scale = np.linalg.norm(matrix, axis=0)
    scale[scale == 0] = 1.0
    # A triangle of P rows has the same solution, and fitting again many times reads m rows once each.
    q, r = np.linalg.qr(matrix / scale)
    rates: Floats = nnls(r, q.T @ wanted)[0] / scale
    return rates


@dataclass(frozen=True, slots=True)
class RooflineCore:
    """Each kind of operation at a rate of its own: a linear model with non-negative rates.

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
        """(n, S, 1)."""
        terms = table.terms(workload)
        times = np.stack([terms[stage] @ self.rates[stage] for stage in STAGES], axis=1)
        return np.log(np.maximum(times, _SMALLEST_MS))[..., None]

    def arrays(self) -> Arrays:
        """One array a stage."""
        return {f"rates.{stage}": rates for stage, rates in self.rates.items()}

    @classmethod
    def from_arrays(cls, arrays: Arrays) -> RooflineCore:
        """What `arrays` gave."""
        return cls({stage: arrays[f"rates.{stage}"] for stage in STAGES})


@dataclass(frozen=True, slots=True)
class MlpCore:
    """Roofline times a correction: an MLP over standardised features with a median and increments above it.

    Attributes:
        roofline: what the correction is relative to, so that the network has little to learn and extrapolates.
        centre: (F,) and `spread`: (F,) of the features.
        layers: (in, out) weights and (out,) biases; tanh between them; the last has S · L outputs.
    """

    kind: ClassVar[str] = "mlp"
    roofline: RooflineCore
    centre: Floats
    spread: Floats
    layers: tuple[tuple[NDArray[np.float32], NDArray[np.float32]], ...]

    def log_ms(self, table: CostTable, workload: Workload) -> Floats:
        """(n, S, L); levels cannot cross, because each adds a positive step to the one before."""
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
        """Rates, scaler and layers."""
        layers: Arrays = {}
        for i, (weight, bias) in enumerate(self.layers):
            layers |= {f"layers.{i}.weight": weight, f"layers.{i}.bias": bias}
        return {**self.roofline.arrays(), "centre": self.centre, "spread": self.spread, **layers}

    @classmethod
    def from_arrays(cls, arrays: Arrays) -> MlpCore:
        """What `arrays` gave."""
        count = sum(name.startswith("layers.") for name in arrays) // 2
        layers = tuple((arrays[f"layers.{i}.weight"], arrays[f"layers.{i}.bias"]) for i in range(count))
        return cls(RooflineCore.from_arrays(arrays), arrays["centre"], arrays["spread"], layers)


@dataclass(frozen=True, slots=True)
class BoostingCore:
    """Roofline times a correction by boosted regression trees, a forest for each stage.

    Attributes:
        start: (S,) added to every prediction.
        feature, threshold, left, right, value: (S, T, N); a leaf is its own left and right child.
        depth: levels below the roots.
    """

    kind: ClassVar[str] = "boosting"
    roofline: RooflineCore
    start: Floats
    feature: NDArray[np.int64]
    threshold: Floats
    left: NDArray[np.int64]
    right: NDArray[np.int64]
    value: Floats
    depth: int

    def log_ms(self, table: CostTable, workload: Workload) -> Floats:
        """(n, S, 1)."""
        # Trees were grown on float32, and a threshold may fall between a value and its rounding.
        x = table.features(workload).astype(np.float32)
        n, (S, T, _) = len(x), self.value.shape
        stage, tree = np.arange(S)[:, None], np.arange(T)
        row = np.arange(n)[:, None, None]
        node = np.zeros((n, S, T), dtype=np.int64)
        for _ in range(self.depth):
            goes_left = x[row, self.feature[stage, tree, node]] <= self.threshold[stage, tree, node]
            node = np.where(goes_left, self.left[stage, tree, node], self.right[stage, tree, node])
        correction = self.start + self.value[stage, tree, node].sum(axis=-1)
        return self.roofline.log_ms(table, workload) + correction[..., None]

    def arrays(self) -> Arrays:
        """Rates and trees."""
        trees = {name: getattr(self, name) for name in ("feature", "threshold", "left", "right", "value")}
        return {**self.roofline.arrays(), "start": self.start, **trees, "depth": np.array(self.depth)}

    @classmethod
    def from_arrays(cls, arrays: Arrays) -> BoostingCore:
        """What `arrays` gave."""
        trees = {name: arrays[name] for name in ("feature", "threshold", "left", "right", "value")}
        return cls(RooflineCore.from_arrays(arrays), arrays["start"], **trees, depth=int(arrays["depth"]))


@dataclass(frozen=True, slots=True)
class NearestCore:
    """The geometric mean of the measured times of the nearest requests in standardised features.

    Attributes:
        points: (m, F) standardised. log_times: (m, S). neighbours: how many are averaged.
    """

    kind: ClassVar[str] = "nearest"
    centre: Floats
    spread: Floats
    points: Floats
    log_times: Floats
    neighbours: int

    def log_ms(self, table: CostTable, workload: Workload) -> Floats:
        """(n, S, 1)."""
        x = (table.features(workload) - self.centre) / self.spread
        distance = (self.points**2).sum(axis=1) - 2 * x @ self.points.T
        k = min(self.neighbours, len(self.points))
        nearest = np.argpartition(distance, k - 1, axis=1)[:, :k]
        return self.log_times[nearest].mean(axis=1)[..., None]

    def arrays(self) -> Arrays:
        """Scaler and points."""
        names = ("centre", "spread", "points", "log_times")
        return {**{name: getattr(self, name) for name in names}, "neighbours": np.array(self.neighbours)}

    @classmethod
    def from_arrays(cls, arrays: Arrays) -> NearestCore:
        """What `arrays` gave."""
        centre, spread, points, log_times = (arrays[n] for n in ("centre", "spread", "points", "log_times"))
        return cls(centre, spread, points, log_times, int(arrays["neighbours"]))


def core_from_arrays(kind: str, arrays: Arrays) -> Core:
    """The core of a checkpoint.

    Raises:
        KeyError: the kind is unknown, or an array is missing.
    """
    if kind == RooflineCore.kind:
        return RooflineCore.from_arrays(arrays)
    if kind == MlpCore.kind:
        return MlpCore.from_arrays(arrays)
    if kind == BoostingCore.kind:
        return BoostingCore.from_arrays(arrays)
    if kind == NearestCore.kind:
        return NearestCore.from_arrays(arrays)
    raise KeyError(kind)
