"""Gradients against central differences of the documented quantity, computed apart, in float64."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import grpo_toy
from tempovlm.control.checkpoint import read_tensors
from tempovlm.lab.fit import SCORE, fit
from tempovlm.lab.grpo.algorithm import (
    STATE,
    TEMPERATURE,
    advantages,
    entropy,
    every_reward,
    grpo_loss,
    kl_divergence,
    train,
    value_loss,
)
from tempovlm.lab.grpo.environment import MASKED
from tempovlm.lab.options import FitOptions, GrpoOptions

Logits = Sequence[float]

POLICY = (1.5410, -0.2934, -2.1788, 0.5684, -1.0845)
REFERENCE = (-1.3986, 0.4033, 0.8380, -0.7193, -0.4033)


def probabilities(logits: Logits) -> np.ndarray:
    powers = np.exp(np.asarray(logits) - max(logits))
    return powers / powers.sum()


def kl(policy: Logits, reference: Logits) -> float:
    p, q = probabilities(policy), probabilities(reference)
    return float(sum(a * np.log(a / b) for a, b in zip(p, q, strict=True)))


def slopes(function: Callable[[Logits], float], at: Logits) -> np.ndarray:
    steps = 1e-5 * np.eye(len(at))
    return np.array([(function(at + step) - function(at - step)) / 2e-5 for step in steps])  # type: ignore[operator]


def leaf(logits: Logits) -> torch.Tensor:
    return torch.tensor([logits], dtype=torch.float64, requires_grad=True)


def divergence(policy: torch.Tensor, reference: Logits) -> torch.Tensor:
    """Of one distribution from another, by logits."""
    return kl_divergence(policy.log_softmax(dim=1), leaf(reference).log_softmax(dim=1))


def test_the_gradient_of_the_divergence() -> None:
    policy = leaf(POLICY)
    value = divergence(policy, REFERENCE)
    value.sum().backward()
    assert value.item() == pytest.approx(kl(POLICY, REFERENCE))
    assert policy.grad is not None
    found = policy.grad[0].numpy()
    np.testing.assert_allclose(found, slopes(lambda at: kl(at, REFERENCE), POLICY), atol=1e-8)
    np.testing.assert_allclose(found, [0.603, -0.259, -0.074, -0.154, -0.117], atol=6e-4)


def test_the_divergence_by_hand() -> None:
    policy, reference = torch.tensor([[0.5, 0.25, 0.25]]).log(), torch.tensor([[0.25, 0.25, 0.5]]).log()
    # 1/2 log 2 + 1/4 log 1 + 1/4 log 1/2.
    assert kl_divergence(policy, reference).item() == pytest.approx(0.25 * np.log(2))
    assert kl_divergence(policy, policy).item() == pytest.approx(0, abs=1e-7)


@pytest.mark.parametrize("mask", [MASKED, -torch.inf])
def test_what_is_masked_has_no_part_in_the_divergence(mask: float) -> None:
    policy, masked = leaf(POLICY), torch.tensor([[False, True, False, False, True]])
    log_probs, reference = (x.masked_fill(masked, mask).log_softmax(dim=1) for x in (policy, leaf(REFERENCE)))
    value = kl_divergence(log_probs, reference)
    value.sum().backward()
    legal = [0, 2, 3]
    some, other = ([logits[i] for i in legal] for logits in (POLICY, REFERENCE))
    assert value.item() == pytest.approx(kl(some, other))
    assert policy.grad is not None
    assert policy.grad[0, [1, 4]].tolist() == pytest.approx([0, 0], abs=1e-12)
    np.testing.assert_allclose(policy.grad[0, legal].numpy(), slopes(lambda at: kl(at, other), some), atol=1e-8)


@pytest.mark.parametrize("learn_tier", [True, False])
def test_the_divergence_of_a_policy_is_that_over_its_legal_settings(learn_tier: bool) -> None:
    actor, other = (grpo_toy.actor(learn_tier=learn_tier, seed=seed) for seed in (0, 1))
    other.controller.knob1.load_state_dict(actor.controller.knob1.state_dict())
    rows, budgets = torch.arange(8), torch.full((8,), 21.0, dtype=torch.float64)
    batch = grpo_toy.world().batch(rows, budgets, mask=True)
    ours, theirs = actor(batch), other(batch)
    found = kl_divergence(ours, theirs)
    for row in range(8):
        legal = (ours[row] > MASKED / 2).nonzero().flatten()
        assert len(legal) in ((5,) if learn_tier else (1, 4))
        assert found[row].item() == pytest.approx(
            kl(ours[row, legal].tolist(), theirs[row, legal].tolist()), abs=1e-6
        )
    found.sum().backward()
    grads = [p.grad for p in actor.controller.knob2knob3.parameters() if p.grad is not None]
    assert grads
    assert all(bool(torch.isfinite(grad).all()) for grad in grads)


def test_the_divergence_of_later_steps_is_of_the_policy_that_learns(tmp_path: Path) -> None:
    """Of two steps on the same draws the first is at the reference, the second at what the first one made."""
    history, actors = [], []
    for steps in (2, 1):
        options = GrpoOptions(num_generations=8, num_iterations=steps, beta=0.5)
        task = grpo_toy.task(options, num_epochs=1, batch_size=48, lr=0.05)
        task = replace(task, draw=lambda rows, _: np.full(len(rows), 21.0))
        actor, folder = grpo_toy.actor(learn_tier=True), tmp_path / str(steps)
        history.append(train(actor, task, folder, "toy").history[0])
        actor.load_state_dict(read_tensors(folder / STATE, "state")["policy"])
        actors.append(actor)
    batch = grpo_toy.world().batch(torch.arange(48), torch.full((48,), 21.0, dtype=torch.float64), mask=True)
    with torch.no_grad():
        after = kl_divergence(actors[1](batch), grpo_toy.actor(learn_tier=True)(batch)).mean().item()
    assert after > 1e-4
    assert history[1]["kl"] == pytest.approx(0, abs=1e-7)
    assert history[0]["kl"] == pytest.approx(after / 2, rel=1e-4)


def test_the_gradient_of_the_entropy() -> None:
    def documented(at: Logits) -> float:
        p = probabilities(at)
        return float(-(p * np.log(p)).sum())

    policy = leaf(POLICY)
    entropy(policy.log_softmax(dim=1)).sum().backward()
    assert policy.grad is not None
    np.testing.assert_allclose(policy.grad[0].numpy(), slopes(documented, POLICY), atol=1e-8)


@pytest.mark.parametrize("moved", [0.0, 0.05])
def test_the_surrogates_mean_gradient_is_that_of_the_mean_reward(moved: float) -> None:
    """Over all groups of two that another policy may draw; half of it, as a choice is part of its group's mean."""
    rewards, drew = np.array([1.0, 0.2, 0.5]), [0.3, -0.2, 0.6]
    now = [logit + moved * (i - 1) for i, logit in enumerate(drew)]
    p, policy = probabilities(drew), leaf(now)
    total = torch.zeros((), dtype=torch.float64)
    for pair in itertools.product(range(3), repeat=2):
        log_probs = policy.log_softmax(dim=1)[:, list(pair)]
        old = torch.tensor(np.log(p[list(pair)])).unsqueeze(0)
        gains = advantages(torch.tensor(rewards[list(pair)]).unsqueeze(0), "none")
        found = grpo_loss(log_probs, old, gains, GrpoOptions(num_generations=2, entropy_coef=0.0))
        assert found.clip_fraction.item() == 0
        total = total - p[list(pair)].prod() * found.loss
    total.backward()
    assert policy.grad is not None
    expected = slopes(lambda at: float(probabilities(at) @ rewards), now) / 2
    np.testing.assert_allclose(policy.grad[0].numpy(), expected, atol=1e-8)


