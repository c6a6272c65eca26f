"""A plan decides what runs, and nothing else changes: counted blocks and experts, and a model written anew."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

import tiny_model
from tempovlm.control.guard import Guard
from tempovlm.core.knobs import KnobConfig
from tempovlm.core.request import Answer, Request
from tempovlm.engine.batching import answer_batch
from tempovlm.engine.engine import Engine
from tempovlm.model.narrow import NarrowDecoder
from tempovlm.model.vlm import Molmo

QUESTIONS = ("what is the color?", "is there a dog", "how many dogs are there in the sign (a) 4 (b) 12?", "stop")
SIZES = ((84, 112), (112, 84), (90, 90), (60, 180))


def request(i: int = 0, **fields: object) -> Request:
    picture = Image.fromarray(tiny_model.picture(i, *SIZES[i % len(SIZES)]))
    fields = {"max_new_tokens": 6, **fields}
    return Request(images=(picture,), question=QUESTIONS[i % len(QUESTIONS)], **fields)  # type: ignore[arg-type]


def fixed(engine: Engine, tier: str, top_k: int, num_blocks: int) -> Guard:
    return Guard.fixed(KnobConfig(tier=tier, top_k=top_k, num_blocks=num_blocks), engine.space)


@contextmanager
def counted(model: Molmo) -> Iterator[list[tuple[int, int, int]]]:
    """(block, tokens, experts per token) of every block that runs, in order."""
    seen: list[tuple[int, int, int]] = []

    def watch(index: int) -> object:
        return lambda _, args: seen.append((index, args[0].shape[0] * args[0].shape[1], args[1]))

    hooks = [
        block.moe.register_forward_pre_hook(watch(i))  # type: ignore[union-attr, arg-type]
        for i, block in enumerate(model.decoder.blocks)
    ]
    visit = NarrowDecoder._visit

    def watched(self: NarrowDecoder, block: object, x: np.ndarray, top_k: int) -> np.ndarray:
        seen.append((next(i for i, own in enumerate(self.blocks) if own is block), 1, top_k))
        return visit(self, block, x, top_k)  # type: ignore[arg-type]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(NarrowDecoder, "_visit", watched)
        yield seen
    for hook in hooks:
        hook.remove()


@pytest.mark.parametrize(("tier", "top_k", "num_blocks"), [("low", 2, 3), ("medium", 5, 4), ("high", 6, 6)])
def test_only_the_plans_blocks_run_with_its_experts(
    engine: Engine, tier: str, top_k: int, num_blocks: int
) -> None:
    guard = fixed(engine, tier, top_k, num_blocks)
    with counted(engine.runner.model) as seen:
        answer = engine.answer(request(), guard)
    blocks = engine.plan(answer.knobs).blocks
    assert len(blocks) == num_blocks
    prompt = answer.num_vision_tokens + answer.num_text_tokens
    steps = [prompt] + [1] * (answer.num_output_tokens - 1)
    assert seen == [(block, tokens, top_k) for tokens in steps for block in blocks]


def test_a_skipped_block_owns_no_cache(engine: Engine) -> None:
    run = engine.runner
    ready = run.prepare(tiny_model.picture(), "low", request())
    vision = run.project(run.encode(ready.crops), ready.crops)
    plan = engine.plan(engine.space.cheapest)
    state = run.prefill(ready.prompt, vision, plan, 4)
    assert state.cache.keys.shape[0] == len(plan.steps) < engine.runner.model.config.num_blocks
    assert state.cache.capacity == len(ready.prompt.tokens) + 4


def test_the_tier_changes_the_crops_that_are_encoded(engine: Engine) -> None:
    counts = []
    with counted_crops(engine.runner.model) as seen:
        for tier in engine.space.tiers:
            engine.answer(request(), fixed(engine, tier, 4, 6))
            counts.append(sum(seen))
            seen.clear()
    assert counts[0] == 1
    assert counts[0] < counts[1] < counts[2]


@contextmanager
def counted_crops(model: Molmo) -> Iterator[list[int]]:
    seen: list[int] = []
    hook = model.vision.register_forward_pre_hook(lambda _, args: seen.append(len(args[0])))
    try:
        yield seen
    finally:
        hook.remove()


def plain_logits(model: Molmo, x: Tensor) -> Tensor:
    """Logits after the last of embeddings (T, D): all blocks, the trained top-k, no cache, a loop over experts."""
    own = dict(model.named_parameters())
    config = model.config
    T, heads, width = len(x), config.num_heads, config.head_width

    def norm(values: Tensor, name: str) -> Tensor:
        return values / (values.pow(2).mean(-1, keepdim=True) + config.norm_eps).sqrt() * own[f"{name}.weight"]

    inverse = config.rope_theta ** (-torch.arange(0, width, 2).double() / width)
    turn = torch.polar(torch.ones(T, width // 2).double(), torch.outer(torch.arange(T).double(), inverse))

    def rotated(values: Tensor) -> Tensor:
        parts = values.view(T, heads, 2, width // 2).double()
        product = torch.complex(parts[:, :, 0], parts[:, :, 1]) * turn[:, None]
        return torch.cat((product.real, product.imag), -1).float()

    for i in range(config.num_blocks):
        name = f"decoder.blocks.{i}.attention"
        q, k, v = (norm(x, f"{name}.norm") @ own[f"{name}.qkv.weight"].T).chunk(3, -1)
        q, k = rotated(norm(q, f"{name}.q_norm")), rotated(norm(k, f"{name}.k_norm"))
        scores = torch.einsum("qhw,khw->hqk", q, k) / width**0.5
        scores = scores.masked_fill(torch.ones(T, T).triu(1).bool(), float("-inf"))
        mixed = torch.einsum("hqk,khw->qhw", scores.softmax(-1), v.view(T, heads, width))
        x = x + mixed.reshape(T, -1) @ own[f"{name}.out.weight"].T
        x = x + plain_experts(
            own, f"decoder.blocks.{i}.moe", norm(x, f"decoder.blocks.{i}.moe.norm"), config.top_k
        )
    return norm(x[-1], "decoder.norm") @ own["decoder.head.weight"].T


def plain_experts(own: dict[str, Tensor], name: str, x: Tensor, top_k: int) -> Tensor:
    """Every expert on every token; a token keeps those whose probability is among its `top_k` largest."""
    probabilities = (x @ own[f"{name}.router.weight"].T).softmax(-1)
    smallest = probabilities.sort(descending=True).values[:, top_k - 1 : top_k]
    weights = probabilities * (probabilities >= smallest)
    out = torch.zeros_like(x)
    for expert in range(weights.shape[1]):
        gate, up = (x @ own[f"{name}.gate_up"][expert].T).chunk(2, -1)
        out += weights[:, expert : expert + 1] * ((F.silu(gate) * up) @ own[f"{name}.down"][expert].T)
    return out


@pytest.mark.parametrize("i", [0, 1, 2])
def test_native_plan_is_the_plain_model_and_cached_is_uncached(engine: Engine, i: int) -> None:
    """The plain model knows neither plan nor cache: it reads the whole stream anew for every token."""
    one = request(i)
    answer = engine.answer(one)
    run, model = engine.runner, engine.runner.model
    ready = run.prepare(run.open(one), engine.space.native.tier, one)
    vision = run.project(run.encode(ready.crops), ready.crops)
    slots = ready.prompt.slots
    assert slots is not None
    assert vision is not None
    with torch.inference_mode():
        x = model.embed(ready.prompt.tokens[None], vision, slots)[0]
        state = run.prefill(ready.prompt, vision, engine.plan(engine.space.native), 6)
        torch.testing.assert_close(state.logits[0], plain_logits(model, x), rtol=2e-4, atol=2e-4)
        tokens: list[int] = []
        for _ in answer.tokens:
            tokens.append(int(plain_logits(model, x).argmax()))
            x = torch.cat((x, model.decoder.embed(torch.tensor(tokens[-1:]))))
    assert tuple(tokens) == answer.tokens


@pytest.mark.parametrize("setting", [("low", 2, 3), ("medium", 4, 5), ("high", 6, 6)])
def test_batched_is_single(engine: Engine, setting: tuple[str, int, int]) -> None:
    guard = fixed(engine, *setting)
    requests = [request(i, max_new_tokens=3 + 2 * i) for i in range(4)]
    requests.insert(2, Request(images=(), question="is there a dog?", max_new_tokens=5))
    together = answer_batch(engine, requests, guard)
    alone = [engine.answer(one, guard) for one in requests]
    lengths = {answer.num_vision_tokens + answer.num_text_tokens for answer in alone}
    assert len(lengths) > 2, "the rows must be ragged"
    for batched, single in zip(together, alone, strict=True):
        for field in (
            "tokens",
            "text",
            "finish_reason",
            "num_vision_tokens",
            "num_text_tokens",
            "tiling",
            "knobs",
        ):
            assert getattr(batched, field) == getattr(single, field)


def test_sampled_batches_repeat_single_samples(engine: Engine) -> None:
    requests = [request(i, temperature=0.8, top_p=0.9, seed=i) for i in range(3)]
    together = answer_batch(engine, requests)
    assert [answer.tokens for answer in together] == [engine.answer(one).tokens for one in requests]


def test_interleaved_plans_run_as_alone(engine: Engine) -> None:
    """Two streams with different plans, pictures and lengths are stepped alternately on one model."""
    guards = [fixed(engine, "low", 2, 3), fixed(engine, "high", 6, 6)]
    requests = [request(0, max_new_tokens=5), request(2, max_new_tokens=7)]
    alone = [engine.answer(one, guard) for one, guard in zip(requests, guards, strict=True)]
    streams = [engine.stream(one, guard) for one, guard in zip(requests, guards, strict=True)]
    last: list[object] = [None, None]
    for items in itertools.zip_longest(*streams):
        last = [item if item is not None else before for item, before in zip(items, last, strict=True)]
    for mixed, single in zip(last, alone, strict=True):
        assert isinstance(mixed, Answer)
        assert (mixed.tokens, mixed.knobs) == (single.tokens, single.knobs)
    assert not torch.is_inference_mode_enabled()
