"""Exp 3: the first stage learns the tier of the best setting from the budget and the question.

A label is the tier of the most accurate setting that fits a budget, question by question, so it moves with what
each single answer happened to be: the same budget and the same kind of question have different labels. How much
can be learned at all is told by gradient boosting on the same inputs. Budgets are drawn anew in every epoch; split
by picture into training, validation (the choice of the epoch) and test (everything reported).

Shapes: `N` questions, `R` rows, of which each is a question with a budget.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from tempovlm.control.checkpoint import save_controller
from tempovlm.control.networks import (
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
from tempovlm.engine.engine import Engine
from tempovlm.lab.exp3_first_stage.data import Material, Rows, draw_rows, load_material
from tempovlm.lab.exp3_first_stage.report import judge_stage1
from tempovlm.lab.fit import SCORE, fit
from tempovlm.lab.grpo.algorithm import TEMPERATURE
from tempovlm.lab.options import FirstStageFlags, FitOptions
from tempovlm.lab.table import Floats

VARIANTS = ("budget", "language", "glance")
LOSSES = ("label", "value")
STAGE1 = "stage1"
CHECKPOINT = "best_stage1_checkpoint.pt"

_JUDGED_BUDGETS = 16
"""Of each question of validation and test; the same in every epoch."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage1Job(FirstStageFlags):
    """Exp 3, whose files go to `stage1` in the output directory.

    Attributes:
        engine: with the model whose features are used. weights: hash of its weights.
    """

    engine: Engine
    weights: str
    options: FitOptions

    @property
    def folder(self) -> Path:
        """Where everything of this stage goes."""
        return self.output_dir / STAGE1

    def check(self) -> None:
        """Raise a `UserError` that names the first flag whose value makes no sense."""
        self.options.check()
        for name, legal in (("knob1_variant", VARIANTS), ("knob1_loss", LOSSES)):
            if getattr(self, name) not in legal:
                raise UserError(f"--{name} {getattr(self, name)}: choose from {', '.join(legal)}")
        if not (math.isfinite(self.time_price) and self.time_price >= 0):
            raise UserError(f"--time_price {self.time_price}: must be a number of at least 0")
        if self.time_price and self.knob1_loss != "value":
            raise UserError("--time_price: a label has no price; add --knob1_loss value")
        if self.budgets_per_question < 1:
            raise UserError(f"--budgets_per_question {self.budgets_per_question}: must be at least 1")


def build_knob1(variant: str, data: Material, hidden_dim: int) -> Knob1Predictor:
    """A network of a variant, its inputs standardised by the questions of training."""
    seen, tiers = data.features.take(data.split.train), len(data.space.tiers)
    language, glance = torch.from_numpy(seen.language), torch.from_numpy(seen.glance)
    net: Knob1Predictor
    if variant == "budget":
        net = Knob1PredictorBudget(hidden_dim, tiers)
    elif variant == "language":
        net = Knob1PredictorBudgetLanguage(language.shape[1], hidden_dim, tiers)
        net.fit_inputs(language)
    else:
        net = Knob1PredictorBudgetLanguageGlance(language.shape[1], glance.shape[1], hidden_dim, tiers)
        net.fit_inputs(language, glance)
    net.budget.fit(data.limits_ms)
    return net


class TierObjective:
    """The tier of the best setting, or the tier's worth; new budgets for every question in every epoch."""

    def __init__(self, net: Knob1Predictor, data: Material, job: Stage1Job) -> None:
        self.net, self.data, self.per_question = net, data, job.budgets_per_question
        self.by_value, self.time_price, seed = job.knob1_loss == "value", job.time_price, job.options.seed
        self.device = next(net.parameters()).device
        self.language = torch.from_numpy(data.features.language).to(self.device)
        self.glance = torch.from_numpy(data.features.glance).to(self.device)
        rng = np.random.default_rng([seed, 0])
        rows = draw_rows(data, data.split.validation, _JUDGED_BUDGETS, rng, job.time_price)
        self.held_out = self._tensors(rows)

    def _tensors(self, rows: Rows) -> list[Tensor]:
        budgets = torch.tensor(rows.budget_ms, dtype=torch.float32)
        values = torch.tensor(rows.value - self.time_price * rows.share, dtype=torch.float32)
        columns = (torch.from_numpy(rows.question), budgets, torch.from_numpy(rows.tier), values)
        return [column.to(self.device) for column in columns]

    def draw(self, rng: np.random.Generator) -> Sequence[Tensor]:
        """The questions of training with new budgets, shuffled."""
        rows = draw_rows(self.data, self.data.split.train, self.per_question, rng, self.time_price)
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
        # Of equals the cheaper one: each tier above the lowest costs a tie.
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
    options = job.options
    data = load_material(
        job.engine,
        job.weights,
        job.results_dirs,
        job.datasets,
        test_results_dirs=job.test_results_dirs,
        latency_estimator_path=job.latency_estimator_path,
        train_split=job.train_split,
        seed=options.seed,
        data_dir=job.data_dir,
    )
    return train_stage1(job, data)


def train_stage1(job: Stage1Job, data: Material) -> dict[str, Any]:
    """The same on material that was read."""
    with writing_to(job.folder):
        return _train(job, data)


def _train(job: Stage1Job, data: Material) -> dict[str, Any]:
    options = job.options
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(options.seed)
        net = build_knob1(job.knob1_variant, data, options.hidden_dim).to(options.device)
    objective = TierObjective(net, data, job)
    about = {
        "questions": data.table.question_id.tolist(),
        "range_ms": data.limits_ms,
        "accuracy": float(data.table.accuracy.sum()),
        "train_split": job.train_split,
        "budgets_per_question": job.budgets_per_question,
        "knob1_loss": job.knob1_loss,
        "time_price": job.time_price,
        "weights": data.weights,
    }
    fitted = fit(net, objective, options, job.folder, about)
    parts = {
        name: draw_rows(
            data, getattr(data.split, name), count, np.random.default_rng([options.seed, place]), job.time_price
        )
        for name, count, place in (
            ("train", job.budgets_per_question, 2),
            ("validation", _JUDGED_BUDGETS, 0),
            ("test", _JUDGED_BUDGETS, 3),
        )
    }
    logits = objective.predict(parts["test"])
    report = judge_stage1(job.knob1_variant, data, parts, logits, options.seed) | {
        "loss": job.knob1_loss,
        "time_price": job.time_price,
        "best_epoch": fitted.best_epoch,
        "best_validation_score": max(record[SCORE] for record in fitted.history),
        "options": asdict(options),
        "test_results": [str(folder) for folder in job.test_results_dirs],
        "latency": "predicted" if job.latency_estimator_path else "measured medians of the settings",
        "stamp": dict(data.stamp),
    }
    save_controller(
        job.folder / CHECKPOINT,
        kind="two_stage_stage1",
        networks={"knob1": net},
        space=data.space,
        weights=data.weights,
        stamp=data.stamp,
        options={
            **asdict(options),
            **{name: getattr(job, name) for name in ("knob1_variant", "knob1_loss", "time_price", "train_split")},
        },
        metrics={name: report[name] for name in ("accuracy", "accuracy_interval", "best_validation_score")},
    )
    write_whole(job.folder / "report.json", json.dumps(report, indent=1) + "\n")
    return report
