"""Group-relative policy optimisation (GRPO) of the choice among settings, top to bottom.

1. *Reward*: accuracy, less a penalty for the time beyond the budget and a price for the time within it.
2. *Draw*: for every question and budget the policy draws a group of settings, and each earns its reward.
3. *Loss*: each choice counts by how much better it is than its group (DeepSeekMath, Shao et al. 2024, arXiv
   2402.03300), clipped as in PPO, with a KL term and an entropy bonus. There is one action to an episode: its
   log-probability is that of the whole setting, the sum over the knobs that were drawn.
4. *Warm start*: regression on the rewards of all settings, where a table knows them.
5. *Training*: epochs of draws and steps, a validation after each, and a state file to resume from.

Policies are modules that give log-probabilities of settings (`actors.py`); questions, latencies and accuracies are
the environment's (`environment.py`); options and their defaults are in `lab/options.py`.

Shapes: `B` groups (a question with a budget), `G` choices of a group, `K` settings, `T` tiers.
"""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from tempovlm.control.checkpoint import read_tensors
from tempovlm.core.errors import UserError
from tempovlm.core.files import make_folder
from tempovlm.core.knobs import KnobSpace
from tempovlm.core.progress import progress_bar
from tempovlm.lab.fit import Training
from tempovlm.lab.grpo.environment import (
    MASKED,
    AccuracySource,
    Actor,
    Batch,
    Environment,
    OnlineAccuracy,
    TableAccuracy,
    Task,
)
from tempovlm.lab.log import logged
from tempovlm.lab.options import SCALES, GrpoOptions

STATE = "training_state.pt"
"""Beside the log; a training that is finished is not repeated."""

TEMPERATURE = 0.1
"""Reward that a factor of e in probability stands for, in a warm start."""

_STD_FLOOR = 1e-4
"""Added to a standard deviation, as trl does."""

_NO_SPREAD = 1e-6
"""Rewards of a group that differ by no more are taken as equal."""

_WARM_BUDGETS, _WARM_BATCH, _WARM_LR, _WARM_DECAY = 4, 64, 2e-3, 0.05
"""Options of a warm start: budgets of a question in an epoch, batch size, learning rate and weight decay."""

_log = logging.getLogger("tempovlm")


# 1. Reward


def reward(accuracy: Tensor, latency_ms: Tensor, budget_ms: Tensor, options: GrpoOptions) -> Tensor:
    """Return (B, G) rewards of (B, G) accuracies from 0 to 1 and latencies under (B,) budgets.

    reward = alpha · accuracy - penalty · max(0, latency - budget) / budget - time_price · latency / budget

    The first two terms are the seed document's, which calls the penalty's weight beta; here beta is what GRPO and
    trl call beta, the weight of the KL term. They leave time within the budget free, so that all of it is worth
    spending on the smallest gain. With a price, an answer that is as good but earlier is better.

    Raises:
        ValueError: a budget is not a positive number.
    """
    if not bool((budget_ms > 0).all()):
        raise ValueError("budgets must be positive numbers of milliseconds")
    budget_ms = budget_ms.unsqueeze(-1)
    late = options.penalty * ((latency_ms - budget_ms).clamp(min=0) / budget_ms)
    return options.alpha * accuracy - late - options.time_price * latency_ms / budget_ms


def every_reward(
    env: Environment, batch: Batch, options: GrpoOptions, accuracy: AccuracySource | None = None
) -> Tensor:
    """Return (B, K) rewards of all settings, by the environment's accuracies or by others."""
    every = torch.arange(len(env.space)).expand(len(batch.rows), -1)
    found = (accuracy or env.accuracy)(batch.rows, every)
    return reward(found, env.latency_ms[batch.rows], batch.budget_ms, options)


# 2. Draw


@dataclass(frozen=True, eq=False, slots=True)
class Rollout:
    """Groups that were drawn: all (B, G) but the batch, on the CPU."""

    batch: Batch
    settings: Tensor
    log_probs: Tensor
    accuracy: Tensor
    latency_ms: Tensor
    rewards: Tensor

    @property
    def in_time(self) -> Tensor:
        """Whether each answer took no longer than its budget."""
        return self.latency_ms <= self.batch.budget_ms.unsqueeze(1)


def sound(log_probs: Tensor) -> Tensor:
    """The log-probabilities (B, K) themselves.

    Raises:
        UserError: they are no numbers, because the policy's weights are not.
    """
    if bool(torch.isnan(log_probs).any()):
        raise UserError("--lr: the training diverged, the controller's outputs are no numbers; give a smaller one")
    return log_probs


