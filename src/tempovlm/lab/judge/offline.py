"""Policies judged on recorded answers: who would have chosen what, at which budget, on a `Table`.

A rule maps a table and budgets to settings, going by the table's upper times. A setting that a rule must not take
has an infinite one. Rules that look at content find it by the table's question ids, so rows in another order are
other content: that is the shuffled control.

Shapes: `N` questions, `K` settings, `B` budgets, `V` vertices of a hull, `F` features.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from tempovlm.control.policy import Policy, Question, Sight
from tempovlm.control.select import TIE, Ints, Mask, best
from tempovlm.core.errors import UserError
from tempovlm.core.knobs import TIERS
from tempovlm.lab.table import Floats, Table

ScoresOf = Callable[[Table], Floats]
"""Scores (N, K) of a table's questions, in its order."""

Rule = Callable[[Table, Sequence[float]], Ints]
"""A policy to be judged: table and budgets -> indices of settings (N, B)."""


@dataclass(frozen=True, slots=True)
class Static:
    """The same setting always."""

    index: int

    def __call__(self, table: Table, budgets_ms: Sequence[float]) -> Ints:
        """Return the setting (N, B)."""
        return np.full((len(table), len(budgets_ms)), self.index, dtype=np.int64)


@dataclass(frozen=True, slots=True)
class BestStatic:
    """For each budget the one setting that was best on the training questions among those that fit there.

    Attributes:
        accuracy: (K,) training means. fit_ms: (K,) what must fit, such as an upper quantile over the training
            questions.
    """

    accuracy: Floats
    fit_ms: Floats

    def __call__(self, table: Table, budgets_ms: Sequence[float]) -> Ints:
        """(N, B), the same in every row."""
        exists = np.isfinite(table.upper_ms).any(axis=0)
        cost_ms = np.where(exists, self.fit_ms, np.inf)
        chosen = [best(self.accuracy, cost_ms <= b, cost_ms, tie=TIE) for b in budgets_ms]
        return np.tile(np.array(chosen), (len(table), 1))


@dataclass(frozen=True, slots=True)
class Scored:
    """The best-scored setting that fits the question's budget, cheaper on ties; the cheapest where none fits.

    Attributes:
        scores_of: the scores.
        allowed: (K,) settings that it may take at all; None for every one.
        tie: scores that differ by at most this count as equal.
        time_price: score that using the whole budget costs, as in a controller's reward.
        price_per_ms: score that a millisecond costs.
    """

    scores_of: ScoresOf
    allowed: Mask | None = None
    tie: float = TIE
    time_price: float = 0.0
    price_per_ms: float = 0.0

    def __call__(self, table: Table, budgets_ms: Sequence[float]) -> Ints:
        """Return choices (N, B)."""
        scores, allowed = self.scores_of(table), True if self.allowed is None else self.allowed
        cost_ms, prices = table.upper_ms, [self.price_per_ms + self.time_price / b for b in budgets_ms]
        columns = [
            best(scores, allowed & (cost_ms <= b), cost_ms, price, self.tie)
            for b, price in zip(budgets_ms, prices, strict=True)
        ]
        return np.stack(columns, axis=1)


def table_rule(
    accuracy: Floats, time_price: float = 0.0, price_per_ms: float = 0.0, allowed: Mask | None = None
) -> Scored:
    """Choose the setting that is best on average, (K,), among those that fit the question."""
    scores_of: ScoresOf = lambda table: np.broadcast_to(accuracy, (len(table), len(accuracy)))  # noqa: E731
    return Scored(scores_of, allowed, time_price=time_price, price_per_ms=price_per_ms)


def random_rule(seed: int = 0) -> Scored:
    """Draw a setting evenly among those that fit; the same at each call."""
    return Scored(lambda table: np.random.default_rng(seed).random(table.accuracy.shape), tie=0.0)


