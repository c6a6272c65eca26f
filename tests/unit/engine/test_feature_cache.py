"""Pictures that are recognised: equal answers, bounded memory, and no hit where a pixel differs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

import tiny_model
from tempovlm.api import load
from tempovlm.control.guard import Guard
from tempovlm.core.errors import UserError
from tempovlm.core.request import Request
from tempovlm.engine.calibration import measure_once
from tempovlm.engine.engine import Engine
from tempovlm.engine.feature_cache import ContentDigest, FeatureCache
from tempovlm.model.vision.tiling import cut_crops


def counted(width: int = 4) -> tuple[Callable[[Tensor], Tensor], list[int]]:
    """An encoder, and the numbers of crops that it was given."""
    seen: list[int] = []

    def encode(patches: Tensor) -> Tensor:
        seen.append(len(patches))
        return patches.float().sum(dim=(1, 2), keepdim=True).expand(-1, 1, width).contiguous()

    return encode, seen


@pytest.fixture
def caching(engine: Engine) -> Engine:
    other = Engine(engine.runner.model, engine.runner.tokenizer, feature_cache_mb=8)
    assert other.runner.features is not None
    return other


def ask(pixels: np.ndarray) -> Request:
    return Request(images=(Image.fromarray(pixels),), question="what is the sign?", max_new_tokens=4)


def test_a_repeated_picture_answers_the_same_without_encoding(engine: Engine, caching: Engine) -> None:
    cache, seen = caching.runner.features, []
    assert cache is not None
    hook = engine.runner.model.vision.register_forward_pre_hook(lambda _, args: seen.append(len(args[0])))
    pixels = tiny_model.picture()
    changed = pixels.copy()
    changed[40, 50, 1] ^= 1
    guards = [Guard.fixed(replace(engine.space.native, tier=tier), engine.space) for tier in engine.space.tiers]
    try:
        for guard in guards:
            answers = [caching.answer(ask(picture), guard) for picture in (pixels, changed, pixels, changed)]
            encoded = len(seen)
            expected = [engine.answer(ask(picture), guard) for picture in (pixels, changed)]
            assert [one.tokens for one in answers] == [one.tokens for one in (*expected, *expected)]
            assert encoded == 2
            seen.clear()
    finally:
        hook.remove()
    assert (cache.hits, cache.misses) == (6, 6)


def test_features_of_a_hit_are_those_that_were_made(caching: Engine) -> None:
    crops = cut_crops(tiny_model.picture(), "medium", tiny_model.CONFIG.vision)
    first, second = (caching.runner.encode(crops) for _ in range(2))
    assert torch.equal(first, second)  # type: ignore[arg-type]
    # Equal crops of which one is taken for padding hit the same features and still come out as zeros.
    live = torch.ones(len(crops.patches), dtype=torch.bool)
    live[1] = False
    padded = caching.runner.encode(replace(crops, live=live))
    assert padded is not None
    assert not padded[1].any()
    assert torch.equal(caching.runner.encode(crops), first)  # type: ignore[arg-type]


def test_the_oldest_go_first_and_the_bound_holds() -> None:
    encode, seen = counted()
    cache = FeatureCache(2 * 3 * 4 * 4)  # two pictures of three crops and four float32 features
    a, b, c = (torch.full((3, 2, 5), float(i)) for i in range(3))
    for picture in (a, b, a, c):
        assert torch.equal(cache.features(picture, encode), encode(picture))
        assert cache.num_bytes <= cache.max_bytes
    seen.clear()
    cache.features(a, encode)  # used after b was
    cache.features(c, encode)
    assert not seen
    cache.features(b, encode)
    assert seen == [3]
    large = torch.zeros(99, 2, 5)
    cache.features(large, encode)
    cache.features(large, encode)
    assert seen == [3, 99, 99]
    assert cache.num_bytes == cache.max_bytes


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_digest_tells_values_order_and_number_apart(dtype: torch.dtype) -> None:
    digest = ContentDigest()
    patches = torch.randn(3, 4, 6).to(dtype)
    others = [patches[:2], patches.flip(0), patches.flip(1), patches.flip(2), -patches, torch.zeros_like(patches)]
    for at in ((0, 0, 0), (2, 3, 5), (1, 2, 3)):
        changed = patches.clone()
        changed[at] += 0.25
        others.append(changed)
    digests = [digest(one) for one in (patches, *others)]
    assert len(set(digests)) == len(digests)
    assert digest(patches.clone()) == digests[0] != ContentDigest()(patches)


def test_measurements_encode_everything(caching: Engine) -> None:
    cache = caching.runner.features
    assert cache is not None
    for _ in range(2):
        measure_once(caching, ask(tiny_model.picture()), 0)
    assert (cache.hits, cache.misses, cache.num_bytes) == (0, 0, 0)


def test_the_public_door_keeps_none_unless_asked(tiny_folder: Path) -> None:
    def loaded(megabytes: float) -> FeatureCache | None:
        options = {"device": "cpu", "warmup": False, "progress": False, "feature_cache_mb": megabytes}
        return load(str(tiny_folder), **options).engine.runner.features  # type: ignore[arg-type]

    assert loaded(0) is None
    cache = loaded(1.5)
    assert cache is not None
    assert cache.max_bytes == 1_500_000
    with pytest.raises(UserError, match="feature_cache_mb"):
        loaded(-1)
