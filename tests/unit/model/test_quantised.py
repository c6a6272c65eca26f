"""Weights of one byte: their rounding, and the decode kernels on them against float32 on what they stand for."""

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
from tempovlm.model.cache import KVCache
from tempovlm.model.config import ModelConfig
from tempovlm.model.layers import RMSNorm
from tempovlm.model.moe import MoE
from tempovlm.model.quantised import Kind, QuantisedDecoder, QuantisedMoE, Scaled, imitate

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
TOLERANCE = 1e-4
KINDS: tuple[Kind, ...] = ("fp8", "int8")

ODD = replace(tiny_model.CONFIG, width=48, num_heads=3, num_experts=20, expert_width=24, num_blocks=2)
EVEN = replace(tiny_model.CONFIG, width=64, num_heads=2, num_experts=16, expert_width=32, num_blocks=2)

SIZES = {"odd": ODD, "even": EVEN}
PAIRS = [(size, kind) for size in SIZES for kind in KINDS]
EXPERTS = [
    (*pair, top_k) for top_k in range(1, 17) for i, pair in enumerate(PAIRS) if top_k in (1, 16) or top_k % 4 == i
]
"""Every number of experts, and the fewest and the most of each size and kind."""


@pytest.fixture(autouse=True)
def reproducible() -> Iterator[None]:
    torch.manual_seed(0)
    with torch.no_grad():
        yield


@pytest.fixture(scope="module")
def kernels() -> ModuleType:
    pytest.importorskip("triton")
    return importlib.import_module("tempovlm.model.kernels.decode")


def buffers(kernels: ModuleType, config: ModelConfig, top_k: int) -> object:
    """Buffers poisoned but for the tickets, cut so small that every product takes several programs."""
    tile = kernels.Tile(16, 32)
    on = kernels.StepBuffers.allocate(
        config, top_k, DEVICE, kernels.Tiling(tile, tile, tile, tile, tile, tile, splits=4, tokens=8)
    )
    for name in ("x", "qkv", "parts", "sums", "mixed", "router", "hidden", "logits"):
        getattr(on, name).fill_(torch.nan)
    on.chosen.fill_(-1)
    return on


def assert_close(ours: Tensor, plain: Tensor) -> None:
    error = (ours - plain).norm() / plain.norm()
    assert error <= TOLERANCE, float(error)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(5, 7), (3, 4, 16)])
def test_rounding_is_to_the_nearest_and_by_row(kind: Kind, shape: tuple[int, ...]) -> None:
    weight = torch.randn(shape) * torch.logspace(-6, 6, shape[-2]).unsqueeze(-1)
    weight[..., 1, :] = 0
    scaled = Scaled.of(weight.bfloat16(), kind)
    exact, dense = weight.bfloat16().float(), scaled.dense()
    assert scaled.values.element_size() == 1
    assert scaled.scales.shape == shape[:-1]
    # Half a step: of an integer, or of fp8's three binary digits, below 2⁻⁶ of a constant size.
    step = scaled.scales.unsqueeze(-1).expand(shape)
    bound = step / 2 if kind == "int8" else torch.maximum(exact.abs() * 2**-4, step * 2**-10)
    assert ((dense - exact).abs() <= bound * 1.0001).all()
    assert_close(dense.abs().amax(-1), exact.abs().amax(-1))
    assert scaled.nbytes == weight.numel() + 4 * scaled.scales.numel()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("rows", "width", "tile"), [(7, 48, (4, 32)), (64, 64, (8, 64)), (33, 80, (2, 128))])
def test_norm_and_product(kernels: ModuleType, kind: Kind, rows: int, width: int, tile: tuple[int, int]) -> None:
    norm = RMSNorm(width, 1e-5).to(DEVICE)
    norm.weight.uniform_(0.7, 1.3)
    x = 3 * torch.randn(width, device=DEVICE)
    weight = Scaled.of(torch.randn(rows, width, device=DEVICE), kind)
    out = torch.full((rows,), torch.nan, device=DEVICE)
    kernels.norm_matvec(x, norm, weight, out, kernels.Tile(*tile))
    assert_close(out, weight.dense() @ norm(x))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("rows", "width", "tile"), [(7, 48, (4, 32)), (64, 64, (8, 64)), (33, 80, (2, 128))])
