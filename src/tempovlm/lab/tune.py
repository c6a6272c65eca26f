"""Measures how accurate the settings are on your own questions, by successive halving over all of them.

Every setting answers the first 12 questions; those that are worth running answer 25, 50, 100 and so on to all.
A setting is worth what the frontier (at every budget the most accurate setting that fits) loses without it, on
average over draws of the accuracies: a Bayesian bootstrap of whole questions, the same draws for all settings, so
that they are compared on the same questions. Two things stand in for the questions that were not asked yet:

- each question's accuracies are drawn half-way to an additive fit of tier, top-k and depth, so that settings learn
  from their neighbours;
- `PRIOR` imagined questions, each answered right from some tier, top-k and depth on, so that a dozen questions
  which all settings answer alike do not rule out the dearer ones.

One after the other, the setting that is worth least is ruled out, until as few are left as a round may keep and
each of them is worth `TOLERANCE`. The cheapest always stays. A setting that was ruled out, but that its estimate
puts on the frontier at the end, answers the questions that it lacks. It is successive halving (Z. Karnin, T. Koren
and O. Somekh, Almost optimal exploration in multi-armed bandits, ICML 2013) for a frontier in place of one arm.

Shapes: `N` questions, `K` settings of the knob space, `A` that are left, `R` draws, `P` imagined questions.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tempovlm.control.select import TIE, Floats, Ints, Mask
from tempovlm.core.knobs import KNOBS, KnobConfig, KnobSpace
from tempovlm.core.progress import Advance, silent
from tempovlm.core.records import SweepRow
from tempovlm.engine.engine import Engine
from tempovlm.lab.core_exp.failures import AGAIN, tell_failures
from tempovlm.lab.core_exp.ledger import Ledger
from tempovlm.lab.core_exp.plan import Job, row_key
from tempovlm.lab.core_exp.sweep import Todo, run_accuracy
from tempovlm.lab.statistics import Z_95, clustered_mean, wilson_interval

Ask = Callable[[range, Ints], Floats]

FIRST_ROUNDS = (12, 25, 50, 100)
"""Questions after which settings are ruled out; later rounds double."""

MOST_KEPT = (45, 30, 20)
"""Settings that may stay after each of the first rounds, and after all later ones."""

TOLERANCE = 0.0003
"""Expected loss of accuracy, a share of 1 on average over log-budgets, that a setting must prevent to stay."""

PRIOR = 10.0
"""Weight of the imagined questions, in questions."""

DRAWS = 40

BATCH = 16
"""Questions answered together; also what is lost when the run is killed, times the settings of a tier."""

_IMAGINED = 40
_SMOOTHING = 0.5
_RIDGE = 0.1
_NO_COST = 1e-9
_LAST_BUDGETS = 0.05
"""Weight, in log-milliseconds, of the budgets that everything fits."""


def rounds(count: int) -> list[int]:
    """The numbers of questions after which settings are ruled out, and at last all questions."""
    sizes = list(FIRST_ROUNDS)
    while sizes[-1] < count:
        sizes.append(2 * sizes[-1])
    return [*(size for size in sizes if size < count), count]


def most_kept(number: int) -> int:
    """Return the number of settings that may stay after a round, counted from 0."""
    return MOST_KEPT[min(number, len(MOST_KEPT) - 1)]


def worth_running(
    accuracy: Floats, left: Ints, space: KnobSpace, costs_ms: Floats, most: int, rng: np.random.Generator
) -> Ints:
    """Select the settings that go on.

    Args:
        accuracy: (N, A) of the settings that are left, on the questions so far.
        left: (A,) their indices in the space, ascending.
        space: all settings.
        costs_ms: (K,) median latencies.
        most: that may stay.
        rng: of the draws.

    Returns:
        Indices in the space, ascending, with the cheapest of `left`.
    """
    order = left[np.argsort(costs_ms[left], kind="stable")]
    drawn = _drawn_accuracies(accuracy, left, space, rng)[:, np.argsort(costs_ms[left], kind="stable")]
    logs = np.log(np.maximum(costs_ms[order], _NO_COST))
    weights = np.append(np.diff(logs), _LAST_BUDGETS)
    weights, best = weights / weights.sum(), np.maximum.accumulate(drawn, axis=1)
    kept = np.arange(len(order))
    while len(kept) > 1:
        losses = [_loss(drawn, best, weights, np.delete(kept, i)) for i in range(1, len(kept))]
        least = int(np.argmin(losses))
        if len(kept) <= most and losses[least] > TOLERANCE:
            break
        kept = np.delete(kept, least + 1)
    return np.sort(order[kept])


def _loss(drawn: Floats, best: Floats, weights: Floats, kept: Ints) -> float:
    """Return the frontier's average loss if only some settings are left.

    `drawn` (R, A) in order of cost, `best` (R, A) the most accurate up to each cost, `weights` (A,) of the budgets
    from each cost to the next.
    """
    some = np.zeros_like(drawn)
    some[:, kept] = drawn[:, kept]
    return float(((best - np.maximum.accumulate(some, axis=1)) @ weights).mean())


def _drawn_accuracies(accuracy: Floats, left: Ints, space: KnobSpace, rng: np.random.Generator) -> Floats:
    """(R, A) draws of what the accuracies may be.

    Source: D. B. Rubin, The Bayesian bootstrap, Annals of Statistics 9 (1981): exponential weights of questions.
    """
    steps = _steps(space)[left]
    ridge = _RIDGE * np.eye(steps.shape[1])
    ridge[0, 0] = _NO_COST
    smooth = steps @ np.linalg.solve(steps.T @ steps + ridge, steps.T)
    known = (1 - _SMOOTHING) * accuracy + _SMOOTHING * accuracy @ smooth.T
    asked = rng.exponential(size=(DRAWS, len(known)))
    imagined = rng.exponential(size=(DRAWS, _IMAGINED)) * PRIOR / _IMAGINED
    drawn: Floats = asked @ known + imagined @ _imagined_questions(space, rng)[:, left]
    return drawn / (asked.sum(axis=1) + imagined.sum(axis=1))[:, None]


def _places(space: KnobSpace) -> NDArray[np.int64]:
    """(K, 3) the place of each setting's value of each knob."""
    values = (space.tiers, space.top_ks, space.block_counts)
    sizes = [len(one) for one in values]
    return np.stack(np.unravel_index(np.arange(len(space)), sizes), axis=1)


