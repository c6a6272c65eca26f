"""The simulator ends each request once, repeats itself, and its clairvoyant is beaten by nobody."""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from pathlib import Path

import numpy as np
import pytest
from decision_worlds import COST_MS, K
from queue_worlds import CHANCE, door, traffic, world

from tempovlm.control.policies import prior_accuracy
from tempovlm.control.policy import Policy, Question
from tempovlm.control.price import Price
from tempovlm.core.errors import UserError
from tempovlm.core.knobs import KnobSpace
from tempovlm.lab.judge.inputs import Content, Sights
from tempovlm.lab.queueing import clairvoyant
from tempovlm.lab.queueing.arrivals import arrival_times_ms, gaps_of
from tempovlm.lab.queueing.choosers import Chooser, accuracy_by_kind, knowing, named, of_policy, of_scores
from tempovlm.lab.queueing.simulate import REFUSED, Outcome, simulate
from tempovlm.lab.queueing.world import Traffic, World, draw_traffic, read_world
from tempovlm.lab.table import Table
from tempovlm.model.config import PRESETS

DERIVED, FREE = Price(), Price(is_derived=False)


def test_where_no_answer_is_right_accuracies_are_those_that_a_server_assumes(repo_root: Path) -> None:
    results = [repo_root / "results" / "core_exp_molmoe_h200"]
    space = KnobSpace.for_model(PRESETS["molmoe-1b"].shape)
    of = read_world(results, space, ["text_vqa"], assumed=True)
    expected = [prior_accuracy(space)[knobs] for knobs in space]
    assert of.judged.accuracy == pytest.approx(np.tile(expected, (len(of.judged), 1)))
    assert of.train is of.judged
    with pytest.raises(UserError, match="no training questions"):
        read_world(results, space, ["text_vqa"])


def run(of: World, requests: Traffic, name: str, price: Price = DERIVED, lanes: int = 1) -> Outcome:
    return simulate(of, requests, named(name, of), door(price, lanes))


def busy(of: World, load: float = 2.0, count: int = 300) -> Traffic:
    return draw_traffic(of, gaps_of("bursts", 0, count, 3), load, [60.0, 90.0], seed=4)


@pytest.mark.parametrize("name", ["native", "native_sheds", "greedy", "slackfit", "table", "kind"])
@pytest.mark.parametrize("lanes", [1, 2])
def test_each_request_ends_once_and_lanes_are_not_shared(name: str, lanes: int) -> None:
    of = world(spread=0.1)
    requests = busy(of)
    outcome = run(of, requests, name, lanes=lanes)
    ends = np.stack([outcome.on_time, outcome.late, outcome.refused]).astype(int)
    assert (ends.sum(axis=0) == 1).all()
    assert (outcome.right_on_time <= outcome.on_time).all()
    served = np.flatnonzero(outcome.answered)
    took_ms = requests.service_ms[served, outcome.setting[served]]
    begin_ms = outcome.end_ms[served] - took_ms
    assert (begin_ms >= requests.arrival_ms[served] - 1e-6).all()
    inside = [int(((begin_ms <= at + 1e-6) & (outcome.end_ms[served] > at + 1e-6)).sum()) for at in begin_ms]
    assert max(inside) == lanes, "all lanes are used, and none twice"
    if name == "native":
        assert not outcome.refused.any()


def test_the_same_seed_gives_the_same_and_another_one_another() -> None:
    of = world(spread=0.1)
    gaps = gaps_of("poisson", 0, 200, 1)
    outcomes = [run(of, draw_traffic(of, gaps, 1.5, [72.0], seed), "table").setting.tolist() for seed in (7, 7, 8)]
    assert outcomes[0] == outcomes[1] != outcomes[2]


def test_a_lane_that_nobody_shares_is_given_to_the_best_setting() -> None:
    of = world()
    outcome = run(of, traffic(of, np.arange(20) * 500.0), "table")
    assert set(outcome.setting) == {int(np.argmax(CHANCE))}


def test_who_waits_is_left_time_by_the_price_and_by_no_price_is_not() -> None:
    of = world()
    requests = traffic(of, (np.arange(40)[:, None] * 300.0 + np.arange(4)).ravel())
    greedy, priced = (run(of, requests, name).on_time for name in ("greedy", "table"))
    assert greedy.mean() == pytest.approx(0.5), "two of four native answers fit"
    early = priced[:32].mean()
    assert 0.75 <= early < 1, "the first ones do not know yet who comes behind them"
    assert priced[80:].mean() == pytest.approx(1.0), "later on they do"


def test_what_is_not_expected_in_time_is_refused_before_it_takes_time() -> None:
    of = world()
    outcome = run(of, traffic(of, np.zeros(30)), "table")
    assert outcome.refused.any()
    assert not outcome.late.any()


def test_a_late_answer_is_one_that_took_longer_than_its_bound() -> None:
    of = world()
    requests = traffic(of, np.arange(5) * 500.0, budget_ms=40.0)
    requests.service_ms[2] *= 3
    outcome = run(of, requests, "table")
    assert outcome.late.tolist() == [False, False, True, False, False]
    assert outcome.right_on_time[2] == 0


