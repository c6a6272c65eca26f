"""NumPy and torch give the same logits, at any input."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from tempovlm.control.learned.host import HostNetwork, added, product
from tempovlm.control.learned.networks import (
    AccuracyNetwork,
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
    host, values = HostNetwork(net), {"language": LANGUAGE[0].numpy(), "glance": VISION[0].numpy()}
    seen = sum((read(values[name]) for name, read in host.inputs.items()), np.float32(0))
    for budget_ms in BUDGETS_MS:
        want = tier_logits(net, LANGUAGE[:1], torch.tensor([budget_ms]), VISION[:1])
        near(host(budget_ms, np.asarray(seen)), want)


def test_the_second_stage() -> None:
    net = Knob2Knob3Predictor(8, 6, 16, num_top_ks=5, num_block_counts=4)
    net.fit_inputs(VISION, LANGUAGE)
    net.eval()
    host = HostNetwork(net)
    looked = host.inputs["vision"](VISION[0].numpy()) + host.inputs["language"](LANGUAGE[0].numpy())
    for tier in range(3):
        of_tier = net.of_tier(net.tier(torch.tensor([tier])))
        seen = looked + added(of_tier.detach().numpy().T)[:, 0]
        for budget_ms in BUDGETS_MS:
            want = net(VISION[:1], LANGUAGE[:1], torch.tensor([budget_ms]), torch.tensor([tier]))
            near(host(budget_ms, seen), torch.cat(want, dim=1))


def test_accuracies_from_a_question_alone() -> None:
    net = AccuracyNetwork(6, 16, 9)
    net.fit_inputs(LANGUAGE, torch.rand(40, 9))
    net.eval()
    host = HostNetwork(net)
    seen = host.inputs["language"](LANGUAGE[0].numpy())
    for budget_ms in BUDGETS_MS:
        near(host(budget_ms, seen), net(LANGUAGE[:1]))


def test_supervision() -> None:
    net = SupervisedController(16, 3, 5, 4)
    near(HostNetwork(net)(33.0), torch.cat(net(torch.tensor([33.0])), dim=1))


def test_units_far_from_nothing_stay_numbers() -> None:
    net = SupervisedController(16, 3, 5, 4)
    with torch.no_grad():
        for layer in (net.budget.mlp[0], net.trunk[1]):
            layer.weight.mul_(1e4)
    with np.errstate(all="raise", under="ignore"):
        for budget_ms in BUDGETS_MS:
            row = HostNetwork(net)(budget_ms)
            want = torch.cat(net(torch.tensor([budget_ms])), dim=1)[0].detach().numpy()
            np.testing.assert_allclose(row, want, rtol=1e-3, atol=1e-3 * np.abs(want).max())


@pytest.mark.parametrize(("rows", "width"), [(128, 6272), (127, 4096), (3, 200_000)])
def test_a_layer_of_many_weights(rows: int, width: int) -> None:
    layer, x = nn.Linear(width, rows, bias=False), torch.randn(1, width)
    near(product(layer.weight.detach().numpy())(x[0].numpy()), layer(x))


def test_another_layer_is_refused() -> None:
    net = SupervisedController(16, 3, 5, 4)
    net.trunk[0] = nn.GELU()
    with pytest.raises(TypeError, match="GELU"):
        HostNetwork(net)
