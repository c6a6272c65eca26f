"""Policies judged on recorded answers: who would have chosen what, at which budget, on a `DecisionTable`.

A rule maps the table, the latencies that it may go by and the budgets to settings. A setting that a rule must not
take has an infinite latency there. Rules that look at content find it by the table's question ids, so rows in
another order are other content: that is the shuffled control. Nothing here measures or runs a model.

Shapes: `N` questions, `K` settings, `B` budgets, `V` vertices of a hull, `F` features.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from tempovlm.control.baselines import ConstantScores, Scorer, choose_best, varying
from tempovlm.control.guard import lower_tier, nearest_below
from tempovlm.control.policies import TIE
from tempovlm.control.policy import Features, Policy, Question, Sight, needs_glance
from tempovlm.core.errors import UserError
from tempovlm.core.knobs import KnobConfig, KnobSpace
from tempovlm.lab.table import DecisionTable

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Mask = NDArray[np.bool_]

FeaturesOf = Callable[[DecisionTable], Floats]
"""(N, F) features of a table's questions, in its order."""


class Rule(Protocol):
    """Chooses a setting for every question at every budget."""

    def __call__(self, table: DecisionTable, latency_ms: Floats, budgets_ms: Sequence[float]) -> Ints:
        """(N, B) indices of settings; latency_ms is (N, K)."""


@dataclass(frozen=True, slots=True)
class Static:
    """The same setting always."""

    index: int

    def __call__(self, table: DecisionTable, latency_ms: Floats, budgets_ms: Sequence[float]) -> Ints:
        """(N, B) the setting."""
        del latency_ms
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

    def __call__(self, table: DecisionTable, latency_ms: Floats, budgets_ms: Sequence[float]) -> Ints:
        """(N, B), the same in every row."""
        exists = np.isfinite(latency_ms).any(axis=0)
        cost_ms = np.where(exists, self.fit_ms, np.inf)
        columns = [choose_best(self.accuracy[None], (cost_ms <= b)[None], cost_ms[None])[0] for b in budgets_ms]
        return np.tile(np.array(columns, dtype=np.int64), (len(table), 1))


@dataclass(frozen=True, slots=True)
class Scored:
    """The best-scored setting that fits the question's budget, cheaper on ties; the cheapest where none fits.

    Attributes:
        features_of: what the scorer looks at; None for one that looks at nothing.
        allowed: (K,) settings that it may take at all; None for every one.
        time_price: what a score loses by using the whole budget, as in a controller's reward.
    """

    scorer: Scorer
    features_of: FeaturesOf | None = None
    allowed: Mask | None = None
    tie: float = TIE
    time_price: float = 0.0

    def __call__(self, table: DecisionTable, latency_ms: Floats, budgets_ms: Sequence[float]) -> Ints:
        """(N, B) choices."""
        features = np.zeros((len(table), 1)) if self.features_of is None else self.features_of(table)
        scores = self.scorer.scores(features)
        open_to = np.isfinite(latency_ms) & (True if self.allowed is None else self.allowed)
        # A setting that is not there takes for ever, and no price is to make a NaN of that.
        cost_ms = np.where(open_to, latency_ms, 0.0)
        columns = [
            choose_best(scores - self.time_price * cost_ms / b, open_to & (latency_ms <= b), latency_ms, self.tie)
            for b in budgets_ms
        ]
        return np.stack(columns, axis=1)


def table_rule(accuracy: Floats, time_price: float = 0.0) -> Scored:
    """The setting that is best on average, (K,), among those that fit the question."""
    return Scored(ConstantScores(accuracy), time_price=time_price)


def single_knob_rule(space: KnobSpace, knobs: Sequence[str], accuracy: Floats, time_price: float = 0.0) -> Scored:
    """The table over the settings where only the named knobs leave their native value."""
    return Scored(ConstantScores(accuracy), allowed=varying(space, knobs), time_price=time_price)


@dataclass(frozen=True, slots=True)
class RandomRule:
    """A setting drawn evenly among those that fit."""

    seed: int = 0

    def __call__(self, table: DecisionTable, latency_ms: Floats, budgets_ms: Sequence[float]) -> Ints:
        """(N, B) choices; the same at each call."""
        del table
        drawn = np.random.default_rng(self.seed).random(latency_ms.shape)
        columns = [choose_best(drawn, latency_ms <= b, latency_ms, 0.0) for b in budgets_ms]
        return np.stack(columns, axis=1)


@dataclass(frozen=True, slots=True)
class Oracle:
    """For each question the setting that is best on a table that it may look at, the cheapest of the best.

    On the judged table itself that is the plain oracle, a bound that no policy can reach, because it also profits
    from luck. On the twin table (the same scenes with other noise and a small shift) it is noise-corrected.

    Attributes:
        truth: holds every question of the judged table.
    """

    truth: DecisionTable

    def __call__(self, table: DecisionTable, latency_ms: Floats, budgets_ms: Sequence[float]) -> Ints:
        """(N, B) choices."""
        accuracy = self.truth.accuracy[positions(self.truth, table)]
        columns = [choose_best(accuracy, latency_ms <= b, latency_ms, 0.0) for b in budgets_ms]
        return np.stack(columns, axis=1)


