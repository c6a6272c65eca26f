from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from tempovlm.lab.grpo.algorithm import reward
from tempovlm.lab.options import GrpoOptions

PLAIN = GrpoOptions()


def test_the_seed_documents_weights() -> None:
    weights = (PLAIN.alpha, PLAIN.penalty, PLAIN.time_price)
    assert weights == pytest.approx((1.0, 0.5, 0.0))


def test_only_time_beyond_the_budget_costs() -> None:
    accuracy = torch.tensor([[1.0, 1.0, 0.3], [0.0, 0.6, 1.0]])
    latency_ms = torch.tensor([[100.0, 150.0, 50.0], [80.0, 40.0, 20.0]])
    found = reward(accuracy, latency_ms, torch.tensor([100.0, 20.0]), PLAIN)
    # Half over the budget costs 0.25; 4 and 2 times the budget cost 1.5 and 0.5; in time costs nothing.
    torch.testing.assert_close(found, torch.tensor([[1.0, 0.75, 0.3], [-1.5, 0.1, 1.0]]))


def test_weights_scale_their_terms() -> None:
    arguments = (torch.tensor([[0.5]]), torch.tensor([[30.0]]), torch.tensor([20.0]))
    torch.testing.assert_close(reward(*arguments, replace(PLAIN, alpha=2.0, penalty=0.1)), torch.tensor([[0.95]]))


def test_time_has_a_price_by_the_share_of_the_budget() -> None:
    accuracy, latency_ms = torch.tensor([[1.0, 1.0]]), torch.tensor([[50.0, 150.0]])
    found = reward(accuracy, latency_ms, torch.tensor([100.0]), replace(PLAIN, time_price=0.2))
    torch.testing.assert_close(found, torch.tensor([[1 - 0.1, 1 - 0.25 - 0.3]]))


@pytest.mark.parametrize("budget_ms", [0.0, -1.0, float("nan")])
def test_a_budget_must_be_positive(budget_ms: float) -> None:
    with pytest.raises(ValueError, match="positive"):
        reward(torch.ones(1, 1), torch.ones(1, 1), torch.tensor([budget_ms]), PLAIN)
