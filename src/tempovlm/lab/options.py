"""Options of the controllers' trainings, from which the scripts take flags, defaults and help. Loads no torch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tempovlm.core.errors import UserError
from tempovlm.lab.script import flag

SCHEDULES = ("cosine", "constant")
SCALES = ("group", "batch", "none")
LOSS_TYPES = ("grpo", "dr_grpo")
ACCURACY_SOURCES = ("table", "online")


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


@dataclass(frozen=True, slots=True, kw_only=True)
class FitOptions:
    """Options of training on labels; the first three defaults are the seed document's."""

    batch_size: int = 64
    num_epochs: int = 50
    lr: float = 1e-4
    hidden_dim: int = 128
    weight_decay: float = 1e-2
    grad_accum: int = 1
    lr_schedule: str = "cosine"
    seed: int = 42
    device: str = "cpu"

    def check(self) -> None:
        """Raise a `UserError` that names the first flag whose value makes no sense."""
        check_counts(self, ("hidden_dim",), 1)
        check_loop(self)


@dataclass(frozen=True, slots=True, kw_only=True)
class GrpoOptions:
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
        warm_start: epochs of regression on the rewards of all settings before the first draw.
        batch_size: questions of a batch, each with a budget and a group of choices.
        tier_exploration: share of the draws whose tier is drawn evenly from outside, of a policy that does not
            learn it.
    """

    num_generations: int = flag(5, "settings drawn for a question", "--group_size", "--num_generations")
    num_iterations: int = flag(2, "steps on the same draws")
    epsilon: float = flag(0.2, "how far the ratio of probabilities may pay off")
    beta: float = flag(0.0, "weight of KL(policy || start), summed over all settings")
    scale_rewards: str = flag("group", "whose spread rewards are divided by: group, batch or none")
    loss_type: str = flag(
        "grpo",
        "grpo or dr_grpo, as in trl: how a choice's actions are averaged, which is the same for its one action; "
        "both divide rewards as --scale_rewards says, and the Dr. GRPO paper's is --scale_rewards none",
    )
    entropy_coef: float = flag(0.01, "weight of the entropy")
    alpha: float = flag(1.0, "weight of accuracy in the reward")
    penalty: float = flag(0.5, "weight of lateness; the seed document's beta")
    time_price: float = flag(0.0, "weight of the share of the budget that is used")
    accuracy_source: str = flag("table", "table, or online: run the model at what is drawn")
    mask_infeasible: bool = flag(True, "draw what the guard would allow")
    warm_start: int = flag(0, "epochs of regression on all rewards before GRPO")
    grad_accum: int = flag(1, "batches to a step")
    lr_schedule: str = flag("cosine", "cosine or constant")
    batch_size: int = 32
    num_epochs: int = 100
    lr: float = 1e-4
    seed: int = 42
    device: str = "cpu"
    tier_exploration: float = 0.0

    def check(self) -> None:
        """Raise a `UserError` that names the first flag whose value makes no sense."""
        if self.num_generations < 2:
            raise UserError(f"--group_size {self.num_generations}: must be at least 2, or nothing is compared")
        check_counts(self, ("num_iterations",), 1)
        if not 0 < self.epsilon < 1:
            raise UserError(f"--epsilon {self.epsilon}: must lie between 0 and 1")
        check_counts(self, ("beta", "entropy_coef", "alpha", "penalty", "time_price", "warm_start"), 0)
        check_choice("scale_rewards", self.scale_rewards, SCALES)
        check_choice("loss_type", self.loss_type, LOSS_TYPES)
        check_choice("accuracy_source", self.accuracy_source, ACCURACY_SOURCES)
        check_loop(self)
        if not 0 <= self.tier_exploration <= 1:
            raise UserError(f"--tier_exploration {self.tier_exploration}: must lie between 0 and 1")
        if self.warm_start and self.accuracy_source != "table":
            raise UserError("--warm_start: needs the accuracies of all settings; leave --accuracy_source as it is")


LoopOptions = FitOptions | GrpoOptions
"""Options of every training: `cosine` as `lr_schedule` ends at zero, `grad_accum` batches make one step."""
