"""Features that controllers learn from."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import tiny_model
from tempovlm.control.learned.observation import glance_feature, question_ids, vision_feature, vision_width
from tempovlm.core.request import Request
from tempovlm.data.catalog import load_samples
from tempovlm.data.sample import Sample
from tempovlm.engine.engine import Engine
from tempovlm.lab import features

SPACE = tiny_model.SPACE


@pytest.fixture(scope="module")
def samples(tmp_path_factory: pytest.TempPathFactory) -> list[Sample]:
    from tempovlm.testbed.make import make_testbed

    bed = make_testbed(
        tmp_path_factory.mktemp("bed") / "bed", 2, 3, seed=1, progress=False, datasets=("okvqa",), workers=1
    )
    return load_samples("okvqa", "val", data_dir=bed)


def test_features_are_those_of_serving(engine: Engine, samples: list[Sample]) -> None:
    table = features.extract_features(engine, samples)
    run, sample = engine.runner, samples[-1]
    assert table.vision.shape == (len(samples), 3, vision_width(tiny_model.CONFIG.width))
    ids = question_ids(run.tokenizer, sample.question)
    mean = run.model.decoder.embedding[ids].detach().mean(dim=0).numpy()
    np.testing.assert_allclose(table.language[-1], mean, atol=1e-5)
    request = Request(images=(sample.image_path,), question=sample.question)
    for t, tier in enumerate(SPACE.tiers):
        ready = run.prepare(run.open(request), tier, request)
        tokens = run.project(run.encode(ready.crops), ready.crops)
        assert tokens is not None
        np.testing.assert_allclose(table.vision[-1, t], vision_feature(tokens), atol=1e-4)
        if t == 0:
            np.testing.assert_allclose(table.glance[-1], glance_feature(tokens), atol=1e-4)


def test_a_picture_that_cannot_be_read_has_zeros(engine: Engine, samples: list[Sample], tmp_path: Path) -> None:
    (tmp_path / "bad.png").write_bytes(b"no picture")
    broken = [replace(samples[0], image_path=tmp_path / "bad.png"), samples[-1]]
    table = features.extract_features(engine, broken)
    assert not table.vision[0].any()
    assert table.vision[1].any()


def test_features_are_made_once(samples: list[Sample], tmp_path: Path) -> None:
    calls: list[int] = []
    rng = np.random.default_rng(0)

    def extract() -> features.FeatureTable:
        calls.append(1)
        count = len(samples)
        shapes = ((count, 4), (count, 6), (count, 3, 6))
        return features.FeatureTable(*(rng.standard_normal(shape).astype(np.float32) for shape in shapes))

    first = features.obtain_features(tmp_path, "abc", samples, extract)
    again = features.obtain_features(tmp_path, "abc", samples, extract)
    assert len(calls) == 1
    assert np.array_equal(first.vision, again.vision)
    features.obtain_features(tmp_path, "other weights", samples, extract)
    features.obtain_features(tmp_path, "abc", samples[:1], lambda: extract().take(np.array([0])))
    assert len(calls) == 3
    for stored in (tmp_path / ".features").iterdir():
        stored.write_bytes(stored.read_bytes()[:50])
    features.obtain_features(tmp_path, "abc", samples, extract)
    assert len(calls) == 4


def test_features_of_an_unreadable_picture_are_not_kept(samples: list[Sample], tmp_path: Path) -> None:
    blind = features.FeatureTable(*(np.zeros((len(samples), *rest), np.float32) for rest in ((4,), (6,), (3, 6))))
    assert not features.obtain_features(tmp_path, "abc", samples, lambda: blind).vision.any()
    seen = replace(blind, vision=blind.vision + 1)
    assert features.obtain_features(tmp_path, "abc", samples, lambda: seen).vision.all()
    assert features.obtain_features(tmp_path, "abc", samples, lambda: blind).vision.all()


def test_features_of_other_pictures_or_answers_are_others(samples: list[Sample], tmp_path: Path) -> None:
    picture = tmp_path / "picture.png"
    picture.write_bytes(b"one")
    same = [replace(sample, image_path=picture) for sample in samples]
    first = features.feature_key("abc", same)
    assert features.feature_key("abc", same) == first
    picture.write_bytes(b"another")
    second = features.feature_key("abc", same)
    assert len({first, second, features.feature_key("abc", [replace(s, answers=("no",)) for s in same])}) == 3
