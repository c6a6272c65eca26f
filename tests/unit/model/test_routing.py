"""Which experts a token visits: the same ones in a prompt, a batch, a decode step and training, in any type.

Small whole numbers make products exact, so that equal scores are equal on every machine.
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
from tempovlm.model.cache import KVCache
from tempovlm.model.config import ModelConfig
from tempovlm.model.moe import MoE, best
from tempovlm.model.narrow import NarrowDecoder
from tempovlm.training import elastic

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
WIDE = replace(tiny_model.CONFIG, width=64, num_heads=2, num_experts=64, expert_width=16)
ODD = replace(tiny_model.CONFIG, width=48, num_heads=3, num_experts=20, expert_width=16)


@pytest.fixture(autouse=True)
def reproducible() -> Iterator[None]:
    torch.manual_seed(0)
    with torch.no_grad():
        yield


def kernels(name: str) -> ModuleType:
    pytest.importorskip("triton")
    return importlib.import_module(f"tempovlm.model.kernels.{name}")


def layer_of(config: ModelConfig, router: Tensor, dtype: torch.dtype = torch.float32) -> MoE:
    """A layer with these router weights, whose norm leaves vectors of ones and minus ones as they are."""
    layer = MoE(config)
    for weight in (layer.gate_up, layer.down):
        weight.copy_(torch.randn_like(weight) * weight.shape[-1] ** -0.5)
    layer.router.weight.copy_(router)
    return layer.to(DEVICE, dtype)


def signs(count: int, width: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """(count, width) ones and minus ones, whose root mean square is 1."""
    return (torch.randint(2, (count, width), device=DEVICE) * 2 - 1).to(dtype)


def in_order(scores: Tensor, top_k: int) -> list[list[int]]:
    """The experts by falling score and then by number, as said in words."""
    rows = scores.tolist()
    return [sorted(range(len(row)), key=lambda e: (-row[e], e))[:top_k] for row in rows]


def chosen_by_step(layer: MoE, x: Tensor, config: ModelConfig, top_k: int) -> list[list[int]]:
    """What the kernel of a decode step chooses, token by token."""
    decode = kernels("decode")
    on, found = decode.StepBuffers.allocate(config, top_k, DEVICE), []
    for row in x:
        on.x.copy_(row)
        decode.route(layer, top_k, on)
        found.append(on.chosen.tolist())
    return found


@pytest.mark.parametrize("config", [WIDE, ODD], ids=["64 experts", "20 experts"])
@pytest.mark.parametrize("top_k", [1, 8, 13])
def test_equal_scores_go_to_the_lower_expert_everywhere(config: ModelConfig, top_k: int) -> None:
    E, D = config.num_experts, config.width
    router = torch.zeros(E, D)
    router[:, :3] = torch.randint(-1, 2, (E, 3)).float()  # scores from -3 to 3: most of them several times
    layer, x = layer_of(config, router), signs(40, D)
    scores = x.cpu() @ router.T
    expected = in_order(scores, top_k)
    weights, experts = layer.route(x, top_k)
    assert experts.tolist() == expected
    torch.testing.assert_close(weights.cpu(), scores.softmax(-1).gather(-1, torch.tensor(expected)))
    assert [layer.route(row.unsqueeze(0), top_k)[1][0].tolist() for row in x] == expected
    shares, by_kernel = kernels("prefill").choose(scores.to(DEVICE), top_k, torch.float32)
    assert by_kernel.tolist() == expected
    torch.testing.assert_close(shares, weights)
    assert chosen_by_step(layer, x[:5], config, top_k) == expected[:5]


def test_scores_are_compared_and_not_their_shares() -> None:
    """Numbers that hardly differ have equal exponentials."""
    scores = torch.zeros(1, 16)
    scores[0, 9] = 1e-12
    assert best(scores, 3).tolist() == [[9, 0, 1]]
    assert kernels("prefill").choose(scores.to(DEVICE), 3, torch.float32)[1].tolist() == [[9, 0, 1]]


def test_a_prompt_in_bfloat16_visits_the_experts_of_decode_steps() -> None:
    """Half of these scores are equal to another one once they are rounded to bfloat16."""
    layer = layer_of(WIDE, torch.randn(WIDE.num_experts, WIDE.width) / 8, torch.bfloat16)
    x = signs(60, WIDE.width, torch.bfloat16)
    normed = layer.norm(x)
    assert torch.equal(normed, x)
    _, experts = layer.route(normed, 8)
    exact = layer.router.weight.double() @ x.double().T
    assert experts.tolist() == in_order(exact.T, 8)
    assert chosen_by_step(layer, x.float()[:8], WIDE, 8) == experts[:8].tolist()
    rounded = torch.nn.functional.linear(x, layer.router.weight).float()
    assert (best(rounded, 8) != experts).any(), "else this shows nothing"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_autocast_leaves_the_router_in_float32(dtype: torch.dtype) -> None:
    layer = layer_of(WIDE, torch.randn(WIDE.num_experts, WIDE.width) / 8, dtype)
    x = signs(30, WIDE.width, dtype)
    plain = layer.scores(x)
    with torch.autocast(DEVICE.type, torch.bfloat16):
        cast = layer.scores(x)
    assert plain.dtype == cast.dtype == torch.float32
    torch.testing.assert_close(cast, plain, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_training_visits_the_experts_that_serving_visits(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer = layer_of(WIDE, torch.randn(WIDE.num_experts, WIDE.width) / 8, dtype)
    layer.router.weight[7:11] = layer.router.weight[3]
    seen: list[Tensor] = []

    def weighted(_: MoE, x: Tensor, gates: Tensor) -> Tensor:
        seen.append(gates)
        assert gates.requires_grad
        assert gates.dtype == dtype
        return x

    monkeypatch.setattr(MoE, "weighted", weighted)
    x = signs(30, WIDE.width, dtype)
    with torch.enable_grad():
        elastic.moe_elastic(layer, x.unsqueeze(0).requires_grad_(), 8)
    weights, served = layer.route(layer.norm(x), 8)
    torch.testing.assert_close(seen[0].detach().gather(1, served), weights.detach())
    assert (seen[0] != 0).sum(1).tolist() == [8] * 30


def test_a_narrow_step_breaks_ties_as_the_modules_do() -> None:
    """With scores that are all equal any other choice gives other logits, since experts differ."""
    model = tiny_model.build_model()
    for block in model.decoder.blocks:
        block.moe.router.weight.zero_()
    narrow = NarrowDecoder.of(model.decoder)
    assert narrow is not None
    plan = Plan(KnobConfig(tier="low", top_k=3, num_blocks=2), (Step(0, 3), Step(5, 3)))
    caches = [KVCache.allocate(model.config, 2, 1, 4, torch.zeros(1)) for _ in range(2)]
    ours = narrow.decode(5, plan, caches[0], 0)
    torch.testing.assert_close(ours, model.decode(torch.tensor([5]), plan, caches[1], 0), rtol=1e-4, atol=1e-5)
    for block in model.decoder.blocks:
        block.moe.gate_up[3:].zero_()  # the first three alone are visited
    torch.testing.assert_close(narrow.decode(5, plan, caches[0], 0), ours)


def test_the_order_of_scores_that_are_not_numbers_names_experts_that_there_are() -> None:
    scores = torch.tensor([[torch.nan] * 8, [1.0, torch.nan, 2.0, -torch.inf] * 2, [-torch.inf] * 8])
    for experts in (best(scores, 8), kernels("prefill").choose(scores.to(DEVICE), 8, torch.float32)[1]):
        assert 0 <= int(experts.min()) <= int(experts.max()) < 8