@torch.no_grad()
def roll_out(
    actor: Actor, env: Environment, batch: Batch, options: GrpoOptions, generator: torch.Generator
) -> Rollout:
    """Draw a group of settings, with replacement, for every question, and look up their rewards."""
    log_probs = sound(actor(batch))
    settings = torch.multinomial(
        log_probs.exp().cpu(), options.num_generations, replacement=True, generator=generator
    )
    return outcome(env, batch, settings, chosen_log_probs(log_probs, settings).cpu(), options)


def chosen_log_probs(log_probs: Tensor, settings: Tensor) -> Tensor:
    """(B, G) of the settings that were drawn, from those of all settings (B, K)."""
    return log_probs.gather(1, settings.to(log_probs.device))


def outcome(env: Environment, batch: Batch, settings: Tensor, log_probs: Tensor, options: GrpoOptions) -> Rollout:
    """Look up accuracy, latency and reward of settings (B, G)."""
    accuracy = env.accuracy(batch.rows, settings).double()
    latency_ms = env.latency_ms[batch.rows.unsqueeze(1), settings]
    rewards = reward(accuracy, latency_ms, batch.budget_ms, options)
    return Rollout(batch, settings, log_probs, accuracy, latency_ms, rewards)


def entropy(log_probs: Tensor) -> Tensor:
    """(B,) of distributions (B, K), in nats."""
    return -(log_probs.exp() * log_probs).sum(dim=1)


# 3. Loss


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


# 4. Warm start


def warm_start(policy: nn.Module, task: Task, options: GrpoOptions) -> None:
    """Fit a policy in place to the expected rewards of all settings; ends in evaluation mode.

    GRPO sees the few settings that it draws; where the rewards of all settings are known, regression uses each of
    them and has no noise of drawing. The target is the optimum of a policy whose entropy is rewarded:
    log-probabilities are rewards over a temperature, up to a constant for each question (Haarnoja et al. 2017,
    Soft Q-learning, arXiv 1702.08165, equation 4). Nothing is masked: what fits is the guard's business, and what
    the mask leaves differs from question to question. A policy that does not learn tiers gets them from outside.
    """
    env, rows, epochs = task.env, np.repeat(task.rows, _WARM_BUDGETS), options.regression_epochs
    learned = [one for one in policy.parameters() if one.requires_grad]
    optimizer = torch.optim.AdamW(learned, lr=_WARM_LR, weight_decay=_WARM_DECAY)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * math.ceil(len(rows) / _WARM_BATCH))
    policy.train()
    with torch.random.fork_rng(), progress_bar("warm start") as advance:
        torch.manual_seed(options.seed)
        for epoch in range(epochs):
            rng = np.random.default_rng([options.seed, epoch, 1])
            for some, budget_ms in _batches(task, rng.permutation(rows), rng, _WARM_BATCH):
                tiers = torch.as_tensor(rng.integers(len(env.space.tiers), size=len(some)))
                batch = env.batch(some, budget_ms, mask=False, tiers=tiers if options.tier_exploration else None)
                value_loss(policy, env, batch, options).backward()
                optimizer.step()
                optimizer.zero_grad()
                schedule.step()
            advance(epoch + 1, epochs)
    policy.eval()


def _batches(
    task: Task, rows: NDArray[np.int64], rng: np.random.Generator, size: int
) -> list[tuple[Tensor, Tensor]]:
    """Split questions, and new budgets for them, into batches."""
    budgets = torch.as_tensor(task.draw(rows, rng), dtype=torch.float64)
    return list(zip(torch.as_tensor(rows).split(size), budgets.split(size), strict=True))


def value_loss(policy: Actor, env: Environment, batch: Batch, options: GrpoOptions) -> Tensor:
    """Mean squared error of the log-probabilities, times the temperature, as expected rewards less their mean.

    Where a tier was chosen from outside, only its settings are compared.
    """
    log_probs = policy(batch)
    rewards = every_reward(env, batch, options, env.expected).to(log_probs)
    counts = (log_probs > MASKED / 2).to(log_probs)
    found, wanted = (_centred(values, counts) for values in (TEMPERATURE * log_probs, rewards))
    return (((found - wanted) ** 2 * counts).sum(dim=1) / counts.sum(dim=1)).mean()


def _centred(values: Tensor, counts: Tensor) -> Tensor:
    """(B, K) less the mean of those that count."""
    return values - (values * counts).sum(dim=1, keepdim=True) / counts.sum(dim=1, keepdim=True)


# 5. Training


def train(policy: nn.Module, task: Task, folder: Path, title: str) -> GrpoTraining:
    """Train in place; the policy ends with the weights of the epoch whose validation reward was highest.

    Raises:
        UserError: the training diverges, the folder cannot be written, or it holds a training under other
            conditions that was interrupted. The caller holds it (`core.files.writing_to`).
    """
    task.options.check()
    if (task.options.loss_type, task.options.scale_rewards) == ("dr_grpo", "group"):
        _log.warning(
            "--loss_type dr_grpo divides by the group's spread, which its paper does not; add --scale_rewards "
            "none for what the paper does"
        )
    make_folder(folder)
    training = GrpoTraining(policy, task)
    training.resume(folder / STATE)
    if training.epoch == 0:
        training.begin()
    training.run(folder / STATE, title)
    return training