def test_a_machine_that_was_slow_is_tried_again() -> None:
    """After slow answers the margin exceeds the budget, and only further answers can tell that they are over."""
    of = world()
    native = named("native_sheds", of)
    bound_ms = float(of.bound_ms[np.flatnonzero(native.allowed)[0]])
    requests = traffic(of, np.arange(200) * 500.0, budget_ms=1.1 * bound_ms)
    requests.service_ms[:8] *= 3
    outcome = simulate(of, requests, native, door(FREE, 1))
    assert outcome.late[:8].all()
    assert outcome.on_time[8:].all()


def test_a_refusal_is_told_at_once_or_counts_as_late() -> None:
    """With a budget of 100 a refusal at 10 is in time to ask elsewhere, one at 11 is not."""
    end_ms = np.array([0.0, 10.0, 11.0, 90.0, 120.0])
    setting = np.array([REFUSED, REFUSED, REFUSED, 0, 0])
    outcome = Outcome(setting, end_ms, np.ones(5), np.full(5, 100.0), np.zeros(5))
    assert outcome.refused.tolist() == [True, True, False, False, False]
    assert outcome.refused_late.tolist() == [False, False, True, False, False]
    assert outcome.late.tolist() == [False, False, True, False, True]
    assert outcome.on_time.tolist() == [False, False, False, True, False]


@pytest.mark.parametrize("load", [1.0, 2.0, 4.0])
def test_who_was_admitted_is_refused_late_only_where_it_would_be_late(load: float) -> None:
    """Questions of unequal worth: whoever has waited for long is answered, however much others gain."""
    of = world(spread=0.1)
    rng = np.random.default_rng(1)
    unequal = of_scores("unequal", of.judged.accuracy * rng.uniform(0.1, 1, (len(of.judged), 1)), len(of.space))
    requests = busy(of, load)
    outcome = simulate(of, requests, unequal, door(DERIVED, 1))
    displaced = outcome.refused & (outcome.end_ms > outcome.arrival_ms)
    assert displaced.any(), "early, some make room for others"
    least_ms = float(of.bound_ms.min())
    for i in np.flatnonzero(outcome.refused_late):
        assert outcome.end_ms[i] + 1.3 * least_ms > outcome.deadline_ms[i]
    assert outcome.refused_late.mean() < 0.01


# The clairvoyant


