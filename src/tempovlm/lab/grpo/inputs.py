"""From result files to what GRPO learns on: questions, what settings take, budgets, and a split by picture.

What both experiments share. Training budgets are drawn anew at every epoch; those that choose the epoch and those
of the report are drawn once, for other pictures. Knows no network.

Shapes: `N` questions, `B` questions under budgets.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from tempovlm.core.errors import UserError
from tempovlm.core.progress import progress_bar
from tempovlm.data.sample import Sample
from tempovlm.engine.engine import Engine
from tempovlm.lab.core_exp.store import read_results
from tempovlm.lab.features import (
    Split,
    budget_range,
    check_device,
    draw_budgets,
    extract_features,
    find_samples,
    obtain_features,
    read_table,
    split_images,
)
from tempovlm.lab.grpo.actors import Shared
from tempovlm.lab.grpo.algorithm import Task
from tempovlm.lab.grpo.environment import (
    AccuracySource,
    Batch,
    Environment,
    OnlineAccuracy,
    TableAccuracy,
    measured_costs,
    predicted_costs,
)
from tempovlm.lab.options import AdaptiveFlags, GrpoFlags, GrpoOptions
from tempovlm.lab.table import DecisionTable
from tempovlm.latency.estimator import load_estimator

if TYPE_CHECKING:
    import pandas as pd

FIXED_BUDGETS = 8
"""Budgets for every question of the validation and of the test."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GrpoJob(GrpoFlags):
    """What to learn from and where to leave it.

    Attributes:
        engine: with the model whose features the controller sees. weights: hash of its weights.
        max_new_tokens: cap on answers, where accuracy comes from running the model.
    """

    engine: Engine
    weights: str
    options: GrpoOptions
    max_new_tokens: int = AdaptiveFlags.max_new_tokens

    def check(self) -> None:
        """Raise a `UserError` that names the first flag whose value makes no sense."""
        self.options.check()
        for name in ("hidden_dim", "max_new_tokens"):
            if getattr(self, name) < 1:
                raise UserError(f"--{name} {getattr(self, name)}: must be at least 1")


@dataclass(frozen=True, eq=False, slots=True, kw_only=True)
class Material:
    """Questions, in the table's order, and everything that is known about them.

    Attributes:
        stamp: of the latencies, whose milliseconds a controller learns.
    """

    table: DecisionTable
    samples: Sequence[Sample]
    env: Environment
    split: Split
    limits_ms: tuple[float, float]
    stamp: Mapping[str, Any]

    def task(self, options: GrpoOptions) -> Task:
        """What to learn, and the budgets that choose the epoch."""
        return Task(
            env=self.env,
            rows=_rows(self.split.train),
            validation=self.fixed_batch(_rows(self.split.validation), options.seed),
            draw=lambda rows, rng: draw_budgets(rng, len(rows), self.limits_ms),
            options=options,
        )

    def test_batch(self, seed: int) -> Batch:
        """Questions about pictures that neither learning nor the choice of the epoch saw."""
        return self.fixed_batch(_rows(self.split.test), seed)

    def fixed_batch(self, rows: NDArray[np.int64], seed: int) -> Batch:
        """Every question under several budgets, under the guard's mask, as served."""
        every = np.repeat(rows, FIXED_BUDGETS)
        budgets = draw_budgets(np.random.default_rng([seed, len(rows)]), len(every), self.limits_ms)
        return self.env.batch(torch.as_tensor(every), torch.as_tensor(budgets), mask=True)


def _rows(mask: NDArray[np.bool_]) -> NDArray[np.int64]:
    return np.flatnonzero(mask)


def gather(job: GrpoJob) -> Material:
    """Read and check everything.

    Raises:
        UserError: a flag makes no sense, or results, estimator or pictures are missing or do not fit together.
    """
    job.check()
    space = job.engine.space
    estimator = None
    if job.latency_estimator_path is not None:
        estimator = load_estimator(job.latency_estimator_path, space)
    frame = read_results(list(job.results_dirs), list(job.datasets), space)
    _check_weights(frame, job.weights)
    table = read_table(frame, space, job.datasets)
    if estimator is None:
        check_device(frame)
        costs = measured_costs(table, frame)
    else:
        costs = predicted_costs(table, frame, estimator)
    samples = find_samples(table, job.data_dir)
    accuracy: AccuracySource = TableAccuracy(torch.tensor(table.accuracy))
    if job.options.accuracy_source == "online":
        accuracy = OnlineAccuracy(job.engine, samples, job.max_new_tokens)
    split = split_images(table.image_id, job.train_split, job.options.seed)
    return Material(
        table=table,
        samples=samples,
        env=Environment(space, costs, accuracy),
        split=split,
        limits_ms=budget_range(costs.upper_ms[split.train]),  # below and above, the guard decides alone
        stamp=(estimator.stamp if estimator else frame.attrs["stamp"]) or {},
    )


def _check_weights(frame: pd.DataFrame, weights: str) -> None:
    """Results of another model say nothing about this one; the predecessor's files name no weights."""
    for path, stamp in frame.attrs["stamps"].items():
        found = (stamp or {}).get("weights")
        if found is not None and found != weights:
            raise UserError(f"{path}: field weights is {found}, those of --model_path are {weights}")


def see(job: GrpoJob, material: Material) -> Shared:
    """Features of all questions on the training device, stored beside the results when first made."""

    def extract() -> Any:
        with progress_bar("looking at the pictures") as advance:
            return extract_features(job.engine, material.samples, advance)

    found = obtain_features(job.results_dirs[0], job.weights, material.samples, extract)
    language, vision, glance = (
        torch.as_tensor(array, device=job.options.device) for array in (found.language, found.vision, found.glance)
    )
    return Shared(language, vision, glance)
