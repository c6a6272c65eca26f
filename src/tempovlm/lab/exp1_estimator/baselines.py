"""What the MLP has to beat: a linear roofline, gradient boosting, nearest neighbours; and how to choose."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from tempovlm.lab.exp1_estimator.data import Rows, Split
from tempovlm.lab.exp1_estimator.train import Log, Options, calibrated, cross_fit, stage_metrics, train_mlp
from tempovlm.latency.cores import BoostingCore, Core, NearestCore, RooflineCore
from tempovlm.latency.estimator import Estimator, benchmark_ms
from tempovlm.latency.features import STAGES, CostTable, Floats, Workload

PREDICTION_LIMIT_MS = 0.2
"""What predicting all settings may cost: the guard asks on every request."""

CHOICE_RULE = (
    "least mean over stages of the median relative error on training pictures that a fold left out, seen and "
    "unseen settings counting half each, among the models that predict all settings within "
    f"{PREDICTION_LIMIT_MS} ms"
)

_TREES, _DEPTH = 150, 4
_NEIGHBOURS = 3
_MOST_POINTS = 4000
"""Neighbours to search; more make the checkpoint large and the answer slow."""


def fit_boosting(table: CostTable, train: Rows, seed: int) -> BoostingCore:
    """Boosted trees on the logarithm of measured over roofline, one forest a stage that has two rows or more."""
    from sklearn.ensemble import GradientBoostingRegressor

    roofline = RooflineCore.fit(table, train.workload, train.ms)
    x = table.features(train.workload).astype(np.float32)
    goal = np.log(train.ms) - roofline.log_ms(table, train.workload)[..., 0]
    starts: list[float] = []
    forests: list[list[dict[str, Floats]]] = []
    for stage in range(len(STAGES)):
        known = np.isfinite(goal[:, stage])
        if known.sum() < 2:  # each tree leaves some rows out
            starts.append(0.0)
            forests.append([])
            continue
        model = GradientBoostingRegressor(
            loss="absolute_error", n_estimators=_TREES, max_depth=_DEPTH, subsample=0.7, random_state=seed
        ).fit(x[known], goal[known, stage])
        trees = [tree.tree_ for tree in model.estimators_[:, 0]]
        rest = sum(model.learning_rate * tree.predict(x[known][:1])[0, 0] for tree in trees)
        starts.append(float(model.predict(x[known][:1])[0] - rest))
        forests.append([_tree_arrays(tree, model.learning_rate) for tree in trees])
    return BoostingCore(roofline, np.array(starts), **_packed(forests), depth=_DEPTH)


def _tree_arrays(tree: Any, rate: float) -> dict[str, Floats]:
    """A tree's nodes; leaves are their own children."""
    own = np.arange(tree.node_count)
    leaf = tree.children_left < 0
    return {
        "feature": np.where(leaf, 0, tree.feature),
        "threshold": np.where(leaf, 0.0, tree.threshold),
        "left": np.where(leaf, own, tree.children_left),
        "right": np.where(leaf, own, tree.children_right),
        "value": np.where(leaf, rate * tree.value[:, 0, 0], 0.0),
    }


def _packed(forests: list[list[dict[str, Floats]]]) -> dict[str, Any]:
    """Trees of all stages in arrays (S, T, N); what is missing is a leaf of value 0."""
    trees = max(1, max(len(forest) for forest in forests))
    nodes = max((len(tree["value"]) for forest in forests for tree in forest), default=1)
    kinds = {
        "feature": np.int64,
        "threshold": np.float64,
        "left": np.int64,
        "right": np.int64,
        "value": np.float64,
    }
    result = {name: np.zeros((len(forests), trees, nodes), dtype=kind) for name, kind in kinds.items()}
    for s, forest in enumerate(forests):
        for t, tree in enumerate(forest):
            for name, array in tree.items():
                result[name][s, t, : len(array)] = array
    return result