def _steps(space: KnobSpace) -> Floats:
    """(K, F) a one, and for each knob whether its value is at least the second, the third and so on."""
    places = _places(space)
    columns = [places[:, i] >= step for i in range(3) for step in range(1, places[:, i].max() + 1)]
    return np.stack([np.ones(len(space), dtype=bool), *columns], axis=1).astype(float)


def _imagined_questions(space: KnobSpace, rng: np.random.Generator) -> Floats:
    """(P, K) accuracies on imagined questions, each answered right from some value of each knob on.

    From top-k no more than the trained number is asked: above it accuracy need not rise.
    """
    places = _places(space)
    most = [len(space.tiers), space.top_ks.index(space.native_top_k) + 1, len(space.block_counts)]
    needed = np.stack([rng.integers(0, size, _IMAGINED) for size in most], axis=1)
    return (places[None] >= needed[:, None]).all(axis=2).astype(float)


def estimates(accuracy: Floats, kept: Ints, space: KnobSpace) -> Floats:
    """(K,) expected accuracies of all settings, of which only some answered all questions.

    That of a setting that did is its mean. That of another is shrunk: by the share of questions that it did not
    answer, towards an additive fit of tier, top-k and depth to all answers; its own part is its distance from the
    kept settings on the questions that it did answer, because those may be easier than the rest.

    Args:
        accuracy: (N, K) NaN where a setting did not answer.
        kept: indices of those that answered everything.
        space: all settings.
    """
    means = accuracy[:, kept].mean(axis=0)
    known = ~np.isnan(accuracy)
    contrasts = accuracy - accuracy[:, kept].mean(axis=1, keepdims=True)
    own = np.nanmean(np.where(known, contrasts, np.nan), axis=0) + means.mean()
    fit = _additive_fit(contrasts, known, space)
    fit += (means - fit[kept]).mean()
    share = known.mean(axis=0)
    shrunk: Floats = np.clip(share * own + (1 - share) * fit, 0.0, 1.0)
    shrunk[kept] = means
    return shrunk


def _additive_fit(contrasts: Floats, known: Mask, space: KnobSpace) -> Floats:
    """(K,) least squares of known contrasts (N, K) on tier, top-k and depth, with an effect of each question."""
    steps = _steps(space)[:, 1:]
    left = _RIDGE * len(contrasts) * np.eye(steps.shape[1])
    right = np.zeros(steps.shape[1])
    for pattern in np.unique(known, axis=0):
        some = contrasts[(known == pattern).all(axis=1)][:, pattern]
        own = steps[pattern] - steps[pattern].mean(axis=0)
        left += len(some) * own.T @ own
        right += own.T @ (some - some.mean(axis=1, keepdims=True)).sum(axis=0)
    fit: Floats = steps @ np.linalg.solve(left, right)
    return fit


