"""A policy's start before GRPO: its logits are fitted to what every setting was worth, where a table knows that.

GRPO sees the few settings that it draws; where the rewards of all settings are known, regression uses each of them
and has no noise of drawing. The target is the optimum of a policy whose entropy is rewarded: log-probabilities are
rewards over a temperature, up to a constant for each question (Z. Haarnoja et al., Soft Q-learning, 2017, arXiv
1702.08165, equation 4). GRPO goes on from there. Nothing is masked: what fits is the guard's business, and what
the mask leaves differs from question to question.

Shapes: `B` questions under budgets, `K` settings.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from tempovlm.core.progress import progress_bar
from tempovlm.training.grpo import GrpoOptions
from tempovlm.training.rollout import MASKED, Actor, Batch, DrawBudgets, World, every_reward

TEMPERATURE = 0.1
"""Reward that a factor of e in probability stands for."""

BUDGETS_PER_QUESTION = 4
BATCH_SIZE = 64
LR, WEIGHT_DECAY = 2e-3, 0.05


def warm_start(
    policy: nn.Module,
    world: World,
    rows: np.ndarray,
    draw: DrawBudgets,
    options: GrpoOptions,
    *,
    epochs: int,
    seed: int,
    explore_tiers: bool = False,
) -> None:
    """Fit a policy in place to the rewards of all settings; it ends in evaluation mode.

    Args:
        policy: an `Actor` with weights to learn.
        world: with accuracies of all settings.
        rows: questions of the training.
        draw: budgets for them, new in every epoch.
        options: of the reward.
        epochs: passes over the questions.
        seed: of order, budgets and dropout.
        explore_tiers: draw tiers evenly from outside, for a policy that does not learn them.
    """
    weights = [one for one in policy.parameters() if one.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=LR, weight_decay=WEIGHT_DECAY)
    steps = epochs * -(-len(rows) * BUDGETS_PER_QUESTION // BATCH_SIZE)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    policy.train()
    with torch.random.fork_rng(), progress_bar("warm start") as advance:
        torch.manual_seed(seed)
        for epoch in range(epochs):
            rng = np.random.default_rng([seed, epoch, 1])
            every = rng.permutation(np.repeat(rows, BUDGETS_PER_QUESTION))
            budgets = torch.as_tensor(draw(every, rng), dtype=torch.float64)
            for some, budget_ms in zip(
                torch.as_tensor(every).split(BATCH_SIZE), budgets.split(BATCH_SIZE), strict=True
            ):
                tiers = torch.as_tensor(rng.integers(len(world.space.tiers), size=len(some)))
                left_ms = world.left_ms(some, budget_ms)
                batch = Batch(some, budget_ms, left_ms, tiers=tiers if explore_tiers else None)
                value_loss(policy, world, batch, options).backward()
                optimizer.step()
                optimizer.zero_grad()
                schedule.step()
            advance(epoch + 1, epochs)
    policy.eval()


def value_loss(policy: Actor, world: World, batch: Batch, options: GrpoOptions) -> Tensor:
    """Mean squared error of the log-probabilities, times the temperature, as rewards less their question's mean.

    Where a tier was chosen from outside, only its settings are compared.
    """
    log_probs = policy(batch)
    rewards = every_reward(world, batch, options).to(log_probs)
    counts = (log_probs > MASKED / 2).to(log_probs)
    found, wanted = (_centred(values, counts) for values in (TEMPERATURE * log_probs, rewards))
    return (((found - wanted) ** 2 * counts).sum(dim=1) / counts.sum(dim=1)).mean()


def _centred(values: Tensor, counts: Tensor) -> Tensor:
    """(B, K) less the mean of those that count."""
    return values - (values * counts).sum(dim=1, keepdim=True) / counts.sum(dim=1, keepdim=True)