class GrpoTraining(Training):
    """A training by rewards; epoch 0 is best where none was better than the start.

    GRPO begins at `start_reward`; `untrained_reward` is what the policy reached before a warm start.
    """

    def __init__(self, policy: nn.Module, task: Task) -> None:
        super().__init__(policy, task.options)
        self.task, self.options = task, task.options
        self.reference = copy.deepcopy(policy).requires_grad_(False) if task.options.beta else None
        self.start_reward = self.untrained_reward = -math.inf

    def begin(self) -> None:
        """Validate, and make the warm start and the reference, before the first epoch."""
        self.start_reward = self.untrained_reward = self.validate()["reward"]
        if self.options.regression_epochs:
            warm_start(self.net, self.task, self.options)
            self.start_reward = self.validate()["reward"]
        if self.reference is not None:
            self.reference = copy.deepcopy(self.net).requires_grad_(False)

    def train_epoch(self) -> dict[str, Any]:
        """Draw, step and validate; return the epoch's record."""
        options, accum = self.options, self.options.grad_accum
        # No dropout: it would make the policy that learns another one than the policy that drew.
        self.net.eval()
        rng = np.random.default_rng([options.seed, self.epoch])
        generator = torch.Generator().manual_seed(int(rng.integers(2**31)))
        batches = _batches(self.task, rng.permutation(self.task.rows), rng, options.batch_size)
        draws = math.ceil(len(batches) / accum)
        seen: list[Rollout] = []
        watched: list[dict[str, Tensor]] = []
        for i in range(draws):
            some = [self.draw(*batch, generator) for batch in batches[i * accum : (i + 1) * accum]]
            seen += some
            groups = sum(len(one.settings) for one in some)
            for _ in range(options.num_iterations):
                watched += [self.backward(one, groups) for one in some]
                self.step(((self.epoch - 1) * draws + i) / (draws * options.num_epochs))
        means = {name: float(torch.stack([one[name] for one in watched]).mean()) for name in watched[0]}
        record = {"epoch": self.epoch, "lr": self.lr(self.epoch / options.num_epochs), **means}
        return {**record, "train": measures(self.task.env, seen), "val": self.validate()}

    def draw(self, rows: Tensor, budget_ms: Tensor, generator: torch.Generator) -> Rollout:
        """Draw a batch's groups, some of them at a tier drawn from outside."""
        env, share = self.task.env, self.options.tier_exploration
        tiers = None
        if share:
            drawn = torch.randint(len(env.space.tiers), rows.shape, generator=generator)
            tiers = torch.where(torch.rand(rows.shape, generator=generator) < share, drawn, -1)
        batch = env.batch(rows, budget_ms, mask=self.options.mask_infeasible, tiers=tiers)
        return roll_out(self.net, env, batch, self.options, generator)

    def backward(self, found: Rollout, groups: int) -> dict[str, Tensor]:
        """Add the gradient of a batch, as its share of a step's groups; return the scalars to watch."""
        log_probs = self.net(found.batch)
        chosen, spread = chosen_log_probs(log_probs, found.settings), entropy(log_probs)
        gains = advantages(found.rewards, self.options.scale_rewards).to(chosen)
        divergence = None
        if self.reference is not None:
            with torch.no_grad():
                reference = self.reference(found.batch)
            divergence = kl_divergence(log_probs, reference)
        result = grpo_loss(chosen, found.log_probs.to(chosen), gains, self.options, divergence, spread)
        (result.loss * (len(found.settings) / groups)).backward()
        names = ("loss", "clip_fraction", "kl", "flat_groups", "ratio")
        return {**{name: getattr(result, name).detach() for name in names}, "entropy": spread.detach().mean()}

    def validate(self) -> dict[str, Any]:
        """Measure the best choices as served; keep the weights of the best epoch, of equals the last."""
        result = measures(self.task.env, [evaluate(self.net, self.task.env, self.task.validation, self.options)])
        if result["reward"] >= self.best_score:
            self.keep(result["reward"])
        return result

    def state(self) -> dict[str, Any]:
        """Return everything that the next epoch depends on."""
        accuracy = self.task.env.accuracy
        return {
            "conditions": self.conditions(),
            "epoch": self.epoch,
            "policy": self.net.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "reference": None if self.reference is None else self.reference.state_dict(),
            "best": {"epoch": self.best_epoch, "reward": self.best_score, "weights": self.best},
            "start": self.start_reward,
            "untrained": self.untrained_reward,
            "known": accuracy.known if isinstance(accuracy, OnlineAccuracy) else None,
        }

    def resume(self, path: Path) -> None:
        """Go on where the file says, if there is one; begin anew where it is of a finished training of others.

        Raises:
            UserError: the file is damaged, or of an unfinished training with other options.
        """
        if not path.is_file():
            return
        state = read_tensors(path, "state of a training")
        now = self.conditions()
        try:
            before, is_finished = state["conditions"], state["epoch"] == state["conditions"]["num_epochs"]
            if before == now:
                self._restore(state)
        except (RuntimeError, ValueError, KeyError, TypeError) as error:
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise UserError(f"{path}: cannot be resumed ({reason[:120]}); remove it to start anew") from None
        if before != now and not is_finished:
            name = next(key for key in now if before.get(key) != now[key])
            raise UserError(
                f"{path}: was begun with {name} {before.get(name)}, not {now[name]}; finish that training "
                "with its own options, or remove the file to start anew"
            )
        self.history = logged(path.parent, self.epoch)

    def _restore(self, state: Mapping[str, Any]) -> None:
        self.net.load_state_dict(state["policy"])
        self.optimizer.load_state_dict(state["optimizer"])
        best = state["best"]
        self.epoch, self.best_epoch, self.best_score = state["epoch"], best["epoch"], best["reward"]
        self.best, self.start_reward, self.untrained_reward = best["weights"], state["start"], state["untrained"]
        if self.reference is not None:
            self.reference.load_state_dict(state["reference"])
        if isinstance(self.task.env.accuracy, OnlineAccuracy):
            self.task.env.accuracy.known.copy_(state["known"])

    def conditions(self) -> dict[str, Any]:
        """Return what must not change when a training is resumed; the device may."""
        own = {name: value for name, value in self.options.record().items() if name != "device"}
        fixed = [p for p in self.net.parameters() if not p.requires_grad] + list(self.net.buffers())
        given = {"first stage or features": fixed, "latencies": [self.task.env.latency_ms]}
        if isinstance(self.task.env.accuracy, TableAccuracy):
            given["accuracies"] = [self.task.env.accuracy.values]
        if isinstance(self.task.env.expected, TableAccuracy):
            given["expected accuracies"] = [self.task.env.expected.values]
        return own | {"questions": len(self.task.rows)} | _sums(given)


