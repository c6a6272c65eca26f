"""Grouped experts without the host against the plain ones; in Triton's interpreter without a GPU."""

from __future__ import annotations

import importlib
from types import ModuleType

import pytest
import torch

import tiny_model
from tempovlm.model.moe import MoE

pytest.importorskip("triton")

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(scope="module")
def kernels() -> ModuleType:
    return importlib.import_module("tempovlm.model.kernels.prefill")


@pytest.mark.parametrize(("tokens", "top_k"), [(1, 1), (5, 2), (19, 8), (33, 3)])
@torch.no_grad()
def test_grouped(kernels: ModuleType, tokens: int, top_k: int) -> None:
    torch.manual_seed(tokens)
    layer = MoE(tiny_model.CONFIG)
    for parameter in layer.parameters():
        parameter.copy_(torch.randn_like(parameter) * parameter.shape[-1] ** -0.5)
    layer = layer.bfloat16().to(DEVICE)
    x = torch.randn(tokens, tiny_model.CONFIG.width).bfloat16().to(DEVICE)
    weights, experts = layer.route(x, top_k)
    ours = kernels.grouped(x, weights, experts, layer.gate_up, layer.down)
    exact = layer.float().dense(x.float(), weights.float(), experts)
    assert ours.dtype == torch.bfloat16
    assert (ours.float() - exact).norm() <= 1e-2 * exact.norm()


def test_sums_follow_places_and_read_nothing_else(kernels: ModuleType) -> None:
    rows = torch.full((6, 48), torch.nan, device=DEVICE)
    rows[[5, 0, 2]] = torch.randn(3, 48, device=DEVICE)
    out = kernels.gather_sum(rows, torch.tensor([[5, 0], [2, 2]], device=DEVICE))
    torch.testing.assert_close(out, torch.stack((rows[5] + rows[0], 2 * rows[2])))


def test_weights_belong_to_rows_before_the_sort(kernels: ModuleType) -> None:
    h = torch.randn(4, 2 * 24, device=DEVICE)
    weights = torch.tensor([1.0, 2.0, 3.0, 4.0], device=DEVICE)
    order = torch.tensor([2, 0, 3, 1], device=DEVICE)
    gate, up = h.chunk(2, dim=1)
    expected = torch.nn.functional.silu(gate) * up * weights[order].unsqueeze(1)
    torch.testing.assert_close(kernels.weighted_swiglu(h, weights, order), expected)
