"""The experiments' flags as dataclasses: scripts take names, defaults and help from them, jobs their fields.

Loads no torch, which scripts import only when threads are set.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from tempovlm.core.errors import UserError
from tempovlm.lab.script import flag, required
from tempovlm.lab.script import seed as read_seed

SCHEDULES = ("cosine", "constant")
SCALES = ("group", "batch", "none")
LOSS_TYPES = ("grpo", "dr_grpo")
ACCURACY_SOURCES = ("table", "online")
ESTIMATOR_LOSSES = ("log", "mse")

LABELS = ("smoothed", "literal")
"""Accuracies to learn from: smoothed over training questions that are like the question, or its own answers."""

WARM_START = 30
"""Epochs of regression before GRPO, where a table has the accuracies of all settings."""


@dataclass(frozen=True, kw_only=True)
class LoopOptions:
    """Options of every training; `cosine` ends at a learning rate of zero."""

    batch_size: int = flag(64, "rows of a batch")
    num_epochs: int = flag(50, "passes over the training rows")
    lr: float = flag(1e-4, "learning rate at the start")
    grad_accum: int = flag(1, "batches whose gradients make one step")
    lr_schedule: str = flag("cosine", "course of the learning rate: cosine or constant")
    seed: int = flag(42, "seed of the split, of the start and of all draws", read=read_seed)
    device: str = "cpu"


def check_loop(options: LoopOptions) -> None:
    """Raise a `UserError` that names the first flag of the loop whose value makes no sense."""
    check_counts(options, ("batch_size", "num_epochs", "grad_accum"), 1)
    if not (math.isfinite(options.lr) and options.lr > 0):
        raise UserError(f"--lr {options.lr}: must be a positive number")
    check_choice("lr_schedule", options.lr_schedule, SCHEDULES)


def check_counts(options: Any, names: Sequence[str], least: int) -> None:
    """Raise a `UserError` that names the first of some flags whose value is less than `least`."""
    for name in names:
        value = getattr(options, name)
        if not (math.isfinite(value) and value >= least):
            kind = "" if isinstance(value, int) else "a number of "
            raise UserError(f"--{name} {value}: must be {kind}at least {least}")


def check_choice(name: str, value: str, legal: Sequence[str]) -> None:
    """Raise a `UserError` unless a flag has one of its legal values."""
    if value not in legal:
        raise UserError(f"--{name} {value}: choose from {', '.join(legal)}")


@dataclass(frozen=True, kw_only=True)
class FitOptions(LoopOptions):
    """Options of training on labels; batch, epochs and learning rate are the seed document's."""

    hidden_dim: int = flag(128, "units of a hidden layer")
    weight_decay: float = 1e-2

    def check(self) -> None:
        """Raise a `UserError` that names the first flag whose value makes no sense."""
        check_counts(self, ("hidden_dim",), 1)
        check_loop(self)


@dataclass(frozen=True, kw_only=True)
class EstimatorOptions(FitOptions):
    """Options of training the latency estimator.

    Attributes:
        loss: `log` is the quantile loss of log-latencies; `mse` is the seed document's squared error in
            milliseconds for the median, and the quantile loss in milliseconds for the levels above it.
    """

    lr: float = flag(1e-3, "learning rate at the start")
    hidden_dim: int = flag(64, "units of a hidden layer")
    weight_decay: float = 1e-4
    num_layers: int = flag(2, "hidden layers")
    loss: str = flag("log", "log: quantile loss of log-latency; mse: squared error in ms")

    def check(self) -> None:
        """Raise a `UserError` that names the first flag whose value makes no sense."""
        FitOptions.check(self)
        check_counts(self, ("num_layers",), 1)
        check_choice("loss", self.loss, ESTIMATOR_LOSSES)


