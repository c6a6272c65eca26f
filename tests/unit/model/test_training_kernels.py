"""The fused kernels of a training step against the plain operations; in Triton's interpreter without a GPU."""

from __future__ import annotations

import importlib
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F

from tempovlm.model.layers import RMSNorm, Rotary, rotate
from tempovlm.model.moe import best
from tempovlm.training.elastic import packed_mask

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


def test_attention_of_packed_questions() -> None:
    attention = importlib.import_module("tempovlm.model.kernels.attention")
    torch.manual_seed(0)
    B, T, D, W = 2, 150, 64, 32
    qkv = torch.randn(B, T, 3 * D, device=DEVICE, requires_grad=True)
    norms = [RMSNorm(D, 1e-5).to(DEVICE) for _ in range(2)]
    for norm in norms:
        norm.weight.data.uniform_(0.5, 1.5)
    rotary = Rotary(W, 1e4, 200).to(DEVICE)
    rotary.reset()
    tables = rotary(torch.randint(0, 200, (B, T), device=DEVICE))
    segments = torch.zeros(B, T, dtype=torch.int32, device=DEVICE)
    segments[0, 70:90], segments[0, 90:140], segments[0, 140:] = 1, 2, -1
    segments[1, 66:149], segments[1, 149:] = 1, -1
    q, k, v = qkv.chunk(3, -1)
    q, k = (rotate(norm(x).view(B, T, -1, W), *tables) for norm, x in zip(norms, (q, k), strict=True))
    q, k, v = (x.reshape(B, T, -1, W).transpose(1, 2) for x in (q, k, v))
    mask = packed_mask(segments)
    plain = F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2)
    weights = (norms[0].weight, norms[1].weight)
    ours = attention.packed_attention(qkv, weights, tables, segments, 1e-5)
    same(ours, plain, [qkv, *weights])


@pytest.mark.parametrize("tokens", [5, 64, 145])
def test_attention_within_crops(tokens: int) -> None:
    attention = importlib.import_module("tempovlm.model.kernels.attention")
    torch.manual_seed(tokens)
    qkv = torch.randn(3, tokens, 3 * 32, device=DEVICE, requires_grad=True)
    q, k, v = qkv.view(3, tokens, 3, 2, 16).permute(2, 0, 3, 1, 4)
    plain = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
    same(attention.crop_attention(qkv, 2), plain, [qkv])


@pytest.mark.parametrize(("tokens", "experts", "top_k"), [(70, 32, 8), (5, 16, 16), (33, 6, 1)])
def test_routing(tokens: int, experts: int, top_k: int) -> None:
    routing = importlib.import_module("tempovlm.model.kernels.routing")
    torch.manual_seed(tokens)
    x = torch.randn(tokens, 24, device=DEVICE, requires_grad=True)
    weight = torch.randn(experts, 24, device=DEVICE, requires_grad=True)
    scores = x @ weight.t()
    shares = scores.softmax(-1)
    chosen = torch.zeros_like(scores).scatter(1, best(scores, top_k), 1.0)
    gates, sums = routing.route(x, weight, top_k)
    assert torch.equal(sums[0], chosen.sum(0))
    plain = torch.cat((shares * chosen, shares.sum(0)[None], shares.square().sum(0)[None]))
    same(torch.cat((gates, sums[1:])), plain, [x, weight])


def test_equal_scores_go_to_the_first_experts() -> None:
    routing = importlib.import_module("tempovlm.model.kernels.routing")
    gates, _ = routing.route(torch.ones(2, 8, device=DEVICE), torch.ones(16, 8, device=DEVICE), 3)
    assert gates.ne(0).nonzero()[:, 1].tolist() == [0, 1, 2] * 2