def test_the_gradient_of_the_whole_loss() -> None:
    """Second step on the same draws, one of them clipped: surrogate, divergence and entropy by their weights."""
    settings, gains = [0, 3, 3, 1, 4], np.array([[0.7, -0.4, -0.4, 1.1, -1.0]])
    drew, options = [1.0, -0.3, -2.0, 0.9, -1.1], GrpoOptions(beta=0.3, entropy_coef=0.05)

    def documented(at: Logits) -> float:
        p, old = probabilities(at), probabilities(drew)
        ratio = p[settings] / old[settings]
        value = np.minimum(ratio * gains[0], np.clip(ratio, 0.8, 1.2) * gains[0]).mean()
        return float(-value + 0.3 * kl(at, REFERENCE) + 0.05 * (p * np.log(p)).sum())

    policy = leaf(POLICY)
    log_probs, old = policy.log_softmax(dim=1), torch.tensor(np.log(probabilities(drew)[settings])).unsqueeze(0)
    found = grpo_loss(
        log_probs[:, settings],
        old,
        torch.tensor(gains),
        options,
        divergence(policy, REFERENCE),
        entropy(log_probs),
    )
    found.loss.backward()
    assert 0 < found.clip_fraction.item() < 1
    assert found.loss.item() == pytest.approx(documented(POLICY))
    assert policy.grad is not None
    np.testing.assert_allclose(policy.grad[0].numpy(), slopes(documented, POLICY), atol=1e-8)


