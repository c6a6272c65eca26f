"""The small networks in NumPy, for one request at a time.

At batch 1 such a network is about twenty operations on a few hundred numbers. Torch takes several times as
long to dispatch them as NumPy to run them, and that time comes off the budget. Training uses the torch modules;
these
classes copy their weights when a policy is made. Shapes: `W`, `L`, `V` feature widths, `H` hidden width.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence

import numpy as np
from torch import Tensor, nn

from tempovlm.control.encoding import CENTRE, SPREAD, LatencyBudgetEncoder
from tempovlm.control.networks import (
    CLIP,
    Feature,
    Knob1Predictor,
    Knob1PredictorBudget,
    Knob1PredictorBudgetLanguageGlance,
    Knob2Knob3Predictor,
    SupervisedController,
)
from tempovlm.control.observation import Row

Function = Callable[[Row], Row]

ALONE = 1 << 18
"""Largest matrix per call, in elements; from 460,800 on, OpenBLAS uses several threads."""


class HostKnob1:
    """The first stage; each variant reads the inputs that it was trained on."""

    def __init__(self, net: Knob1Predictor) -> None:
        looks: list[Feature] = []
        if not isinstance(net, Knob1PredictorBudget):
            looks.append(net.language)
        if isinstance(net, Knob1PredictorBudgetLanguageGlance):
            looks.append(net.glance)
        self._inputs, self._trunk = Inputs(net.budget, looks), layers(net.trunk)

    def __call__(self, budget_ms: float, *looks: Row) -> Row:
        """Return logits (3,) from a budget and, if the variant uses them, a question (L,) and a picture (V,)."""
        return self._trunk(self._inputs(budget_ms, *looks))


class HostKnob2Knob3:
    """The second stage."""

    def __init__(self, net: Knob2Knob3Predictor) -> None:
        self._inputs, self._trunk = Inputs(net.budget, [net.vision, net.language]), layers(net.trunk)
        self._tier = _array(net.tier.weight) @ _array(net.of_tier.weight).T
        self._first = net.heads[0]

    def __call__(self, vision: Row, language: Row, left_ms: float, tier: int) -> tuple[Row, Row]:
        """Return logits (5,) and (5,) from a picture (V,), a question (L,), the time left and the tier's index."""
        both = self._trunk(self._inputs(left_ms, vision, language) + self._tier[tier])
        return both[: self._first], both[self._first :]


class HostSupervised:
    """Exp 2: the controller that sees only the budget."""

    def __init__(self, net: SupervisedController) -> None:
        self._inputs, self._trunk = Inputs(net.budget, []), layers(net.trunk)
        self._ends = np.cumsum(net.heads)[:-1]

    def __call__(self, budget_ms: float) -> list[Row]:
        """Return logits (3,), (5,) and (5,) from a budget."""
        return np.split(self._trunk(self._inputs(budget_ms)), self._ends)


class Inputs:
    """Sums the last linear layers of the budget and of each feature: (H,).

    It is one product with all weights side by side and the features' scales multiplied in, because the number of
    operations decides the time.
    """

    def __init__(self, budget: LatencyBudgetEncoder, looks: Sequence[Feature]) -> None:
        """Copy the weights of the encoder and of each feature."""
        *hidden, last = budget.mlp
        assert isinstance(last, nn.Linear)
        nothing = np.zeros(0, np.float32)
        scales = [_array(look.standard.scale) for look in looks]
        weights = [_array(look.linear.weight) * scale for look, scale in zip(looks, scales, strict=True)]
        self._waves, self._hidden = waves(budget), layers(hidden)
        self._mean = np.concatenate([nothing, *(_array(look.standard.mean) for look in looks)])
        with np.errstate(divide="ignore"):  # a constant column has no scale and gets weight 0
            self._limit = CLIP / np.concatenate([nothing, *scales])
        self._product = product(np.concatenate([*weights, _array(last.weight)], axis=1))
        self._bias = sum((_array(look.linear.bias) for look in looks), _array(last.bias))

    def __call__(self, budget_ms: float, *looks: Row) -> Row:
        """Return hidden units (H,) from milliseconds and the features (W,)."""
        x = self._hidden(self._waves(budget_ms))
        if looks:
            values = np.concatenate(looks) - self._mean
            x = np.concatenate((np.minimum(np.maximum(values, -self._limit), self._limit), x))
        return self._product(x) + self._bias


def waves(net: LatencyBudgetEncoder) -> Callable[[float], Row]:
    """Return the encoding (2F + 1,) of a budget in milliseconds, as the encoder module does."""
    frequencies, count = _array(net.frequencies), net.num_frequencies
    least, most = net.range_ms.tolist()

    def encode(budget_ms: float) -> Row:
        log = np.float32(math.log(min(max(budget_ms, least), most)))
        phase, row = log * frequencies, np.empty(2 * count + 1, np.float32)
        row[0] = (log - CENTRE) / SPREAD
        np.sin(phase, out=row[1 : count + 1])
        np.cos(phase, out=row[count + 1 :])
        return row

    return encode


def layers(net: Iterable[nn.Module]) -> Function:
    """Return a function that applies linear layers and SiLUs in order.

    Raises:
        TypeError: the module has another layer.
    """
    steps: list[Function] = []
    for layer in net:
        if isinstance(layer, nn.Linear):
            steps.append(_linear(layer))
        elif isinstance(layer, nn.SiLU):
            steps.append(_silu)
        else:
            raise TypeError(f"no arithmetic for {type(layer).__name__}")

    def run(x: Row) -> Row:
        for step in steps:
            x = step(x)
        return x

    return run


def _linear(layer: nn.Linear) -> Function:
    times, bias = product(_array(layer.weight)), _array(layer.bias)
    return lambda x: times(x) + bias


def product(weight: Row) -> Function:
    """Multiply a matrix (M, N) by (N,) in parts small enough for one thread, since waking another takes longer."""
    rows, width = weight.shape
    parts = next(n for n in range(1, rows + 1) if rows % n == 0 and (rows // n * width <= ALONE or n == rows))
    if parts == 1:
        return lambda x: weight @ x
    several = weight.reshape(parts, -1, width)
    return lambda x: (several @ x).reshape(rows)


def _silu(x: Row) -> Row:
    return x / (1 + np.exp(-x))


def _array(values: Tensor) -> Row:
    return values.detach().cpu().float().numpy().copy()