def interval(values: NDArray[np.float64], images: NDArray[Any], estimate: float) -> tuple[float, float]:
    """The 95 % interval of an accuracy: Wilson's, of as many questions as the pictures' clusters are worth.

    Args:
        values: (n,) accuracies on the questions that were answered.
        images: (n,) the picture of each.
        estimate: about which the interval lies.
    """
    mean, error = clustered_mean(values, images)
    pictures = len(np.unique(images.astype(str)))
    trials = float(pictures)
    if mean is not None and error and 0 < mean < 1:
        # The error has Bessel's correction: without it, questions about as many pictures are worth one less.
        trials = min(max(mean * (1 - mean) / error**2 * pictures / (pictures - 1), 1.0), float(len(values)))
    low, high = wilson_interval(estimate * trials, trials, Z_95)
    return min(low, estimate), max(high, estimate)


def frontier(accuracy: Floats, costs_ms: Floats) -> list[int]:
    """The settings that are more accurate, by more than `TIE`, than all that are no slower, by cost."""
    found: list[int] = []
    for index in np.lexsort((-accuracy, costs_ms)).tolist():
        if not found or accuracy[index] > accuracy[found[-1]] + TIE:
            found.append(index)
    return found


@dataclass(frozen=True, slots=True)
class Tuned:
    """The result.

    Attributes:
        accuracy: (K,) expected accuracies.
        intervals: of each setting. asked: (K,) questions that each setting answered.
        kept: indices of the settings that answered all. frontier: of those that are worth running, by cost.
    """

    accuracy: Floats
    intervals: list[tuple[float, float]]
    asked: Ints
    kept: Ints
    frontier: list[int]
    num_questions: int

    def rows(self, space: KnobSpace) -> list[dict[str, Any]]:
        """An object for each setting, for the file of accuracies."""
        kept, best = set(self.kept.tolist()), set(self.frontier)
        return [
            {
                **{name: getattr(knobs, name) for name in KNOBS},
                "accuracy": round(float(self.accuracy[i]), 6),
                "interval": [round(end, 4) for end in self.intervals[i]],
                "num_questions": int(self.asked[i]),
                "ruled_out": i not in kept,
                "frontier": i in best,
            }
            for i, knobs in enumerate(space)
        ]


def summarise(
    accuracy: NDArray[np.float64], images: NDArray[Any], kept: Ints, space: KnobSpace, costs_ms: Floats
) -> Tuned:
    """Estimate all settings from (N, K) accuracies, NaN where a setting did not answer, of `images` (N,)."""
    found, known = estimates(accuracy, kept, space), ~np.isnan(accuracy)
    intervals = [
        interval(accuracy[known[:, i], i], images[known[:, i]], float(found[i])) for i in range(len(space))
    ]
    best = frontier(found, costs_ms)
    return Tuned(found, intervals, known.sum(axis=0), kept, best, len(accuracy))


def race(
    ask: Ask, count: int, space: KnobSpace, costs_ms: Floats, seed: int = 0
) -> tuple[NDArray[np.float64], Ints]:
    """Ask in rounds and rule out between them.

    Args:
        ask: answers the questions of a range at settings (A,) and returns the accuracies (n, A), NaN for failures.
        count: questions in all.
        space: all settings.
        costs_ms: (K,) median latencies.
        seed: of the draws.

    Returns:
        (N, K) accuracies, NaN where a setting was not asked, and the indices of the settings that were asked all.
    """
    rng, left = np.random.default_rng(seed), np.arange(len(space))
    accuracy, asked = np.full((count, len(space)), np.nan), np.zeros(len(space), dtype=np.int64)
    for number, size in enumerate(rounds(count)):
        start = int(asked[left[0]])
        accuracy[start:size, left] = ask(range(start, size), left)
        asked[left] = size
        whole = _whole(accuracy[:size][:, left])
        if size < count and len(whole):
            left = worth_running(whole, left, space, costs_ms, most_kept(number), rng)
    while True:
        kept = np.flatnonzero(asked == count)
        whole = accuracy[~np.isnan(accuracy[:, kept]).any(axis=1)]
        best = frontier(estimates(whole, kept, space), costs_ms) if len(whole) else []
        lacking = np.array([index for index in best if asked[index] < count], dtype=np.int64)
        if not len(lacking):
            return accuracy, kept
        for start in np.unique(asked[lacking]).tolist():
            some = lacking[asked[lacking] == start]
            accuracy[start:, some] = ask(range(start, count), some)
            asked[some] = count