def few(count: int, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Arrivals, budgets, accuracies and integer times of three settings."""
    rng = np.random.default_rng(seed)
    arrival_ms = np.cumsum(rng.integers(0, 12, count)).astype(float)
    accuracy = np.sort(rng.random((count, 3)), axis=1)
    return arrival_ms, np.full(count, 25.0), accuracy, np.array([[5.0, 9.0, 14.0]])


def best_by_hand(
    arrival_ms: np.ndarray, budget_ms: np.ndarray, accuracy: np.ndarray, time_ms: np.ndarray
) -> float:
    """The most expected right answers in time over all settings, refusals and orders of the requests."""
    best = 0.0
    for choice in product(range(-1, accuracy.shape[1]), repeat=len(arrival_ms)):
        free_ms = worth = 0.0
        for i, k in enumerate(choice):
            if k >= 0:
                free_ms = max(free_ms, arrival_ms[i]) + time_ms[k]
                worth += accuracy[i, k] * (free_ms <= arrival_ms[i] + budget_ms[i])
        best = max(best, worth)
    return best


@pytest.mark.parametrize("seed", range(12))
def test_the_plan_is_the_best_of_all_choices(seed: int) -> None:
    arrival_ms, budget_ms, accuracy, times_ms = few(6, seed)
    found = clairvoyant.plan(arrival_ms, budget_ms, accuracy, times_ms)
    assert found.value == pytest.approx(best_by_hand(arrival_ms, budget_ms, accuracy, times_ms[0]))


def test_the_plan_weighs_times_that_it_does_not_know() -> None:
    times_ms = np.array([[10.0], [30.0]])  # equally likely
    found = clairvoyant.plan(np.array([0.0, 0.0]), np.array([20.0, 30.0]), np.ones((2, 1)), times_ms)
    # The first one alone is in time with 1/2, then the second one with 1/2; the second one alone is always.
    assert found.value == pytest.approx(1.0)
    assert found.choice(1, 0.0) == 0
    assert found.choice(1, 25.0) == clairvoyant.REFUSE


@pytest.mark.parametrize("load", [0.7, 1.5, 3.0])
@pytest.mark.parametrize("name", ["native_sheds", "greedy", "slackfit", "table"])
def test_nobody_beats_who_knows_all_arrivals(load: float, name: str) -> None:
    of = world()
    exact = replace(of, judged=Table.of(of.space, np.tile(CHANCE, (len(of.judged), 1)), COST_MS))
    gaps = gaps_of("bursts", 0, 200, 5)
    requests = draw_traffic(exact, gaps, load, [72.0], seed=6)
    whole = replace(requests, arrival_ms=np.rint(requests.arrival_ms))
    steps = simulate(exact, whole, knowing(named("table", exact)), door(FREE))
    other = run(exact, whole, name)
    assert other.right_on_time.sum() <= steps.right_on_time.sum() + 0.02 * len(gaps), "but for times of half a ms"


def test_a_clairvoyant_needs_accuracies_that_hold_at_every_budget() -> None:
    of = world()
    with pytest.raises(UserError, match="--policies clairvoyant:greedy"):
        knowing(named("greedy", of))
    with pytest.raises(UserError, match="--policies nothing: no such policy"):
        named("nothing", of)


# What policies know


def test_kinds_are_known_by_their_training_questions() -> None:
    accuracy = np.zeros((40, K))
    accuracy[::2] = 1.0
    kinds = np.array(["easy", "hard"] * 20)
    train = Table.of(world().space, accuracy, COST_MS, template=kinds)
    asked = Table.of(world().space, np.zeros((3, K)), COST_MS, template=np.array(["easy", "hard", "unknown"]))
    known = accuracy_by_kind(train, asked)[:, 0]
    assert known[0] > 0.8 > known[2] > 0.2 > known[1]
    assert known[2] == pytest.approx(0.5)


def test_scores_that_change_with_time_are_those_of_what_is_left() -> None:
    of = world()
    early, late = np.eye(K)[3], np.eye(K)[0]
    one = of_scores("changing", np.broadcast_to(early, (len(of.judged), K)), K)
    scores = np.stack([np.broadcast_to(one, (len(of.judged), K)) for one in (late, early)])
    chooser: Chooser = replace(one, scores=scores, grid_ms=np.array([0.0, 50.0]), has_price=False)
    outcome = simulate(of, traffic(of, np.arange(4) * 500.0, 60.0), chooser, door(FREE))
    assert set(outcome.setting) == {3}
    outcome = simulate(of, traffic(of, np.arange(4) * 500.0, 45.0), chooser, door(FREE))
    assert set(outcome.setting) == {0}


def test_a_second_choice_stays_with_the_tier_of_the_first() -> None:
    of = world()
    first, second = np.eye(K)[5], np.eye(K)[6] + 2 * np.eye(K)[0]
    one = of_scores("seeing", np.broadcast_to(first, (len(of.judged), K)), K)
    chooser = replace(one, settled=np.broadcast_to(second, (1, len(of.judged), K)), has_price=False)
    outcome = simulate(of, traffic(of, np.arange(3) * 500.0, 100.0), chooser, door(FREE))
    assert set(outcome.setting) == {6}
    assert REFUSED not in outcome.setting


# Arrivals and times


@pytest.mark.parametrize("lanes", [1, 3])
def test_load_is_arrivals_over_native_answers(lanes: int) -> None:
    gaps = gaps_of("poisson", 0, 5000, 0)
    times_ms = arrival_times_ms(gaps, 0.5, 120.0, lanes)
    alone_ms = len(times_ms) * 120.0 / lanes
    assert alone_ms / times_ms[-1] == pytest.approx(0.5)


def test_bursts_are_burstier_than_chance_at_the_same_rate() -> None:
    spreads = {name: gaps_of(name, 0, 4000, 0).std() for name in ("poisson", "bursts")}
    assert spreads["poisson"] == pytest.approx(1.0, abs=0.1)
    assert spreads["bursts"] > 1.5
    assert gaps_of("bursts", 0, 4000, 0).mean() == pytest.approx(1.0)


def test_drawn_requests_take_one_lap_of_their_picture_at_every_setting() -> None:
    of = world(spread=0.3)
    requests = draw_traffic(of, np.ones(50), 1.0, [72.0], seed=1)
    laps = {tuple(lap) for lap in of.laps_ms.reshape(-1, K).round(6).tolist()}
    assert {tuple(one) for one in requests.service_ms.round(6).tolist()} <= laps


class Told(Policy):
    """Expects the same of every question, with less of the budget left as much or less."""

    name, scale = "told", "accuracy"

    def __init__(self, slope: float) -> None:
        self.slope = slope

    @property
    def usual(self) -> np.ndarray:
        return np.full(K, 0.25)

    def look(self, question: Question, left_ms: float) -> np.ndarray:
        assert question.text
        return np.full(K, 0.5) + self.slope * left_ms


@pytest.mark.parametrize(("slope", "times"), [(0.0, 1), (1e-3, 12)])
def test_a_policy_is_kept_at_as_many_budgets_as_change_what_it_says(slope: float, times: int) -> None:
    of = world(count=3)

    class Asked(Content):
        def question_of(self, table: Table, row: int) -> Question:
            return Question(text=f"{row} of {len(table)}")

    content = Asked({})
    one = of_policy("told", Told(slope), of, content, Sights(None, content), [72.0])  # type: ignore[arg-type]
    assert one.scores.shape == (times, 3, K)
    assert len(one.grid_ms) == times
    assert one.has_price
    np.testing.assert_allclose(one.mean_scores, 0.25)
