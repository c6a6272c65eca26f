"""The budget's encoding: 1 % is seen everywhere, and no budget breaks it."""

from __future__ import annotations

import pytest
import torch

from tempovlm.control.learned.encoding import LEAST_MS, MOST_MS, LatencyBudgetEncoder


def waves(*budgets_ms: float) -> torch.Tensor:
    return LatencyBudgetEncoder(8).waves(torch.tensor(budgets_ms))


@pytest.mark.parametrize("budget_ms", [1.0, 7.3, 60.0, 200.0, 5000.0])
def test_one_percent_changes_a_wave(budget_ms: float) -> None:
    one, other = waves(budget_ms, budget_ms * 1.01)
    assert (one - other).abs().max() > 0.25


def test_no_two_budgets_of_a_fine_grid_look_alike() -> None:
    grid = torch.exp(torch.linspace(0.0, 9.0, 900))
    found = LatencyBudgetEncoder(8).waves(grid)
    gaps = torch.cdist(found, found) + torch.eye(len(grid))
    assert gaps.min() > 0.1


def test_equal_ratios_are_equal_phases_of_the_logarithm() -> None:
    ten, twenty, forty = waves(10.0, 20.0, 40.0)[:, 0]
    assert torch.isclose(twenty - ten, forty - twenty, atol=1e-6)


def test_no_budget_breaks_it() -> None:
    found = waves(0.0, -5.0, 1e9, float("inf"))
    assert torch.isfinite(found).all()
    torch.testing.assert_close(found[0], waves(LEAST_MS)[0])
    torch.testing.assert_close(found[3], waves(MOST_MS)[0])


def test_budgets_beyond_those_of_a_training_are_taken_as_the_nearest() -> None:
    encoder = LatencyBudgetEncoder(8)
    encoder.fit((20.0, 200.0))
    found = encoder.waves(torch.tensor([1.0, 20.0, 60.0, 200.0, 900.0]))
    torch.testing.assert_close(found[0], found[1])
    torch.testing.assert_close(found[3], found[4])
    torch.testing.assert_close(found[2], waves(60.0)[0])
    torch.testing.assert_close(encoder.state_dict()["range_ms"], torch.tensor([20.0, 200.0]))


def test_shape_weights_and_gradient() -> None:
    encoder = LatencyBudgetEncoder(16, num_frequencies=5)
    assert encoder(torch.tensor([10.0, 20.0, 30.0])).shape == (3, 16)
    assert "mlp.0.weight" in encoder.state_dict()
    encoder(torch.tensor([10.0])).sum().backward()
    assert all(parameter.grad is not None for parameter in encoder.parameters())