def fit_nearest(table: CostTable, train: Rows, seed: int) -> NearestCore:
    """The training rows themselves; a stage that was not measured in one has the roofline's time."""
    roofline = RooflineCore.fit(table, train.workload, train.ms)
    features = table.features(train.workload)
    centre, spread = features.mean(axis=0), np.maximum(features.std(axis=0), 1e-6)
    guess = roofline.log_ms(table, train.workload)[..., 0]
    logs = np.where(np.isfinite(train.ms), np.log(train.ms), guess)
    kept = np.sort(np.random.default_rng(seed).permutation(len(features))[:_MOST_POINTS])
    return NearestCore(centre, spread, ((features - centre) / spread)[kept], logs[kept], _NEIGHBOURS)


@dataclass(frozen=True, slots=True)
class Candidate:
    """A calibrated model, with what it is chosen and calibrated by.

    Attributes:
        left_out: (n, S, L) logarithms for the training rows before the margins, by models that had not seen the
            row's picture.
    """

    estimator: Estimator
    left_out: Floats


def fit_candidates(
    table: CostTable, split: Split, options: Options, stamp: Mapping[str, Any], log: Log
) -> dict[str, Candidate]:
    """Every kind of model, calibrated on the training pictures that each fold leaves out."""
    fits: dict[str, Callable[[Rows], Core]] = {
        "roofline": lambda rows: RooflineCore.fit(table, rows.workload, rows.ms),
        "boosting": lambda rows: fit_boosting(table, rows, options.seed),
        "nearest": lambda rows: fit_nearest(table, rows, options.seed),
    }
    fitted = {"mlp": train_mlp(table, split, options, log)}
    fitted |= {name: cross_fit(table, split, fit) for name, fit in fits.items()}
    return {
        name: Candidate(calibrated(table, one.core, split.train, stamp, one.left_out), one.left_out)
        for name, one in fitted.items()
    }


def choose(
    candidates: Mapping[str, Candidate], split: Split
) -> tuple[str, dict[str, dict[str, float | bool | None]]]:
    """The winner by `CHOICE_RULE`, and what it was judged by."""
    rows = split.train
    workload = every_setting(rows, next(iter(candidates.values())).estimator.table)
    unseen = np.isin(rows.workload.setting, split.choice_settings)
    table: dict[str, dict[str, float | bool | None]] = {}
    for name, candidate in candidates.items():
        medians = candidate.estimator.times(candidate.left_out, rows.workload).ms[..., 0]
        errors = [_mean_error(rows.ms[part], medians[part]) for part in (~unseen, unseen) if part.any()]
        cost_ms = benchmark_ms(candidate.estimator, workload)
        score = float(np.mean(errors))
        table[name] = {"error": score, "predict_ms": cost_ms, "is_fast": cost_ms <= PREDICTION_LIMIT_MS}
    eligible = [name for name in table if table[name]["is_fast"]] or list(table)
    return min(eligible, key=lambda name: float(table[name]["error"] or 0.0)), table


def _mean_error(observed: Floats, predicted: Floats) -> float:
    found = [stage["median_ape"] for stage in stage_metrics(observed, predicted).values()]
    return float(np.mean([value for value in found if value is not None]))


def every_setting(rows: Rows, table: CostTable) -> Workload:
    """A request of the usual size at every setting: medians of each tier's rows, of all rows for other tiers."""
    space, load = table.space, rows.workload
    tiers = np.array([space.tiers.index(knobs.tier) for knobs in space])
    columns = []
    for values in (load.vision_tokens, load.text_tokens, load.crops, load.distinct_crops, load.steps):
        by_tier = [values[tiers[load.setting] == tier] for tier in range(len(space.tiers))]
        usual = np.array([np.median(part if len(part) else values) for part in by_tier])
        columns.append(usual[tiers])
    return Workload(np.arange(len(space)), *columns)
