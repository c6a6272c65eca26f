"""Rules on decision tables: what they choose, the hull of static mixtures, oracles, policies of the engine."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from decision_worlds import COST_MS, SPACE, K, budget_world, content_world, parity, table

from tempovlm.control.baselines import NearestNeighbours, varying
from tempovlm.control.policies import TablePolicy
from tempovlm.control.policy import Policy, Question, Sight
from tempovlm.control.select import Floats
from tempovlm.core.errors import UserError
from tempovlm.core.knobs import KnobConfig
from tempovlm.lab.judge import offline
from tempovlm.lab.judge.inputs import policy_rule
from tempovlm.lab.table import Table

BUDGETS = (13.0, 20.0, 30.0, 40.0)


def question_of(part: Table, row: int) -> Question:
    return Question(text=str(part.question_id[row]))


def sight_of(_part: Table, _row: int, tier: str) -> Sight:
    return Sight(tier, None, 1, 1)


def test_hull_of_a_hand_computed_case() -> None:
    cost_ms, accuracy = np.array([10.0, 20.0, 30.0, 40.0, 25.0]), np.array([0.2, 0.3, 0.6, 0.55, 0.3])
    hull = offline.upper_hull(cost_ms, accuracy)
    # From (10, .2) to (30, .6) the line passes above (20, .3); the setting of 40 ms is dearer and worse.
    assert hull.tolist() == [0, 2]
    at_ms = np.array([[5.0, 10.0, 15.0, 20.0, 30.0, 99.0]])
    found = offline.mixed(cost_ms[None, hull], accuracy[None, hull], at_ms)
    np.testing.assert_allclose(found[0], [0.2, 0.2, 0.3, 0.4, 0.6, 0.6])


def test_of_settings_that_cost_the_same_only_the_better_is_worth_mixing() -> None:
    hull = offline.upper_hull(np.array([10.0, 10.0, 20.0, 20.0]), np.array([0.1, 0.2, 0.4, 0.3]))
    assert hull.tolist() == [1, 2]


def test_a_mixture_keeps_to_its_settings_where_test_questions_disagree_with_the_training_ones() -> None:
    cost_ms, accuracy = np.array([[10.0, 30.0, 20.0]]), np.array([[0.5, 0.4, 0.7]])
    found = offline.mixed(cost_ms, accuracy, np.array([[15.0, 25.0, 30.0]]))
    np.testing.assert_allclose(found[0], [0.6, 0.55, 0.4])


def test_a_price_of_time_leaves_what_a_gain_does_not_pay_for() -> None:
    accuracy = np.array([0.5] * (K - 1) + [0.6])
    part = table(np.tile(accuracy, (2, 1)))
    dear_ms, cheap_ms = COST_MS[-1], COST_MS.min()
    budget_ms = 2 * dear_ms
    even = 0.1 / ((dear_ms - cheap_ms) / budget_ms)  # the price at which the dearest setting is just worth it
    for price, chosen in ((0.0, K - 1), (0.9 * even, K - 1), (1.1 * even, int(COST_MS.argmin()))):
        rule = offline.table_rule(accuracy, price)
        assert rule(part, [budget_ms]).tolist() == [[chosen]] * 2
    part.upper_ms[:, 0] = np.inf
    assert offline.table_rule(accuracy, 9.0)(part, [budget_ms]).tolist() != [[0]] * 2


def test_mixture_is_fitted_on_training_means() -> None:
    mixture = offline.StaticMixture.fit(np.linspace(0.1, 0.9, K), COST_MS)
    assert mixture.settings[0] == 0
    assert mixture.settings[-1] == K - 1


def test_a_feasible_mixture_takes_only_settings_that_fit_the_budget() -> None:
    accuracy, latency_ms = np.array([0.2, 0.5, 0.6, 0.9]), np.array([10.0, 20.0, 30.0, 40.0])
    mixture = offline.StaticMixture.fit(accuracy, latency_ms, np.array([12.0, 35.0, 33.0, 60.0]))
    # From (20, .5) to (40, .9) the line passes above (30, .6).
    assert mixture.settings.tolist() == [0, 1, 3]
    assert mixture.feasible(60.0).tolist() == [0, 1, 3]
    assert mixture.feasible(59.0).tolist() == [0, 1, 2]
    assert mixture.feasible(34.0).tolist() == [0, 2]
    assert mixture.feasible(5.0).tolist() == [0]


def test_scored_rules_keep_to_what_fits_and_fall_back_to_the_cheapest() -> None:
    world = budget_world(5)
    rule = offline.table_rule(COST_MS / 100)
    chosen = rule(world, (5.0, *BUDGETS))
    assert (chosen[:, 0] == 0).all()
    for column, budget_ms in enumerate(BUDGETS, start=1):
        best = max(np.flatnonzero(budget_ms >= COST_MS), key=lambda i: COST_MS[i])
        assert (COST_MS[chosen[:, column]] == COST_MS[best]).all()


def test_ties_go_to_the_cheaper_setting() -> None:
    world = budget_world(3)
    chosen = offline.table_rule(np.full(K, 0.5))(world, (99.0,))
    assert (chosen == 0).all()


def test_a_table_over_one_knob_leaves_the_others_native() -> None:
    world = budget_world(3)
    rule = offline.table_rule(COST_MS, allowed=varying(SPACE, ("tier",)))
    settings = [SPACE.settings[i] for i in rule(world, BUDGETS)[0]]
    assert settings[0] == SPACE.cheapest  # no native depth fits 13 ms
    assert settings[1:] == [KnobConfig(tier=tier, top_k=8, num_blocks=16) for tier in SPACE.tiers]


def test_best_static_goes_by_its_own_quantile_and_never_by_the_question() -> None:
    world = content_world(4)
    rule = offline.BestStatic(np.arange(K) / K, COST_MS * 2)
    chosen = rule(world, (5.0, 30.0, 99.0))
    assert chosen.tolist() == [[0, 2, K - 1]] * 4


def test_random_rule_repeats_and_covers_only_what_fits() -> None:
    world = budget_world(600)
    rule = offline.random_rule(3)
    chosen = rule(world, (20.0, 40.0))
    np.testing.assert_array_equal(chosen, rule(world, (20.0, 40.0)))
    assert set(chosen[:, 0].tolist()) == set(np.flatnonzero(COST_MS <= 20.0).tolist())
    counts = np.bincount(chosen[:, 1], minlength=K)
    assert counts.min() > 25


def test_the_hindsight_oracle_is_right_wherever_a_setting_is() -> None:
    world = content_world(10)
    chosen = offline.pick_rule(world)(world, (20.0, 40.0))
    assert chosen[:, 0].tolist() == [0] * 10
    assert chosen[:, 1].tolist() == [0, K - 1] * 5


def test_the_twin_pick_chooses_on_the_twin() -> None:
    twin = content_world(4)
    judged = table(1 - twin.accuracy)
    chosen = offline.pick_rule(twin)(judged, (40.0,))
    assert np.take_along_axis(judged.accuracy, chosen, 1).sum() == pytest.approx(0)


def test_tables_are_aligned_by_question_and_a_gap_is_named() -> None:
    world = content_world(6)
    kept, twin = offline.common(world, world.take(np.array([5, 3, 1])))
    assert kept.question_id.tolist() == twin.question_id.tolist() == ["q0001", "q0003", "q0005"]
    with pytest.raises(UserError, match="question q0000 of okvqa"):
        offline.positions(kept, world)
    with pytest.raises(UserError, match="--twin_results_dir"):
        offline.common(world.take(np.array([0])), world.take(np.array([1])))


def test_shuffling_takes_the_content_and_leaves_the_latency() -> None:
    latency_ms = np.tile(COST_MS, (40, 1))
    latency_ms[:20] *= 10
    world = table(content_world(40).accuracy, latency_ms)
    neighbours = NearestNeighbours.fit(parity(world), world.accuracy, world.image_id.tolist(), counts=(5,))
    rule = offline.Scored(lambda part: neighbours.scores(parity(part)))
    real = rule(world, (40.0,))
    mixed = offline.shuffled(rule, 1)(world, (40.0,))
    assert (mixed[:20] == 0).all()  # nothing else fits those
    assert (real[20:] != mixed[20:]).any()
    assert sorted(set(mixed[20:, 0].tolist())) == [0, K - 1]


def test_restricted_rules_choose_among_the_rest() -> None:
    world = budget_world(50)
    allowed = np.zeros(K, dtype=bool)
    allowed[[2, 5]] = True
    for rule in (offline.random_rule(), offline.pick_rule(world), offline.BestStatic(np.ones(K), COST_MS)):
        chosen = offline.restricted(rule, allowed)(world, (1.0, 99.0))
        assert set(chosen.ravel().tolist()) <= {2, 5}


@pytest.mark.parametrize("prices", [{}, {"price_per_ms": 0.05}, {"time_price": 1.5}], ids=str)
def test_a_policy_of_the_engine_chooses_as_its_rule_does(prices: dict[str, float]) -> None:
    world = budget_world(30)
    accuracy = np.linspace(0.2, 0.9, K)
    policy = TablePolicy(SPACE, dict(zip(SPACE, accuracy.tolist(), strict=True)))
    asked = offline.PolicyRule(policy, question_of, sight_of, **prices)
    chosen = offline.table_rule(accuracy, **prices)(world, BUDGETS)
    np.testing.assert_array_equal(asked(world, BUDGETS), chosen)
    assert (chosen != offline.table_rule(accuracy)(world, BUDGETS)).any() == bool(prices)


def test_only_scores_on_the_scale_of_accuracy_pay_for_the_share_of_the_budget() -> None:
    accuracy = np.linspace(0.2, 0.9, K)
    policy = TablePolicy(SPACE, dict(zip(SPACE, accuracy.tolist(), strict=True)))
    content: Any = SimpleNamespace(question_of=question_of)
    for one, price in ((policy, 0.3), (Listener(), 0.0)):
        rule = policy_rule(one, content, sight_of, 0.3)
        assert isinstance(rule, offline.PolicyRule)
        assert rule.time_price == pytest.approx(price)


class Listener(Policy):
    """Wants the dearest setting and remembers what it was told."""

    name = "listener"
    sees_picture = True

    def __init__(self, *, sees_glance: bool = False) -> None:
        self.glances: list[Any] = []
        self.left_ms: list[float] = []
        self._sees_glance = sees_glance

    @property
    def sees_glance(self) -> bool:
        return self._sees_glance

    def look(self, question: Question, left_ms: float) -> Floats:
        assert question.left_ms == left_ms
        self.glances.append(question.glance)
        return COST_MS

    def settle(self, question: Question, sight: Sight, left_ms: float) -> Floats:
        assert question.left_ms is not None
        assert sight.tier in SPACE.tiers
        self.left_ms.append(left_ms)
        return COST_MS


def test_a_policy_takes_the_best_scored_setting_that_fits() -> None:
    world = budget_world(2)
    rule = offline.PolicyRule(Listener(), question_of, sight_of)
    chosen = rule(world, (5.0, *BUDGETS))
    wanted = [int(np.where(budget_ms >= COST_MS, COST_MS, -1.0).argmax()) for budget_ms in (99.0, *BUDGETS)]
    assert chosen.tolist() == [[0, *wanted[1:]]] * 2


def test_a_policy_is_told_what_is_left_after_looking() -> None:
    world, policy = replace(budget_world(3), look_ms=np.tile([2.0, 3.0, 4.0], (3, 1))), Listener()
    rule = offline.PolicyRule(policy, question_of, sight_of)
    rule(world, (40.0,))
    assert policy.left_ms == pytest.approx([36.0] * 3)


def test_a_policy_that_glances_sees_the_global_crop_of_the_lowest_tier() -> None:
    def look(_: object, row: int, tier: str) -> Sight:
        return Sight(tier, [f"crop {i} of {row} at {tier}" for i in range(3)], 10, 5)

    world, policy = budget_world(2), Listener(sees_glance=True)
    offline.PolicyRule(policy, question_of, look)(world, (99.0,))
    assert policy.glances == [["crop 0 of 0 at low"], ["crop 0 of 1 at low"]]