@dataclass(frozen=True, kw_only=True)
class GrpoOptions(LoopOptions):
    """Options of GRPO, named as in trl 1.16, except for the KL term (`lab/grpo/algorithm.py`).

    Attributes:
        num_generations: choices drawn for a question and a budget; also called group size.
        num_iterations: gradient steps on the same draws. From the second one on the policy differs from the one
            that drew, so the ratio and its clipping matter.
        epsilon: how far the ratio of new to old probability may pay off on either side of 1.
        beta: weight of KL(policy ‖ reference), where the reference is the policy at the start of the training; 0
            leaves it out.
        scale_rewards: divisor of a reward less its group's mean: the standard deviation of the `group`,
            that of the whole `batch`, or `none`. Dividing by the group's makes questions count most whose answers
            differ least, for which the Dr. GRPO paper (Liu et al. 2025, arXiv 2503.20783) takes `none`.
        loss_type: how the losses of an episode's actions become one: `grpo` divides by their number, `dr_grpo` by
            a constant, the most that there can be. There is one action to an episode here, so both are the mean
            over the choices. Neither says anything about scaling: all of the Dr. GRPO paper is `dr_grpo` with
            `scale_rewards` none.
        entropy_coef: weight of the policy's entropy, which is added to what is maximised.
        alpha, penalty, time_price: weights of the reward's accuracy, of its overshoot and of the share of the
            budget that is used.
        accuracy_source: `table` looks accuracies up, `online` runs the model at the settings that are drawn.
        mask_infeasible: draw only from the settings that the guard would allow, as it will be when serving (the
            gradient stays unbiased: Huang and Ontañón 2022, arXiv 2006.14171). Without it the reward's penalty
            has to teach what fits, and it does not forbid: being late by a fifth of the budget costs 0.1, which a
            better answer outweighs, so the policy learns to prefer what the guard will then refuse. With it the
            penalty is all but never earned, and time is learned only where the mask leaves a choice; on a machine
            that was not calibrated, where nothing is masked, such a policy is not to be relied upon. Reports give
            the adherence with and without the mask.
        warm_start: epochs of regression on the rewards of all settings before the first draw; None is `WARM_START`
            where a table has them, else none. More fit the noise of single answers.
        warm_start_values: the accuracies in those rewards. `smoothed` ones are free of what each answer happened
            to be; GRPO goes by the answers themselves.
        batch_size: questions of a batch, each with a budget and a group of choices.
        tier_exploration: share of the draws whose tier is drawn evenly from outside, of a policy that does not
            learn it.
    """

    num_generations: int = flag(
        5, "settings drawn for a question and a budget", "--group_size", "--num_generations"
    )
    num_iterations: int = flag(2, "gradient steps on the same draws")
    epsilon: float = flag(0.2, "how far from 1 the ratio of new to old probability may pay off")
    beta: float = flag(0.0, "weight of KL(policy || start), summed over all settings")
    scale_rewards: str = flag("group", "whose spread rewards are divided by: group, batch or none")
    loss_type: str = flag(
        "grpo",
        "grpo or dr_grpo, as in trl: how a choice's actions are averaged, which is the same for its one action; "
        "both divide rewards as --scale_rewards says, and the Dr. GRPO paper's is --scale_rewards none",
    )
    entropy_coef: float = flag(0.01, "weight of the policy's entropy, which is maximised too")
    alpha: float = flag(1.0, "weight of accuracy in the reward")
    penalty: float = flag(0.5, "weight of lateness in the reward")
    time_price: float = flag(0.0, "accuracy that using the whole budget costs")
    accuracy_source: str = flag(
        "table", "where accuracy comes from: table, or online to run the model at what is drawn"
    )
    mask_infeasible: bool = flag(True, "draw only settings that the guard would allow")
    warm_start: int | None = flag(
        None,
        "epochs of regression on the rewards of all settings before GRPO; default: "
        f"{WARM_START}, or 0 with --accuracy_source online",
    )
    warm_start_values: str = flag(
        LABELS[0],
        "accuracies that it regresses: smoothed over like training questions, or literal, the question's own",
    )
    batch_size: int = flag(32, "questions of a batch")
    num_epochs: int = flag(100, "passes over the training questions")
    tier_exploration: float = 0.0

    @property
    def regression_epochs(self) -> int:
        """Epochs of the warm start."""
        if self.warm_start is not None:
            return self.warm_start
        return WARM_START if self.accuracy_source == "table" else 0

    def record(self) -> dict[str, Any]:
        """Return all options as plain values, the warm start as it is done."""
        return asdict(self) | {"warm_start": self.regression_epochs}

    def check(self) -> None:
        """Raise a `UserError` that names the first flag whose value makes no sense."""
        if self.num_generations < 2:
            raise UserError(f"--group_size {self.num_generations}: must be at least 2, or nothing is compared")
        check_counts(self, ("num_iterations",), 1)
        if not 0 < self.epsilon < 1:
            raise UserError(f"--epsilon {self.epsilon}: must lie between 0 and 1")
        check_counts(self, ("beta", "entropy_coef", "alpha", "penalty", "time_price"), 0)
        if self.regression_epochs < 0:
            raise UserError(f"--warm_start {self.warm_start}: must be at least 0")
        check_choice("scale_rewards", self.scale_rewards, SCALES)
        check_choice("loss_type", self.loss_type, LOSS_TYPES)
        check_choice("accuracy_source", self.accuracy_source, ACCURACY_SOURCES)
        check_choice("warm_start_values", self.warm_start_values, LABELS)
        check_loop(self)
        if not 0 <= self.tier_exploration <= 1:
            raise UserError(f"--tier_exploration {self.tier_exploration}: must lie between 0 and 1")
        if self.warm_start and self.accuracy_source != "table":
            raise UserError("--warm_start: needs the accuracies of all settings; leave --accuracy_source as it is")


