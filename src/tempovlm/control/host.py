"""The small networks' arithmetic in NumPy, for one request at a time.

At batch 1 such a network is some thirty operations on at most a few hundred numbers. Torch takes several times as
long to dispatch them as they take, and that time comes off the budget. Training has the networks themselves; here
are their weights as they are when a policy is made. Shapes: `W`, `L`, `V` widths of features, `H` hidden width.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray
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

Row = NDArray[np.float32]
Function = Callable[[Row], Row]


class HostKnob1:
    """The first stage; each variant reads what it was trained on."""

    def __init__(self, net: Knob1Predictor) -> None:
        self._budget, self._trunk = encoder(net.budget), layers(net.trunk)
        self._language = None if isinstance(net, Knob1PredictorBudget) else feature(net.language)
        self._glance = feature(net.glance) if isinstance(net, Knob1PredictorBudgetLanguageGlance) else None

    def __call__(self, budget_ms: float, language: Row | None, glance: Row | None = None) -> Row:
        """The tiers' logits (3,) of a budget, a question (L,) and a look at the picture (V,)."""
        x = self._budget(budget_ms)
        for look, values in ((self._language, language), (self._glance, glance)):
            if look is not None and values is not None:
                x = x + look(values)
        return self._trunk(x)


class HostKnob2Knob3:
    """The second stage."""

    def __init__(self, net: Knob2Knob3Predictor) -> None:
        self._budget, self._trunk = encoder(net.budget), layers(net.trunk)
        self._language, self._vision = feature(net.language), feature(net.vision)
        self._tier = _array(net.tier.weight) @ _array(net.of_tier.weight).T
        self._first = net.heads[0]

    def __call__(self, vision: Row, language: Row, left_ms: float, tier: int) -> tuple[Row, Row]:
        """Logits (5,) and (5,) of a picture (V,), a question (L,), what is left and the tier's place."""
        x = self._vision(vision) + self._language(language) + self._budget(left_ms) + self._tier[tier]
        both = self._trunk(x)
        return both[: self._first], both[self._first :]


class HostSupervised:
    """Exp 2: the budget alone."""

    def __init__(self, net: SupervisedController) -> None:
        self._budget, self._trunk = encoder(net.budget), layers(net.trunk)
        self._ends = np.cumsum(net.heads)[:-1]

    def __call__(self, budget_ms: float) -> list[Row]:
        """Logits (3,), (5,) and (5,) of a budget."""
        return np.split(self._trunk(self._budget(budget_ms)), self._ends)


def encoder(net: LatencyBudgetEncoder) -> Callable[[float], Row]:
    """A budget in milliseconds to (H,)."""
    frequencies, mlp = _array(net.frequencies), layers(net.mlp)
    least, most = net.range_ms.tolist()

    def encode(budget_ms: float) -> Row:
        log = np.float32(np.log(min(max(budget_ms, least), most)))
        phase = log * frequencies
        return mlp(np.concatenate(([(log - CENTRE) / SPREAD], np.sin(phase), np.cos(phase)), dtype=np.float32))

    return encode


def feature(net: Feature) -> Function:
    """A feature (W,) to (H,)."""
    mean, scale, linear = _array(net.standard.mean), _array(net.standard.scale), _linear(net.linear)
    return lambda values: linear(np.minimum(np.maximum((values - mean) * scale, -CLIP), CLIP))


def layers(net: nn.Sequential) -> Function:
    """Linear layers and SiLUs, one after the other.

    Raises:
        TypeError: there is another layer among them.
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
    weight, bias = _array(layer.weight), _array(layer.bias)
    return lambda x: weight @ x + bias


def _silu(x: Row) -> Row:
    return x / (1 + np.exp(-x))


def _array(values: Tensor) -> Row:
    return values.detach().cpu().float().numpy().copy()