def _sums(given: Mapping[str, Iterable[Tensor]]) -> dict[str, str]:
    """Return a fingerprint of the data: sums to seven digits, stable across devices."""
    return {name: f"{sum(float(t.double().abs().sum()) for t in some):.6e}" for name, some in given.items()}


def best_settings(log_probs: Tensor, num_tiers: int) -> Tensor:
    """(B, 1) what is served: the likeliest tier under log-probabilities (B, K), then its likeliest setting."""
    by_tier = log_probs.unflatten(1, (num_tiers, -1))
    tier = by_tier.logsumexp(dim=2).argmax(dim=1)
    inside = by_tier[torch.arange(len(tier), device=tier.device), tier].argmax(dim=1)
    return (tier * by_tier.shape[2] + inside).unsqueeze(1).cpu()


@torch.no_grad()
def evaluate(policy: nn.Module, env: Environment, batch: Batch, options: GrpoOptions) -> Rollout:
    """The policy's best choice for every question: groups of one."""
    policy.eval()
    log_probs = sound(policy(batch))
    settings = best_settings(log_probs, len(env.space.tiers))
    return outcome(env, batch, settings, chosen_log_probs(log_probs, settings).cpu(), options)


def measures(env: Environment, rollouts: Sequence[Rollout]) -> dict[str, Any]:
    """Means over all choices, and the share of each value of each knob."""
    settings = torch.cat([one.settings.flatten() for one in rollouts])
    used = [(one.latency_ms / one.batch.budget_ms.unsqueeze(1)).flatten() for one in rollouts]
    return {
        "reward": float(torch.cat([one.rewards.flatten() for one in rollouts]).mean()),
        "accuracy": float(torch.cat([one.accuracy.flatten() for one in rollouts]).mean()),
        "latency_ms": float(torch.cat([one.latency_ms.flatten() for one in rollouts]).mean()),
        "adherence": float(torch.cat([one.in_time.flatten() for one in rollouts]).double().mean()),
        "utilisation": float(torch.cat(used).mean()),
        "knobs": knob_shares(env.space, settings),
    }


def knob_shares(space: KnobSpace, settings: Tensor) -> dict[str, dict[str, float]]:
    """Knob → value → its share among settings (n,)."""
    shares = torch.bincount(settings, minlength=len(space)).double().view(space.shape) / max(len(settings), 1)
    found = {}
    for axis, (knob, values) in enumerate(space.axes.items()):
        part = shares.movedim(axis, 0).flatten(1).sum(1)
        found[knob] = dict(zip(map(str, values), part.tolist(), strict=True))
    return found
