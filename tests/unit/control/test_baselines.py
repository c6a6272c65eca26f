"""Policies without deep learning: what they choose, alone, on arrays and behind the guard."""

from __future__ import annotations

import numpy as np
import pytest
from decision_worlds import COST_MS, SPACE, K, content_world, parity

from tempovlm.control import baselines
from tempovlm.control.guard import Guard
from tempovlm.control.policy import Question, Sight
from tempovlm.core.knobs import KNOBS
from tempovlm.core.request import Request


def test_one_knob_leaves_the_others_native() -> None:
    only = baselines.varying(SPACE, ("num_blocks",))
    assert [str(k) for k, is_one in zip(SPACE, only, strict=True) if is_one] == ["high/k8/b8", "high/k8/b16"]
    assert baselines.varying(SPACE, ()).sum() == 1
    assert baselines.varying(SPACE, KNOBS).all()


def test_features_tell_words_from_one_another_and_shapes() -> None:
    sign, count = (baselines.question_features(text, (300, 400)) for text in ("What sign?", "how many dogs"))
    assert sign.shape == count.shape
    assert not np.allclose(sign, count)
    np.testing.assert_allclose(sign, baselines.question_features("what SIGN", (300, 400)))
    wide = baselines.question_features("what sign", (100, 400))
    assert (~np.isclose(sign, wide)).sum() == 2
    assert np.isfinite(baselines.question_features("", None)).all()


def test_neighbours_learn_which_questions_need_which_setting() -> None:
    world = content_world(100)
    features = np.concatenate([parity(world), np.zeros((100, 1))], axis=1)
    model = baselines.NearestNeighbours.fit(features, world.accuracy, world.image_id.tolist())
    scores = model.scores(np.array([[0.0, 0.0], [1.0, 0.0]]))
    assert scores.argmax(axis=1).tolist() == [0, K - 1]
    assert scores.max() == pytest.approx(1.0)
    np.testing.assert_allclose(model.usual, world.accuracy.mean(axis=0))


def test_the_number_of_neighbours_is_large_where_content_says_nothing() -> None:
    rng = np.random.default_rng(0)
    features, accuracy = rng.random((300, 2)), (rng.random((300, K)) < 0.5).astype(float)
    images = [f"p{i}" for i in range(300)]
    noisy = baselines.NearestNeighbours.fit(features, accuracy, images, counts=(1, 100))
    assert noisy.neighbours == 100
    clear = baselines.NearestNeighbours.fit(
        features, (features[:, :1] > 0.5) * np.ones((1, K)), images, counts=(1, 100)
    )
    assert clear.neighbours == 1


def test_few_questions_are_enough_to_fit() -> None:
    world = content_world(3)
    model = baselines.NearestNeighbours.fit(parity(world), world.accuracy, world.image_id.tolist())
    assert np.isfinite(model.scores(parity(world))).all()


def test_bandit_learns_from_single_answers_which_questions_need_which_setting() -> None:
    content = parity(content_world(400))
    rising = (COST_MS - COST_MS[0]) / (COST_MS[-1] - COST_MS[0])
    accuracy = np.where(content > 0, rising, 1 - rising)
    latency_ms = np.tile(COST_MS, (400, 1))
    model = baselines.LinUCB.fit(SPACE, content, accuracy, latency_ms, ridge=1.0)
    scores = model.scores(np.array([[0.0], [1.0]]))
    assert [SPACE.settings[i] for i in scores.argmax(axis=1)] == [SPACE.cheapest, SPACE.native]
    again = baselines.LinUCB.fit(SPACE, content, accuracy, latency_ms, ridge=1.0)
    np.testing.assert_allclose(again.weights, model.weights)


def test_bandit_never_looks_at_a_setting_that_it_did_not_try() -> None:
    world = content_world(50)
    accuracy, latency_ms = world.accuracy.copy(), world.latency_ms.copy()
    accuracy[:, 5], latency_ms[:, 5] = np.nan, np.inf
    model = baselines.LinUCB.fit(SPACE, parity(world), accuracy, latency_ms)
    assert np.isfinite(model.weights).all()


def test_behind_the_guard_a_scored_policy_answers_requests() -> None:
    world = content_world(60)
    features = np.stack([baselines.question_features(("short", "long")[i % 2], None) for i in range(60)])
    model = baselines.NearestNeighbours.fit(features, world.accuracy, world.image_id.tolist(), counts=(5,))
    policy = baselines.ScoredPolicy(model, "knn")
    assert (policy.scale, policy.sees_picture) == ("accuracy", False)
    guard = Guard.around(policy, SPACE, None)
    for text, wanted in (("short", SPACE.cheapest), ("long", SPACE.native)):
        request = Request(images=(), question=text, budget_ms=100.0)
        tier = guard.choose_tier(request, None, 0.0)
        assert guard.choose_compute(request, tier, Sight(tier.tier, None, 0, 0), 1.0).knobs == wanted


def test_slackfit_takes_the_slowest_bucket_that_fits_the_slack() -> None:
    """Buckets end at 10, 20, 30 and 40 ms; the third setting is beaten by the second."""
    policy = baselines.SlackFit(np.array([10.0, 18.0, 19.0, 27.0, 40.0]), np.array([0.5, 0.7, 0.6, 0.8, 0.9]), 4)
    question = Question(text="what?")
    slacks_ms = (5.0, 10.0, 19.9, 20.0, 35.0, 40.0, 1e9)
    assert [int(policy.look(question, one).argmax()) for one in slacks_ms] == [0, 0, 0, 1, 3, 4, 4]
    assert policy.scale == "logit"
    assert policy.look(question, 40.0)[2] == -np.inf
    only = baselines.SlackFit(np.array([10.0, np.inf]), np.array([0.5, 0.9]))
    assert int(only.look(question, 1e9).argmax()) == 0
