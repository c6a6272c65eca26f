"""From result files to what GRPO learns on: questions, what settings take, budgets, and a split by picture.

Training budgets are drawn anew at every epoch; those that choose the epoch and those of the report are drawn once,
for other pictures.

Shapes: `N` questions, `B` questions under budgets.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from tempovlm.core.errors import UserError
from tempovlm.data.sample import Sample
from tempovlm.lab.features import LearningJob
from tempovlm.lab.grpo.actors import Shared
from tempovlm.lab.grpo.algorithm import Task
from tempovlm.lab.grpo.environment import Batch, Environment, OnlineAccuracy
from tempovlm.lab.options import GrpoOptions
from tempovlm.lab.table import budget_range, draw_budgets

FIXED_BUDGETS = 8
"""Budgets for every question of the validation and of the test."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GrpoJob(LearningJob):
    """The job of Exp 4 and 5.

    Attributes:
        hidden_dim: units of the networks' hidden layers.
        max_new_tokens: cap on answers, where accuracy comes from running the model.
    """

    options: GrpoOptions
    hidden_dim: int = 128
    max_new_tokens: int = 16

    def check(self) -> None:
        """Raise a `UserError` that names the first flag whose value makes no sense."""
        self.options.check()
        for name in ("hidden_dim", "max_new_tokens"):
            if getattr(self, name) < 1:
                raise UserError(f"--{name} {getattr(self, name)}: must be at least 1")


def gather(job: GrpoJob) -> tuple[Environment, list[Sample]]:
    """Read and check everything.

    Raises:
        UserError: a flag makes no sense, or results, estimator or pictures are missing or do not fit together.
    """
    job.check()
    estimator = job.estimator
    table, samples = job.read(job.results_dirs)
    table = table.split_by_picture(job.train_split, job.options.seed).for_training(estimator)
    online = job.options.accuracy_source == "online"
    accuracy = OnlineAccuracy(job.engine, samples, job.max_new_tokens) if online else None
    return Environment(table, accuracy), samples


def limits_ms(env: Environment) -> tuple[float, float]:
    """Return the range of budgets; below and above it the guard decides alone."""
    return budget_range(env.table.upper_ms[env.table.rows("train")])


def new_task(env: Environment, options: GrpoOptions, judged: str = "validation") -> Task:
    """Return what to learn, and the questions and budgets of the part that it is judged on."""
    ends_ms = limits_ms(env)
    return Task(
        env=env,
        rows=env.table.rows("train"),
        validation=fixed_batch(env, judged, options.seed),
        draw=lambda rows, rng: draw_budgets(rng, len(rows), ends_ms),
        options=options,
    )


def fixed_batch(env: Environment, part: str, seed: int) -> Batch:
    """Put every question of a part under several budgets, under the guard's mask, as served."""
    rows = env.table.rows(part)
    every = np.repeat(rows, FIXED_BUDGETS)
    budgets = draw_budgets(np.random.default_rng([seed, len(rows)]), len(every), limits_ms(env))
    return env.batch(torch.as_tensor(every), torch.as_tensor(budgets), mask=True)


def see(job: GrpoJob, samples: Sequence[Sample]) -> Shared:
    """Features of all questions on the training device, stored beside the results when first made."""
    found = job.features(job.results_dirs[0], samples)
    arrays = (found.language, found.vision, found.glance)
    return Shared(*(torch.as_tensor(array, device=job.options.device) for array in arrays))
