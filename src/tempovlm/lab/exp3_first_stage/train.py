"""Exp 3: the first stage learns the tier of the best setting from the budget and the question.

A label is the tier of the setting that is expected to be the most accurate of those that fit a budget, by training
questions that are like the question (`expected.py`). `--knob1_label literal` goes by the question's own answers
instead, so that the label moves with what each single answer happened to be: the same budget and the same kind of
question have different labels, and the cheapest tier is the most frequent one. How much can be learned at all is
told by gradient boosting on the same inputs. Budgets are drawn anew in every epoch; split
by picture into training, validation (the choice of the epoch) and test (everything reported).

Shapes: `N` questions, `R` rows, of which each is a question with a budget.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from tempovlm.control.checkpoint import save_controller
from tempovlm.control.learned.networks import (
    Knob1Predictor,
    Knob1PredictorBudget,
    Knob1PredictorBudgetLanguage,
    Knob1PredictorBudgetLanguageGlance,
    tier_logits,
)
from tempovlm.control.select import TIE
from tempovlm.core.errors import UserError
from tempovlm.core.files import writing_to
from tempovlm.core.paths import write_whole
from tempovlm.lab.exp3_first_stage.data import Rows, draw_rows, limits_ms
from tempovlm.lab.exp3_first_stage.expected import smoothed
from tempovlm.lab.exp3_first_stage.report import judge_stage1
from tempovlm.lab.features import FeatureTable, LearningJob
from tempovlm.lab.fit import SCORE, fit, seeded
from tempovlm.lab.grpo.algorithm import TEMPERATURE
from tempovlm.lab.options import LABELS, FirstStageFlags, FitOptions, check_choice
from tempovlm.lab.table import PARTS, Floats, Table

VARIANTS: Mapping[str, tuple[str, ...]] = {
    "budget": (),
    "language": ("language",),
    "glance": ("language", "glance"),
}
"""The features that each variant looks at."""

_NETWORKS: Mapping[str, Any] = {
    "budget": Knob1PredictorBudget,
    "language": Knob1PredictorBudgetLanguage,
    "glance": Knob1PredictorBudgetLanguageGlance,
}
LOSSES = ("label", "value")
STAGE1 = "stage1"
CHECKPOINT = "best_stage1_checkpoint.pt"

_LOSS = ("knob1_label", "knob1_loss", "time_price")
_METRICS = ("accuracy", "accuracy_interval", "literal_accuracy", "best_validation_score")

_JUDGED_BUDGETS = 16
"""Budgets for each question of validation and test; the same in every epoch."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage1Job(FirstStageFlags, LearningJob):
    """Exp 3, whose files go to `stage1` in the output directory."""

    options: FitOptions

    @property
    def folder(self) -> Path:
        """Folder of this stage's files."""
        return self.output_dir / STAGE1

    def check(self) -> None:
        """Raise a `UserError` that names the first flag whose value makes no sense."""
        self.options.check()
        for name, legal in (("knob1_variant", VARIANTS), ("knob1_label", LABELS), ("knob1_loss", LOSSES)):
            check_choice(name, getattr(self, name), tuple(legal))
        if not (math.isfinite(self.time_price) and self.time_price >= 0):
            raise UserError(f"--time_price {self.time_price}: must be a number of at least 0")
        if self.time_price and self.knob1_loss != "value":
            raise UserError("--time_price: a label has no price; add --knob1_loss value")
        if self.budgets_per_question < 1:
            raise UserError(f"--budgets_per_question {self.budgets_per_question}: must be at least 1")


def build_knob1(variant: str, table: Table, features: FeatureTable, hidden_dim: int) -> Knob1Predictor:
    """A network of a variant, its inputs standardised by the questions of training."""
    rows, tiers = table.rows("train"), len(table.space.tiers)
    seen = [torch.from_numpy(getattr(features, name)[rows]) for name in VARIANTS[variant]]
    net = _NETWORKS[variant](*(one.shape[1] for one in seen), hidden_dim, tiers)
    if seen:
        net.fit_inputs(*seen)
    net.budget.fit(limits_ms(table))
    return cast(Knob1Predictor, net)


