"""The controllers' networks: shapes, inputs that matter, gradients to every head."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tempovlm.control.learned.networks import (
    HIDDEN_DIM,
    Knob1PredictorBudget,
    Knob1PredictorBudgetLanguage,
    Knob1PredictorBudgetLanguageGlance,
    Knob2Knob3Predictor,
    Standardiser,
    SupervisedController,
    TwoStageController,
    tier_logits,
)

BUDGETS = torch.tensor([20.0, 90.0])
LANGUAGE, VISION = torch.randn(2, 6, generator=torch.Generator().manual_seed(0)), torch.arange(8.0).view(2, 4)


def test_three_heads() -> None:
    logits = SupervisedController(16)(BUDGETS)
    assert [tuple(row.shape) for row in logits] == [(2, 3), (2, 5), (2, 5)]
    logits = SupervisedController(16, 3, 4, 2)(BUDGETS)
    assert (logits.tier.shape[1], logits.top_k.shape[1], logits.num_blocks.shape[1]) == (3, 4, 2)


def test_the_second_stage_depends_on_all_that_it_is_given() -> None:
    net = Knob2Knob3Predictor(4, 6, 16).eval()
    tier = torch.tensor([0, 2])
    base = torch.cat(net(VISION, LANGUAGE, BUDGETS, tier), dim=1)
    assert base.shape == (2, 10)
    for changed in (
        (VISION + 1, LANGUAGE, BUDGETS, tier),
        (VISION, LANGUAGE + 1, BUDGETS, tier),
        (VISION, LANGUAGE, BUDGETS * 1.5, tier),
        (VISION, LANGUAGE, BUDGETS, 1 - tier.clamp(max=1)),
    ):
        assert not torch.allclose(base, torch.cat(net(*changed), dim=1))


@pytest.mark.parametrize(
    "net",
    [Knob1PredictorBudget(16), Knob1PredictorBudgetLanguage(6, 16), Knob1PredictorBudgetLanguageGlance(6, 4, 16)],
)
def test_every_variant_says_a_tier(net: nn.Module) -> None:
    logits = tier_logits(net, LANGUAGE, BUDGETS, VISION)  # type: ignore[arg-type]
    assert logits.shape == (2, 3)
    logits.sum().backward()
    assert all(parameter.grad is not None for parameter in net.parameters())


def test_a_glance_is_asked_for() -> None:
    with pytest.raises(ValueError, match="needs a glance"):
        tier_logits(Knob1PredictorBudgetLanguageGlance(6, 4, 16), LANGUAGE, BUDGETS, None)


def test_inputs_are_standardised_by_training_data() -> None:
    values = torch.tensor([[1.0, 100.0, 7.0], [3.0, 300.0, 7.0]])
    standard = Standardiser(3)
    torch.testing.assert_close(standard(torch.ones(1, 3)), torch.ones(1, 3))
    standard.fit(values)
    assert torch.allclose(standard(values), torch.tensor([[-1.0, -1.0, 0.0], [1.0, 1.0, 0.0]]))
    assert standard(torch.full((1, 3), 1e9)).max() == pytest.approx(5)


def test_constructors_can_be_repeated_from_sizes() -> None:
    net = Knob2Knob3Predictor(4, 6, 16, num_top_ks=3, num_block_counts=2)
    again = type(net)(**net.sizes)
    again.load_state_dict(net.state_dict())
    assert TwoStageController(Knob1PredictorBudget(16), again).knob2knob3 is again


def test_small_enough_for_a_batch_of_one() -> None:
    nets = (Knob1PredictorBudgetLanguage(192), Knob2Knob3Predictor(384, 192))
    weights = sum(parameter.numel() for net in nets for parameter in net.parameters())
    assert HIDDEN_DIM <= 128
    assert weights < 250_000