def _whole(accuracy: Floats) -> Floats:
    """The questions that did not fail at any setting."""
    return accuracy[~np.isnan(accuracy).any(axis=1)]


def tune(
    engine: Engine, dataset: str, jobs: Sequence[Job], ledger: Ledger, costs_ms: Floats, advance: Advance
) -> Tuned:
    """Tune on questions in a random order, and go on where an earlier run of the same ledger was interrupted.

    Questions that fail at any setting count for none; how many is told on stderr.

    Args:
        engine: of the model.
        dataset: name of the questions.
        jobs: the questions, shuffled.
        ledger: opened, keeps the answers.
        costs_ms: (K,) median latencies.
        advance: takes milliseconds of work done and in all, if no further setting is ruled out.

    Raises:
        AllFailedError: no question was answered at all settings.
    """
    space, asked = engine.space, _Asking(engine, dataset, jobs, ledger, costs_ms, advance)
    accuracy, kept = race(asked.accuracy_of, len(jobs), space, costs_ms)
    failed = np.isnan(accuracy[:, kept]).any(axis=1)
    tell_failures(asked.errors(), len(jobs), "questions", AGAIN)
    images = np.array([str(job.sample.image_id) for job in jobs])
    return summarise(accuracy[~failed], images[~failed], kept, space, costs_ms)


@dataclass(slots=True)
class _Asking:
    """Answers questions in batches and keeps the rows.

    Attributes:
        done_ms: work so far, in milliseconds of single answers.
    """

    engine: Engine
    dataset: str
    jobs: Sequence[Job]
    ledger: Ledger
    costs_ms: Floats
    advance: Advance
    done_ms: float = 0.0

    def accuracy_of(self, questions: range, left: Ints) -> Floats:
        """(n, A) accuracies of settings on some questions."""
        space = self.engine.space
        settings, some = [space.settings[i] for i in left], [self.jobs[i] for i in questions]
        cost_ms = float(self.costs_ms[left].sum())
        total_ms = self.done_ms + cost_ms * (len(self.jobs) - questions.start)
        for batch in _batches(some):
            run_accuracy(self.engine, list(self._todo(batch, settings)), self.ledger, silent)
            self.done_ms += cost_ms * len(batch)
            self.advance(round(self.done_ms), round(total_ms))
        rows = self._rows()
        found = [[_accuracy(rows.get(row_key(job, knobs))) for knobs in settings] for job in some]
        return np.array(found, dtype=float).reshape(len(some), len(settings))

    def _todo(self, batch: Sequence[Job], settings: Sequence[KnobConfig]) -> Iterator[Todo]:
        """The batch at the settings of each tier, without the questions that have an answer at all of them."""
        tiers: dict[str, list[KnobConfig]] = defaultdict(list)
        for knobs in settings:
            tiers[knobs.tier].append(knobs)
        for some in tiers.values():
            open_: dict[tuple[KnobConfig, ...], list[Job]] = defaultdict(list)
            for job in batch:
                keys = {row_key(job, knobs): knobs for knobs in some}
                lacking = self.ledger.unanswered(self.dataset, keys)
                open_[tuple(keys[key] for key in lacking)].append(job)
            yield from ((self.dataset, lacking, jobs) for lacking, jobs in open_.items() if lacking)

    def errors(self) -> list[str]:
        """A line for each question that failed at some setting."""
        first: dict[str, SweepRow] = {}
        for row in self._rows().values():
            if row.error:
                first.setdefault(row.question_id, row)
        own = {str(job.sample.question_id) for job in self.jobs}
        return [f"question {name} at {row.knobs}: {row.error}" for name, row in first.items() if name in own]

    def _rows(self) -> Mapping[Any, SweepRow]:
        return self.ledger.rows.get(self.dataset, {})


def _batches(jobs: Sequence[Job]) -> Iterator[Sequence[Job]]:
    return (jobs[start : start + BATCH] for start in range(0, len(jobs), BATCH))


def _accuracy(row: SweepRow | None) -> float:
    return float("nan") if row is None or row.error or row.accuracy is None else row.accuracy
