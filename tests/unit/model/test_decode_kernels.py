"""The kernels of a decode step against the plain modules in float32; in Triton's interpreter without a GPU.

Whatever a kernel must write is filled with NaN before it runs, and so is every cache entry it must not read.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from dataclasses import replace
from types import ModuleType

import pytest
import torch
from torch import Tensor

import tiny_model
from tempovlm.core.knobs import KnobConfig
from tempovlm.core.plan import Plan, Step
from tempovlm.model.attention import Attention, Span
from tempovlm.model.cache import KVCache
from tempovlm.model.config import ModelConfig
from tempovlm.model.layers import RMSNorm, Rotary
from tempovlm.model.moe import MoE

pytest.importorskip("triton")

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
TOLERANCE = 1e-4
CAPACITY = 96

ODD = replace(tiny_model.CONFIG, width=48, num_heads=3, num_experts=20, expert_width=24, num_blocks=2)
"""No size is a power of two, as in the pocket."""

EVEN = replace(tiny_model.CONFIG, width=64, num_heads=2, num_experts=16, expert_width=32, num_blocks=2)
"""Every size is one, as in MolmoE-1B."""

SIZES = {"odd": ODD, "even": EVEN}
CONTEXTS = [("odd", c) for c in (0, 1, 7, 8, 9, 31, 33, 70, CAPACITY - 1)] + [("even", c) for c in (0, 8, 33, 70)]
EXPERTS = [(size, k) for k in range(1, 17) for i, size in enumerate(SIZES) if k in (1, 8, 16) or k % 2 == i]
"""Every number of experts, and the fewest, the usual and the most of each size."""


@pytest.fixture(scope="module")
def kernels() -> ModuleType:
    return importlib.import_module("tempovlm.model.kernels.decode")


@pytest.fixture(autouse=True)
def reproducible() -> Iterator[None]:
    torch.manual_seed(0)
    with torch.no_grad():
        yield


def filled(module: torch.nn.Module) -> torch.nn.Module:
    """Random weights; norms around one."""
    for name, parameter in module.named_parameters():
        values = torch.randn_like(parameter) * parameter.shape[-1] ** -0.5
        parameter.copy_(1 + 0.3 * values if "norm" in name else values)
    return module.to(DEVICE)


def buffers(kernels: ModuleType, config: ModelConfig, top_k: int, **tiling: object) -> object:
    """Buffers poisoned but for the tickets, cut so small that every product takes several programs."""
    tile = kernels.Tile
    small = {name: tile(16, 32) for name in ("qkv", "out", "router", "hidden", "down", "head")}
    cut = kernels.Tiling(**{**small, "splits": 4, "tokens": 8, **tiling})
    on = kernels.StepBuffers.allocate(config, top_k, DEVICE, cut)
    for name in ("x", "qkv", "parts", "sums", "mixed", "router", "hidden", "logits", "best"):
        getattr(on, name).fill_(torch.nan)
    on.shares.fill_(torch.nan)
    on.chosen.fill_(-1)
    on.where.fill_(-1)
    return on


def assert_close(ours: Tensor, plain: Tensor) -> None:
    error = (ours - plain).norm() / plain.norm()
    assert error <= TOLERANCE, float(error)


@pytest.mark.parametrize(("rows", "width", "tile"), [(7, 48, (4, 32)), (64, 64, (8, 64)), (33, 80, (2, 128))])
def test_norm_and_product(kernels: ModuleType, rows: int, width: int, tile: tuple[int, int]) -> None:
    norm = filled(RMSNorm(width, 1e-5))
    assert isinstance(norm, RMSNorm)
    x, weight = 3 * torch.randn(width, device=DEVICE), torch.randn(rows, width, device=DEVICE)
    out = torch.full((rows,), torch.nan, device=DEVICE)
    kernels.norm_matvec(x, norm, weight, out, kernels.Tile(*tile))
    assert_close(out, weight @ norm(x))


@pytest.mark.parametrize(("size", "context"), CONTEXTS, ids=str)
def test_attention(kernels: ModuleType, size: str, context: int) -> None:
    config = SIZES[size]
    layer = filled(Attention(config))
    assert isinstance(layer, Attention)
    rotary = Rotary(config.head_width, 1e4, CAPACITY).to(DEVICE)
    rotary.reset()
    H, W, D = config.num_heads, config.head_width, config.width
    keys, values = torch.full((2, 1, 1, H, CAPACITY, W), torch.nan, device=DEVICE)
    keys[..., :context, :], values[..., :context, :] = torch.randn(2, 1, 1, H, context, W, device=DEVICE)
    plain = KVCache(keys.clone(), values.clone())
    x = torch.randn(1, 1, D, device=DEVICE)
    cos, sin = rotary(torch.full((1, 1), context, device=DEVICE))
    added = layer(x, Span(context, cos, sin, None), plain, 0)

    on = buffers(kernels, config, 1)
    on.x.copy_(x.view(-1))
    on.position.fill_(context)
    for _ in range(2 if context == 33 else 1):  # twice: the tickets must be back at zero
        kernels.norm_matvec(on.x, layer.norm, layer.qkv.weight, on.qkv, on.tiling.qkv)
        kernels.attend(layer, rotary, keys[0, 0], values[0, 0], on)
    assert_close(keys[..., : context + 1, :], plain.keys[..., : context + 1, :])
    assert_close(values[..., : context + 1, :], plain.values[..., : context + 1, :])
    assert keys[..., context + 1 :, :].isnan().all()
    kernels.add_matvec(on.mixed.unsqueeze(0), layer.out.weight, on.x, on.tiling.out)
    assert_close(on.x, (x + added).view(-1))


@pytest.mark.parametrize(("size", "top_k"), EXPERTS, ids=str)
def test_experts(kernels: ModuleType, size: str, top_k: int) -> None:
    config = SIZES[size]
    layer = filled(MoE(config))
    assert isinstance(layer, MoE)
    x = torch.randn(1, 1, config.width, device=DEVICE)
    on = buffers(kernels, config, top_k)
    on.x.copy_(x.view(-1))
    kernels.add_experts(layer, top_k, on)
    assert_close(on.x, (x + layer(x, top_k)).view(-1))
    _, experts = layer.route(layer.norm(x).view(1, -1), top_k)
    assert on.chosen.tolist() == experts[0].tolist()


def test_equal_router_scores_choose_different_experts(kernels: ModuleType) -> None:
    layer = filled(MoE(EVEN))
    assert isinstance(layer, MoE)
    layer.router.weight.zero_()
    on = buffers(kernels, EVEN, 5)
    on.x.copy_(torch.randn(EVEN.width))
    kernels.add_experts(layer, 5, on)
    assert on.chosen.tolist() == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("size", [1, 160, 2049])
def test_pick(kernels: ModuleType, size: int) -> None:
    on = buffers(kernels, replace(ODD, embedding_size=size), 1)
    for place in {0, size // 2, size - 1}:
        on.logits.copy_(-torch.rand(1, size) - 1)
        on.logits[0, place] = -0.5
        on.position.fill_(5)
        kernels.pick(on)
        assert (on.token.tolist(), on.position.tolist()) == ([place], [6])
    on.logits.fill_(1.0)
    kernels.pick(on)
    assert on.token.tolist() == [0]


@pytest.mark.parametrize("size", [160, 2049])
@pytest.mark.parametrize("wrong", [torch.nan, torch.inf])
def test_pick_finds_none_where_logits_are_not_numbers(kernels: ModuleType, size: int, wrong: float) -> None:
    on = buffers(kernels, replace(ODD, embedding_size=size), 1)
    for place in (0, size // 2, size - 1):
        on.logits.copy_(torch.randn(1, size))
        on.logits[0, place] = wrong
        kernels.pick(on)
        assert on.token.tolist() == [-1]
    on.logits.fill_(-torch.inf)
    kernels.pick(on)
    assert on.token.tolist() == [-1]
    on.logits[0, 7] = -3.0
    kernels.pick(on)
    assert on.token.tolist() == [7]


def test_no_embedding_is_read_for_no_token(kernels: ModuleType) -> None:
    model = tiny_model.build_model().to(DEVICE)
    plan = Plan(KnobConfig(tier="low", top_k=3, num_blocks=3), (Step(0, 3), Step(4, 3), Step(5, 3)))
    cache = KVCache.allocate(model.config, 3, 1, 32, model.decoder.embedding)
    found, whole = [], kernels.Tile(64, 64)
    for token in (-1, 0):
        tiles = dict.fromkeys(("qkv", "out", "hidden", "down", "head"), whole)
        on = buffers(kernels, model.config, 4, splits=1, **tiles)
        on.token.fill_(token)
        on.position.fill_(0)
        kernels.forward(model.decoder, plan, cache, on)
        found.append(on.logits)
    assert_close(*found)


def test_pick_keeps_to_a_limit(kernels: ModuleType) -> None:
    on = buffers(kernels, replace(ODD, embedding_size=2049), 1)
    on = replace(on, limit=torch.zeros_like(on.logits))
    on.logits.copy_(-torch.arange(2049.0).unsqueeze(0))
    on.limit[0, :2048] = -torch.inf
    kernels.pick(on)
    assert on.token.tolist() == [2048]
    on.limit.zero_()
    kernels.pick(on)
    assert on.token.tolist() == [0]


def test_greedy_tokens_of_a_plan(kernels: ModuleType) -> None:
    model = tiny_model.build_model().to(DEVICE)
    plan = Plan(KnobConfig(tier="low", top_k=3, num_blocks=3), (Step(0, 3), Step(4, 3), Step(5, 3)))
    prompt = torch.tensor([[5, 17, 30, 2, 9, 11, 40]], device=DEVICE)
    cache = KVCache.allocate(model.config, 3, 1, 32, model.decoder.embedding)
    first = model.prefill(model.embed(prompt, None, None), plan, cache).argmax(-1)
    ours = KVCache(cache.keys.clone(), cache.values.clone())
    on = buffers(kernels, model.config, 4, splits=2)
    on.token.copy_(first)
    on.position.fill_(prompt.shape[1])
    token = first
    for step in range(2):
        logits = model.decode(token, plan, cache, prompt.shape[1] + step)
        token = logits.argmax(-1)
        kernels.forward(model.decoder, plan, ours, on)
        assert_close(on.logits, logits)
        kernels.pick(on)
        assert torch.equal(on.token, token)


def test_bfloat16_weights(kernels: ModuleType) -> None:
    layer = filled(MoE(EVEN))
    assert isinstance(layer, MoE)
    x = torch.randn(1, 1, EVEN.width, device=DEVICE)
    expected = (x + layer.bfloat16().float()(x, 4)).view(-1)
    on = buffers(kernels, EVEN, 4)
    on.x.copy_(x.view(-1))
    kernels.add_experts(layer.bfloat16(), 4, on)
    assert_close(on.x, expected)
