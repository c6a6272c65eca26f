"""The parts of a prompt between its products against the plain modules; in Triton's interpreter without a GPU."""

from __future__ import annotations

import importlib
from dataclasses import replace
from types import ModuleType

import pytest
import torch

import tiny_model
from tempovlm.model.attention import Attention, Span
from tempovlm.model.cache import KVCache
from tempovlm.model.config import ModelConfig
from tempovlm.model.layers import RMSNorm, Rotary, rotate
from tempovlm.model.moe import MoE

pytest.importorskip("triton")

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(scope="module")
def kernels() -> ModuleType:
    return importlib.import_module("tempovlm.model.kernels.prefill")


@pytest.mark.parametrize(("width", "heads", "dtype"), [(48, 3, torch.bfloat16), (64, 2, torch.float32)])
@torch.no_grad()
def test_norm_and_rotation_of_strided_rows(
    kernels: ModuleType, width: int, heads: int, dtype: torch.dtype
) -> None:
    layer = RMSNorm(width, 1e-5).to(DEVICE)
    layer.weight.uniform_(0.5, 1.5)
    qkv = torch.randn(2, 7, 3 * width, device=DEVICE).to(dtype)
    positions = torch.arange(7, device=DEVICE).expand(2, 7)
    cos, sin = Rotary(width // heads, 1e4, 16).to(DEVICE)(positions)
    exact, layer = RMSNorm(width, 1e-5).to(DEVICE), layer.to(dtype)
    exact.weight.copy_(layer.weight)
    for x in qkv.split(width, dim=-1):
        plain = exact(x.float())
        turned = rotate(plain.view(2, 7, heads, -1), cos, sin).flatten(2)
        normed = kernels.norm(x, layer.weight, 1e-5)
        rotated = kernels.norm_rotate(x, layer.weight, cos, sin, 1e-5)
        assert normed.dtype == rotated.dtype == dtype
        for ours, right in ((normed, plain), (rotated, turned)):
            assert (ours.float() - right).norm() <= (1e-2 if dtype == torch.bfloat16 else 1e-5) * right.norm()
    last = qkv[:, -1, :width]
    torch.testing.assert_close(
        kernels.norm(last, layer.weight, 1e-5), kernels.norm(last.clone(), layer.weight, 1e-5)
    )


@pytest.mark.parametrize("config", [tiny_model.CONFIG, replace(tiny_model.CONFIG, width=48, num_heads=3)])
@torch.no_grad()
def test_the_split_writes_rotated_entries_and_nothing_else(kernels: ModuleType, config: ModelConfig) -> None:
    layer, D = Attention(config).to(DEVICE), config.width
    for norm in (layer.q_norm, layer.k_norm):
        norm.weight.uniform_(0.5, 1.5)
    qkv = torch.randn(2, 5, 3 * D, device=DEVICE)
    ours = KVCache.allocate(config, 3, 2, 16, qkv)
    for values in (ours.keys, ours.values):
        values.fill_(torch.nan)
    plain = KVCache(ours.keys.clone(), ours.values.clone())
    tables = Rotary(config.head_width, 1e4, 16).to(DEVICE)(torch.arange(3, 8, device=DEVICE).expand(2, 5))
    q, k, v = (part.view(2, 5, config.num_heads, -1) for part in qkv.split(D, dim=-1))
    turned = [rotate(norm(x.flatten(2)).view_as(x), *tables) for norm, x in ((layer.q_norm, q), (layer.k_norm, k))]
    plain.write(1, 3, turned[1].transpose(1, 2), v.transpose(1, 2))
    norms = layer.q_norm.weight, layer.k_norm.weight
    queries = kernels.split(qkv, norms, tables, config.norm_eps, ours, 1, 3)
    torch.testing.assert_close(queries, turned[0].flatten(2))
    for entries, expected in ((ours.keys, plain.keys), (ours.values, plain.values)):
        torch.testing.assert_close(entries, expected, equal_nan=True)


@torch.no_grad()
def test_rows_get_entries_where_tokens_are_kept(kernels: ModuleType) -> None:
    D, W, eps = 48, 16, 1e-5
    norms = torch.rand(2, D, device=DEVICE) + 0.5
    qkv, places = torch.randn(4, 3 * D, device=DEVICE), torch.tensor([3, 0, 7, 1], device=DEVICE)
    entries = torch.tensor([5, -1, 0, 2], device=DEVICE)
    cos, sin = Rotary(W, 1e4, 16).to(DEVICE)(places.unsqueeze(0))
    keys, values = torch.full((2, 6, D), torch.nan, device=DEVICE)
    tables = cos[0, :, 0].contiguous(), sin[0, :, 0].contiguous()
    queries = kernels.split_rows(qkv, (norms[0], norms[1]), tables, eps, entries, keys, values)
    turned = []
    for weight, x in zip(norms, qkv.split(D, dim=1), strict=False):
        unit = x * x.square().mean(-1, keepdim=True).add(eps).rsqrt() * weight
        turned.append(rotate(unit.view(1, 4, -1, W), cos, sin).flatten(2)[0])
    torch.testing.assert_close(queries, turned[0])
    kept, rest = [0, 2, 3], [1, 3, 4]
    torch.testing.assert_close(keys[entries[kept]], turned[1][kept])
    torch.testing.assert_close(values[entries[kept]], qkv[kept, 2 * D :])
    assert bool(keys[rest].isnan().all() & values[rest].isnan().all())


@torch.no_grad()
def test_sums_within_products_are_sums() -> None:
    """The in-place way of a block, which a GPU takes, with this machine's means."""
    layer, x = Attention(tiny_model.CONFIG), torch.randn(2, 5, tiny_model.CONFIG.width)
    for parameter in layer.parameters():
        parameter.copy_(torch.randn_like(parameter) * parameter.shape[-1] ** -0.5)
    cos, sin = Rotary(tiny_model.CONFIG.head_width, 1e4, 16)(torch.arange(5).expand(2, 5))
    span = Span(0, cos, sin, None)
    expected = x + layer(x, span, None, 0)
    layer.add_to(x, span, None, 0)
    torch.testing.assert_close(x, expected)

    experts = MoE(tiny_model.CONFIG)
    for parameter in experts.parameters():
        parameter.copy_(torch.randn_like(parameter) * parameter.shape[-1] ** -0.5)
    dtype = torch.bfloat16 if DEVICE.type == "cuda" else torch.float32  # the interpreter multiplies no bfloat16
    experts, x = experts.to(DEVICE, dtype), x.to(DEVICE, dtype)
    plain = experts.float()(x.float(), 3)
    before = x.float().clone()
    experts.to(dtype).add_to(x, 3)
    assert (x.float() - before - plain).norm() <= 2e-2 * (before + plain).norm()


@pytest.mark.parametrize(("experts", "top_k"), [(64, 8), (20, 16), (8, 1)])
def test_choice_of_experts(kernels: ModuleType, experts: int, top_k: int) -> None:
    scores = torch.randn(9, experts, device=DEVICE)
    shares, expected = scores.softmax(dim=-1).topk(top_k, dim=-1)
    weights, chosen = kernels.choose(scores, top_k, torch.float32)
    assert torch.equal(chosen.long(), expected)
    torch.testing.assert_close(weights, shares)
    _, equal = kernels.choose(torch.zeros(1, experts, device=DEVICE), top_k, torch.float32)
    assert equal[0].tolist() == list(range(top_k))
    _, unclear = kernels.choose(torch.full((1, experts), torch.nan, device=DEVICE), top_k, torch.float32)
    assert 0 <= int(unclear.min()) <= int(unclear.max()) < experts


def test_a_token_may_have_fewer_experts(kernels: ModuleType) -> None:
    scores = torch.randn(4, 20, device=DEVICE)
    limits = torch.tensor([3, 0, 6, 1], dtype=torch.int32, device=DEVICE)
    weights, chosen = kernels.choose(scores, 6, torch.float32)
    shares, experts = kernels.choose(scores, 6, torch.float32, limits)
    inside = torch.arange(6, device=DEVICE) < limits.unsqueeze(1)
    torch.testing.assert_close(shares, weights.where(inside, torch.zeros((), device=DEVICE)))
    assert torch.equal(experts, chosen.where(inside, chosen[:, :1]))
