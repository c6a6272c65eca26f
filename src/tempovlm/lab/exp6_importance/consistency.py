"""Correlates block importances between data sets, kinds of task, and training and validation pictures.

A correlation of noisy importances is lower than that of the true ones, so each comes with its reliability: the
correlation of two halves of the same data set's pictures. Intervals resample pictures, which adds that noise
again, so they are biased downwards.
Shapes: `n` questions, `N` blocks, `R` draws.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np

from tempovlm.data.registry import task_of
from tempovlm.lab.statistics import Floats, Resamples, percentile_interval

AGREE = 0.9
"""The seed document's target for the mean correlation between the VQA data sets."""

RULE = (
    "Data-agnostic: yes if the 95 % interval of the mean correlation between VQA data sets lies above 0.9; no if "
    "it lies below 0.9 and the mean of what two halves of a data set reach is 0.9 or more, so that noise is not "
    "the reason; else undecided. Task-dependent: yes if the interval of (mean correlation within VQA) - (mean "
    "correlation of VQA with other tasks) lies above 0; no if its upper end is below 0.05; else undecided. "
    "Correlations are Spearman's over the inner blocks, the only ones that a ranking decides about."
)


@dataclass(frozen=True, slots=True)
class Importance:
    """Importances of one data set and split.

    Attributes:
        values: (N,). draws: (R, N) under resampled pictures. reliability: correlation of the whole set's
            importances with those of another such set, estimated from halves; Spearman's, inner blocks.
    """

    values: Floats
    draws: Floats
    reliability: float

    @classmethod
    def of(cls, drops: Floats, images: Sequence[str], *, draws: int = 2000, seed: int = 0) -> Importance:
        """Average score differences (n, N) of questions on these pictures."""
        rng = np.random.default_rng(seed)
        pictures = Resamples(images, draws, rng, by="counts")
        sums, counts = pictures.sums(drops), pictures.sums(np.ones((len(drops), 1)))
        return cls(drops.mean(axis=0), pictures.means(drops)[1:], _reliability(sums, counts, rng))

    def interval(self) -> tuple[Floats, Floats]:
        """Compute the lower and upper ends (N,) of 95 % intervals."""
        return percentile_interval(self.draws)