@dataclass(frozen=True, kw_only=True)
class DeviceFlags:
    """Flags of every script that computes."""

    device: str = flag("auto", "auto, cpu, cuda or cuda:N")


@dataclass(frozen=True, kw_only=True)
class ModelFlags(DeviceFlags):
    """Flags of every script that runs a model."""

    model_path: str = required("pocket, a model folder, or a hub id")


@dataclass(frozen=True, kw_only=True)
class DataDirFlags:
    """Flags of every script that looks at pictures."""

    data_dir: Path | None = flag(None, "folder of the data sets; default: the one in the cache directory")


@dataclass(frozen=True, kw_only=True)
class DataFlags(DataDirFlags):
    """Flags of every script that asks about pictures."""

    datasets: Sequence[str] = required("data sets, or files of your own questions", "--dataset_names")


@dataclass(frozen=True, kw_only=True)
class SupervisedFlags:
    """Flags of Exp 2.

    Attributes:
        profiling_results: files of Exp 7; of several data sets the mean by their number of questions is taken.
        latency_quantile: which total of a setting must fit the budget; a budget is a promise, so a high one.
        num_budgets: neighbours of 20 000 are 0.02 % apart where the range is a factor of 50.
    """

    profiling_results: Sequence[Path] = required("profiling_results.json of Exp 7")
    output_dir: Path = required("folder of the checkpoint, the report and the log")
    train_split: float = flag(0.8, "share of the budgets to learn from")
    num_budgets: int = flag(20_000, "budgets drawn, log-uniformly over the feasible range")
    latency_quantile: str = flag("p95", "total that must fit a budget: mean, p50, p95 or p99")


@dataclass(frozen=True, kw_only=True)
class ResultsFlags:
    """Flags of every training on results of the core experiment."""

    results_dirs: Sequence[Path] = required("results of the core experiment", "--results_dir")
    datasets: Sequence[str] = required("data sets", "--dataset_names")
    output_dir: Path = required("folder of the checkpoint, the report, the log and the figures")
    train_split: float = flag(0.8, "share of the pictures to learn from")


@dataclass(frozen=True, kw_only=True)
class EstimatorFlags(ResultsFlags):
    """Flags of Exp 1."""

    max_samples: int | None = flag(None, "rows at most, drawn at random; default: all")
    transfer_dirs: Sequence[Path] = flag((), "results of another device to move to", "--transfer_results_dir")


@dataclass(frozen=True, kw_only=True)
class LearningFlags(ResultsFlags, DataDirFlags):
    """Flags of Exp 3, 4 and 5."""

    latency_estimator_path: Path | None = flag(None, "checkpoint of Exp 1; default: measured latencies")


