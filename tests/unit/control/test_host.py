"""NumPy and torch give the same logits, at any input."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from tempovlm.control.host import HostKnob1, HostKnob2Knob3, HostSupervised, layers
from tempovlm.control.networks import (
    Knob1Predictor,
    Knob1PredictorBudget,
    Knob1PredictorBudgetLanguage,
    Knob1PredictorBudgetLanguageGlance,
    Knob2Knob3Predictor,
    SupervisedController,
    tier_logits,
)

BUDGETS_MS = (0.1, 7.0, 20.0, 61.3, 300.0, 5e6)
LANGUAGE, VISION = torch.randn(40, 6), 9 * torch.randn(40, 8)


def near(row: np.ndarray, logits: torch.Tensor) -> None:
    np.testing.assert_allclose(row, logits[0].detach().numpy(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("variant", ["budget", "language", "glance"])
def test_the_first_stage(variant: str) -> None:
    net: Knob1Predictor
    if variant == "budget":
        net = Knob1PredictorBudget(16)
    elif variant == "language":
        net = Knob1PredictorBudgetLanguage(6, 16)
        net.fit_inputs(LANGUAGE)
    else:
        net = Knob1PredictorBudgetLanguageGlance(6, 8, 16)
        net.fit_inputs(LANGUAGE, VISION)
    net.budget.fit((15.0, 200.0))
    net.eval()
    host = HostKnob1(net)
    looks = [LANGUAGE[0].numpy(), VISION[0].numpy()][: ("budget", "language", "glance").index(variant)]
    for budget_ms in BUDGETS_MS:
        want = tier_logits(net, LANGUAGE[:1], torch.tensor([budget_ms]), VISION[:1])
        near(host(budget_ms, *looks), want)


def test_the_second_stage() -> None:
    net = Knob2Knob3Predictor(8, 6, 16, num_top_ks=5, num_block_counts=4)
    net.fit_inputs(VISION, LANGUAGE)
    net.eval()
    host = HostKnob2Knob3(net)
    for budget_ms in BUDGETS_MS:
        for tier in range(3):
            want = net(VISION[:1], LANGUAGE[:1], torch.tensor([budget_ms]), torch.tensor([tier]))
            for row, logits in zip(
                host(VISION[0].numpy(), LANGUAGE[0].numpy(), budget_ms, tier), want, strict=True
            ):
                near(row, logits)


def test_supervision() -> None:
    net = SupervisedController(16, 3, 5, 4)
    for row, logits in zip(HostSupervised(net)(33.0), net(torch.tensor([33.0])), strict=True):
        near(row, logits)


@pytest.mark.parametrize(("rows", "width"), [(128, 6272), (127, 4096), (3, 200_000)])
def test_a_layer_of_many_weights(rows: int, width: int) -> None:
    layer, x = nn.Linear(width, rows), torch.randn(1, width)
    near(layers([layer])(x[0].numpy()), layer(x))


def test_another_layer_is_refused() -> None:
    with pytest.raises(TypeError, match="GELU"):
        layers(nn.Sequential(nn.Linear(2, 2), nn.GELU()))
