"""Compare the MLP with a linear roofline, gradient boosting and nearest neighbours, and choose the best."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from tempovlm.core.units import now_ms
from tempovlm.lab.exp1_estimator.data import Rows, Split
from tempovlm.lab.exp1_estimator.train import Candidate, cross_fit, stage_metrics, train_mlp
from tempovlm.lab.log import Log
from tempovlm.lab.options import EstimatorOptions
from tempovlm.latency.cores import SERVED, Core, RooflineCore
from tempovlm.latency.estimator import Estimator
from tempovlm.latency.features import CostTable, Floats, Workload

PREDICTION_LIMIT_MS = 0.2
"""Limit of the time to predict all settings: the guard asks for every request."""

CHOICE_RULE = (
    "least mean over stages of the median relative error on training pictures that a fold left out, seen and "
    "unseen settings counting half each, among the models that a checkpoint can hold and that predict all "
    f"settings within {PREDICTION_LIMIT_MS} ms"
)

TREES = 150
"""Trees of the boosting, for each stage."""


@dataclass(frozen=True, slots=True)
class ComparedCore:
    """A model of medians for comparison only: a checkpoint cannot hold it.

    Attributes:
        medians: predicts logarithms (n, S) of requests.
    """

    kind: str
    medians: Callable[[CostTable, Workload], Floats]

    def log_ms(self, table: CostTable, workload: Workload) -> Floats:
        """Predict medians: (n, S, 1)."""
        return self.medians(table, workload)[..., None]


def fit_boosting(table: CostTable, train: Rows, seed: int) -> ComparedCore:
    """Fit boosted trees to the logarithm of measured over roofline, for each stage that has two rows or more."""
    from sklearn.ensemble import GradientBoostingRegressor

    roofline = RooflineCore.fit(table, train.workload, train.ms)
    features = table.features(train.workload)
    goal = np.log(train.ms) - roofline.log_ms(table, train.workload)[..., 0]
    models = {}
    for stage, known in enumerate(np.isfinite(goal).T):
        if known.sum() >= 2:  # each tree leaves some rows out
            model = GradientBoostingRegressor(
                loss="absolute_error", n_estimators=TREES, max_depth=4, subsample=0.7, random_state=seed
            )
            models[stage] = model.fit(features[known], goal[known, stage])

    def medians(costs: CostTable, workload: Workload) -> Floats:
        logs, x = roofline.log_ms(costs, workload)[..., 0], costs.features(workload)
        for stage, model in models.items():
            logs[:, stage] += model.predict(x)
        return logs

    return ComparedCore("boosting", medians)


def fit_nearest(table: CostTable, train: Rows, neighbours: int = 3) -> ComparedCore:
    """Keep the training rows and answer with the geometric mean of the nearest ones in standardised features.

    A stage that a row did not measure has the roofline's time there.
    """
    from sklearn.neighbors import KNeighborsRegressor
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    guess = RooflineCore.fit(table, train.workload, train.ms).log_ms(table, train.workload)[..., 0]
    logs = np.where(np.isfinite(train.ms), np.log(train.ms), guess)
    model = make_pipeline(StandardScaler(), KNeighborsRegressor(min(neighbours, len(train))))
    model.fit(table.features(train.workload), logs)
    return ComparedCore("nearest", lambda costs, workload: model.predict(costs.features(workload)))


def fit_candidates(
    table: CostTable, split: Split, options: EstimatorOptions, stamp: Mapping[str, Any], log: Log
) -> dict[str, Candidate]:
    """Fit every kind of model, calibrated on the training pictures that each fold leaves out."""
    fits: dict[str, Callable[[Rows], Core]] = {
        "roofline": lambda rows: RooflineCore.fit(table, rows.workload, rows.ms),
        "boosting": lambda rows: fit_boosting(table, rows, options.seed),
        "nearest": lambda rows: fit_nearest(table, rows),
    }
    mlp = train_mlp(table, split, options, log, stamp)
    return {"mlp": mlp, **{name: cross_fit(table, split, fit, stamp) for name, fit in fits.items()}}


def choose(
    candidates: Mapping[str, Candidate], split: Split
) -> tuple[str, dict[str, dict[str, float | bool | None]]]:
    """Choose the winner by `CHOICE_RULE`; return its name and each model's error, time and whether it is fast."""
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
    served = [name for name, one in candidates.items() if isinstance(one.estimator.core, SERVED)]
    eligible = [name for name in served if table[name]["is_fast"]] or served
    return min(eligible, key=lambda name: float(table[name]["error"] or 0.0)), table


def _mean_error(observed: Floats, predicted: Floats) -> float:
    found = [stage["median_ape"] for stage in stage_metrics(observed, predicted).values()]
    return float(np.mean([value for value in found if value is not None]))


def every_setting(rows: Rows, table: CostTable) -> Workload:
    """Make a request of the usual size at every setting: medians of the tier's rows, or of all if it has none."""
    space, load = table.space, rows.workload
    tiers = np.array([space.tiers.index(knobs.tier) for knobs in space])
    columns = []
    for values in (load.vision_tokens, load.text_tokens, load.crops, load.distinct_crops, load.steps):
        by_tier = [values[tiers[load.setting] == tier] for tier in range(len(space.tiers))]
        usual = np.array([np.median(part if len(part) else values) for part in by_tier])
        columns.append(usual[tiers])
    return Workload(np.arange(len(space)), *columns)


def benchmark_ms(estimator: Estimator, workload: Workload, repeats: int = 300) -> float:
    """Measure the median time of one call of `predict`, after a tenth as many calls to warm up."""
    times_ms = []
    for _ in range(repeats // 10 + repeats):
        start_ms = now_ms()
        estimator.predict(workload)
        times_ms.append(now_ms() - start_ms)
    return float(np.median(times_ms[repeats // 10 :]))