def keys(table: DecisionTable) -> list[tuple[str, str]]:
    """Data set and question id of each row."""
    return list(zip(table.dataset.tolist(), table.question_id.tolist(), strict=True))


def positions(whole: DecisionTable, part: DecisionTable) -> Ints:
    """(N,) where the rows of `part` stand in `whole`.

    Raises:
        UserError: a question is missing there.
    """
    at = {key: i for i, key in enumerate(keys(whole))}
    found = [at.get(key, -1) for key in keys(part)]
    if -1 in found:
        dataset, question = keys(part)[found.index(-1)]
        raise UserError(f"question {question} of {dataset} is missing in one of the results directories")
    return np.array(found, dtype=np.int64)


def common(one: DecisionTable, other: DecisionTable) -> tuple[DecisionTable, DecisionTable]:
    """The questions that both tables hold, in the same order.

    Raises:
        UserError: there are none.
    """
    known = set(keys(other))
    kept = one.take(np.array([key in known for key in keys(one)], dtype=bool))
    if not len(kept):
        raise UserError("--twin_results_dir: no question in common with --results_dir")
    return kept, other.take(positions(other, kept))


@dataclass(frozen=True, slots=True)
class PolicyRule:
    """Asks a policy of the engine, question by question, with what the guard would show it.

    Attributes:
        space: the settings. question_of: a row's text and picture size.
        sight_of: the encoded picture of a row at a tier, for policies that look at it.
        looking_ms: (N, T) of the table given, what has passed when the picture is encoded; None for a policy that
            does not mind, which is then told the whole budget twice.
    """

    policy: Policy
    space: KnobSpace
    question_of: Callable[[DecisionTable, int], tuple[str, tuple[int, int] | None]]
    sight_of: Callable[[DecisionTable, int, str], Sight]
    looking_ms: Callable[[DecisionTable], Floats] | None = None

    def __call__(self, table: DecisionTable, latency_ms: Floats, budgets_ms: Sequence[float]) -> Ints:
        """(N, B) choices, corrected towards the cheaper side as the guard does."""
        looking_ms = None if self.looking_ms is None else self.looking_ms(table)
        rows = []
        for i in range(len(table)):
            passed_ms = None if looking_ms is None else looking_ms[i]
            rows.append([self._choose(table, i, latency_ms[i], budget_ms, passed_ms) for budget_ms in budgets_ms])
        return np.array(rows, dtype=np.int64).reshape(len(table), len(budgets_ms))

    def _choose(
        self, table: DecisionTable, row: int, latency_ms: Floats, budget_ms: float, looking_ms: Floats | None
    ) -> int:
        fits = np.flatnonzero(latency_ms <= budget_ms)
        if len(fits) < 2:
            return int(fits[0]) if len(fits) else int(np.argmin(latency_ms))
        choices = tuple(self.space.settings[k] for k in fits)
        text, size = self.question_of(table, row)
        seen = self.sight_of(table, row, self.space.tiers[0]).vision if needs_glance(self.policy) else None
        question = Question(
            text=text,
            choices=choices,
            image_size=size,
            budget_ms=budget_ms,
            glance=None if seen is None else seen[:1],
        )
        tier = lower_tier(self.space, self.policy.choose_tier(question, budget_ms), choices)
        same = tuple(knobs for knobs in choices if knobs.tier == tier)
        passed_ms = 0.0 if looking_ms is None else float(looking_ms[self.space.tiers.index(tier)])
        features = Features(question=question, choices=same, sight=self.sight_of(table, row, tier))
        top_k, num_blocks = self.policy.choose_compute(features, tier, budget_ms - passed_ms)
        wanted = KnobConfig(tier=tier, top_k=top_k, num_blocks=num_blocks)
        return self.space.index(wanted if wanted in same else nearest_below(wanted, same))


def shuffled(rule: Rule, seed: int) -> Rule:
    """The same rule shown the content of another question, with the latencies of the right one.

    What remains of its gain did not come from the content.
    """

    def choose(table: DecisionTable, latency_ms: Floats, budgets_ms: Sequence[float]) -> Ints:
        order = np.random.default_rng(seed).permutation(len(table))
        return rule(table.take(order), latency_ms, budgets_ms)

    return choose


def restricted(rule: Rule, allowed: Mask) -> Rule:
    """The same rule over fewer settings (K,): the others' latency is infinite."""

    def choose(table: DecisionTable, latency_ms: Floats, budgets_ms: Sequence[float]) -> Ints:
        return rule(table, np.where(allowed, latency_ms, np.inf), budgets_ms)

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
        accuracy: (R, V) likewise.
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
