"""Experts of sorted tokens against the plain ones; in Triton's interpreter without a GPU."""

from __future__ import annotations

import importlib
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F

import tiny_model
from tempovlm.model.moe import MoE

pytest.importorskip("triton")

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPE = torch.bfloat16 if torch.cuda.is_available() else torch.float32
"""The interpreter multiplies no bfloat16."""


@pytest.fixture(scope="module")
def kernels() -> ModuleType:
    return importlib.import_module("tempovlm.model.kernels.experts")


@pytest.mark.parametrize(("tokens", "top_k"), [(1, 1), (5, 2), (19, 8), (33, 3)])
@torch.no_grad()
def test_grouped(kernels: ModuleType, tokens: int, top_k: int) -> None:
    torch.manual_seed(tokens)
    layer = MoE(tiny_model.CONFIG)
    for parameter in layer.parameters():
        parameter.copy_(torch.randn_like(parameter) * parameter.shape[-1] ** -0.5)
    layer = layer.to(DEVICE, DTYPE)
    x = torch.randn(tokens, tiny_model.CONFIG.width).to(DEVICE, DTYPE)
    weights, experts = layer.route(x, top_k)
    ours = kernels.grouped(x, weights, experts, layer.gate_up, layer.down)
    exact = layer.float().dense(x.float(), weights.float(), experts)
    assert ours.dtype == DTYPE
    assert (ours.float() - exact).norm() <= 1e-2 * exact.norm()


def test_sums_follow_places_and_read_nothing_else(kernels: ModuleType) -> None:
    rows = torch.full((6, 48), torch.nan, device=DEVICE)
    rows[[5, 0, 2]] = torch.randn(3, 48, device=DEVICE)
    out = kernels.gather_sum(rows, torch.tensor([[5, 0], [2, 2]], device=DEVICE))
    expected = torch.stack((rows[5] + rows[0], 2 * rows[2]))
    torch.testing.assert_close(out, expected)
    onto = torch.randn(2, 48, device=DEVICE)
    expected = expected + onto
    assert kernels.gather_sum(rows, torch.tensor([[5, 0], [2, 2]], device=DEVICE), onto) is onto
    torch.testing.assert_close(onto, expected)


@pytest.mark.parametrize("counts", [(1, 0, 64, 3), (65, 128, 0, 129), (0, 0, 0, 200)])
@pytest.mark.parametrize(("width", "expert_width"), [(72, 40), (64, 136)])
def test_tiles_of_every_height_and_widths_that_fill_none(
    kernels: ModuleType, counts: tuple[int, ...], width: int, expert_width: int
) -> None:
    torch.manual_seed(width)
    experts = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    experts = experts[torch.randperm(len(experts))].unsqueeze(1).to(DEVICE)
    x = torch.randn(len(experts), width, device=DEVICE).to(DTYPE)
    gate_up = torch.randn(len(counts), 2 * expert_width, width, device=DEVICE).to(DTYPE) * width**-0.5
    down = torch.randn(len(counts), width, expert_width, device=DEVICE).to(DTYPE) * expert_width**-0.5
    weights = torch.rand(len(experts), 1, device=DEVICE).to(DTYPE)
    chosen = experts.squeeze(1)
    gate, up = torch.einsum("nd,nfd->nf", x.float(), gate_up[chosen].float()).chunk(2, dim=1)
    hidden = F.silu(gate) * up * weights.float()
    tokens, order, places, ends = kernels.sort(experts, len(counts))
    ours = kernels.hidden(x, weights, (tokens, order, ends), gate_up)
    expected = hidden[tokens.long()]
    assert (ours.float() - expected).norm() <= 1e-2 * expected.norm()
    rows = kernels.down(ours, ends, down)
    expected = torch.einsum("nf,ndf->nd", ours.float(), down[chosen[tokens.long()]].float())
    assert (rows.float() - expected).norm() <= 1e-2 * expected.norm()
    assert torch.equal(kernels.gather_sum(rows, places), rows[places.squeeze(1).long()])


@pytest.mark.parametrize(("tokens", "top_k"), [(1, 1), (5, 3), (700, 6), (2100, 8)])
def test_sort_is_stable_and_complete(kernels: ModuleType, tokens: int, top_k: int) -> None:
    num_experts = 20  # the last of them is never chosen
    experts = torch.randint(0, num_experts - 1, (tokens, top_k), device=DEVICE)
    expected, order = experts.flatten().sort(stable=True)
    of, found, places, ends = kernels.sort(experts, num_experts)
    assert torch.equal(found.long(), order)
    assert torch.equal(of.long(), order // top_k)
    assert torch.equal(expected[places.flatten().long()], experts.flatten())
    counts = torch.bincount(expected, minlength=num_experts)
    assert torch.equal(ends.long(), counts.cumsum(0))
