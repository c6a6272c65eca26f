"""GRPO over episodes of a shared queue: what a choice earns is what all requests of its episode earn.

1. *Choice*: of each request the policy says the accuracies that it expects. Whether the request is admitted, at
   what price of lane time it is answered and by which setting is what the schedule and the rule of choice that
   serve make of them. The regression's logits are the start; GRPO learns a correction of them in two directions:
   for all settings alike, and by lane time.
2. *Draw*: a group is the same episode several times. Each sample draws its own weights of the correction around
   those that are learned, once, so that it is consistent over the episode: what one request is denied shows in
   what others earn (state-dependent exploration: A. Raffin et al., Smooth exploration for robotic reinforcement
   learning, CoRL 2021, arXiv 2005.05719). Each request's correction is then normal, with a spread that its
   features give.
3. *Loss*: `lab/grpo/algorithm.py`'s, with the episode's advantage for each of its choices.

Samples whose outcomes are equal have no advantage. The trained correction is linear in the network's last hidden
units, so it becomes part of its last layer.

Shapes: `N` questions, `K` settings, `H` hidden units, `P` features of a correction, `D` directions, `n` requests
of an episode, `G` samples.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tempovlm.control.checkpoint import read_tensors
from tempovlm.control.learned.networks import AccuracyNetwork
from tempovlm.lab.fit import Training
from tempovlm.lab.grpo.algorithm import advantages, grpo_loss
from tempovlm.lab.log import logged
from tempovlm.lab.options import GrpoOptions
from tempovlm.lab.queue_grpo.episodes import Episode, Source
from tempovlm.lab.table import Floats

FEATURES = 4
"""Features of a correction: a constant 1, and the hidden units' main components over the training questions."""

STEPS = 4
"""Gradient steps of an epoch."""

VALIDATED = 32
"""Episodes that judge an epoch, the same ones after each."""


class Corrected(nn.Module):
    """A value network whose logits are corrected by `weight` (D, P), the one thing that learns.

    Attributes:
        logits: (N, K) of the network alone. features: (N, P) of a correction.
        usual_logits: (M, K) of the questions that make an ordinary one. usual_features: (M, P).
        directions: (D, K) of a correction among the settings.
    """

    def __init__(self, net: AccuracyNetwork, language: Tensor, usual: Tensor, lane_ms: Floats) -> None:
        """Correct a network.

        Args:
            net: fitted by regression; stays as it is.
            language: (N, L) questions that episodes ask.
            usual: (M, L) questions of the training.
            lane_ms: (K,) expected times of the settings.
        """
        super().__init__()
        self.net = net.requires_grad_(False)
        cost = torch.tensor((lane_ms - lane_ms.mean()) / np.ptp(lane_ms), dtype=torch.float32)
        self.directions = torch.stack((torch.ones(len(lane_ms)), cost))
        with torch.no_grad():
            hidden = net.hidden(usual)
            self.centre = hidden.mean(dim=0)
            _, spread, axes = torch.linalg.svd(hidden - self.centre, full_matrices=False)
            count = min(FEATURES - 1, len(spread))
            self.axes = axes[:count].T / (spread[:count].clamp(min=1e-6) / len(usual) ** 0.5)
            self.logits, self.features = net(language), self.features_of(language)
            self.usual_logits, self.usual_features = net(usual), self.features_of(usual)
        self.weight = nn.Parameter(torch.zeros(len(self.directions), 1 + count))

    def features_of(self, language: Tensor) -> Tensor:
        """Return the features (B, P) of questions (B, L)."""
        parts = (self.net.hidden(language) - self.centre) @ self.axes
        return torch.cat((torch.ones(len(parts), 1), parts), dim=1)

    def corrections(self, rows: Tensor) -> Tensor:
        """Return the corrections (n, D) of some questions."""
        return self.features[rows] @ self.weight.T

    @torch.no_grad()
    def expected(self, rows: Tensor, weight: Tensor) -> tuple[Floats, Floats]:
        """Return the accuracies (n, K) of some questions, and (K,) of an ordinary one, under other weights."""
        whole = weight.T @ self.directions
        own = self.logits[rows] + self.features[rows] @ whole
        usual = self.usual_logits + self.usual_features @ whole
        return own.double().sigmoid().numpy(), usual.double().sigmoid().mean(dim=0).numpy()

    @torch.no_grad()
    def folded(self, usual: Tensor) -> AccuracyNetwork:
        """Return a network that says the corrected accuracies; `usual` (M, L) are the training's questions."""
        net = AccuracyNetwork(**self.net.sizes).eval().requires_grad_(False)
        net.load_state_dict(self.net.state_dict())
        last = net.last
        added = self.directions.T @ self.weight[:, 1:] @ self.axes.T
        last.weight.add_(added)
        last.bias.add_(self.directions.T @ self.weight[:, 0] - added @ self.centre)
        net.fit_usual(usual)
        return net


@dataclass(frozen=True, eq=False, slots=True)
class Rollout:
    """The samples of an episode.

    Attributes:
        rows: (n,) its questions. corrections: (n, G, D) that were drawn. returns: (G,) mean earnings of a request.
        log_probs: (n, G) of the corrections when they were drawn.
    """

    rows: Tensor
    corrections: Tensor
    returns: Tensor
    log_probs: Tensor


