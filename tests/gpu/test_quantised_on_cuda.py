"""Decode steps on weights of one byte on CUDA, at the real sizes: against float32, and their distance to bf16."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

import tiny_model
from tempovlm.api import load
from tempovlm.control.guard import Guard
from tempovlm.core.decode_dtype import DecodeDtype
from tempovlm.core.knobs import KnobConfig
from tempovlm.core.plan import Plan, Step
from tempovlm.core.request import Request
from tempovlm.engine.cuda.graphs import FP8_CAPABILITY, GraphDecoder
from tempovlm.engine.engine import Engine
from tempovlm.model.cache import KVCache
from tempovlm.model.config import MOLMOE_1B, POCKET
from tempovlm.model.decoder import Decoder
from tempovlm.model.prompt import Tokenizer
from tempovlm.model.quantised import imitate
from tempovlm.model.vlm import Molmo
from tempovlm.model.weights import empty_model

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]

BLOCKS = 2
CONFIGS = {"molmoe-1b": MOLMOE_1B, "pocket": POCKET}
TOLERANCE = 1e-2
"""Of a step in bfloat16 against float32; its cache entries are rounded."""


@pytest.fixture(params=["fp8", "int8"])
def weights(request: pytest.FixtureRequest) -> DecodeDtype:
    if request.param == "fp8" and torch.cuda.get_device_capability() < FP8_CAPABILITY:
        pytest.skip("this GPU cannot convert fp8")
    return request.param


@pytest.fixture(scope="module", params=CONFIGS, ids=str)
def pair(request: pytest.FixtureRequest) -> Iterator[tuple[Molmo, Decoder]]:
    """A model of two blocks in bfloat16, and its decoder in float32."""
    torch.manual_seed(0)
    config = replace(CONFIGS[request.param], num_blocks=BLOCKS)
    model = empty_model(config, "cuda", torch.bfloat16)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name and name.endswith("weight"):
                parameter.uniform_(0.7, 1.3)
            else:
                parameter.normal_(std=0.02)
    exact = empty_model(config, "cuda", torch.float32)
    exact.load_state_dict(model.state_dict())
    yield model, exact.decoder
    torch.cuda.empty_cache()


def plan_of(top_k: int) -> Plan:
    knobs = KnobConfig(tier="low", top_k=top_k, num_blocks=BLOCKS)
    return Plan(knobs, tuple(Step(i, top_k) for i in range(BLOCKS)))


@torch.inference_mode()
def step(decoder: Decoder, token: Tensor, plan: Plan, cache: KVCache, place: int) -> Tensor:
    """Logits (1, V) of a float32 decoder; the cache is copied to float32."""
    copy = KVCache(cache.keys.float(), cache.values.float())
    hidden = decoder(decoder.embed(token.unsqueeze(1)), token.new_full((1, 1), place), plan, copy, place)
    return decoder.logits(hidden[:, -1])


@pytest.mark.parametrize("top_k", [1, 2, 4, 7, 8, 12, 16])
def test_a_graph_is_off_bf16_by_no_more_than_the_rounding(
    pair: tuple[Molmo, Decoder], weights: DecodeDtype, top_k: int
) -> None:
    model, exact = pair
    assert weights != "bf16"
    meant, plan = imitate(exact, weights), plan_of(top_k)
    graphs = {name: GraphDecoder(model, decode_dtype=name) for name in (weights, "bf16")}
    context = 300
    keys, values = torch.randn(
        2, BLOCKS, 1, model.config.num_heads, context, model.config.head_width, device="cuda"
    ).bfloat16()
    token = torch.randint(0, model.config.embedding_size, (1,), device="cuda")
    logits = {}
    for name, decoder in graphs.items():
        decoder.warmup([plan])
        with decoder.lane() as lane:
            assert lane is not None
            assert lane.has_graph(plan)
            cache = lane.cache_for(plan)
            cache.keys.fill_(torch.nan)
            cache.values.fill_(torch.nan)
            cache.keys[..., :context, :].copy_(keys)
            cache.values[..., :context, :].copy_(values)
            plain = KVCache(cache.keys.clone(), cache.values.clone())
            lane.on.token.copy_(token)
            lane.on.position.fill_(context)
            for buffer in (lane.on.x, lane.on.qkv, lane.on.mixed, lane.on.hidden, lane.on.router, lane.on.logits):
                buffer.fill_(torch.nan)
            lane.start_step(plan)
            logits[name] = lane.on.logits.clone()
            assert lane.on.token.item() == lane.on.logits.argmax().item()
    stands_for, loaded = (step(decoder, token, plan, plain, context) for decoder in (meant, exact))
    assert (logits[weights] - stands_for).norm() <= TOLERANCE * stands_for.norm()
    bound = (stands_for - loaded).norm() + TOLERANCE * (stands_for.norm() + loaded.norm())
    assert (logits[weights] - logits["bf16"]).norm() <= bound
    assert (logits[weights] - logits["bf16"]).norm() > 0


def test_tokens_of_graphs_are_those_of_kernels(tmp_path: Path, weights: DecodeDtype) -> None:
    folder = tiny_model.save_folder(tmp_path / "tiny")
    tokenizer = Tokenizer.load(folder / "tokenizer.json")
    engine = Engine(tiny_model.build_model().to("cuda"), tokenizer, name="tiny", decode_dtype=weights)
    request = Request(images=(), question="what is the dog?", max_new_tokens=12)
    guard = Guard.fixed(engine.space.cheapest, engine.space)
    by_kernels, by_graph = (engine.answer(request, guard).tokens for _ in range(2))
    graphs = engine.runner.graphs
    assert graphs is not None
    with graphs.lane() as lane:
        assert lane is not None
        assert lane.has_graph(engine.plan(engine.space.cheapest))
    assert by_kernels == by_graph


def test_a_loaded_model_answers_and_its_stamp_says_so(tmp_path: Path, weights: DecodeDtype) -> None:
    folder = tiny_model.save_folder(tmp_path / "tiny")
    model = load(str(folder), device="cuda", weights=weights, warmup=False, progress=False)
    assert model.answer(None, "stop", knobs=model.space.cheapest).num_output_tokens >= 1
    assert model.stamp().device == f"cuda/bfloat16/{weights}"