def test_plain_product_is_added(
    kernels: ModuleType, kind: Kind, rows: int, width: int, tile: tuple[int, int]
) -> None:
    inputs, x = torch.randn(1, width, device=DEVICE), torch.randn(rows, device=DEVICE)
    weight = Scaled.of(torch.randn(rows, width, device=DEVICE), kind)
    expected = x + weight.dense() @ inputs[0]
    kernels.add_matvec(inputs, weight, x, kernels.Tile(*tile))
    assert_close(x, expected)


@pytest.mark.parametrize(("size", "kind", "top_k"), EXPERTS, ids=str)
def test_experts(kernels: ModuleType, size: str, kind: Kind, top_k: int) -> None:
    config = SIZES[size]
    layer = MoE(config).to(DEVICE)
    for parameter in layer.parameters():
        parameter.copy_(torch.randn_like(parameter) * parameter.shape[-1] ** -0.5)
    # Every expert and row has a size of its own: a scale of another row would be seen.
    for weight in (layer.gate_up, layer.down):
        sizes = torch.logspace(-1, 1, weight[..., 0].numel(), device=DEVICE)
        weight.mul_(sizes.view(*weight.shape[:2], 1))
    quantised = QuantisedMoE.of(layer, kind)
    layer.gate_up.copy_(quantised.gate_up.dense())
    layer.down.copy_(quantised.down.dense())
    x = torch.randn(1, 1, config.width, device=DEVICE)
    on = buffers(kernels, config, top_k)
    on.x.copy_(x.view(-1))
    kernels.add_experts(quantised, top_k, on)
    assert_close(on.x, (x + layer(x, top_k)).view(-1))
    _, experts = layer.route(layer.norm(x).view(1, -1), top_k)
    assert on.chosen.tolist() == experts[0].tolist()


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_is_that_of_the_weights_they_stand_for(kernels: ModuleType, kind: Kind) -> None:
    model = tiny_model.build_model().to(DEVICE)
    quantised, imitation = QuantisedDecoder.of(model.decoder, kind), imitate(model.decoder, kind)
    plan = Plan(KnobConfig(tier="low", top_k=3, num_blocks=3), (Step(0, 3), Step(4, 3), Step(5, 3)))
    cache = KVCache.allocate(model.config, 3, 1, 32, model.decoder.embedding)
    prompt = torch.tensor([[5, 17, 30, 2, 9, 11, 40]], device=DEVICE)
    token = model.prefill(model.embed(prompt, None, None), plan, cache).argmax(-1)
    unquantised = model.decode(token, plan, KVCache(cache.keys.clone(), cache.values.clone()), prompt.shape[1])
    ours = KVCache(cache.keys.clone(), cache.values.clone())
    on = buffers(kernels, model.config, 4)
    on.token.copy_(token)
    on.position.fill_(prompt.shape[1])
    kernels.forward(quantised, plan, ours, on)
    positions = torch.full((1, 1), prompt.shape[1], device=DEVICE)
    hidden = imitation(imitation.embed(token.unsqueeze(1)), positions, plan, cache, prompt.shape[1])
    assert_close(on.logits, imitation.logits(hidden[:, -1]))
    assert not torch.allclose(on.logits, unquantised, rtol=1e-3, atol=0)
    assert torch.equal(model.decoder.head.weight, tiny_model.build_model().decoder.head.weight.to(DEVICE))


def test_memory_is_a_byte_a_value_and_the_rest_is_shared() -> None:
    decoder = tiny_model.build_model().decoder
    quantised = QuantisedDecoder.of(decoder, "fp8")
    products = [decoder.head.weight]
    for block in decoder.blocks:
        products += [block.attention.qkv.weight, block.attention.out.weight, block.moe.gate_up, block.moe.down]
    values, rows = (sum(size(one) for one in products) for size in (Tensor.numel, lambda one: one[..., 0].numel()))
    assert quantised.nbytes == values + 4 * rows
    assert quantised.embedding is decoder.embedding
    assert quantised.blocks[0].moe.router is decoder.blocks[0].moe.router
