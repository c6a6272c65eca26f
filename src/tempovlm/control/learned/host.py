"""The small networks in NumPy, for one request at a time.

At batch 1 such a network is about twenty operations on a few hundred numbers. Torch takes several times as
long to dispatch them as NumPy to run them, and that time comes off the budget. Training uses the torch modules;
these
classes copy their weights when a policy is made. Shapes: `W`, `L`, `V` feature widths, `H` hidden width.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from torch import Tensor, nn

from tempovlm.control.learned.encoding import CENTRE, SPREAD, LatencyBudgetEncoder
from tempovlm.control.learned.networks import CLIP, Feature
from tempovlm.control.learned.observation import Row

Function = Callable[[Row], Row]

ALONE = 1 << 18
"""Largest matrix per call, in elements; from 460,800 on, OpenBLAS uses several threads."""

_HALF_OF_ONE = 0.6392322713805369
"""Half of where silu is 1: what a constant unit has before it."""


class HostNetwork:
    """A network of features, and of a budget if it has one: what each feature adds, and logits from their sum.

    Attributes:
        inputs: by the name that the network has for a feature, what it adds.
    """

    def __init__(self, net: nn.Module) -> None:
        """Take the weights as they are.

        Raises:
            TypeError: the network is not an encoder's two layers, features and a trunk of two layers, with SiLUs.
        """
        trunk = net.get_submodule("trunk")
        assert isinstance(trunk, nn.Sequential)
        _, middle, _, heads = _checked(trunk, nn.SiLU, nn.Linear, nn.SiLU, nn.Linear)
        looks = {name: look for name, look in net.named_children() if isinstance(look, Feature)}
        self.inputs = {name: Input(look) for name, look in looks.items()}
        bias = np.zeros((_linear(middle).shape[1] - 1, 1), np.float32)
        for look in looks.values():
            bias[:, 0] += _array(look.linear.bias)
        self._budget = _of_budget(dict(net.named_children()).get("budget"), bias)
        self._middle, self._heads = _hidden(_linear(middle)), _linear(heads)

    def __call__(self, budget_ms: float, seen: Row | float = 0.0) -> Row:
        """Return logits from milliseconds and the sum (H + 1,) of what the features add, 0 without any."""
        x = self._budget(budget_ms)
        x += seen
        return self._heads.dot(_silu(self._middle.dot(_silu(x))))


def _of_budget(budget: nn.Module | None, bias: Row) -> Callable[[float], Row]:
    """A budget in milliseconds to new (H + 1,) units, with a bias (H, 1); that alone where there is no encoder."""
    if not isinstance(budget, LatencyBudgetEncoder):
        alone = _hidden(bias)[:, 0]
        return lambda _: alone.copy()
    first, _, last = _checked(budget.mlp, nn.Linear, nn.SiLU, nn.Linear)
    of_log, of_sum, encode = _linear(first), _linear(last), waves(budget)
    of_log[:, -1] -= of_log[:, 0] * (CENTRE / SPREAD)
    of_log[:, 0] /= SPREAD
    of_sum[:, -1:] += bias
    to_hidden, to_sum = _hidden(of_log), _hidden(of_sum)
    return lambda budget_ms: to_sum.dot(_silu(to_hidden.dot(encode(budget_ms))))


class Input:
    """A feature (W,), standardised and through its linear layer, as (H + 1,) that `HostNetwork` adds."""

    def __init__(self, look: Feature) -> None:
        """Take the weights as they are."""
        scale = _array(look.standard.scale)
        with np.errstate(divide="ignore"):  # a constant column has no scale, and so no weight
            self._most = CLIP / scale
        self._least, self._mean = -self._most, _array(look.standard.mean)
        self._product = product(added(_array(look.linear.weight) * scale))

    def __call__(self, values: Row) -> Row:
        """Without the bias, which the network adds."""
        x = values - self._mean
        np.minimum(x, self._most, out=x)
        return self._product(np.maximum(x, self._least, out=x))


def added(weight: Row) -> Row:
    """Units (H, N) as `HostNetwork` adds them: halved, and nothing for the constant one (H + 1, N)."""
    return np.concatenate((weight / 2, np.zeros_like(weight[:1])))


def waves(net: LatencyBudgetEncoder) -> Callable[[float], Row]:
    """A budget in milliseconds to (2F + 2,): its logarithm, the encoder's own sines and cosines, and 1."""
    own, (least, most) = _array(net.frequencies), net.range_ms.tolist()
    end = len(own) + 1
    phases = np.concatenate(([0], own, own, [0])).astype(np.float32)

    def encode(budget_ms: float) -> Row:
        log = math.log(min(max(budget_ms, least), most))
        row = phases * log
        sines, cosines = row[:end], row[end:]
        np.sin(sines, sines)
        np.cos(cosines, cosines)  # that of the last phase, 0, is 1
        row[0] = log
        return row

    return encode


def product(weight: Row) -> Function:
    """A matrix (M, N) times (N,), in parts small enough for one thread: to wake another takes longer."""
    step = max(ALONE // weight.shape[1], 1)
    if len(weight) <= step:
        return weight.dot
    parts = [weight[start : start + step] for start in range(0, len(weight), step)]
    return lambda x: np.concatenate([part.dot(x) for part in parts])


def _checked(net: nn.Sequential, *kinds: type[nn.Module]) -> list[nn.Module]:
    """The layers, which are of these kinds."""
    if [type(layer) for layer in net] != list(kinds):
        raise TypeError(f"no arithmetic for {net}")
    return list(net)


def _linear(layer: nn.Module) -> Row:
    """A linear layer (M, N) with its bias as the last column (M, N + 1)."""
    assert isinstance(layer, nn.Linear)
    return np.concatenate((_array(layer.weight), _array(layer.bias)[:, None]), axis=1)


def _hidden(layer: Row) -> Row:
    """A layer (H, N + 1) before a SiLU: halved, with the constant unit (H + 1, N + 1)."""
    constant = np.zeros_like(layer[:1])
    constant[0, -1] = _HALF_OF_ONE
    return np.concatenate((layer / 2, constant))


def _silu(half: Row) -> Row:
    """Silu of twice the values, in place of none of them."""
    x: Row = np.tanh(half)
    x *= half
    x += half
    return x


def _array(values: Tensor) -> Row:
    return values.detach().cpu().float().numpy().copy()
