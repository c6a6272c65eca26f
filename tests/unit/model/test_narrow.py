"""Decoding in NumPy equals decoding in torch, for any plan, and writes the same cache."""

from __future__ import annotations

import warnings

import pytest
import torch

from tempovlm.core.knobs import KnobConfig
from tempovlm.core.plan import Plan, Ranking, Step
from tempovlm.model.cache import KVCache
from tempovlm.model.narrow import NarrowDecoder
from tiny_model import CONFIG, build_model

PROMPT = 21


@pytest.mark.parametrize(
    ("blocks", "top_k"), [((0, 1, 2, 3, 4, 5), 4), ((0, 3, 5), 2), ((0, 5), 1), ((0, 1, 2, 3, 4, 5), 8)]
)
@torch.inference_mode()
def test_logits_and_cache_are_torchs(blocks: tuple[int, ...], top_k: int) -> None:
    model = build_model()
    narrow = NarrowDecoder.of(model.decoder)
    assert narrow is not None
    knobs = KnobConfig(tier="low", top_k=top_k, num_blocks=len(blocks))
    plan = Plan(knobs, tuple(Step(block, top_k) for block in blocks))
    x = torch.randn(1, PROMPT, CONFIG.width, generator=torch.Generator().manual_seed(7))
    caches = [KVCache.allocate(CONFIG, len(blocks), 1, PROMPT + 3, x) for _ in range(2)]
    for cache in caches:
        model.prefill(x, plan, cache)
    for count, token in enumerate((5, 17, 3)):
        plain = model.decode(torch.tensor([token]), plan, caches[0], PROMPT + count)
        ours = narrow.decode(token, plan, caches[1], PROMPT + count)
        torch.testing.assert_close(ours, plain, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(caches[1].keys, caches[0].keys, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(caches[1].values, caches[0].values, rtol=1e-4, atol=1e-5)


def test_large_gates_do_not_overflow() -> None:
    model = build_model()
    with torch.no_grad():
        for name, parameter in model.decoder.named_parameters():
            if name.endswith("gate_up"):
                parameter.mul_(1e4)
    narrow = NarrowDecoder.of(model.decoder)
    assert narrow is not None
    plan = Plan.build(KnobConfig(tier="low", top_k=4, num_blocks=6), Ranking.evenly_spaced(6), CONFIG.shape)
    cache = KVCache.allocate(CONFIG, 6, 1, 4, torch.zeros(1))
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)  # numpy's, of an overflow
        assert narrow.decode(5, plan, cache, 0).isfinite().all()


def test_other_models_go_the_usual_way() -> None:
    assert NarrowDecoder.of(build_model().bfloat16().decoder) is None
