"""The fused kernels of a training step against the plain operations; in Triton's interpreter without a GPU."""

from __future__ import annotations

import importlib
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F

from tempovlm.model.layers import RMSNorm, Rotary, rotate

pytest.importorskip("triton")


DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(scope="module")
def kernels() -> ModuleType:
    return importlib.import_module("tempovlm.model.kernels.training")


def plain_gated_swiglu(h: torch.Tensor, gates: torch.Tensor) -> torch.Tensor:
    gate, up = h.unflatten(-1, (gates.shape[1], 2, -1)).unbind(2)
    return (F.silu(gate) * up * gates.unsqueeze(-1)).flatten(1)


def same(ours: torch.Tensor, plain: torch.Tensor, inputs: list[torch.Tensor]) -> None:
    """Equal outputs, and equal gradients for a random direction."""
    torch.testing.assert_close(ours, plain, rtol=1e-5, atol=1e-5)
    direction = torch.randn_like(plain)
    ours_back = torch.autograd.grad(ours, inputs, direction, retain_graph=True)
    plain_back = torch.autograd.grad(plain, inputs, direction)
    for one, other in zip(ours_back, plain_back, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("rows", "experts", "width", "top_k"), [(70, 16, 48, 8), (3, 4, 16, 1), (65, 8, 5, 8)])
def test_gated_swiglu(kernels: ModuleType, rows: int, experts: int, width: int, top_k: int) -> None:
    torch.manual_seed(rows)
    h = torch.randn(rows, experts * 2 * width, device=DEVICE, requires_grad=True)
    weights, chosen = torch.rand(rows, experts, device=DEVICE).softmax(-1).topk(top_k)
    weights.requires_grad_()
    gates = torch.zeros(rows, experts, device=DEVICE).scatter(1, chosen, weights)
    same(kernels.gated_swiglu(h, gates), plain_gated_swiglu(h, gates), [h, weights])


def test_norm_and_rotary_of_a_part_of_a_wider_row(kernels: ModuleType) -> None:
    torch.manual_seed(0)
    B, T, D, W = 3, 37, 192, 32
    norm = RMSNorm(D, 1e-5).to(DEVICE)
    norm.weight.data.uniform_(0.5, 1.5)
    wide = torch.randn(B, T, 3 * D, device=DEVICE, requires_grad=True)
    rotary = Rotary(W, 1e4, 100).to(DEVICE)
    rotary.reset()
    cos, sin = rotary(torch.randint(0, 100, (B, T), device=DEVICE))
    keys = wide.split(D, -1)[1]
    ours = kernels.norm_rotate(keys, norm.weight, cos, sin, norm.eps)
    plain = rotate(norm(keys).view(B, T, D // W, W), cos, sin).flatten(2)
    same(ours, plain, [wide, norm.weight])


def test_quick_gelu(kernels: ModuleType) -> None:
    x = torch.randn(5, 1111, device=DEVICE, requires_grad=True)
    same(kernels.quick_gelu(x), x * torch.sigmoid(1.702 * x), [x])


def test_unused_experts_get_zeros_whatever_they_hold(kernels: ModuleType) -> None:
    h = torch.full((2, 2 * 2 * 8), torch.inf, device=DEVICE)
    h[:, :16] = 1.0
    gates = torch.tensor([[0.5, 0.0], [0.25, 0.0]], device=DEVICE)
    out = kernels.gated_swiglu(h, gates)
    assert torch.equal(out[:, 8:], torch.zeros(2, 8, device=DEVICE))
    torch.testing.assert_close(out[0, :8], torch.full((8,), 0.5 * F.silu(torch.tensor(1.0)).item(), device=DEVICE))
