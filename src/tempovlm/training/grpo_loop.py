"""Trains a policy by GRPO: draws, rewards, clipped steps, a validation every epoch, and a state to resume from.

It knows policies as modules that give log-probabilities of settings, and nothing of what is in them. Every epoch
has random numbers of its own, made from seed and epoch, so a training that was interrupted ends as if it had not
been.

Shapes: `B` groups of a batch, `G` choices of a group, `K` settings, `T` tiers.
"""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from tempovlm.control.checkpoint import read_tensors, write_tensors
from tempovlm.core.errors import UserError
from tempovlm.core.files import make_folder
from tempovlm.core.knobs import KnobSpace
from tempovlm.core.progress import progress_bar
from tempovlm.lab.fit import SCHEDULES
from tempovlm.lab.log import logged, training_log
from tempovlm.training.grpo import GrpoLoss, GrpoOptions, advantages, grpo_loss, kl_divergence
from tempovlm.training.rollout import (
    Batch,
    DrawBudgets,
    OnlineAccuracy,
    Rollout,
    TableAccuracy,
    World,
    chosen_log_probs,
    entropy,
    outcome,
    roll_out,
    sound,
)
from tempovlm.training.warm_start import warm_start

STATE = "training_state.pt"
"""Beside the log; a training that is finished is not repeated."""

_MAX_GRAD_NORM = 1.0

_log = logging.getLogger("tempovlm")


@dataclass(frozen=True, slots=True, kw_only=True)
class LoopOptions:
    """How to train.

    Attributes:
        batch_size: questions of a batch, each with a budget and a group of choices.
        grad_accum: batches whose gradients make one step.
        tier_exploration: share of the draws whose tier is drawn evenly from outside, of a policy that does not
            learn it.
        warm_start: epochs of regression on the rewards of all settings before the first draw; see
            `training/warm_start.py`.
    """

    batch_size: int = 32
    num_epochs: int = 100
    lr: float = 1e-4
    grad_accum: int = 1
    lr_schedule: str = "cosine"
    seed: int = 42
    device: str = "cpu"
    tier_exploration: float = 0.0
    warm_start: int = 0

    def check(self) -> None:
        """Raise a `UserError` that names the first flag whose value makes no sense."""
        for name in ("batch_size", "num_epochs", "grad_accum"):
            if getattr(self, name) < 1:
                raise UserError(f"--{name} {getattr(self, name)}: must be at least 1")
        if not (math.isfinite(self.lr) and self.lr > 0):
            raise UserError(f"--lr {self.lr}: must be a positive number")
        if self.lr_schedule not in SCHEDULES:
            raise UserError(f"--lr_schedule {self.lr_schedule}: choose from {', '.join(SCHEDULES)}")
        if self.warm_start < 0:
            raise UserError(f"--warm_start {self.warm_start}: must be at least 0")
        if not 0 <= self.tier_exploration <= 1:
            raise UserError(f"--tier_exploration {self.tier_exploration}: must lie between 0 and 1")


def options_from(flags: Mapping[str, Any]) -> tuple[GrpoOptions, LoopOptions]:
    """Options from a script's flags, which have the fields' names; group size is the number of generations."""
    given = {"num_generations": flags["group_size"], **flags}
    grpo, loop = (
        {f.name: given[f.name] for f in fields(c) if f.name in given} for c in (GrpoOptions, LoopOptions)
    )
    return GrpoOptions(**grpo), LoopOptions(**loop)


@dataclass(frozen=True, eq=False, slots=True, kw_only=True)
class Task:
    """What a policy learns on.

    Attributes:
        rows: questions of the training. validation: the same questions and budgets at every epoch.
        draw: budgets for questions of the training, new at every epoch.
    """

    world: World
    rows: NDArray[np.int64]
    validation: Batch
    draw: DrawBudgets
    options: GrpoOptions
    loop: LoopOptions


@dataclass(frozen=True, slots=True)
class Trained:
    """The epoch that was kept (0: none was better than the start), validation rewards, and all epochs' records.

    GRPO begins at `start_reward`; `untrained_reward` is what the policy reached before a warm start.
    """

    best_epoch: int
    best_reward: float
    start_reward: float
    untrained_reward: float
    history: Sequence[Mapping[str, Any]]


