"""Decode and prefill on CUDA at the real sizes: kernels against float32, graphs against their kernels."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

import tiny_model
from streams import taking_turns
from tempovlm.control.guard import Guard
from tempovlm.core.knobs import KnobConfig
from tempovlm.core.plan import Plan, Step
from tempovlm.core.request import Request
from tempovlm.engine.cuda.graphs import GraphDecoder
from tempovlm.engine.engine import Engine
from tempovlm.model.cache import KVCache
from tempovlm.model.config import MOLMOE_1B, POCKET, ModelConfig
from tempovlm.model.moe import best
from tempovlm.model.prompt import Tokenizer
from tempovlm.model.vlm import Molmo
from tempovlm.model.weights import empty_model

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]

BLOCKS = 2
CONFIGS = {"molmoe-1b": MOLMOE_1B, "pocket": POCKET}


def random_model(config: ModelConfig, dtype: torch.dtype) -> Molmo:
    model = empty_model(config, "cuda", dtype)
    for name, parameter in model.named_parameters():
        if "norm" in name and name.endswith("weight"):
            parameter.uniform_(0.7, 1.3)
        else:
            parameter.normal_(std=0.02)
    return model


@pytest.fixture(scope="module", params=CONFIGS, ids=str)
def pair(request: pytest.FixtureRequest) -> Iterator[tuple[Molmo, Molmo]]:
    """A model of two blocks in bfloat16, and the same weights in float32."""
    torch.manual_seed(0)
    config = replace(CONFIGS[request.param], num_blocks=BLOCKS)
    model = random_model(config, torch.bfloat16)
    exact = empty_model(config, "cuda", torch.float32)
    exact.load_state_dict(model.state_dict())
    yield model, exact
    torch.cuda.empty_cache()


def plan_of(top_k: int) -> Plan:
    knobs = KnobConfig(tier="low", top_k=top_k, num_blocks=BLOCKS)
    return Plan(knobs, tuple(Step(i, top_k) for i in range(BLOCKS)))


def relative_error(ours: Tensor, exact: Tensor) -> float:
    return float((ours.float() - exact).norm() / exact.norm())


@pytest.mark.parametrize("top_k", range(1, 17))
def test_a_step_against_float32(pair: tuple[Molmo, Molmo], top_k: int) -> None:
    model, exact = pair
    plan = plan_of(top_k)
    graphs = GraphDecoder(model)
    graphs.warmup([plan])
    for context in (0, 1, 63, 700, model.config.max_sequence_length - 1):
        with graphs.lane() as lane:
            assert lane is not None
            assert lane.has_graph(plan)
            cache = lane.cache_for(plan)
            for values in (cache.keys, cache.values):
                values[..., :context, :].normal_()
                values[..., context:, :].fill_(torch.nan)
            plain = KVCache(cache.keys.float(), cache.values.float())
            token = torch.randint(0, model.config.embedding_size, (1,), device="cuda")
            lane.on.token.copy_(token)
            lane.on.position.fill_(context)
            for buffer in (lane.on.x, lane.on.qkv, lane.on.mixed, lane.on.hidden, lane.on.router, lane.on.logits):
                buffer.fill_(torch.nan)
            lane.start_step(plan)
            expected = exact.decode(token, plan, plain, context)
            assert relative_error(lane.on.logits, expected) <= 1e-2
            assert lane.on.token.item() == lane.on.logits.argmax().item()
            assert lane.on.position.item() == context + 1
            assert relative_error(cache.keys[..., context, :], plain.keys[..., context, :]) <= 1e-2


@pytest.mark.parametrize(("tokens", "top_k"), [(1, 8), (5, 1), (336, 8), (1250, 12), (2030, 4)])
def test_grouped_experts_against_float32(pair: tuple[Molmo, Molmo], tokens: int, top_k: int) -> None:
    from tempovlm.model.kernels import experts as kernels

    ours, exact = (model.decoder.blocks[1].moe for model in pair)
    x = torch.randn(tokens, pair[0].config.width, device="cuda").bfloat16()
    weights, experts = ours.route(x, top_k)
    out = kernels.grouped(x, weights, experts, ours.gate_up, ours.down)
    assert relative_error(out, exact.grouped(x.float(), weights.float(), experts)) <= 1e-2
    assert torch.equal(out, kernels.grouped(x, weights, experts, ours.gate_up, ours.down))


@torch.inference_mode()
@pytest.mark.parametrize("tokens", [1, 5, 336, 1250])
def test_a_prompt_visits_the_experts_of_float32(pair: tuple[Molmo, Molmo], tokens: int) -> None:
    """Of the same inputs: rounded to bfloat16, a score in fifty would be another's equal."""
    ours, exact = (model.decoder.blocks[1].moe for model in pair)
    x = torch.randn(tokens, pair[0].config.width, device="cuda").bfloat16()
    scores, wanted = ours.scores(x), x.double() @ ours.router.weight.double().T
    assert scores.dtype == torch.float32
    torch.testing.assert_close(scores.double(), wanted, rtol=1e-4, atol=1e-4)
    weights, experts = ours.route(x, 8)
    assert torch.equal(experts.long(), best(scores, 8))
    torch.testing.assert_close(weights.float(), scores.softmax(-1).gather(-1, experts.long()), rtol=8e-3, atol=0)
    assert (best(wanted, 8) == experts).float().mean() >= 0.999
    assert (best(exact.scores(x.float()), 8) == experts).float().mean() >= 0.999


