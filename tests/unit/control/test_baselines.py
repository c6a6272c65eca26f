"""Policies without deep learning: what they choose, alone, on arrays and behind the guard."""

from __future__ import annotations

import numpy as np
import pytest
from decision_worlds import COST_MS, SPACE, K, content_world, parity

from tempovlm.control import baselines
from tempovlm.control.guard import Guard
from tempovlm.control.policies import prior_accuracy
from tempovlm.control.policy import Features, Policy, Question, Sight
from tempovlm.core.knobs import KnobConfig
from tempovlm.core.request import Request

EVERYTHING = np.ones(K, dtype=bool)
TABLE = np.array([prior_accuracy(SPACE)[knobs] for knobs in SPACE])


def choose(policy: Policy, choices: tuple[KnobConfig, ...], text: str = "what color is it?") -> KnobConfig:
    """Both choices in turn, as the guard asks for them."""
    question = Question(text=text, choices=choices, image_size=(100, 200))
    tier = policy.choose_tier(question, 50.0)
    same = tuple(knobs for knobs in choices if knobs.tier == tier)
    features = Features(question=question, choices=same, sight=Sight(None, 0, 0))
    top_k, num_blocks = policy.choose_compute(features, tier, 40.0)
    return KnobConfig(tier=tier, top_k=top_k, num_blocks=num_blocks)


def test_the_best_allowed_setting_is_taken_and_the_cheapest_of_equals() -> None:
    scores = np.array([[0.5, 0.501, 0.9], [0.5, 0.7, 0.9]])
    allowed = np.array([[True, True, False], [True, True, False]])
    cost_ms = np.tile([3.0, 4.0, 5.0], (2, 1))
    assert baselines.choose_best(scores, allowed, cost_ms).tolist() == [0, 1]
    assert baselines.choose_best(scores, np.zeros((2, 3), dtype=bool), cost_ms).tolist() == [0, 0]


def test_one_knob_leaves_the_others_native() -> None:
    only = baselines.varying(SPACE, ("num_blocks",))
    assert [str(k) for k, is_one in zip(SPACE, only, strict=True) if is_one] == ["high/k8/b8", "high/k8/b16"]
    assert baselines.varying(SPACE, ()).sum() == 1
    assert baselines.varying(SPACE, baselines.KNOBS).all()


@pytest.mark.parametrize("knob", baselines.KNOBS)
def test_single_knob_policies_turn_theirs_alone(knob: str) -> None:
    scorer, allowed = baselines.ConstantScores(TABLE), baselines.varying(SPACE, (knob,))
    policy = baselines.ScoredPolicy(SPACE, scorer, COST_MS, allowed, "table")
    assert isinstance(policy, Policy)
    assert choose(policy, SPACE.settings) == SPACE.native
    cheaper = tuple(k for k in SPACE if getattr(k, knob) != getattr(SPACE.native, knob))
    chosen = choose(policy, cheaper)
    assert all(
        getattr(chosen, other) == getattr(SPACE.native, other) for other in baselines.KNOBS if other != knob
    )
    assert choose(policy, (SPACE.cheapest,)) == SPACE.cheapest


def test_features_tell_words_from_one_another_and_shapes() -> None:
    sign, count = (baselines.question_features(text, (300, 400)) for text in ("What sign?", "how many dogs"))
    assert sign.shape == count.shape
    assert not np.allclose(sign, count)
    np.testing.assert_allclose(sign, baselines.question_features("what SIGN", (300, 400)))
    wide = baselines.question_features("what sign", (100, 400))
    assert (~np.isclose(sign, wide)).sum() == 2
    assert np.isfinite(baselines.question_features("", None)).all()
    assert baselines.features_of(["a", "b"], [None, (1, 1)], baselines.question_features).shape == (2, len(sign))


def test_neighbours_learn_which_questions_need_which_setting() -> None:
    world = content_world(100)
    features = np.concatenate([parity(world), np.zeros((100, 1))], axis=1)
    model = baselines.NearestNeighbours.fit(features, world.accuracy, world.image_id.tolist())
    scores = model.scores(np.array([[0.0, 0.0], [1.0, 0.0]]))
    assert scores.argmax(axis=1).tolist() == [0, K - 1]
    assert scores.max() == pytest.approx(1.0)


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
    words = ["short", "long"]
    features = baselines.features_of([words[i % 2] for i in range(60)], [None] * 60, baselines.question_features)
    model = baselines.NearestNeighbours.fit(features, world.accuracy, world.image_id.tolist(), counts=(5,))
    policy = baselines.ScoredPolicy(SPACE, model, COST_MS, EVERYTHING, "knn")
    guard = Guard.around(policy, SPACE, None)
    for text, wanted in (("short", SPACE.cheapest), ("long", SPACE.native)):
        request = Request(images=(), question=text, budget_ms=100.0)
        tier = guard.choose_tier(request, None, 0.0)
        assert guard.choose_compute(request, tier, Sight(None, 0, 0), 1.0).knobs == wanted
    assert policy.choose_compute(None, "low", 1.0)[0] in SPACE.top_ks
