from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import grpo_toy
from tempovlm.core.errors import UserError
from tempovlm.lab.exp3_first_stage.expected import Expected
from tempovlm.lab.grpo.algorithm import (
    TEMPERATURE,
    evaluate,
    every_reward,
    measures,
    train,
    value_loss,
    warm_start,
)
from tempovlm.lab.grpo.environment import MASKED, Batch, Environment
from tempovlm.lab.options import GrpoOptions

OPTIONS = GrpoOptions(time_price=0.1)
K = len(grpo_toy.SPACE)


def some() -> Batch:
    return replace(grpo_toy.task().validation, allowed=None)


def test_the_loss_is_zero_where_logits_are_rewards_over_the_temperature() -> None:
    world, batch = grpo_toy.world(), some()
    rewards = every_reward(world, batch, OPTIONS)
    exact = (rewards / TEMPERATURE + 7.0).log_softmax(dim=1)
    assert float(value_loss(lambda _: exact, world, batch, OPTIONS)) == pytest.approx(0.0, abs=1e-12)
    even = torch.full_like(rewards, -np.log(K))
    spread = float(rewards.var(dim=1, unbiased=False).mean())
    assert float(value_loss(lambda _: even, world, batch, OPTIONS)) == pytest.approx(spread)


def test_settings_of_other_tiers_than_one_chosen_outside_do_not_count() -> None:
    world, batch = grpo_toy.world(), some()
    rewards = every_reward(world, batch, OPTIONS)
    given = (rewards[:, :4] / TEMPERATURE).log_softmax(dim=1)
    outside = torch.cat([given, torch.full((len(given), K - 4), MASKED, dtype=given.dtype)], dim=1)
    assert float(value_loss(lambda _: outside, world, batch, OPTIONS)) == pytest.approx(0.0, abs=1e-12)


@pytest.mark.parametrize("learn_tier", [True, False])
def test_it_learns_without_a_draw(learn_tier: bool) -> None:
    task, actor = grpo_toy.task(OPTIONS), grpo_toy.actor(learn_tier=learn_tier)
    first = {name: value.clone() for name, value in actor.controller.knob1.named_parameters()}
    before = value_loss(actor, task.env, some(), OPTIONS).item()
    options = replace(OPTIONS, warm_start=60, seed=0, tier_exploration=float(not learn_tier))
    warm_start(actor, task, options)
    assert not actor.training
    assert value_loss(actor, task.env, some(), OPTIONS).item() < (0.5 if learn_tier else 0.9) * before
    moved = any(not torch.equal(first[name], value) for name, value in actor.controller.knob1.named_parameters())
    assert moved == learn_tier


def test_it_regresses_what_is_expected_and_grpo_goes_by_the_answers() -> None:
    world = grpo_toy.world()
    wrong = Expected(1 - world.table.accuracy, 8, 20)
    turned, batch = Environment(world.table, expected=wrong), some()
    rewards = every_reward(world, batch, OPTIONS)
    expected = every_reward(turned, batch, OPTIONS, turned.expected)
    assert torch.equal(every_reward(turned, batch, OPTIONS), rewards)
    assert not torch.allclose(expected, rewards)
    exact = (expected / TEMPERATURE).log_softmax(dim=1)
    assert float(value_loss(lambda _: exact, turned, batch, OPTIONS)) == pytest.approx(0.0, abs=1e-12)


@pytest.mark.parametrize(
    ("given", "epochs"),
    [({}, 30), ({"accuracy_source": "online"}, 0), ({"warm_start": 0}, 0), ({"warm_start": 4}, 4)],
)
def test_regression_comes_first_where_all_accuracies_are_known(given: dict[str, Any], epochs: int) -> None:
    options = GrpoOptions(**given)
    options.check()
    assert options.regression_epochs == options.record()["warm_start"] == epochs


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"warm_start": -1}, "--warm_start -1: must be at least 0"),
        ({"warm_start_values": "x"}, "--warm_start_values x: choose from smoothed, literal"),
        ({"warm_start": 2, "accuracy_source": "online"}, "--warm_start: needs the accuracies of all settings"),
    ],
)
def test_wrong_options_are_named(given: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        GrpoOptions(**given).check()


def test_grpo_goes_on_from_there(tmp_path: Path) -> None:
    task, actor = grpo_toy.task(OPTIONS, warm_start=60), grpo_toy.actor(learn_tier=True)
    trained = train(actor, task, tmp_path, "toy")
    found = measures(task.env, [evaluate(actor, task.env, task.validation, OPTIONS)])
    assert trained.untrained_reward < trained.start_reward <= trained.best_score
    assert found["reward"] == pytest.approx(trained.best_score)
    online = replace(task, options=replace(task.options, accuracy_source="online"))
    with pytest.raises(UserError, match="--warm_start"):
        train(actor, online, tmp_path / "online", "toy")