def pick_rule(truth: Table) -> Scored:
    """Choose for each question what is best on a table that holds every judged question, the cheapest of the best.

    On the judged table itself that is the hindsight oracle: at a budget, no choice among the settings that fit is
    more accurate. It is an upper bound, and a loose one, because it also profits from luck. On the twin table (the
    same scenes with other noise and a small shift) it is the twin pick: it chooses on one set of answers and is
    scored on another, so it profits from no luck. It knows one answer a setting, not the chance of a right one, so
    its expected accuracy is a lower bound of what knowing those chances could reach, and policies may be above it.
    """
    return Scored(lambda table: truth.accuracy[positions(truth, table)], tie=0.0)


def positions(whole: Table, part: Table) -> Ints:
    """(N,) where the rows of `part` stand in `whole`.

    Raises:
        UserError: a question is missing there.
    """
    at = {key: i for i, key in enumerate(whole.questions)}
    found = [at.get(key, -1) for key in part.questions]
    if -1 in found:
        dataset, question = part.questions[found.index(-1)]
        raise UserError(f"question {question} of {dataset} is missing in one of the results directories")
    return np.array(found, dtype=np.int64)


def common(one: Table, other: Table) -> tuple[Table, Table]:
    """The questions that both tables hold, in the same order.

    Raises:
        UserError: there are none.
    """
    known = set(other.questions)
    kept = one.take(np.array([key in known for key in one.questions], dtype=bool))
    if not len(kept):
        raise UserError("--twin_results_dir: no question in common with --results_dir")
    return kept, other.take(positions(other, kept))