def _reliability(sums: Floats, counts: Floats, rng: np.random.Generator, splits: int = 200) -> float:
    """Mean correlation of two halves, stepped up to the whole length: 2 r / (1 + r).

    Source: C. Spearman, Correlation calculated from faulty data, 1910; W. Brown, the same volume.
    """
    images = len(counts)
    if images < 4:
        return math.nan
    orders = [np.split(rng.permutation(images), [images // 2]) for _ in range(splits)]
    means = np.array([[sums[half].sum(axis=0) / counts[half].sum() for half in halves] for halves in orders])
    found = spearman(means[:, 0, 1:-1], means[:, 1, 1:-1])
    known = found[np.isfinite(found)]
    r = float(known.mean()) if len(known) else math.nan
    return 2 * r / (1 + r) if r > -1 else math.nan


def pearson(one: Floats, other: Floats) -> Floats:
    """Correlate along the last axis; NaN where one side does not vary."""
    from scipy.stats import ConstantInputWarning, NearConstantInputWarning, pearsonr

    if one.shape[-1] < 2:
        return np.full(one.shape[:-1], np.nan)
    with warnings.catch_warnings():
        for kind in (ConstantInputWarning, NearConstantInputWarning):
            warnings.simplefilter("ignore", kind)
        found: Floats = pearsonr(one, other, axis=-1).statistic
    return found


def spearman(one: Floats, other: Floats) -> Floats:
    """Correlate ranks along the last axis; equal values share the mean of their ranks."""
    from scipy.stats import rankdata

    return pearson(rankdata(one, axis=-1), rankdata(other, axis=-1))


MEASURES = {"pearson": pearson, "spearman": spearman}


def correlate(one: Importance, other: Importance) -> dict[str, Any]:
    """Compute both correlations over all and over the inner blocks, with 95 % intervals and a noise ceiling."""
    record: dict[str, Any] = {}
    for measure, correlation in MEASURES.items():
        for scope, part in (("all_blocks", slice(None)), ("inner_blocks", slice(1, -1))):
            estimate = float(correlation(one.values[part], other.values[part]))
            draws = correlation(one.draws[:, part], other.draws[:, part])
            record[f"{measure}_{scope}"] = _estimate(estimate, draws)
    ceiling = one.reliability * other.reliability
    noise = math.sqrt(ceiling) if ceiling > 0 else math.nan
    record["noise_ceiling"] = _number(noise)
    record["spearman_inner_blocks_disattenuated"] = _number(
        min(1.0, record["spearman_inner_blocks"]["estimate"] / noise)
        if noise > 0 and record["spearman_inner_blocks"]["estimate"] is not None
        else math.nan
    )
    return record


def _estimate(estimate: float, draws: Floats) -> dict[str, float | None]:
    known = draws[np.isfinite(draws)]
    low, high = np.quantile(known, (0.025, 0.975)) if len(known) else (math.nan, math.nan)
    return {"estimate": _number(estimate), "low": _number(float(low)), "high": _number(float(high))}


def _number(value: float) -> float | None:
    return round(value, 5) if math.isfinite(value) else None


def cross_dataset(importances: Mapping[str, Importance]) -> dict[str, Any]:
    """Correlate every pair of data sets, average within VQA and between VQA and other tasks, and judge."""
    pairs = {f"{a}|{b}": correlate(importances[a], importances[b]) for a, b in combinations(importances, 2)}
    vqa = [name for name in importances if task_of(name) == "vqa"]
    others = [name for name in importances if name not in vqa]
    within = _mean_correlation(importances, list(combinations(vqa, 2)))
    between = _mean_correlation(importances, [(a, b) for a in vqa for b in others])
    summary = {
        "within_vqa": _summary(within),
        "vqa_with_others": _summary(between),
        "difference": _summary(None if within is None or between is None else _minus(within, between)),
        "reliability": {name: _number(one.reliability) for name, one in importances.items()},
    }
    return {"pairwise": pairs, "summary": summary, "rule": RULE, "verdict": verdict(summary, vqa)}


Spread = tuple[float, Floats]
"""An estimate and its draws."""


def _mean_correlation(importances: Mapping[str, Importance], pairs: Sequence[tuple[str, str]]) -> Spread | None:
    """Mean of Spearman's over the inner blocks of these pairs, and of each draw; None of no pairs."""
    if not pairs:
        return None
    inner = slice(1, -1)
    values, draws = [], []
    for a, b in pairs:
        one, other = importances[a], importances[b]
        values.append(float(spearman(one.values[inner], other.values[inner])))
        draws.append(spearman(one.draws[:, inner], other.draws[:, inner]))
    return math.fsum(values) / len(values), np.mean(draws, axis=0)


def _minus(one: Spread, other: Spread) -> Spread:
    return one[0] - other[0], one[1] - other[1]


def _summary(spread: Spread | None) -> dict[str, float | None] | None:
    return None if spread is None else _estimate(*spread)


def verdict(summary: Mapping[str, Any], vqa: Sequence[str]) -> dict[str, str]:
    """Answer yes, no or undecided to both halves of "data-agnostic but task-dependent", by `RULE`."""
    within, difference = summary["within_vqa"], summary["difference"]
    known = [summary["reliability"][name] for name in vqa]
    reliable = bool(known) and None not in known and sum(known) / len(known) >= AGREE
    agnostic = "undecided"
    if within is not None and within["low"] is not None:
        if within["low"] > AGREE:
            agnostic = "yes"
        elif within["high"] < AGREE and reliable:
            agnostic = "no"
    dependent = "undecided"
    if difference is not None and difference["low"] is not None:
        if difference["low"] > 0:
            dependent = "yes"
        elif difference["high"] < 0.05:
            dependent = "no"
    text = f"Data-agnostic among VQA data sets: {agnostic}. Task-dependent: {dependent}."
    return {"data_agnostic": agnostic, "task_dependent": dependent, "text": text}
