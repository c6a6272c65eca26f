"""The lane: requests that take turns on it decode as alone; its kernels in Triton's interpreter without a GPU."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace

import numpy as np
import pytest
import torch

import tiny_model
from recorders import Again
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
    """The engine of the other tests, decoding on the lane with coarse tiles, which interpret faster."""
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
    for wanted in (request(max_new_tokens=3), request(max_new_tokens=3, temperature=1.5, top_p=0.7, seed=3)):
        expected, answer = (one.answer(wanted, guard) for one in (engine, on_lanes))
        assert answer.tokens == expected.tokens
        assert len(answer.step_ms) == len(answer.tokens) - 1


def test_interleaved_plans_answer_as_each_alone(engine: Engine, on_lanes: Engine) -> None:
    cheapest, native = engine.space.cheapest, engine.space.native
    deeper = replace(native, num_blocks=next(n for n in engine.space.block_counts if n > cheapest.num_blocks))
    guards = [Guard.fixed(knobs, engine.space) for knobs in (cheapest, deeper)]
    requests = [request(max_new_tokens=3), request(question="what is the dog?", max_new_tokens=3)]
    drawn = request(temperature=1.5, top_p=0.9, seed=5)
    pairs = [*zip(requests, guards, strict=True), (requests[0], guards[1]), (drawn, guards[0])]
    expected = [engine.answer(*pair).tokens for pair in pairs]
    streams = [on_lanes.stream(*pair) for pair in pairs]
    assert [answer.tokens for answer in taking_turns(streams)] == expected


@pytest.mark.parametrize("copied", [deepcopy, pickle.dumps])
def test_captured_graphs_are_not_copied(on_lanes: Engine, copied: Callable[[Engine], object]) -> None:
    with pytest.raises(UserError, match="load the model anew"):
        copied(on_lanes)


def test_only_a_stream_that_goes_on_is_set_aside(on_lanes: Engine) -> None:
    graphs = on_lanes.runner.graphs
    assert graphs is not None
    for is_abandoned in (False, True):
        stream = on_lanes.stream(request())
        next(stream)
        stay = graphs._lane._stay
        assert stay is not None
        assert stay.kept is None
        if is_abandoned:
            stream.close()
        with graphs.lane():
            assert (stay.kept is None) == is_abandoned
        stream.close()
        assert stay.is_over


def test_no_step_starts_that_cannot_count(on_lanes: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    from tempovlm.engine.cuda.graphs import Lane

    started: list[int] = []

    def step(lane: Lane, plan: object, generator: object, made: torch.Tensor) -> None:
        del lane, plan, generator
        started.append(made.storage_offset())
        made.fill_(5)

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
    graphs = 2 + 2 * len(buckets)  # steps and prompts of two plans
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


def test_prompts_without_a_graph_take_the_next_larger_one(engine: Engine) -> None:
    model = deepcopy(engine.runner.model).bfloat16()
    plans = [engine.plan(knobs) for knobs in (engine.space.cheapest, engine.space.largest)]
    cache = KVCache.allocate(model.config, model.config.num_blocks, 1, 512, model.decoder.embedding)
    recorder = Again()
    reader = PromptReader(model, cache, recorder)  # type: ignore[arg-type]
    x = model.embed(torch.arange(90).unsqueeze(0) % 40, None, None)
    expected = model.prefill(x, plans[0], None)
    for captured, replayed in ((64, 0), (320, 1), (256, 2), (128, 3)):
        reader.capture(plans[0], captured)
        torch.testing.assert_close(reader.read(x, plans[0]), expected, rtol=0.1, atol=0.1)
        assert recorder.replayed == replayed
        assert list(reader.wanted.items()) == [((plans[0].steps, 128), plans[0])] * (captured != 128)
    reader.read(x, plans[1])
    assert recorder.replayed == 3, "another plan's graphs do not serve"
