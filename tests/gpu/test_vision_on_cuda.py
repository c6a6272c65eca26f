"""The vision side on CUDA at the real sizes: kernels against float32, graphs against kernels, and the cache."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

import tiny_model
from tempovlm.control.guard import Guard
from tempovlm.control.learned.networks import Knob1PredictorBudgetLanguage, Knob2Knob3Predictor
from tempovlm.control.learned.observation import vision_feature
from tempovlm.control.learned.policies import Reader, TwoStagePolicy
from tempovlm.control.policy import Question
from tempovlm.core.request import Request
from tempovlm.engine.cuda.vision_graphs import VisionGraphs, vision_graphs
from tempovlm.engine.engine import Engine
from tempovlm.engine.feature_cache import ContentDigest
from tempovlm.model.config import MOLMOE_1B, POCKET
from tempovlm.model.prompt import Tokenizer
from tempovlm.model.vision.encoder import kernels_for
from tempovlm.model.vlm import Molmo

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]

CONFIGS = {"molmoe-1b": MOLMOE_1B, "pocket": POCKET}
COUNTS = (1, 2, 5, 7, 13)


@pytest.fixture(scope="module", params=CONFIGS, ids=str)
def pair(request: pytest.FixtureRequest) -> Iterator[tuple[Molmo, Molmo]]:
    """A model of one decoder block in bfloat16, and the same weights in float32."""
    yield tiny_model.rounded_pair(replace(CONFIGS[request.param], num_blocks=1), "cuda")
    torch.cuda.empty_cache()


def relative_error(ours: Tensor, exact: Tensor) -> float:
    return float((ours.float() - exact.float()).norm() / exact.float().norm())


def crops_for(model: Molmo, count: int) -> tuple[Tensor, Tensor]:
    """Patches (count, P, X), and masks (count, P) of which some are empty and some partly padded."""
    vision = model.config.vision
    patches = torch.randn(count, vision.num_patches, vision.patch_values, device="cuda").bfloat16()
    masks = torch.tensor([0.0, 0.3, 1.0, 1.0], device="cuda")
    masks = masks[torch.randint(4, (count, vision.num_patches), device="cuda")]
    masks[-1] = -1.0
    return patches, masks


@pytest.mark.parametrize("count", COUNTS)
def test_kernels_are_as_close_to_float32_as_the_plain_modules(pair: tuple[Molmo, Molmo], count: int) -> None:
    model, exact = pair
    patches, masks = crops_for(model, count)
    with torch.no_grad():
        x = model.vision.patch_embedding(patches)
        assert kernels_for(x) is not None
    expected = exact.vision(patches.float()).detach()
    plain = model.vision(patches).detach()  # with gradients enabled the plain modules run
    with torch.inference_mode():
        assert kernels_for(patches) is not None
        ours = model.vision(patches)
    assert relative_error(ours, expected) <= max(1.2 * relative_error(plain, expected), 1e-2)

    expected = exact.projector(plain.float(), masks).detach()
    spread = relative_error(model.projector(plain, masks).detach(), expected)
    with torch.inference_mode():
        assert relative_error(model.projector(plain, masks), expected) <= max(1.2 * spread, 1e-2)


@torch.inference_mode()
def test_a_graph_gives_what_its_kernels_give(pair: tuple[Molmo, Molmo]) -> None:
    model, _ = pair
    graphs = vision_graphs(model)
    assert graphs is not None
    for count in COUNTS:
        patches, masks = crops_for(model, count)
        eager = graphs.encode(patches)
        eager_tokens = graphs.project(eager, masks)
        assert graphs.encode.wanted == graphs.project.wanted == {count}
        graphs.settle(lambda: True)
        assert not graphs.encode.wanted
        for _ in range(2):
            poison(graphs)
            features = graphs.encode(patches)
            assert relative_error(features, eager) <= 1e-2
            assert relative_error(graphs.project(features, masks), eager_tokens) <= 1e-2
        assert not graphs.encode.wanted
    # Smaller counts still right after larger ones were captured over the same buffers.
    patches, masks = crops_for(model, 2)
    features, plain = graphs.encode(patches), model.vision(patches)
    assert relative_error(features, plain) <= 1e-2
    assert relative_error(graphs.project(features, masks), model.projector(plain, masks)) <= 1e-2


def poison(graphs: VisionGraphs) -> None:
    """Put NaN into the buffers of all stages, so that what a replay does not write shows."""
    for stage in (graphs.encode, graphs.project, graphs.pool):
        for buffer in (*stage._inputs, *(made[-1] for _, made in stage._graphs.values())):
            buffer.fill_(torch.nan)


@torch.inference_mode()
def test_interleaved_requests_own_their_results(pair: tuple[Molmo, Molmo]) -> None:
    model, _ = pair
    graphs = vision_graphs(model)
    assert graphs is not None
    graphs.warmup(("low", "medium"))
    requests = [crops_for(model, count) for count in (5, 7, 5)]
    alone = [graphs.project(graphs.encode(patches), masks) for patches, masks in requests]
    encoded = [graphs.encode(patches) for patches, _ in requests]
    projected = [graphs.project(one, masks) for one, (_, masks) in zip(encoded, requests, strict=True)]
    assert not graphs.encode.wanted | graphs.project.wanted
    for ours, expected in zip(projected, alone, strict=True):
        assert torch.equal(ours, expected)
    assert relative_error(projected[0], projected[2]) > 0.1


@torch.inference_mode()
def test_a_policy_sees_each_request_s_own_pooled_tokens_after_a_wait(pair: tuple[Molmo, Molmo]) -> None:
    model, _ = pair
    graphs, config = vision_graphs(model), model.config
    assert graphs is not None
    shape = (config.vision.pooled**2, config.width)
    pictures = [torch.randn(count, *shape, device="cuda").bfloat16() for count in (7, 2, 7)]
    expected = [vision_feature(tokens) for tokens in pictures]
    for _ in range(2):
        for feature, tokens in zip(expected, pictures, strict=True):
            np.testing.assert_allclose(graphs.pool(tokens).cpu().numpy(), feature, rtol=1e-4, atol=1e-5)
        graphs.settle(lambda: True)
        poison(graphs)
    assert not graphs.pool.wanted


def test_the_sight_of_a_policy_is_on_the_host_once_the_device_was_waited_for(tokenizer: Tokenizer) -> None:
    engine = Engine(tiny_model.build_model().to("cuda"), tokenizer)
    run, one = engine.runner, ask(1)
    engine.warmup()
    ready = run.prepare(run.open(one), "medium", one)
    with torch.inference_mode():
        vision = run.project(run.encode(ready.crops), ready.crops)
        assert vision is not None
        pictures = [vision, 3 * vision, vision]
        sights = [run.see(ready, "medium", tokens, pool=True) for tokens in pictures]
        torch.cuda.current_stream().synchronize()
        for sight, tokens in zip(sights, pictures, strict=True):
            assert sight.pooled.is_pinned()
            np.testing.assert_allclose(sight.pooled.numpy(), vision_feature(tokens), rtol=1e-4, atol=1e-5)


def test_a_two_stage_policy_chooses_as_on_the_cpu(tokenizer: Tokenizer) -> None:
    torch.manual_seed(0)
    width, space = tiny_model.CONFIG.width, tiny_model.SPACE
    sizes = {"num_top_ks": len(space.top_ks), "num_block_counts": len(space.block_counts)}
    nets = Knob1PredictorBudgetLanguage(width, 16), Knob2Knob3Predictor(2 * width, width, 16, **sizes)
    engines = [Engine(tiny_model.build_model().to(device), tokenizer) for device in ("cpu", "cuda")]
    for _ in range(2):
        scores = []
        for engine in engines:
            run, one = engine.runner, ask(2)
            policy = TwoStagePolicy(space, "two", nets[0].eval(), Reader(run.model, tokenizer), nets[1].eval())
            ready = run.prepare(run.open(one), "medium", one)
            vision = run.project(run.encode(ready.crops), ready.crops)
            sight = run.see(ready, "medium", vision, pool=True)
            if run.device.type == "cuda":
                torch.cuda.current_stream().synchronize()
            question = Question(text=one.question)
            scores.append((policy.look(question, 30.0), policy.settle(question, sight, 20.0)))
            run.settle()
        for ours, expected in zip(scores[1], scores[0], strict=True):
            np.testing.assert_allclose(ours, expected, rtol=2e-2, atol=5e-3)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder: Path = tiny_model.save_folder(tmp_path_factory.mktemp("model") / "tiny")
    return Tokenizer.load(folder / "tokenizer.json")


def ask(seed: int) -> Request:
    images = (Image.fromarray(tiny_model.picture(seed)),)
    return Request(images=images, question="what is the sign?", max_new_tokens=5)


def test_answers_are_those_of_the_cpu_by_kernels_and_by_graph(tokenizer: Tokenizer) -> None:
    cpu, cuda = (Engine(tiny_model.build_model().to(device), tokenizer) for device in ("cpu", "cuda"))
    assert cpu.runner.vision is None
    assert cuda.runner.vision is not None
    for tier in cpu.space.tiers:
        guard = Guard.fixed(replace(cpu.space.native, tier=tier), cpu.space)
        expected = cpu.answer(ask(1), guard)
        for _ in range(2):
            assert cuda.answer(ask(1), guard).tokens == expected.tokens
        assert not cuda.runner.vision.encode.wanted


def test_streams_of_two_pictures_answer_as_each_alone(tokenizer: Tokenizer) -> None:
    engine = Engine(tiny_model.build_model().to("cuda"), tokenizer)
    engine.warmup()
    guard = Guard.fixed(engine.space.native, engine.space)
    alone = [engine.answer(ask(seed), guard).tokens for seed in (1, 2)]
    streams = [engine.stream(ask(seed), guard) for seed in (1, 2)]
    last = [next(stream) for stream in streams]
    for i in (1, 0):
        for item in streams[i]:
            last[i] = item
    assert [answer.tokens for answer in last] == alone  # type: ignore[union-attr]


def test_the_cache_answers_the_same_and_misses_a_changed_pixel(tokenizer: Tokenizer) -> None:
    plain = Engine(tiny_model.build_model().to("cuda"), tokenizer)
    engine = Engine(tiny_model.build_model().to("cuda"), tokenizer, feature_cache_mb=64)
    cache = engine.runner.features
    assert cache is not None
    guard = Guard.fixed(engine.space.native, engine.space)
    expected = plain.answer(ask(1), guard).tokens
    for _ in range(3):
        assert engine.answer(ask(1), guard).tokens == expected
    assert (cache.hits, cache.misses) == (2, 1)
    pixels = tiny_model.picture(1)
    pixels[50, 60, 2] ^= np.uint8(1)
    engine.answer(replace(ask(1), images=(Image.fromarray(pixels),)), guard)
    assert (cache.hits, cache.misses) == (2, 2)


def test_a_digest_of_many_large_crops(pair: tuple[Molmo, Molmo]) -> None:
    digest = ContentDigest()
    patches, _ = crops_for(pair[0], 13)
    first = digest(patches)
    assert digest(patches.clone()) == first
    patches[12, -1, -1] += 1
    assert digest(patches) != first