@torch.inference_mode()
def test_equal_scores_go_to_the_lower_expert(pair: tuple[Molmo, Molmo]) -> None:
    """In a prompt by kernels, by the modules in float32, and in a step."""
    from tempovlm.model.kernels import decode

    ours, exact = (model.decoder.blocks[1].moe for model in pair)
    kept = ours.router.weight.clone()
    try:
        for layer in (ours, exact):
            layer.router.weight.zero_()
        x = torch.randn(7, pair[0].config.width, device="cuda").bfloat16()
        for chosen in (ours.route(x, 8)[1], exact.route(x.float(), 8)[1]):
            assert chosen.tolist() == [list(range(8))] * 7
        on = decode.StepBuffers.allocate(pair[0].config, 8, x.device)
        on.x.copy_(x[0])
        decode.route(ours, 8, on)
        assert on.chosen.tolist() == list(range(8))
    finally:
        for layer in (ours, exact):
            layer.router.weight.copy_(kept)


@torch.inference_mode()
@pytest.mark.parametrize("length", [1, 5, 336])
def test_a_prompt_against_float32(pair: tuple[Molmo, Molmo], length: int) -> None:
    plan = plan_of(pair[0].config.num_experts)  # all of them: rounding cannot change the choice
    tokens = torch.randint(0, 1000, (1, length), device="cuda")
    ours, exact = (model.prefill(model.embed(tokens, None, None), plan, None) for model in pair)
    assert relative_error(ours, exact) <= 2e-2


@torch.inference_mode()
def test_a_padded_prompt_by_graph_reads_as_itself(pair: tuple[Molmo, Molmo]) -> None:
    model, _ = pair
    plan = plan_of(model.config.num_experts)  # all of them: rounding cannot change the choice
    graphs = GraphDecoder(model)
    with graphs.lane() as lane:
        assert lane is not None
        for length in (300, 100, 77):  # a graph is captured after a longer prompt was read
            x = model.embed(torch.randint(0, 1000, (1, length), device="cuda"), None, None)
            plain = model.prefill(x, plan, lane.cache_for(plan))
            keys = lane.cache_for(plan).keys[..., :length, :].clone()
            lane.prompts.capture(plan, length)
            assert relative_error(lane.prompts.read(x, plan), plain.float()) <= 2e-2
            assert relative_error(lane.cache_for(plan).keys[..., :length, :], keys.float()) <= 2e-2


@pytest.fixture(scope="module")
def engines(tmp_path_factory: pytest.TempPathFactory) -> tuple[Engine, Engine]:
    """The tiny model in float32: on the CPU, and on CUDA with graphs."""
    folder: Path = tiny_model.save_folder(tmp_path_factory.mktemp("model") / "tiny")
    tokenizer = Tokenizer.load(folder / "tokenizer.json")
    cpu, cuda = (Engine(tiny_model.build_model().to(device), tokenizer, name="tiny") for device in ("cpu", "cuda"))
    assert cuda.runner.graphs is not None
    return cpu, cuda


def text(**fields: object) -> Request:
    return Request(**{"images": (), "question": "what is the dog?", "max_new_tokens": 12, **fields})  # type: ignore[arg-type]


def test_tokens_of_graphs_are_those_of_kernels_and_of_the_model(engines: tuple[Engine, Engine]) -> None:
    cpu, cuda = engines
    for knobs in (cpu.space.cheapest, cpu.space.native, cpu.space.largest):
        guard = Guard.fixed(knobs, cpu.space)
        by_kernels, by_graph = (cuda.answer(text(), guard).tokens for _ in range(2))
        graphs = cuda.runner.graphs
        assert graphs is not None
        with graphs.lane() as lane:
            assert lane is not None
            assert lane.has_graph(cuda.plan(knobs))
        assert by_kernels == by_graph == cpu.answer(text(), guard).tokens


def test_drawn_tokens_repeat_and_depend_on_the_seed(engines: tuple[Engine, Engine]) -> None:
    _, cuda = engines
    answers = [cuda.answer(text(temperature=1.5, top_p=0.9, seed=seed)).tokens for seed in (1, 1, 1, 2)]
    assert answers[0] == answers[1] == answers[2] != answers[3]


def test_interleaved_plans_answer_as_each_alone(engines: tuple[Engine, Engine]) -> None:
    _, cuda = engines
    cuda.warmup()
    pairs = [
        (text(), Guard.fixed(cuda.space.cheapest, cuda.space)),
        (text(question="is there a sign?"), Guard.fixed(cuda.space.native, cuda.space)),
        (text(question="stop"), Guard.fixed(cuda.space.largest, cuda.space)),
    ]
    alone = [cuda.answer(*one).tokens for one in pairs]
    streams = [cuda.stream(*one) for one in pairs]
    assert [answer.tokens for answer in taking_turns(streams)] == alone
