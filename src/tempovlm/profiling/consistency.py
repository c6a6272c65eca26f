"""Whether block importances agree: between data sets, between kinds of task, between training and validation.

Pure functions on arrays of score differences. A correlation of noisy importances is lower than that of the true
ones, so each comes with its reliability: what two halves of the same data set's pictures reach. Intervals resample
pictures, which adds that noise once more, so they lean to the low side.
Shapes: `n` questions, `N` blocks, `R` draws.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tempovlm.data.registry import DATASETS

Floats = NDArray[np.float64]

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
        """From score differences (n, N) of questions on these pictures."""
        sums, counts = _by_image(drops, images)
        rng = np.random.default_rng(seed)
        return cls(drops.mean(axis=0), _resampled(sums, counts, draws, rng), _reliability(sums, counts, rng))

    def interval(self) -> tuple[Floats, Floats]:
        """Lower and upper ends (N,) of 95 % intervals."""
        low, high = np.quantile(self.draws, (0.025, 0.975), axis=0)
        return low, high


def _by_image(drops: Floats, images: Sequence[str]) -> tuple[Floats, Floats]:
    names = {name: i for i, name in enumerate(dict.fromkeys(images))}
    place = np.array([names[name] for name in images])
    sums = np.zeros((len(names), drops.shape[1]))
    np.add.at(sums, place, drops)
    return sums, np.bincount(place).astype(np.float64)


def _resampled(sums: Floats, counts: Floats, draws: int, rng: np.random.Generator) -> Floats:
    """(R, N) means over pictures drawn with replacement, as many as there are.

    Source: A. C. Davison and D. V. Hinkley, Bootstrap Methods and their Application, 1997, section 3.8.
    """
    images = len(counts)
    times = rng.multinomial(images, np.full(images, 1 / images), size=draws).astype(np.float64)
    return (times @ sums) / (times @ counts)[:, None]


def _reliability(sums: Floats, counts: Floats, rng: np.random.Generator, splits: int = 200) -> float:
    """Mean correlation of two halves, stepped up to the whole length: 2 r / (1 + r).

    Source: C. Spearman, Correlation calculated from faulty data, 1910; W. Brown, the same volume.
    """
    images = len(counts)
    if images < 4:
        return math.nan
    found = []
    for _ in range(splits):
        order = rng.permutation(images)
        halves = order[: images // 2], order[images // 2 :]
        one, other = (sums[half].sum(axis=0) / counts[half].sum() for half in halves)
        found.append(float(spearman(one[1:-1], other[1:-1])))
    known = [value for value in found if math.isfinite(value)]
    r = math.fsum(known) / len(known) if known else math.nan
    return 2 * r / (1 + r) if r > -1 else math.nan


def pearson(one: Floats, other: Floats) -> Floats:
    """Correlation along the last axis; NaN where one side does not vary."""
    x = one - one.mean(axis=-1, keepdims=True)
    y = other - other.mean(axis=-1, keepdims=True)
    scale = np.sqrt((x * x).sum(axis=-1) * (y * y).sum(axis=-1))
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(scale > 1e-15, (x * y).sum(axis=-1) / scale, np.nan)


def spearman(one: Floats, other: Floats) -> Floats:
    """Pearson's correlation of ranks, equal values sharing the mean of theirs."""
    return pearson(ranks(one), ranks(other))


def ranks(values: Floats) -> Floats:
    """Ranks from 1 along the last axis."""
    mine, others = values[..., :, None], values[..., None, :]
    return (mine > others).sum(axis=-1) + ((mine == others).sum(axis=-1) + 1) / 2


MEASURES = {"pearson": pearson, "spearman": spearman}


def correlate(one: Importance, other: Importance) -> dict[str, Any]:
    """Both correlations over all blocks and over the inner ones, with 95 % intervals, and what noise allows."""
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
    """Every pair of data sets, the means within VQA and between VQA and other tasks, and the verdict."""
    pairs = {f"{a}|{b}": correlate(importances[a], importances[b]) for a, b in combinations(importances, 2)}
    vqa = [name for name in importances if name in DATASETS and DATASETS[name].task == "vqa"]
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
    """Yes, no or undecided to both halves of "data-agnostic but task-dependent", by `RULE`."""
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