def log_probs(policy: Corrected, rows: Tensor, corrections: Tensor, exploration: float) -> Tensor:
    """(n, G) densities' logarithms of corrections (n, G, D), up to a constant."""
    spread = exploration * policy.features[rows].norm(dim=1)
    off = corrections - policy.corrections(rows).unsqueeze(1)
    return -(off**2).sum(dim=2) / (2 * spread**2).unsqueeze(1)


@torch.no_grad()
def roll_out(
    policy: Corrected, episode: Episode, samples: int, exploration: float, generator: torch.Generator
) -> Rollout:
    """Let an episode happen several times, each time with other weights of the correction."""
    rows = torch.as_tensor(episode.rows)
    noise = exploration * torch.randn(samples, *policy.weight.shape, generator=generator)
    drawn = torch.einsum("np,gdp->ngd", policy.features[rows], policy.weight + noise)
    returns = [episode.earned(*policy.expected(rows, policy.weight + one)).mean() for one in noise]
    return Rollout(rows, drawn, torch.tensor(returns), log_probs(policy, rows, drawn, exploration))


class QueueTraining(Training):
    """A training in a queue; epoch 0, the regression, is best where none was better."""

    def __init__(
        self, policy: Corrected, source: Source, judged: Source, options: GrpoOptions, exploration: float
    ) -> None:
        super().__init__(policy, options, weight_decay=0.0)
        self.policy, self.source, self.options, self.exploration = policy, source, options, exploration
        rng = np.random.default_rng([options.seed, 0])
        self.judged = [judged.draw(rng) for _ in range(VALIDATED)]
        self.start_reward = self.validate()

    def train_epoch(self) -> dict[str, Any]:
        """Draw, step and validate; return the epoch's record."""
        options = self.options
        rng = np.random.default_rng([options.seed, self.epoch])
        generator = torch.Generator().manual_seed(int(rng.integers(2**31)))
        seen: list[Rollout] = []
        clipped: list[float] = []
        for step in range(STEPS):
            episodes = [self.source.draw(rng) for _ in range(options.batch_size)]
            some = [self.roll_out(one, generator) for one in episodes]
            gains = advantages(torch.stack([one.returns for one in some]), options.scale_rewards)
            for _ in range(options.num_iterations):
                clipped += [self.backward(*one) for one in zip(some, gains, strict=True)]
                self.step(((self.epoch - 1) * STEPS + step) / (STEPS * options.num_epochs))
            seen += some
        returns = torch.stack([one.returns for one in seen])
        return {
            "epoch": self.epoch,
            "train": float(returns.mean()),
            "spread": float(returns.std(dim=1).mean()),
            "clip_fraction": float(np.mean(clipped)),
            "val": self.validate(),
            "weight": self.policy.weight.detach().round(decimals=4).tolist(),
        }

    def roll_out(self, episode: Episode, generator: torch.Generator) -> Rollout:
        """Let an episode happen as often as the options say."""
        return roll_out(self.policy, episode, self.options.num_generations, self.exploration, generator)

    def backward(self, found: Rollout, gains: Tensor) -> float:
        """Add an episode's gradient with advantages (G,), as its share of a step's; return its clipped share."""
        own = log_probs(self.policy, found.rows, found.corrections, self.exploration)
        spread = self.exploration * self.policy.features[found.rows].norm(dim=1)
        divergence = (self.policy.corrections(found.rows) ** 2).sum(dim=1) / (2 * spread**2)  # from no correction
        every = gains.to(own).expand_as(own)
        result = grpo_loss(own, found.log_probs, every, self.options, divergence, own.new_zeros(len(own)))
        (result.loss / self.options.batch_size).backward()
        return float(result.clip_fraction)

    def validate(self) -> float:
        """Return what the correction without noise earns; keep its weights if they are the best so far."""
        reward = mean_reward(self.policy, self.judged)
        if reward > self.best_score:
            self.keep(reward)
        return reward

    def state(self) -> dict[str, Any]:
        """Return everything that the next epoch depends on."""
        return {
            "conditions": self.conditions(),
            "epoch": self.epoch,
            "policy": self.net.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "best": {"epoch": self.best_epoch, "reward": self.best_score, "weights": self.best},
        }

    def resume(self, path: Path) -> None:
        """Go on where a file says, if there is one of the same training; else begin anew."""
        if not path.is_file():
            return
        state = read_tensors(path, "state of a training")
        if state.get("conditions") != self.conditions():
            return
        self.net.load_state_dict(state["policy"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.epoch, best = state["epoch"], state["best"]
        self.best_epoch, self.best_score, self.best = best["epoch"], best["reward"], best["weights"]
        self.history = logged(path.parent, self.epoch)

    def conditions(self) -> dict[str, Any]:
        """Return what must not change when a training is resumed."""
        given = {"logits": self.policy.logits, "gaps": torch.tensor(self.source.gaps)}
        sums = {name: f"{float(values.double().abs().sum()):.6e}" for name, values in given.items()}
        return asdict(self.options) | sums | {"exploration": self.exploration, "loads": list(self.source.loads)}


def mean_reward(policy: Corrected, episodes: Sequence[Episode]) -> float:
    """Return the mean earnings of a request over some episodes."""
    earned = [one.earned(*policy.expected(torch.as_tensor(one.rows), policy.weight)) for one in episodes]
    return float(np.concatenate(earned).mean())
