"""Labels, budgets, splits and features that controllers learn from."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import decision_worlds
import numpy as np
import pandas as pd
import pytest

import tiny_model
from tempovlm.control.observation import glance_feature, question_ids, vision_feature, vision_width
from tempovlm.core.errors import UserError
from tempovlm.core.request import Request
from tempovlm.data.catalog import load_samples
from tempovlm.data.sample import Sample
from tempovlm.engine.engine import Engine
from tempovlm.lab import features as material

SPACE = tiny_model.SPACE


def test_budgets_are_log_uniform_over_what_is_feasible() -> None:
    latency_ms = np.array([[10.0, 100.0], [20.0, 200.0], [30.0, 1000.0]])
    limits_ms = material.budget_range(latency_ms)
    assert limits_ms == pytest.approx((20.0, 200.0))
    assert material.budget_range(latency_ms[0]) == pytest.approx((10.0, 100.0))
    drawn = material.draw_budgets(np.random.default_rng(0), 4000, limits_ms)
    assert drawn.min() >= 20.0
    assert drawn.max() <= 200.0
    middle = np.sqrt(20.0 * 200.0)
    assert abs((drawn < middle).mean() - 0.5) < 0.03
    again = material.draw_budgets(np.random.default_rng(0), 4000, limits_ms)
    np.testing.assert_allclose(again, drawn)


def test_questions_of_one_picture_stay_together() -> None:
    images = np.array([f"i{i // 3}" for i in range(60)])
    split = material.split_images(images, 0.8, 42)
    assert (np.stack(split).sum(axis=0) == 1).all()
    parts = [set(images[mask]) for mask in split]
    assert all(parts[i].isdisjoint(parts[j]) for i, j in ((0, 1), (0, 2), (1, 2)))
    assert [len(part) for part in parts] == [16, 2, 2]
    assert not np.array_equal(split.train, material.split_images(images, 0.8, 7).train)
    with pytest.raises(UserError, match="--train_split 1"):
        material.split_images(images, 1.0)
    with pytest.raises(UserError, match="needs 3"):
        material.split_images(images[:6])


def test_more_questions_are_for_the_test_alone() -> None:
    first = decision_worlds.table(np.zeros((8, decision_worlds.K)))
    more = replace(
        first.take(np.arange(3)), image_id=np.array(["x", "y", "y"]), accuracy=np.ones((3, decision_worlds.K))
    )
    split = material.split_images(first.image_id, 0.5, 0)
    table, parts = material.with_test(first, split, more)
    for name in ("train", "validation"):
        assert np.flatnonzero(getattr(parts, name)).tolist() == np.flatnonzero(getattr(split, name)).tolist()
    assert np.flatnonzero(parts.test).tolist() == [*np.flatnonzero(split.test), 8, 9, 10]
    assert table.accuracy.mean(axis=1).tolist() == pytest.approx([0.0] * 8 + [1.0] * 3)
    assert np.isnan(table.latency_ms).all(axis=1).tolist() == [False] * 8 + [True] * 3
    seen = replace(more, image_id=np.array(["x", "y", first.image_id[5]]))
    with pytest.raises(UserError, match=f"--test_results_dir: picture {first.image_id[5]} is in --results_dir"):
        material.with_test(first, split, seen)


def timed(space_ms: float = 10.0) -> pd.DataFrame:
    rows = [
        {"tier": k.tier, "top_k": k.top_k, "num_blocks": k.num_blocks, "T_total": space_ms + i + q}
        for i, k in enumerate(SPACE)
        for q in (0, 1, 5)
    ]
    return pd.DataFrame(rows)


def test_medians_of_whatever_was_timed() -> None:
    frame = timed()
    np.testing.assert_allclose(material.median_latency_ms(frame, SPACE), 11.0 + np.arange(len(SPACE)))
    frame.loc[frame["tier"] == "high", "T_total"] = None
    with pytest.raises(UserError, match=r"no measured latency .* at high"):
        material.median_latency_ms(frame, SPACE)


def test_preparing_a_picture_counts_where_it_was_timed_on_the_same_device() -> None:
    frame = timed().assign(source="a", T_preprocess=None)
    frame.loc[frame["tier"] == "high", "T_preprocess"] = 4.0
    frame.attrs["stamps"] = {"a/okvqa.parquet": {"hardware": "x", "device": "cpu"}, "b/okvqa.parquet": None}
    same, other = {"hardware": "x", "device": "cpu"}, {"hardware": "y", "device": "cuda"}
    assert material.preprocess_ms(frame, SPACE, same).tolist() == pytest.approx([0.0, 0.0, 4.0])
    assert material.preprocess_ms(frame, SPACE, other).tolist() == pytest.approx([0.0, 0.0, 0.0])


@pytest.fixture(scope="module")
def samples(tmp_path_factory: pytest.TempPathFactory) -> list[Sample]:
    from tempovlm.testbed.make import make_testbed

    bed = make_testbed(tmp_path_factory.mktemp("bed") / "bed", 2, 3, seed=1, progress=False)
    return load_samples("okvqa", "val", data_dir=bed)


def test_features_are_those_of_serving(engine: Engine, samples: list[Sample]) -> None:
    table = material.extract_features(engine, samples)
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
    table = material.extract_features(engine, broken)
    assert not table.vision[0].any()
    assert table.vision[1].any()


def test_features_are_made_once(samples: list[Sample], tmp_path: Path) -> None:
    calls: list[int] = []
    rng = np.random.default_rng(0)

    def extract() -> material.FeatureTable:
        calls.append(1)
        count = len(samples)
        shapes = ((count, 4), (count, 6), (count, 3, 6))
        return material.FeatureTable(*(rng.standard_normal(shape).astype(np.float32) for shape in shapes))

    first = material.obtain_features(tmp_path, "abc", samples, extract)
    again = material.obtain_features(tmp_path, "abc", samples, extract)
    assert len(calls) == 1
    assert np.array_equal(first.vision, again.vision)
    material.obtain_features(tmp_path, "other weights", samples, extract)
    material.obtain_features(tmp_path, "abc", samples[:1], lambda: extract().take(np.array([0])))
    assert len(calls) == 3
    for stored in (tmp_path / ".features").iterdir():
        stored.write_bytes(stored.read_bytes()[:50])
    material.obtain_features(tmp_path, "abc", samples, extract)
    assert len(calls) == 4


def test_features_of_an_unreadable_picture_are_not_kept(samples: list[Sample], tmp_path: Path) -> None:
    blind = material.FeatureTable(*(np.zeros((len(samples), *rest), np.float32) for rest in ((4,), (6,), (3, 6))))
    assert not material.obtain_features(tmp_path, "abc", samples, lambda: blind).vision.any()
    seen = replace(blind, vision=blind.vision + 1)
    assert material.obtain_features(tmp_path, "abc", samples, lambda: seen).vision.all()
    assert material.obtain_features(tmp_path, "abc", samples, lambda: blind).vision.all()


def test_features_of_other_pictures_or_answers_are_others(samples: list[Sample], tmp_path: Path) -> None:
    picture = tmp_path / "picture.png"
    picture.write_bytes(b"one")
    same = [replace(sample, image_path=picture) for sample in samples]
    first = material.feature_key("abc", same)
    assert material.feature_key("abc", same) == first
    picture.write_bytes(b"another")
    second = material.feature_key("abc", same)
    assert len({first, second, material.feature_key("abc", [replace(s, answers=("no",)) for s in same])}) == 3