def test_the_warm_starts_gradient() -> None:
    """Of the mean squared difference of what is centred, here with the logits themselves as the policy."""
    world, options = grpo_toy.world(), GrpoOptions()
    batch = world.batch(torch.tensor([0]), torch.tensor([41.0], dtype=torch.float64), mask=False)
    rewards = every_reward(world, batch, options)[0].numpy()
    at = np.linspace(-1, 1, 12)

    def documented(logits: Logits) -> float:
        found = TEMPERATURE * np.log(probabilities(logits))
        return float((((found - found.mean()) - (rewards - rewards.mean())) ** 2).mean())

    policy = leaf(at.tolist())
    value_loss(lambda _: policy.log_softmax(dim=1), world, batch, options).backward()
    assert policy.grad is not None
    np.testing.assert_allclose(policy.grad[0].numpy(), slopes(documented, at), atol=1e-8)  # type: ignore[arg-type]


class Slope:
    """Learns one weight whose loss is its product with the rows' mean, so that the gradient is that mean."""

    def __init__(self, rows: Sequence[float]) -> None:
        self.rows = torch.tensor(rows)
        self.net = torch.nn.Linear(1, 1, bias=False)

    def draw(self, _: np.random.Generator) -> Sequence[torch.Tensor]:
        return (self.rows,)

    def loss(self, *batch: torch.Tensor) -> torch.Tensor:
        return self.net(batch[0].unsqueeze(1)).mean()

    def validate(self) -> dict[str, float]:
        return {SCORE: 0.0}


@pytest.mark.parametrize(
    ("accumulate", "expected"),
    [(1, [0.15, 0.35, 0.55, 0.9]), (2, [0.25, (0.5 + 0.6 + 0.9) / 3]), (3, [0.35, 0.9]), (9, [3.0 / 7])],
)
def test_a_steps_gradient_is_that_of_the_mean_over_its_rows(
    accumulate: int, expected: list[float], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Seven rows in batches of two: the last batch is short, and so is the last step."""
    lesson, seen = Slope([0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.9]), []
    step = torch.optim.AdamW.step

    def watched(self: torch.optim.AdamW, *args: object, **kwargs: object) -> object:
        seen.append(float(self.param_groups[0]["params"][0].grad))
        return step(self, *args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(torch.optim.AdamW, "step", watched)
    options = FitOptions(batch_size=2, num_epochs=1, grad_accum=accumulate)
    fit(lesson.net, lesson, options, tmp_path, {})
    assert seen == pytest.approx(expected, rel=1e-5)


def test_batches_of_one_step_count_by_their_groups(tmp_path: Path) -> None:
    """48 questions in batches of 32 and 16 make the same single step as one batch of all."""
    weights = []
    for size, accumulate in ((48, 1), (32, 2)):
        options = GrpoOptions(num_generations=64, num_iterations=1, entropy_coef=1.0, alpha=0.0, penalty=0.0)
        task = grpo_toy.task(options, num_epochs=1, batch_size=size, grad_accum=accumulate)
        # Equal rewards leave the entropy's gradient alone, which depends on the questions and not on the draws.
        actor, folder = grpo_toy.actor(learn_tier=True, seed=3), tmp_path / str(size)
        train(actor, task, folder, "toy")
        state = read_tensors(folder / STATE, "state")["optimizer"]["state"]
        weights.append(torch.cat([one["exp_avg"].flatten() for one in state.values()]))
    torch.testing.assert_close(weights[0], weights[1], rtol=1e-4, atol=1e-7)
