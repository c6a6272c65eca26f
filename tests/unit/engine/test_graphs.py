"""Lanes: one request each, as each would decode alone; their kernels in Triton's interpreter without a GPU."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace

import numpy as np
import pytest
import torch

import tiny_model
from streams import taking_turns
from tempovlm.control.guard import Guard
from tempovlm.core.errors import UserError
from tempovlm.core.request import Request
from tempovlm.core.shape import padded_length
from tempovlm.engine.cuda.capture import PromptReader, usual_buckets
from tempovlm.engine.engine import Engine
from tempovlm.engine.runner import Runner
from tempovlm.latency.features import Workload
from tempovlm.model.cache import KVCache
from tempovlm.model.prompt import build_prompt
from tempovlm.model.vision.tiling import choose_grid

pytest.importorskip("triton")

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="what the interpreter runs; see tests/gpu")


@pytest.fixture
def on_lanes(engine: Engine) -> Engine:
    """The engine of the other tests, decoding on two lanes with coarse tiles, which interpret faster."""
    from tempovlm.engine.cuda.graphs import GraphDecoder
    from tempovlm.model.kernels.decode import Tile, Tiling

    tile = Tile(64, 64)
    tiling = Tiling(tile, tile, tile, tile, tile, tile, splits=2, tokens=64)
    run = engine.runner
    other = Engine(run.model, run.tokenizer, name="lanes")
    other.runner = Runner(run.model, run.tokenizer, graphs=GraphDecoder(run.model, tiling=tiling))
    return other


def request(**fields: object) -> Request:
    return Request(**{"images": (), "question": "stop", "max_new_tokens": 4, **fields})  # type: ignore[arg-type]


def test_greedy_and_drawn_tokens_are_those_of_the_model(engine: Engine, on_lanes: Engine) -> None:
    guard = Guard.fixed(engine.space.cheapest, engine.space)
    for wanted in (request(), request(temperature=1.5, top_p=0.7, seed=3)):
        expected, answer = (one.answer(wanted, guard) for one in (engine, on_lanes))
        assert answer.tokens == expected.tokens
        assert len(answer.step_ms) == len(answer.tokens) - 1


def test_interleaved_plans_answer_as_each_alone(engine: Engine, on_lanes: Engine) -> None:
    guards = [Guard.fixed(knobs, engine.space) for knobs in (engine.space.cheapest, engine.space.native)]
    requests = [request(max_new_tokens=3), request(question="what is the dog?", max_new_tokens=3)]
    pairs = [*zip(requests, guards, strict=True), (requests[0], guards[1])]
    expected = [engine.answer(*pair).tokens for pair in pairs]
    # Three at a time on two lanes: the last one decodes without.
    streams = [on_lanes.stream(*pair) for pair in pairs]
    assert [answer.tokens for answer in taking_turns(streams)] == expected


@pytest.mark.parametrize("copied", [deepcopy, pickle.dumps])
def test_captured_graphs_are_not_copied(on_lanes: Engine, copied: Callable[[Engine], object]) -> None:
    with pytest.raises(UserError, match="load the model anew"):
        copied(on_lanes)


def test_an_abandoned_stream_frees_its_lane(on_lanes: Engine) -> None:
    graphs = on_lanes.runner.graphs
    assert graphs is not None
    stream = on_lanes.stream(request())
    next(stream)
    with graphs.lane() as second, graphs.lane() as third:
        assert second is not None
        assert third is None
    stream.close()
    with graphs.lane() as first, graphs.lane() as second:
        assert {first, second} != {None}
        assert first is not second is not None


def test_no_step_starts_that_cannot_count(on_lanes: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    from tempovlm.engine.cuda.graphs import Lane

    started: list[int] = []

    def step(lane: Lane, *args: int) -> None:
        index = args[-1]
        started.append(index)
        lane._made[index] = 5

    monkeypatch.setattr(Lane, "_step", step)
    wanted = request(max_new_tokens=3)
    assert on_lanes.answer(wanted).num_output_tokens == 3
    assert started == [0, 1]
    started.clear()
    stream = on_lanes.stream(replace(wanted, max_new_tokens=9))
    next(stream)
    next(stream)
    assert started == [0, 1]  # the second step runs while the first one's token is looked at
    stream.close()
    stream = on_lanes.stream(replace(wanted, max_new_tokens=9, budget_ms=1e6, on_deadline="stop"))
    started.clear()
    next(stream)
    next(stream)
    assert started == [0]
    stream.close()


def test_warmup_counts_distinct_steps(engine: Engine, on_lanes: Engine) -> None:
    seen: list[tuple[int, int]] = []
    settings = [knobs for knobs in tiny_model.SPACE if knobs.num_blocks == 3 and knobs.top_k in (2, 4)]
    assert len(settings) == 6
    buckets = usual_buckets(tiny_model.SPACE.tiers, engine.runner.model.config.vision)
    graphs = 2 * 2 + 2 * len(buckets)  # steps of two plans on two lanes, prompts of two plans on one
    assert on_lanes.warmup(settings, lambda done, total: seen.append((done, total))) == graphs
    assert seen[-1] == (graphs, graphs)
    assert engine.warmup() == 0


def test_usual_buckets_hold_prompts_about_pictures_of_any_shape(engine: Engine) -> None:
    config, tokenizer = engine.runner.model.config, engine.runner.tokenizer
    for tier in engine.space.tiers:
        buckets = usual_buckets([tier], config.vision)
        for size in ((64, 64), (90, 20), (20, 90), (60, 90)):
            grid = choose_grid(tier, *size, config.vision)
            for question in ("what?", "what is the price of the largest item on the label next to the door?"):
                prompt = build_prompt(question, "vqa2", grid, config, tokenizer, 4)
                assert padded_length(len(prompt.tokens)) in buckets


@pytest.mark.parametrize(
    ("length", "bucket"), [(1, 64), (64, 64), (65, 128), (512, 512), (513, 640), (1250, 1280)]
)
def test_buckets(length: int, bucket: int) -> None:
    one = np.array([float(length)])
    prompts = Workload(np.array([0]), one - 1, one / length, one, one, one)
    assert padded_length(length) == bucket == prompts.padded_tokens[0]


def test_a_padded_prompt_reads_as_itself(engine: Engine) -> None:
    model = engine.runner.model
    plan = engine.plan(engine.space.cheapest)
    cache = KVCache.allocate(model.config, model.config.num_blocks, 1, 128, model.decoder.embedding)
    reader = PromptReader(model, cache, None)
    for tokens in (torch.arange(90) % 40, torch.arange(70) % 31):  # the second one over what the first one left
        x = model.embed(tokens.unsqueeze(0), None, None)
        exact = KVCache.allocate(model.config, len(plan.steps), 1, 128, x)
        expected = model.prefill(x, plan, exact)
        reader.pad(x, 128)
        torch.testing.assert_close(reader.run(plan, 128), expected, rtol=1e-4, atol=1e-4)
        for ours, plain in ((cache.keys, exact.keys), (cache.values, exact.values)):
            used = ours[: len(plan.steps), ..., : len(tokens), :]
            torch.testing.assert_close(used, plain[..., : len(tokens), :], rtol=1e-4, atol=1e-4)