def make_batch(world: World, rows: Tensor, budget_ms: Tensor, *, mask: bool, tiers: Tensor | None = None) -> Batch:
    """Questions under budgets, with the guard's mask or without."""
    allowed = world.allowed(rows, budget_ms) if mask else None
    return Batch(rows, budget_ms, world.left_ms(rows, budget_ms), allowed, tiers)


def train(policy: nn.Module, task: Task, folder: Path, title: str) -> Trained:
    """Train in place; the policy ends with the weights of the epoch whose validation reward was highest.

    Raises:
        UserError: the training diverges, the folder cannot be written, or it holds a training under other
            conditions that was interrupted. The caller holds it (`core.files.writing_to`).
    """
    task.options.check()
    task.loop.check()
    if task.loop.warm_start and task.options.accuracy_source != "table":
        raise UserError("--warm_start: needs the accuracies of all settings; leave --accuracy_source as it is")
    if (task.options.loss_type, task.options.scale_rewards) == ("dr_grpo", "group"):
        _log.warning(
            "--loss_type dr_grpo divides by the group's spread, which its paper does not; add --scale_rewards "
            "none for what the paper does"
        )
    make_folder(folder)
    run = _Run(policy, task)
    run.resume(folder / STATE)
    if run.epoch == 0:
        run.begin()
    history: list[Mapping[str, Any]] = [*logged(folder, run.epoch)]
    with training_log(folder, history) as log, progress_bar(title) as advance:
        for epoch in range(run.epoch + 1, task.loop.num_epochs + 1):
            record = run.train_epoch(epoch) | {"val": run.validate(epoch)}
            history.append(record)
            log(record)
            run.save(folder / STATE)
            advance(epoch, task.loop.num_epochs)
    policy.load_state_dict(run.best_weights)
    return Trained(run.best_epoch, run.best_reward, run.start_reward, run.untrained_reward, history)


