"""The price of lane time: what a millisecond spent on one request costs those who wait for the lane.

Requests with deadlines d1, ..., dn in the order of their service share a lane that is free at t. If request j
spends cj on it and a(c) is the expected accuracy of lane time c, concave, then

    maximise  a(c1) + ... + a(cn)   subject to   c1 + ... + ci <= di - t   for all i

has Lagrange multipliers mu_i >= 0 of the n constraints, and request j maximises a(c) - lambda_j c at the price
lambda_j = mu_j + ... + mu_n. The solution gives the first one c1 = min over i of (di - t) / i, so that its price
is the slope a'(c1): the price is derived from the deadlines, not fitted. docs/design.md has the derivation.

Shapes: `K` settings, `V` vertices of an envelope.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from tempovlm.control.select import Floats
from tempovlm.core.checks import finite, wrong_argument
from tempovlm.core.request import MOST_PRICE_PER_MS

DERIVED = "derived"
"""Names the price that follows from the deadlines of those who wait."""

ROUNDING = 1e-9
"""A price that exceeds a slope by this share is the same."""


@dataclass(frozen=True, eq=False)
class Envelope:
    """The least concave curve through the origin that no setting lies above: accuracy over lane time.

    Lane time 0 is no answer. Between two vertices it is what a mixture of the two gains.

    Attributes:
        lane_ms: (V,) lane times of the vertices, ascending, 0 first.
        accuracy: (V,) their accuracies as shares of 1, ascending, 0 first.
    """

    lane_ms: Floats
    accuracy: Floats

    @classmethod
    def of(cls, accuracy: Sequence[float] | Floats, lane_ms: Sequence[float] | Floats) -> Envelope:
        """Return the envelope of settings with `accuracy` (K,) and `lane_ms` (K,).

        Infinite times stand for settings that cannot run, and accuracies of 0 or less gain nothing.
        """
        gains, times_ms = np.asarray(accuracy, np.float64), np.asarray(lane_ms, np.float64)
        useful = np.isfinite(times_ms) & (gains > 0)
        order = np.lexsort((-gains[useful], times_ms[useful]))
        vertices = [(0.0, 0.0)]
        for time_ms, gain in zip(times_ms[useful][order].tolist(), gains[useful][order].tolist(), strict=True):
            if gain <= vertices[-1][1]:
                continue
            while len(vertices) > 1 and _turns_up(vertices[-2], vertices[-1], (time_ms, gain)):
                vertices.pop()
            vertices.append((time_ms, gain))
        return cls(*np.array(vertices).T)

    @cached_property
    def slopes(self) -> Floats:
        """(V - 1,) accuracy per ms between neighbouring vertices, descending."""
        with np.errstate(divide="ignore"):
            found: Floats = (self.accuracy[1:] - self.accuracy[:-1]) / (self.lane_ms[1:] - self.lane_ms[:-1])
        return found

    @property
    def steepest(self) -> float:
        """The slope at 0, which is the most accuracy per ms of any setting; 0 without settings."""
        return float(self.slopes[0]) if len(self.slopes) else 0.0

    def stretched(self, factor: float) -> Envelope:
        """Return the envelope of settings that take this factor longer."""
        return Envelope(self.lane_ms * factor, self.accuracy)

    def slope(self, share_ms: float) -> float:
        """Return the slope to the right of a lane time, in accuracy per ms; 0 from the last vertex on."""
        place = int(np.searchsorted(self.lane_ms, max(share_ms, 0.0), side="right")) - 1
        return float(self.slopes[place]) if place < len(self.slopes) else 0.0

    def mean_slope(self, shares_ms: Floats) -> float:
        """Return the mean of `slope` at some lane times (S,)."""
        places = np.searchsorted(self.lane_ms, np.maximum(shares_ms, 0.0), side="right") - 1
        return float(np.append(self.slopes, 0.0)[places].mean())

    def at(self, share_ms: float) -> float:
        """Return the accuracy at a lane time."""
        return float(np.interp(share_ms, self.lane_ms, self.accuracy))

    def is_worth(self, price_per_ms: float) -> bool:
        """Whether some setting gains as much as its lane time costs."""
        return price_per_ms <= self.steepest * (1 + ROUNDING)

    def worth(self, price_per_ms: float) -> float:
        """Return the most that accuracy exceeds the price of its lane time by; 0 where no answer is worth more."""
        return float((self.accuracy - price_per_ms * self.lane_ms).max())


def _turns_up(before: tuple[float, float], middle: tuple[float, float], after: tuple[float, float]) -> bool:
    """Whether the middle one of three points lies on or under the line of the two others."""
    (x0, y0), (x1, y1), (x2, y2) = before, middle, after
    return (y1 - y0) * (x2 - x0) <= (y2 - y0) * (x1 - x0)


def derived_price(envelope: Envelope, share_ms: float | Floats) -> float:
    """Return the price of lane time, in accuracy per ms, at which a request spends its share of it.

    Args:
        envelope: of those who share the lane, taken to be alike.
        share_ms: `shares.common_share_ms`; infinite if nobody waits, for whom time is free. Where it depends on
            who may come, (S,) the shares of equally likely scenarios, and the price is the mean of theirs.
    """
    if isinstance(share_ms, np.ndarray):
        return envelope.mean_slope(share_ms)
    return 0.0 if share_ms == np.inf else envelope.slope(share_ms)


@dataclass(frozen=True, slots=True)
class Price:
    """The price of lane time on a server.

    Attributes:
        is_derived: whether it follows from the deadlines of those who wait.
        per_ms: in accuracy per ms, otherwise.
    """

    is_derived: bool = True
    per_ms: float = 0.0

    def of(self, envelope: Envelope, share_ms: float | Floats) -> float:
        """Return the price for a request that shares a lane: as `derived_price`, or the number."""
        return derived_price(envelope, share_ms) if self.is_derived else self.per_ms

    def __str__(self) -> str:
        return DERIVED if self.is_derived else f"{self.per_ms:g}"


@dataclass(frozen=True, slots=True)
class LanePrice:
    """The price of a lane's time for one request.

    Attributes:
        price: the server's. share_ms: the request's share of the time, infinite if nobody waits; (S,) in each of
            several scenarios.
        weight: how much its accuracy counts beside that of others.
    """

    price: Price = Price(is_derived=False)
    share_ms: float | Floats = np.inf
    weight: float = 1.0

    def per_ms(self, usual: Envelope, slower: float = 1.0) -> float:
        """Return the price in the request's own accuracy per ms.

        Args:
            usual: the envelope of those who share, by expected times.
            slower: the factor by which times are longer than these at the moment.
        """
        return self.price.of(usual, self.share_ms / slower) / self.weight


FREE = LanePrice()
"""Of a lane that nobody waits for."""


def parse_price(text: object) -> Price:
    """Return the price that `derived`, 0 or a number of accuracy per ms names.

    Raises:
        UserError: it is none of these.
    """
    if text == DERIVED:
        return Price()
    try:
        number = finite(float(text) if isinstance(text, str) else text)
    except ValueError:
        number = None
    if number is None or not 0 <= number <= MOST_PRICE_PER_MS:
        limit = f"accuracy per ms up to {MOST_PRICE_PER_MS:g}"
        raise wrong_argument("price", text, f"must be {DERIVED}, 0, or {limit}, such as 0.0005")
    return Price(is_derived=False, per_ms=float(number))