class TierObjective:
    """The label's tier, or each tier's worth; new budgets for every question in every epoch.

    Labels go by the expected accuracies (N, K), or by the questions' own answers where there are none.
    """

    def __init__(
        self,
        net: Knob1Predictor,
        table: Table,
        features: FeatureTable,
        job: Stage1Job,
        expected: Floats | None = None,
    ) -> None:
        self.net, self.table, self.per_question = net, table, job.budgets_per_question
        self.expected = expected
        self.by_value, self.time_price, seed = job.knob1_loss == "value", job.time_price, job.options.seed
        self.device = next(net.parameters()).device
        self.language = torch.from_numpy(features.language).to(self.device)
        self.glance = torch.from_numpy(features.glance).to(self.device)
        rng = np.random.default_rng([seed, 0])
        rows = draw_rows(table, "validation", _JUDGED_BUDGETS, rng, job.time_price, expected)
        self.held_out = self._tensors(rows)

    def _tensors(self, rows: Rows) -> list[Tensor]:
        budgets = torch.tensor(rows.budget_ms, dtype=torch.float32)
        values = torch.tensor(rows.value - self.time_price * rows.share, dtype=torch.float32)
        columns = (torch.from_numpy(rows.question), budgets, torch.from_numpy(rows.tier), values)
        return [column.to(self.device) for column in columns]

    def draw(self, rng: np.random.Generator) -> Sequence[Tensor]:
        """The questions of training with new budgets, shuffled."""
        rows = draw_rows(self.table, "train", self.per_question, rng, self.time_price, self.expected)
        order = torch.from_numpy(rng.permutation(len(rows))).to(self.device)
        return [column[order] for column in self._tensors(rows)]

    def logits(self, question: Tensor, budget_ms: Tensor) -> Tensor:
        """(R, 3) of questions and budgets (R,)."""
        return tier_logits(self.net, self.language[question], budget_ms, self.glance[question])

    def loss(self, *batch: Tensor) -> Tensor:
        """Mean over the rows."""
        question, budget_ms, tier, value = batch
        return self._loss(self.logits(question, budget_ms), tier, value)

    def _loss(self, logits: Tensor, tier: Tensor, value: Tensor) -> Tensor:
        if not self.by_value:
            return F.cross_entropy(logits, tier)
        # Break ties toward the cheaper tier: charge each higher tier one tie margin.
        worth = value - TIE * torch.arange(value.shape[1], device=value.device)
        found, wanted = (one - one.mean(dim=1, keepdim=True) for one in (TEMPERATURE * logits, worth))
        return F.mse_loss(found, wanted)

    def validate(self) -> Mapping[str, float]:
        """Loss, accuracy and worth on the validation questions; the score is what the loss is about."""
        question, budget_ms, tier, value = self.held_out
        logits = self.logits(question, budget_ms)
        chosen = logits.argmax(dim=1)
        accuracy = (chosen == tier).double().mean().item()
        worth = value.gather(1, chosen[:, None]).double().mean().item()
        own = {"val_loss": self._loss(logits, tier, value).item(), "val_accuracy": accuracy, "val_value": worth}
        return {**own, SCORE: worth if self.by_value else accuracy}

    @torch.no_grad()
    def predict(self, rows: Rows) -> Floats:
        """(R, 3) logits."""
        question, budget_ms, *_ = self._tensors(rows)
        return self.logits(question, budget_ms).double().cpu().numpy()


def run_job(job: Stage1Job) -> dict[str, Any]:
    """Train, compare with gradient boosting, write the checkpoint and `report.json`; returns the report.

    Raises:
        UserError: wrong input, or the folder cannot be written or another process trains in it.
    """
    job.check()
    estimator = job.estimator
    table, samples = job.read(job.results_dirs)
    table, others = table.split_by_picture(job.train_split, job.options.seed), None
    if job.test_results_dirs:
        more, others = job.read(job.test_results_dirs)
        table = table.with_test(more)
    table = table.for_training(estimator)
    if estimator is None:
        # A label must not hang on how long a single answer happened to take.
        table = replace(table, latency_ms=np.tile(table.usual_ms(), (len(table), 1)))
    features = job.features(job.results_dirs[0], samples)
    if others is not None:
        features = features.with_more(job.features(job.test_results_dirs[0], others))
    return train_stage1(job, table, features)


def train_stage1(job: Stage1Job, table: Table, features: FeatureTable) -> dict[str, Any]:
    """The same on a table that was read."""
    with writing_to(job.folder):
        return _train(job, table, features)


def _train(job: Stage1Job, table: Table, features: FeatureTable) -> dict[str, Any]:
    options = job.options
    net = seeded(options.seed, lambda: build_knob1(job.knob1_variant, table, features, options.hidden_dim))
    net.to(options.device)
    smooth = smoothed(table, features.language, options.seed) if job.knob1_label == LABELS[0] else None
    expected = None if smooth is None else smooth.accuracy
    objective = TierObjective(net, table, features, job, expected)
    about = {
        "questions": table.question_id.tolist(),
        "range_ms": limits_ms(table),
        "accuracy": float(table.accuracy.sum()),
        **{name: getattr(job, name) for name in ("train_split", "budgets_per_question", *_LOSS)},
        "weights": job.weights_hash,
    }
    fitted = fit(net, objective, options, job.folder, about)
    parts = {
        name: draw_rows(table, name, count, np.random.default_rng([options.seed, place]), job.time_price, expected)
        for name, count, place in zip(
            PARTS, (job.budgets_per_question, *[_JUDGED_BUDGETS] * 2), (2, 0, 3), strict=True
        )
    }
    logits = objective.predict(parts["test"])
    seen = [getattr(features, name) for name in VARIANTS[job.knob1_variant]]
    report = judge_stage1(table, seen, parts, logits, options.seed) | {
        "variant": job.knob1_variant,
        "label": job.knob1_label,
        "smoothing": smooth and smooth.record(),
        "loss": job.knob1_loss,
        "time_price": job.time_price,
        "best_epoch": fitted.best_epoch,
        "best_validation_score": max(record[SCORE] for record in fitted.history),
        "options": asdict(options),
        "test_results": [str(folder) for folder in job.test_results_dirs],
        "latency": "predicted" if job.latency_estimator_path else "measured medians of the settings",
        "stamp": dict(table.stamp),
    }
    save_controller(
        job.folder / CHECKPOINT,
        kind="two_stage_stage1",
        networks={"knob1": net},
        space=table.space,
        weights_hash=job.weights_hash,
        stamp=table.stamp,
        options={
            **asdict(options),
            **{name: getattr(job, name) for name in ("knob1_variant", *_LOSS, "train_split")},
        },
        metrics={name: report[name] for name in _METRICS},
    )
    write_whole(job.folder / "report.json", json.dumps(report, indent=1) + "\n")
    return report
