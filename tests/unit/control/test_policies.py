from __future__ import annotations

import itertools

import pytest

import tiny_model
from tempovlm.control.guard import Guard
from tempovlm.control.policies import TablePolicy, prior_accuracy
from tempovlm.control.policy import Sight
from tempovlm.control.select import TIE
from tempovlm.core.knobs import KnobConfig
from tempovlm.core.request import Request

SPACE = tiny_model.SPACE
PROFILE = tiny_model.make_profile()


def table(**accuracy: float) -> TablePolicy:
    """A policy on a table in which all settings but the named ones (`low_2_3`) are useless."""
    return TablePolicy(SPACE, {k: accuracy.get(f"{k.tier}_{k.top_k}_{k.num_blocks}", 0.0) for k in SPACE})


def choose(policy: TablePolicy, total_ms: float, left_ms: float) -> KnobConfig:
    """The setting that runs with so much left for the answer and, once the picture is encoded, for the rest."""
    guard = Guard(policy, SPACE, tuple(range(len(SPACE))), PROFILE)
    request = Request(images=(), question="what?", budget_ms=total_ms)
    tier = guard.choose_tier(request, None, PROFILE.open_ms)
    return guard.choose_compute(request, tier, Sight(tier.tier, None, 0, 0), total_ms - left_ms).knobs


def test_the_most_accurate_that_fits() -> None:
    policy = table(high_6_6=0.9, medium_4_4=0.7, low_2_3=0.5)
    assert choose(policy, 1e6, 1e6) == SPACE.largest
    assert choose(policy, 40.0, 20.0) == KnobConfig(tier="medium", top_k=4, num_blocks=4)
    assert choose(policy, 20.0, 10.0) == SPACE.cheapest


def test_more_budget_never_means_less_accuracy() -> None:
    accuracy = prior_accuracy(SPACE)
    policy = TablePolicy(SPACE, accuracy)
    reached = [accuracy[choose(policy, budget_ms, budget_ms / 2)] for budget_ms in range(10, 80)]
    assert all(b >= a - TIE for a, b in itertools.pairwise(reached))
    assert reached[-1] > reached[0]


@pytest.mark.parametrize(("lead", "chosen"), [(TIE * 0.9, "low"), (TIE * 1.1, "high")])
def test_a_tie_goes_to_the_cheaper(lead: float, chosen: str) -> None:
    assert choose(table(low_4_4=0.6, high_4_4=0.6 + lead), 1e6, 1e6).tier == chosen


def test_nothing_fits() -> None:
    assert choose(table(high_6_6=0.9), 0.1, 0.1) == SPACE.cheapest


def test_the_prior_prefers_more_compute_up_to_the_trained_top_k() -> None:
    prior = prior_accuracy(SPACE)
    assert max(prior, key=lambda k: (prior[k], -k.top_k)) == SPACE.native
    assert prior[SPACE.largest] == pytest.approx(prior[SPACE.native])
    assert min(prior, key=prior.__getitem__) == SPACE.cheapest
