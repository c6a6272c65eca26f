"""Group-relative policy optimisation of one choice among settings: advantages and the loss, as pure functions.

For every question and budget the policy draws a group of settings; what counts is how much better each is than its
group (DeepSeekMath, Shao et al. 2024, arXiv 2402.03300). There is one action to an episode: its log-probability is
that of the whole setting, the sum over the knobs that were drawn. Option names are trl's and mean what they do in
trl 1.16, but for the KL term, which is summed over all settings and not estimated. Defaults are this project's.
Knows no network.

Shapes: `B` groups (a question with a budget), `G` choices of a group, `K` settings.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from tempovlm.core.errors import UserError
from tempovlm.training.reward import ALPHA, PENALTY, TIME_PRICE

SCALES = ("group", "batch", "none")
LOSS_TYPES = ("grpo", "dr_grpo")
ACCURACY_SOURCES = ("table", "online")

_STD_FLOOR = 1e-4
"""Added to a standard deviation, as trl does."""

_NO_SPREAD = 1e-6
"""Rewards of a group that differ by no more are taken as equal."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GrpoOptions:
    """What is optimised, by trl's names.

    Attributes:
        num_generations: choices drawn for a question and a budget; also called group size.
        num_iterations: gradient steps on the same draws. From the second one on the policy differs from the one
            that drew, so the ratio and its clipping matter.
        epsilon: how far the ratio of new to old probability may pay off on either side of 1.
        beta: weight of KL(policy ‖ reference), where the reference is the policy at the start of the training; 0
            leaves it out.
        scale_rewards: what a reward less its group's mean is divided by: the standard deviation of the `group`,
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
    """

    num_generations: int = 5
    num_iterations: int = 2
    epsilon: float = 0.2
    beta: float = 0.0
    scale_rewards: str = "group"
    loss_type: str = "grpo"
    entropy_coef: float = 0.01
    alpha: float = ALPHA
    penalty: float = PENALTY
    time_price: float = TIME_PRICE
    accuracy_source: str = "table"
    mask_infeasible: bool = True

    @property
    def weights(self) -> dict[str, float]:
        """The reward's."""
        return {name: getattr(self, name) for name in ("alpha", "penalty", "time_price")}

    @property
    def group_size(self) -> int:
        """The seed document's name for the number of generations."""
        return self.num_generations

    def check(self) -> None:
        """Raise a `UserError` that names the first flag whose value makes no sense."""
        if self.num_generations < 2:
            raise UserError(f"--group_size {self.num_generations}: must be at least 2, or nothing is compared")
        if self.num_iterations < 1:
            raise UserError(f"--num_iterations {self.num_iterations}: must be at least 1")
        if not 0 < self.epsilon < 1:
            raise UserError(f"--epsilon {self.epsilon}: must lie between 0 and 1")
        for name in ("beta", "entropy_coef", "alpha", "penalty", "time_price"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= 0):
                raise UserError(f"--{name} {value}: must be a number of at least 0")
        for name, legal in (
            ("scale_rewards", SCALES),
            ("loss_type", LOSS_TYPES),
            ("accuracy_source", ACCURACY_SOURCES),
        ):
            if getattr(self, name) not in legal:
                raise UserError(f"--{name} {getattr(self, name)}: choose from {', '.join(legal)}")


def advantages(rewards: Tensor, scale_rewards: str = "group") -> Tensor:
    """(B, G) rewards less their group's mean, divided as `scale_rewards` says; a group without spread gets zeros.

    Standard deviations are those of a sample (divided by their count less one), as in trl. A choice is part of the
    mean that it is compared with, so without scaling the gradient's expectation is (G - 1) / G of that of the mean
    reward's.

    Raises:
        ValueError: an unknown scale.
    """
    if scale_rewards not in SCALES:
        raise ValueError(f"scale_rewards {scale_rewards!r}: choose from {', '.join(SCALES)}")
    # Means of equal numbers differ from them by rounding, which a division by almost nothing would blow up.
    has_spread = rewards.amax(dim=1, keepdim=True) - rewards.amin(dim=1, keepdim=True) > _NO_SPREAD
    centred = torch.where(has_spread, rewards - rewards.mean(dim=1, keepdim=True), torch.zeros_like(rewards))
    if scale_rewards == "group":
        return centred / (rewards.std(dim=1, keepdim=True) + _STD_FLOOR)
    if scale_rewards == "batch":
        return centred / (rewards.std() + _STD_FLOOR)
    return centred


