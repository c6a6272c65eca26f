"""Vision graphs on a CPU, where replaying a graph is running what was captured again, over the same buffers."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

import tiny_model
from recorders import Again
from tempovlm.control.guard import Guard
from tempovlm.control.learned.observation import vision_feature
from tempovlm.core.request import Request
from tempovlm.engine.company.company import encode_together, project_together
from tempovlm.engine.cuda.vision_graphs import MAX_CROPS, VisionGraphs, crop_counts, vision_graphs
from tempovlm.engine.engine import Engine
from tempovlm.engine.runner import Runner
from tempovlm.model.vision.tiling import CROPS_OF_TIER, Crops, Grid, cut_batch, cut_crops

VISION = tiny_model.CONFIG.vision


@pytest.fixture
def recorder() -> Again:
    return Again()


@pytest.fixture
def graphed(engine: Engine, recorder: Again) -> Runner:
    return replace(engine.runner, vision=VisionGraphs(engine.runner.model, recorder))


def quiet() -> bool:
    """Nobody waits."""
    return True


def crops_of(rows: int, cols: int, seed: int = 0) -> Crops:
    images = torch.from_numpy(tiny_model.picture(seed)).unsqueeze(0)
    crops = cut_batch(images, Grid(rows, cols), VISION, exact=True)
    return replace(crops, patches=crops.patches[0])


def tokens(run: Runner, crops: Crops) -> Tensor:
    vision = run.project(run.encode(crops), crops)
    assert vision is not None
    return vision


@pytest.mark.parametrize(("rows", "cols"), [(1, 1), (1, 4), (2, 3), (3, 4)])
def test_a_graph_gives_what_the_model_gives(
    engine: Engine, graphed: Runner, recorder: Again, rows: int, cols: int
) -> None:
    crops, expected = crops_of(rows, cols), tokens(engine.runner, crops_of(rows, cols))
    torch.testing.assert_close(tokens(graphed, crops), expected)
    assert recorder.captured == recorder.replayed == 0  # kernel by kernel, at once
    graphed.settle(quiet)
    assert recorder.captured == 2
    torch.testing.assert_close(tokens(graphed, crops), expected)
    assert recorder.replayed == 2
    graphed.settle(quiet)
    assert recorder.captured == 2


@pytest.mark.parametrize("is_captured", [True, False])
def test_pictures_together_are_seen_as_alone(engine: Engine, graphed: Runner, *, is_captured: bool) -> None:
    pictures = [crops_of(1, 1), crops_of(1, 4, 1), crops_of(2, 3, 2), crops_of(1, 1, 3)]
    if is_captured:
        assert graphed.vision is not None
        graphed.vision.warmup(engine.space.tiers)
    features = encode_together(graphed, [*pictures, None])
    seen = project_together(graphed, features, [*pictures, None])
    assert seen[-1] is features[-1] is None
    for one, crops in zip(seen[:-1], pictures, strict=True):
        torch.testing.assert_close(one, tokens(engine.runner, crops))


def test_interleaved_requests_do_not_see_each_other(engine: Engine, graphed: Runner) -> None:
    assert graphed.vision is not None
    graphed.vision.warmup(engine.space.tiers)
    pictures = [crops_of(2, 3, seed) for seed in (1, 2)] + [crops_of(1, 1, 3)]
    expected = [tokens(engine.runner, crops) for crops in pictures]
    encoded = [graphed.encode(crops) for crops in pictures]
    projected = [graphed.project(*pair) for pair in zip(encoded, pictures, strict=True)]
    for ours, plain in zip(projected, expected, strict=True):
        assert ours is not None
        torch.testing.assert_close(ours, plain)


def test_other_numbers_of_crops_are_padded_and_captured_while_nobody_waits(
    engine: Engine, graphed: Runner, recorder: Again
) -> None:
    assert graphed.vision is not None
    graphed.vision.warmup(["high"])
    captured, crops = recorder.captured, crops_of(2, 3)
    for replayed in (2, 4):
        torch.testing.assert_close(tokens(graphed, crops), tokens(engine.runner, crops))
        assert recorder.replayed == replayed
        graphed.settle(lambda: False)
        assert recorder.captured == captured
    answers = iter((True, False))
    graphed.settle(lambda: next(answers))
    assert recorder.captured == captured + 1, "somebody came meanwhile"
    graphed.settle(quiet)
    assert recorder.captured == captured + 2
    torch.testing.assert_close(tokens(graphed, crops), tokens(engine.runner, crops))


def test_what_a_policy_sees_is_the_request_s_own(engine: Engine, graphed: Runner, recorder: Again) -> None:
    ready = engine.runner.prepare(None, "low", Request(images=(), question="what?"))
    pictures = [tokens(engine.runner, crops_of(2, 3, seed)) for seed in (1, 2)]
    for captured in (0, 1):
        assert recorder.captured == captured
        sights = [graphed.see(ready, "low", vision, pool=True) for vision in pictures]
        for sight, vision in zip(sights, pictures, strict=True):
            np.testing.assert_allclose(sight.pooled.numpy(), vision_feature(vision), rtol=1e-5, atol=1e-6)
        graphed.settle(quiet)
    assert graphed.see(ready, "low", pictures[0], pool=False).pooled is None
    assert graphed.see(ready, "low", None, pool=True).pooled is None


def test_crops_that_are_not_live_have_no_features(engine: Engine, graphed: Runner) -> None:
    crops = replace(crops_of(1, 4), live=torch.tensor([True, True, False, True, True]))
    for _ in range(2):
        encoded = graphed.encode(crops)
        assert encoded is not None
        torch.testing.assert_close(encoded, engine.runner.encode(crops))
        assert not encoded[2].any()
        assert encoded[1].any()
        graphed.settle(quiet)


def test_more_crops_than_any_tier_has_are_never_captured(graphed: Runner, recorder: Again) -> None:
    tokens(graphed, crops_of(2, 7))
    graphed.settle(quiet)
    assert recorder.captured == 0


def test_warmup_captures_what_the_tiers_need(engine: Engine, recorder: Again) -> None:
    model = engine.runner.model
    other, seen = Engine(model, engine.runner.tokenizer), []
    other.runner = replace(engine.runner, vision=VisionGraphs(model, recorder))
    low = [knobs for knobs in other.space if knobs.tier == "low"]
    assert other.warmup(low) == recorder.captured == 3
    total = other.warmup(advance=lambda *done: seen.append(done))
    # 1, 5 to 7 and 10 to 13 distinct crops; 2 and the same of all crops, which are projected and pooled
    assert recorder.captured == total == 24
    assert seen[-1] == (24, 24)
    for tier in other.space.tiers:
        for size in ((84, 112), (40, 400), (300, 50)):
            picture = np.zeros((*size, 3), np.uint8)
            request = Request(images=(), question="stop", max_new_tokens=1)
            tokens(other.runner, other.runner.prepare(picture, tier, request).crops)  # type: ignore[arg-type]
    other.runner.settle(quiet)
    assert recorder.captured == 24


def test_counts_are_those_of_the_tiers_grids() -> None:
    for tier, (least, most) in CROPS_OF_TIER.items():
        distinct, crops = crop_counts(tier)
        for rows in range(1, most + 1):
            for cols in range(-(-least // rows), most // rows + 1):
                cut = crops_of(rows, cols)
                assert len(cut.patches) in distinct
                assert len(cut.index) in crops <= set(range(MAX_CROPS + 1))


def test_a_crop_that_equals_the_global_one_is_encoded_once(engine: Engine) -> None:
    crops = cut_crops(tiny_model.picture(), "low", VISION)
    assert crops.patches.shape[0] == 1
    assert crops.index.tolist() == [0, 0]
    apart = replace(crops, patches=crops.patches.expand(2, -1, -1), index=torch.arange(2))
    torch.testing.assert_close(tokens(engine.runner, crops), tokens(engine.runner, apart))


def test_there_are_none_on_a_cpu_and_requests_capture_behind(
    engine: Engine, graphed: Runner, recorder: Again
) -> None:
    assert vision_graphs(engine.runner.model) is None
    other = Engine(engine.runner.model, engine.runner.tokenizer)
    assert other.runner.vision is None
    other.runner = graphed
    request = Request(images=(Image.fromarray(tiny_model.picture()),), question="what is it?", max_new_tokens=3)
    guard = Guard.fixed(engine.space.cheapest, engine.space)
    first, second = other.answer(request, guard), other.answer(request, guard)
    assert first.tokens == second.tokens == engine.answer(request, guard).tokens
    assert (recorder.captured, recorder.replayed) == (2, 2)