@dataclass(frozen=True, kw_only=True)
class FirstStageFlags(LearningFlags):
    """Flags of Exp 3.

    Attributes:
        test_results_dirs: of questions about other pictures, which join the test part.
        knob1_label: the label is the tier of the best setting that fits, the cheaper of equals. `smoothed` goes by
            the accuracies that training questions of the kind lead to expect, as the decision rule does. `literal`
            goes by the question's own answers: where a low tier is right on most questions it is the most
            frequent label, even if a higher one is right more often.
        knob1_loss: `label` is the seed document's cross-entropy of the label. `value` fits the logits to what each
            tier's usual best setting is worth.
        time_price: accuracy that the whole budget is worth, with `value`; as in the reward of GRPO.
    """

    test_results_dirs: Sequence[Path] = flag((), "results of more pictures to test on", "--test_results_dir")
    knob1_variant: str = flag("language", "inputs of stage1: budget, language or glance")
    knob1_loss: str = flag(
        "label", "target of stage1: label, the best setting's tier, or value, each tier's worth"
    )
    knob1_label: str = flag(
        LABELS[0],
        "accuracy by which a label's setting is best: smoothed over like training questions, or literal, the "
        "question's own",
    )
    budgets_per_question: int = flag(8, "budgets that stage1 draws for a question in an epoch")
    time_price: float = flag(GrpoOptions.time_price, "accuracy that using the whole budget costs")


@dataclass(frozen=True, kw_only=True)
class GrpoFlags(LearningFlags):
    """Flags of Exp 4 and 5."""

    hidden_dim: int = flag(FitOptions.hidden_dim, "units of a hidden layer")


@dataclass(frozen=True, kw_only=True)
class SecondStageFlags(GrpoFlags):
    """Flags of Exp 4."""

    stage1_checkpoint: Path | None = flag(None, "first stage for stage2; default: that in --output_dir")


@dataclass(frozen=True, kw_only=True)
class JointFlags(GrpoFlags):
    """Flags of Exp 5.

    Attributes:
        architecture: the first two score settings by GRPO. `accuracy` has an ensemble of all seeds expect each
            setting's accuracy by regression alone, so it takes `warm_start`, `seeds` and the sizes alone.
    """

    architecture: str = flag(
        "two_stage", "network: two_stage, llm_based, or accuracy, an ensemble that learns by regression alone"
    )
    num_llm_blocks: int = flag(2, "blocks of the model that the LLM-based controller runs")
    compare_with: Path | None = flag(None, "checkpoint of Exp 4 to judge beside it")


@dataclass(frozen=True, kw_only=True)
class QueueFlags:
    """Flags of Exp 5 in a queue.

    Attributes:
        exploration: standard deviation of what is added to a logit in each direction that is learned.
    """

    arrivals: str | None = flag(
        None, "queue: trace FILE.csv whose first half is learned from and second half judged; poisson or bursts"
    )
    loads: Sequence[float] = flag((0.5, 1.0, 1.7), "queue: arrivals over what the lane answers at native")
    budgets_ms: Sequence[float] = flag((), "queue: budgets in ms; default: 2 x the native median")
    episode_length: int = flag(96, "queue: requests of an episode")
    exploration: float = flag(0.2, "queue: spread of the corrections that are drawn")

    def check_queue(self) -> None:
        """Raise a `UserError` that names the first of these flags whose value makes no sense."""
        if self.arrivals is None:
            raise UserError("--arrivals: the queue needs a trace FILE.csv, poisson or bursts")
        for name in ("loads", "budgets_ms"):
            if wrong := [value for value in getattr(self, name) if not 0 < value < math.inf]:
                raise UserError(f"--{name} {wrong[0]:g}: must be a positive number")
        check_counts(self, ("episode_length",), 2)
        if not 0 < self.exploration < math.inf:
            raise UserError(f"--exploration {self.exploration:g}: must be a positive number")


@dataclass(frozen=True, kw_only=True)
class AdaptiveFlags(DataDirFlags):
    """Flags of Exp 8, whose data sets are mixed in equal parts."""

    controller: str = flag(
        "auto",
        "checkpoint of any controller; or auto, table or fixed; or module:Class or file.py:Class of your own",
        "--controller_path",
        "--policy",
    )
    datasets: tuple[str, ...] = flag(("text_vqa",), "data sets or files of your own, in equal parts", "--dataset")
    num_samples: int = flag(100, "questions in all; each is answered at every budget")
    budgets_ms: tuple[float, ...] = flag((200.0,), "one or several budgets in milliseconds", "--latency_budget")
    on_deadline: Literal["finish", "stop"] = flag("finish", "finish a late answer, or stop it")
    max_new_tokens: int = flag(16, "most tokens of an answer")
    seed: int = flag(42, "seed of the choice of questions and of the order of the budgets", read=read_seed)