@dataclass(frozen=True, slots=True)
class GrpoLoss:
    """Scalars: the loss with its gradient, and what to watch, detached.

    Attributes:
        clip_fraction: share of choices whose ratio is clipped, so that they give no gradient.
        kl: mean of KL(policy ‖ reference); 0 where `beta` is.
        flat_groups: share of groups without any advantage.
        ratio: mean of new over old probability.
    """

    loss: Tensor
    clip_fraction: Tensor
    kl: Tensor
    flat_groups: Tensor
    ratio: Tensor


def kl_divergence(log_probs: Tensor, ref_log_probs: Tensor) -> Tensor:
    """KL(policy ‖ reference), (B,) in nats, of distributions (B, K); a setting without probability adds nothing.

    The sum over all settings, which are few, so that value and gradient are exact whoever drew the choices. The
    estimate by the choices themselves, k3 of J. Schulman, "Approximating KL divergence", 2020 (equation 4 of
    DeepSeekMath, arXiv 2402.03300), has the right mean only at draws from this very policy, and its gradient is
    there on average that of KL(reference ‖ policy): it leaves out that the policy says how likely they are.
    trl 1.16 repairs that by a factor, the ratio of new to old probability (arXiv 2512.02556).

    Args:
        log_probs: of the policy that learns; what is masked is so low that its probability is 0.
        ref_log_probs: of the reference under the same mask, constants.
    """
    probabilities = log_probs.exp()
    log_ratio = torch.where(probabilities > 0, log_probs - ref_log_probs.detach(), 0.0)
    return (probabilities * log_ratio).sum(dim=1)


def grpo_loss(
    log_probs: Tensor,
    old_log_probs: Tensor,
    advantages: Tensor,
    options: GrpoOptions,
    divergence: Tensor | None = None,
    entropy: Tensor | None = None,
) -> GrpoLoss:
    """The clipped surrogate, negated, with the KL term and the entropy bonus.

    Args:
        log_probs: (B, G) of the settings that were drawn, under the policy that learns.
        old_log_probs: (B, G) under the policy that drew them.
        advantages: (B, G) constants.
        options: clip range and weights.
        divergence: (B,) of the policy from the reference; needed where `options.beta` is not 0.
        entropy: (B,) of the policy; needed where `options.entropy_coef` is not 0.

    Raises:
        ValueError: what a weight needs is missing.
    """
    ratio = (log_probs - old_log_probs.detach()).exp()
    clipped = ratio.clamp(1 - options.epsilon, 1 + options.epsilon)
    loss = -torch.minimum(ratio * advantages, clipped * advantages).mean()
    kl = log_probs.new_zeros(())
    if options.beta:
        if divergence is None:
            raise ValueError("beta is not 0: the divergence from the reference is needed")
        kl = divergence.mean()
        loss = loss + options.beta * kl
    if options.entropy_coef:
        if entropy is None:
            raise ValueError("entropy_coef is not 0: the policy's entropy is needed")
        loss = loss - options.entropy_coef * entropy.mean()
    too_good = (ratio > 1 + options.epsilon) & (advantages > 0)
    too_bad = (ratio < 1 - options.epsilon) & (advantages < 0)
    return GrpoLoss(
        loss=loss,
        clip_fraction=(too_good | too_bad).float().mean(),
        kl=kl.detach(),
        flat_groups=(advantages == 0).all(dim=1).float().mean(),
        ratio=ratio.detach().mean(),
    )
