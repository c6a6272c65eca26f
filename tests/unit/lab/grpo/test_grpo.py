"""Advantages and losses by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from tempovlm.core.errors import UserError
from tempovlm.lab.grpo.algorithm import advantages, grpo_loss
from tempovlm.lab.options import LOSS_TYPES, SCALES, GrpoOptions

PLAIN = GrpoOptions(num_generations=2, entropy_coef=0.0)


def test_defaults() -> None:
    options = GrpoOptions()
    assert (options.num_generations, options.epsilon, options.beta) == pytest.approx((5, 0.2, 0.0))
    assert (options.alpha, options.penalty) == pytest.approx((1.0, 0.5))
    assert (options.scale_rewards, options.loss_type) == ("group", "grpo")
    options.check()


REWARDS = torch.tensor([[1.0, 0.0, 0.0, 1.0], [0.3, 0.3, 0.3, 0.3], [3.0, 1.0, 0.0, 0.0]], dtype=torch.float64)


def test_advantages_by_hand() -> None:
    centred = torch.tensor([[0.5, -0.5, -0.5, 0.5], [0.0] * 4, [2.0, 0.0, -1.0, -1.0]], dtype=torch.float64)
    torch.testing.assert_close(advantages(REWARDS, "none"), centred)
    # Variances of a sample: 4 · 0.25 / 3 and (4 + 1 + 1) / 3.
    spread = torch.tensor([(1 / 3) ** 0.5, 1.0, 2**0.5], dtype=torch.float64).unsqueeze(1)
    torch.testing.assert_close(advantages(REWARDS, "group"), centred / (spread + 1e-4))
    # Mean 7.2 / 12 = 0.6, squares 2 + 0.36 + 10, so variance (12.36 - 12 · 0.36) / 11.
    torch.testing.assert_close(advantages(REWARDS, "batch"), centred / ((8.04 / 11) ** 0.5 + 1e-4))


def test_a_group_of_equal_rewards_has_no_advantage_at_all() -> None:
    equal = torch.full((1, 5), 0.3)
    for scale in ("group", "batch", "none"):
        assert advantages(torch.cat((equal, torch.rand(1, 5))), scale)[0].tolist() == pytest.approx([0.0] * 5)
    with pytest.raises(ValueError, match="choose from"):
        advantages(equal, "std")


def logs(*ratios: float) -> torch.Tensor:
    return torch.tensor([ratios]).log().requires_grad_()


def test_the_first_step_is_the_policy_gradient() -> None:
    log_probs, gains = logs(0.5, 0.25), torch.tensor([[1.0, -2.0]])
    found = grpo_loss(log_probs, log_probs, gains, PLAIN)
    found.loss.backward()
    assert found.loss.item() == pytest.approx(0.5)
    assert found.clip_fraction.item() == pytest.approx(0)
    torch.testing.assert_close(log_probs.grad, torch.tensor([[-0.5, 1.0]]))


@pytest.mark.parametrize(
    ("ratio", "gain", "loss", "is_clipped"),
    [
        (1.1, 1.0, -1.1, False),
        (1.5, 1.0, -1.2, True),
        (1.5, -1.0, 1.5, False),
        (0.5, -1.0, 0.8, True),
        (0.5, 1.0, -0.5, False),
    ],
)
def test_clipping_by_hand(ratio: float, gain: float, loss: float, is_clipped: bool) -> None:
    log_probs = logs(ratio)
    found = grpo_loss(log_probs, torch.zeros(1, 1), torch.tensor([[gain]]), PLAIN)
    found.loss.backward()
    assert found.loss.item() == pytest.approx(loss, rel=1e-6)
    assert found.clip_fraction.item() == pytest.approx(float(is_clipped))
    assert log_probs.grad is not None
    assert (log_probs.grad.item() == pytest.approx(0)) is is_clipped
    assert found.ratio.item() == pytest.approx(ratio)


def test_the_weights_of_divergence_and_entropy_by_hand() -> None:
    old, gains = torch.tensor([[0.5, 0.25]]).log(), torch.tensor([[1.0, -1.0]])
    options = replace(PLAIN, beta=0.1, entropy_coef=0.01)
    found = grpo_loss(old, old, gains, options, torch.tensor([0.3]), torch.tensor([2.0]))
    assert found.kl.item() == pytest.approx(0.3)
    assert found.loss.item() == pytest.approx(0.1 * 0.3 - 0.02, rel=1e-5)
    with pytest.raises(ValueError, match="reference"):
        grpo_loss(old, old, gains, options, None, torch.tensor([2.0]))
    with pytest.raises(ValueError, match="entropy"):
        grpo_loss(old, old, gains, options, torch.tensor([0.3]))


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
@pytest.mark.parametrize("scale", SCALES)
def test_a_loss_type_says_nothing_about_scaling(loss_type: str, scale: str) -> None:
    """As in trl 1.16: `dr_grpo` too divides by the group's spread unless `scale_rewards` says none."""
    options = replace(PLAIN, loss_type=loss_type, scale_rewards=scale)
    options.check()
    assert options.scale_rewards == scale
    log_probs, gains = logs(0.5, 0.25), advantages(torch.tensor([[1.0, 0.0]]), options.scale_rewards)
    spread = {"group": 0.5**0.5 + 1e-4, "batch": 0.5**0.5 + 1e-4, "none": 1.0}[scale]
    torch.testing.assert_close(gains, torch.tensor([[0.5, -0.5]]) / spread)
    old = torch.zeros(1, 2)
    assert grpo_loss(log_probs, old, gains, options).loss.item() == pytest.approx(0.075 / spread, rel=1e-5)


def test_flat_groups_are_counted() -> None:
    gains = torch.tensor([[0.0, 0.0], [1.0, -1.0], [0.0, 0.0], [0.0, 0.0]])
    zeros = torch.zeros(4, 2)
    assert grpo_loss(zeros, zeros, gains, PLAIN).flat_groups.item() == pytest.approx(0.75)


@pytest.mark.parametrize(
    ("change", "flag"),
    [
        ({"num_generations": 1}, "--group_size 1"),
        ({"num_iterations": 0}, "--num_iterations 0"),
        ({"epsilon": 1.0}, "--epsilon 1.0"),
        ({"beta": -1.0}, "--beta -1.0"),
        ({"penalty": float("nan")}, "--penalty nan"),
        ({"scale_rewards": "std"}, "--scale_rewards std"),
        ({"loss_type": "cispo"}, "--loss_type cispo"),
        ({"accuracy_source": "guess"}, "--accuracy_source guess"),
    ],
)
def test_wrong_options_are_named(change: dict[str, object], flag: str) -> None:
    with pytest.raises(UserError, match=flag):
        replace(GrpoOptions(), **change).check()  # type: ignore[arg-type]