@dataclass(frozen=True, slots=True)
class PolicyRule:
    """Asks a policy, question by question, with what the guard would show it.

    Attributes:
        question_of: a row's text, picture size and prompt style.
        sight_of: the encoded picture of a row at a tier.
        time_price: score that using the whole budget costs.
        price_per_ms: score that a millisecond costs.
    """

    policy: Policy
    question_of: Callable[[Table, int], Question]
    sight_of: Callable[[Table, int, str], Sight]
    time_price: float = 0.0
    price_per_ms: float = 0.0

    def __call__(self, table: Table, budgets_ms: Sequence[float]) -> Ints:
        """Return choices (N, B)."""
        chosen = np.zeros((len(table), len(budgets_ms)), dtype=np.int64)
        for i in range(len(table)):
            question = self.question_of(table, i)
            if self.policy.sees_glance:
                seen = self.sight_of(table, i, TIERS[0]).vision
                question = replace(question, glance=None if seen is None else seen[:1])
            for b, budget_ms in enumerate(budgets_ms):
                chosen[i, b] = self._choose(table, i, replace(question, left_ms=budget_ms), budget_ms)
        return chosen

    def _choose(self, table: Table, row: int, question: Question, budget_ms: float) -> int:
        policy, upper_ms = self.policy, table.upper_ms[row]
        fits = upper_ms <= budget_ms
        if np.count_nonzero(fits) < 2:
            return int(best(upper_ms, fits, upper_ms))
        rest = (upper_ms, self.price_per_ms + self.time_price / budget_ms, policy.tie)
        first = int(best(policy.look(question, budget_ms), fits, *rest))
        if not policy.sees_picture:
            return first
        tier = first // table.per_tier
        sight = self.sight_of(table, row, table.space.tiers[tier])
        scores = policy.settle(question, sight, budget_ms - float(table.look_ms[row, tier]))
        return int(best(scores, fits & (np.arange(len(fits)) // table.per_tier == tier), *rest))


def free(rule: Rule) -> Rule:
    """Return the rule for which time within a budget costs nothing; itself if it costs nothing already."""
    if isinstance(rule, Scored | PolicyRule) and (rule.time_price or rule.price_per_ms):
        return replace(rule, time_price=0.0, price_per_ms=0.0)
    return rule


def shuffled(rule: Rule, seed: int) -> Rule:
    """The same rule shown the content of another question, with the latencies of the right one.

    What remains of its gain did not come from the content.
    """

    def choose(table: Table, budgets_ms: Sequence[float]) -> Ints:
        order = np.random.default_rng(seed).permutation(len(table))
        own = replace(table.take(order), upper_ms=table.upper_ms, look_ms=table.look_ms)
        return rule(own, budgets_ms)

    return choose


def restricted(rule: Rule, allowed: Mask) -> Rule:
    """The same rule over fewer settings (K,): the others' latency is infinite."""

    def choose(table: Table, budgets_ms: Sequence[float]) -> Ints:
        return rule(replace(table, upper_ms=np.where(allowed, table.upper_ms, np.inf)), budgets_ms)

    return choose


def upper_hull(cost_ms: Floats, accuracy: Floats) -> Ints:
    """Vertices of the concave, rising frontier of points, from cheap to dear: what random mixing can reach.

    A mixture that takes each setting with a probability has the weighted mean of costs and of accuracies, so
    every point on a line between two settings is a policy.

    Args:
        cost_ms: (n,).
        accuracy: (n,).

    Returns:
        (V,) indices; the first is the cheapest point, the last the most accurate.
    """
    order = np.lexsort((-accuracy, cost_ms))
    hull: list[int] = []
    for i in order:
        if hull and accuracy[i] <= accuracy[hull[-1]]:
            continue
        while len(hull) > 1 and _slope(cost_ms, accuracy, hull[-2], hull[-1]) <= _slope(
            cost_ms, accuracy, hull[-2], int(i)
        ):
            hull.pop()
        hull.append(int(i))
    return np.array(hull, dtype=np.int64)


def _slope(cost_ms: Floats, accuracy: Floats, one: int, other: int) -> float:
    width = float(cost_ms[other] - cost_ms[one])
    return float(accuracy[other] - accuracy[one]) / width if width > 0 else np.inf


@dataclass(frozen=True, slots=True)
class StaticMixture:
    """The best random mixtures of static settings, found on the training questions.

    Attributes:
        settings: (V,) the settings that are worth mixing, from cheap to dear.
        accuracy: (K,) means. latency_ms: (K,) medians.
        fit_ms: (K,) what must fit a budget: means of the latencies that policies go by.
    """

    settings: Ints
    accuracy: Floats
    latency_ms: Floats
    fit_ms: Floats

    @classmethod
    def fit(cls, accuracy: Floats, latency_ms: Floats, fit_ms: Floats | None = None) -> StaticMixture:
        """From means and medians (K,) of the training questions; `fit_ms` is `latency_ms` unless given."""
        return cls(
            upper_hull(latency_ms, accuracy), accuracy, latency_ms, latency_ms if fit_ms is None else fit_ms
        )

    def feasible(self, budget_ms: float) -> Ints:
        """(V,) what is worth mixing where every setting must fit a budget; the cheapest alone where none does."""
        fits = np.flatnonzero(self.fit_ms <= budget_ms)
        if not len(fits):
            return np.array([np.argmin(self.fit_ms)], dtype=np.int64)
        return fits[upper_hull(self.latency_ms[fits], self.accuracy[fits])]


def mixed(cost_ms: Floats, accuracy: Floats, at_ms: Floats) -> Floats:
    """The accuracy that mixing the two neighbouring points reaches at a mean cost, each row by itself.

    Below the cheapest point it is the cheapest's, above the dearest one the dearest's. Nothing is chosen here:
    where a dearer point is worse, as can be in a sample other than that which chose the points, the curve falls.

    Args:
        cost_ms: (R, V) of the points.
        accuracy: (R, V) of the points.
        at_ms: (R, M) where to look.

    Returns:
        (R, M) accuracies.
    """
    order = np.argsort(cost_ms, axis=1, kind="stable")
    x = np.take_along_axis(cost_ms, order, axis=1)
    y = np.take_along_axis(accuracy, order, axis=1)
    result = np.where(at_ms < x[:, :1], y[:, :1], y[:, -1:])
    for j in range(x.shape[1] - 1):
        left, right = x[:, j : j + 1], x[:, j + 1 : j + 2]
        width = right - left
        share = np.where(width > 0, (at_ms - left) / np.where(width > 0, width, 1.0), 1.0)
        here = y[:, j : j + 1] + share * (y[:, j + 1 : j + 2] - y[:, j : j + 1])
        result = np.where((at_ms >= left) & (at_ms < right), here, result)
    return result