class _Run:
    """A training in progress."""

    def __init__(self, policy: nn.Module, task: Task) -> None:
        self.policy, self.task, self.epoch = policy, task, 0
        loop = task.loop
        batches = math.ceil(len(task.rows) / loop.batch_size)
        steps = loop.num_epochs * math.ceil(batches / loop.grad_accum)
        self.optimizer = torch.optim.AdamW([p for p in policy.parameters() if p.requires_grad], lr=loop.lr)
        rule = (lambda _: 1.0) if loop.lr_schedule == "constant" else lambda step: _cosine(step / steps)
        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.optimizer, rule)
        self.reference = copy.deepcopy(policy).requires_grad_(False) if task.options.beta else None
        self.best_epoch, self.best_reward, self.best_weights = 0, -math.inf, _weights(policy)
        self.start_reward = self.untrained_reward = -math.inf

    def begin(self) -> None:
        """What comes before the first epoch."""
        task, loop = self.task, self.task.loop
        self.start_reward = self.untrained_reward = self.validate(0)["reward"]
        if loop.warm_start:
            warm_start(
                self.policy,
                task.world,
                task.rows,
                task.draw,
                task.options,
                epochs=loop.warm_start,
                seed=loop.seed,
                explore_tiers=loop.tier_exploration > 0,
            )
            self.start_reward = self.validate(0)["reward"]
        if self.reference is not None:
            self.reference = copy.deepcopy(self.policy).requires_grad_(False)

    def train_epoch(self, epoch: int) -> dict[str, Any]:
        """One pass over the training questions."""
        task, loop = self.task, self.task.loop
        # No dropout: it would make the policy that learns another one than the policy that drew.
        self.policy.eval()
        rng = np.random.default_rng([loop.seed, epoch])
        generator = torch.Generator().manual_seed(int(rng.integers(2**31)))
        rows = rng.permutation(task.rows)
        budgets = torch.as_tensor(task.draw(rows, rng), dtype=torch.float64)
        batches = list(
            zip(torch.as_tensor(rows).split(loop.batch_size), budgets.split(loop.batch_size), strict=True)
        )
        seen: list[Rollout] = []
        losses: list[GrpoLoss] = []
        entropies: list[float] = []
        for first in range(0, len(batches), loop.grad_accum):
            some = [self._draw(r, b, generator) for r, b in batches[first : first + loop.grad_accum]]
            seen += some
            for _ in range(task.options.num_iterations):
                self._step(some, losses, entropies)
            self.schedule.step()
        self.epoch = epoch
        return {
            "epoch": epoch,
            "lr": self.schedule.get_last_lr()[0],
            "loss": _mean(one.loss for one in losses),
            "clip_fraction": _mean(one.clip_fraction for one in losses),
            "kl": _mean(one.kl for one in losses),
            "flat_groups": _mean(one.flat_groups for one in losses),
            "ratio": _mean(one.ratio for one in losses),
            "entropy": sum(entropies) / len(entropies),
            "train": measures(task.world, seen),
        }

    def _draw(self, rows: Tensor, budget_ms: Tensor, generator: torch.Generator) -> Rollout:
        """A batch's groups, some of them at a tier drawn from outside."""
        world, options, share = self.task.world, self.task.options, self.task.loop.tier_exploration
        tiers = None
        if share:
            drawn = torch.randint(len(world.space.tiers), rows.shape, generator=generator)
            tiers = torch.where(torch.rand(rows.shape, generator=generator) < share, drawn, -1)
        batch = make_batch(world, rows, budget_ms, mask=options.mask_infeasible, tiers=tiers)
        return roll_out(self.policy, world, batch, options, generator)

    def _step(self, rollouts: list[Rollout], losses: list[GrpoLoss], entropies: list[float]) -> None:
        """One step on groups that were drawn: the gradient of the mean over all of them."""
        options, groups = self.task.options, sum(len(one.settings) for one in rollouts)
        for one in rollouts:
            log_probs = self.policy(one.batch)
            chosen, spread = chosen_log_probs(log_probs, one.settings), entropy(log_probs)
            gains = advantages(one.rewards, options.scale_rewards).to(chosen)
            divergence = None
            if self.reference is not None:
                with torch.no_grad():
                    reference = self.reference(one.batch)
                divergence = kl_divergence(log_probs, reference)
            found = grpo_loss(chosen, one.log_probs.to(chosen), gains, options, divergence, spread)
            (found.loss * (len(one.settings) / groups)).backward()
            losses.append(found)
            entropies.append(spread.mean().item())
        nn.utils.clip_grad_norm_(self.policy.parameters(), _MAX_GRAD_NORM)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def validate(self, epoch: int) -> dict[str, Any]:
        """What its best choices are worth as served; keeps the weights of the best epoch, of equals the last."""
        found = evaluate(self.policy, self.task.world, self.task.validation, self.task.options)
        result = measures(self.task.world, [found])
        if result["reward"] >= self.best_reward:
            self.best_epoch, self.best_reward, self.best_weights = epoch, result["reward"], _weights(self.policy)
        return result

    def save(self, path: Path) -> None:
        """Write everything that the next epoch needs."""
        accuracy = self.task.world.accuracy
        state = {
            "conditions": self._conditions(),
            "epoch": self.epoch,
            "policy": self.policy.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "reference": None if self.reference is None else self.reference.state_dict(),
            "best": {"epoch": self.best_epoch, "reward": self.best_reward, "weights": self.best_weights},
            "start": self.start_reward,
            "untrained": self.untrained_reward,
            "known": accuracy.known if isinstance(accuracy, OnlineAccuracy) else None,
        }
        write_tensors(path, state)

    def resume(self, path: Path) -> None:
        """Go on where the file says, if there is one.

        Raises:
            UserError: the file is damaged, or of a training with other options.
        """
        if not path.is_file():
            return
        remedy = "finish that training with its own options, or remove the file to start anew"
        try:
            state = read_tensors(path, "state of a training")
            before, now = state["conditions"], self._conditions()
            if before != now and state["epoch"] == before["num_epochs"]:
                return
            if before != now:
                name = next(key for key in now if before.get(key) != now[key])
                raise UserError(f"{path}: was begun with {name} {before.get(name)}, not {now[name]}; {remedy}")
            self.policy.load_state_dict(state["policy"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.schedule.load_state_dict(state["schedule"])
            best = state["best"]
            self.epoch, self.best_epoch, self.best_reward = state["epoch"], best["epoch"], best["reward"]
            self.best_weights, self.start_reward = best["weights"], state["start"]
            self.untrained_reward = state["untrained"]
            if self.reference is not None:
                self.reference.load_state_dict(state["reference"])
            if isinstance(self.task.world.accuracy, OnlineAccuracy):
                self.task.world.accuracy.known.copy_(state["known"])
        except UserError:
            raise
        except (RuntimeError, ValueError, KeyError, TypeError) as error:
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise UserError(f"{path}: cannot be resumed ({reason[:120]}); remove it to start anew") from None

    def _conditions(self) -> dict[str, Any]:
        """What must not change when a training is resumed."""
        own = asdict(self.task.loop)
        own.pop("device")
        fixed = [p for p in self.policy.parameters() if not p.requires_grad] + list(self.policy.buffers())
        given = {"first stage or features": fixed, "latencies": [self.task.world.latency_ms]}
        if isinstance(self.task.world.accuracy, TableAccuracy):
            given["accuracies"] = [self.task.world.accuracy.values]
        return own | asdict(self.task.options) | {"questions": len(self.task.rows)} | _sums(given)


def _sums(given: Mapping[str, Iterable[Tensor]]) -> dict[str, str]:
    """What tells other data from the same: sums in seven digits, which no rounding of a device changes."""
    return {name: f"{sum(float(t.double().abs().sum()) for t in some):.6e}" for name, some in given.items()}


def _cosine(share: float) -> float:
    return 0.5 * (1 + math.cos(math.pi * min(share, 1.0)))


def _mean(values: Iterator[Tensor]) -> float:
    return float(torch.stack([value.detach() for value in values]).mean())


def _weights(policy: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().cpu().clone() for name, value in policy.state_dict().items()}


def best_settings(log_probs: Tensor, num_tiers: int) -> Tensor:
    """(B, 1) what is served: the likeliest tier under log-probabilities (B, K), then its likeliest setting."""
    by_tier = log_probs.unflatten(1, (num_tiers, -1))
    tier = by_tier.logsumexp(dim=2).argmax(dim=1)
    inside = by_tier[torch.arange(len(tier), device=tier.device), tier].argmax(dim=1)
    return (tier * by_tier.shape[2] + inside).unsqueeze(1).cpu()


@torch.no_grad()
def evaluate(policy: nn.Module, world: World, batch: Batch, options: GrpoOptions) -> Rollout:
    """The policy's best choice for every question: groups of one."""
    policy.eval()
    log_probs = sound(policy(batch))
    settings = best_settings(log_probs, len(world.space.tiers))
    return outcome(world, batch, settings, chosen_log_probs(log_probs, settings).cpu(), options)


def measures(world: World, rollouts: Sequence[Rollout]) -> dict[str, Any]:
    """Means over all choices, and the share of each value of each knob."""
    settings = torch.cat([one.settings.flatten() for one in rollouts])
    used = [(one.latency_ms / one.batch.budget_ms.unsqueeze(1)).flatten() for one in rollouts]
    return {
        "reward": float(torch.cat([one.rewards.flatten() for one in rollouts]).mean()),
        "accuracy": float(torch.cat([one.accuracy.flatten() for one in rollouts]).mean()),
        "latency_ms": float(torch.cat([one.latency_ms.flatten() for one in rollouts]).mean()),
        "adherence": float(torch.cat([one.in_time.flatten() for one in rollouts]).double().mean()),
        "utilisation": float(torch.cat(used).mean()),
        "knobs": knob_shares(world.space, settings),
    }


def knob_shares(space: KnobSpace, settings: Tensor) -> dict[str, dict[str, float]]:
    """Knob → value → its share among settings (n,)."""
    shape = (len(space.tiers), len(space.top_ks), len(space.block_counts))
    shares = torch.bincount(settings, minlength=len(space)).double().view(shape) / max(len(settings), 1)
    parts = (
        ("tier", space.tiers, shares.sum(dim=(1, 2))),
        ("top_k", space.top_ks, shares.sum(dim=(0, 2))),
        ("num_blocks", space.block_counts, shares.sum(dim=(0, 1))),
    )
    return {knob: dict(zip(map(str, names), part.tolist(), strict=True)) for knob, names, part in parts}
