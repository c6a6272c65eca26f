"""The judge's statistics in worlds whose right answers are known by construction."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from decision_worlds import COST_MS, SPACE, K, budget_world, content_world, parity, table

from tempovlm.control.baselines import NearestNeighbours
from tempovlm.lab import statistics
from tempovlm.lab.judge import judge, offline
from tempovlm.lab.judge import trial as judge_trial
from tempovlm.lab.table import Table

BUDGETS = (14.0, 24.0, 34.0, 40.0)


def trial(world: Table, train: Table | None = None, **changes: Any) -> judge_trial.Trial:
    train, every_ms = world if train is None else train, np.tile(COST_MS, (len(world), 1))
    values: dict[str, Any] = {
        "table": replace(world, latency_ms=every_ms, upper_ms=every_ms),
        "budgets_ms": BUDGETS,
        "mixture": offline.StaticMixture.fit(train.accuracy.mean(axis=0), COST_MS),
        "reference": offline.pick_rule(world),
        "reference_name": "hindsight oracle",
        "draws": 300,
    }
    return judge_trial.Trial(**values | changes)


def content_rule(world: Table) -> offline.Scored:
    neighbours = NearestNeighbours.fit(parity(world), world.accuracy, world.image_id.tolist(), counts=(5,))
    return offline.Scored(lambda part: neighbours.scores(parity(part)))


def test_where_content_matters_a_policy_that_reads_it_closes_the_whole_gap_and_shuffled_none() -> None:
    world = content_world()
    report, outcomes = judge.judge_all(trial(world), {"reader": content_rule(world)}, looking=["reader"])
    judged = report["policies"]["reader"]
    assert judged["gap_closed"]["value"] == pytest.approx(1.0)
    assert judged["gap_closed"]["interval"] == pytest.approx([1.0, 1.0])
    last = judged["by_budget"][-1]
    # Half of the questions at 13 ms and half at 36: 24.5 ms on average, at which the mixture is right in half.
    assert last["mean_latency_ms"] == pytest.approx(24.5)
    assert last["accuracy"]["value"] == pytest.approx(1.0)
    assert last["against_mixture"]["value"] == pytest.approx(0.5)
    assert last["against_mixture"]["interval"][0] > 0.4
    assert last["below_reference"]["value"] == pytest.approx(0.0)
    assert outcomes[0].latency_ms.shape == (len(world), len(BUDGETS))
    control = report["shuffled"]["reader"]
    assert abs(control["gap_closed"]["value"]) < 0.1
    assert control["content_gain"]["interval"][0] > 0.1


def test_at_the_same_budget_a_reader_is_ahead_of_the_table_and_the_table_of_nobody() -> None:
    world = content_world()
    usual = offline.table_rule(world.accuracy.mean(axis=0))
    rules = {"reader": content_rule(world), "table": usual}
    report, _ = judge.judge_all(trial(world, rivals={"table": usual}), rules)
    reader, table_itself = (report["policies"][name] for name in ("reader", "table"))
    gains = [row["at_same_budget"]["table"] for row in reader["by_budget"]]
    # Only the last budget has room for both settings that are ever right; the table takes one of them for all.
    assert [gain["value"] for gain in gains] == pytest.approx([0.0, 0.0, 0.0, 0.5])
    assert gains[-1]["rival_accuracy"] == pytest.approx(0.5)
    assert gains[-1]["interval"][0] > 0.4
    assert gains[-1]["holm_p_value"] < 0.05 < gains[0]["holm_p_value"]
    assert reader["at_same_budget"]["table"]["value"] == pytest.approx(0.125)
    for row in table_itself["by_budget"]:
        assert row["at_same_budget"]["table"]["interval"] == pytest.approx([0.0, 0.0])


def test_a_price_of_time_does_not_count_at_the_same_budget() -> None:
    world = content_world()
    usual = offline.table_rule(world.accuracy.mean(axis=0))
    reader = content_rule(world)
    assert isinstance(reader, offline.Scored)
    priced = replace(reader, time_price=2.0)
    assert offline.free(priced) == offline.free(reader) == reader
    report, (of_free, of_priced) = judge.judge_all(
        trial(world, rivals={"table": usual}), {"free": reader, "priced": priced}
    )
    assert of_priced.latency_ms.mean() < of_free.latency_ms.mean()
    free, paid = (report["policies"][name] for name in ("free", "priced"))
    assert paid["at_same_budget"]["table"]["value"] == pytest.approx(free["at_same_budget"]["table"]["value"])
    assert paid["by_budget"][-1]["accuracy"]["value"] < free["by_budget"][-1]["accuracy"]["value"]


def test_where_only_the_budget_matters_no_policy_beats_the_mixture() -> None:
    train, test = budget_world(1500, seed=1), budget_world(800, seed=2)
    neighbours = NearestNeighbours.fit(parity(train), train.accuracy, train.image_id.tolist())
    mean = train.accuracy.mean(axis=0)
    rules = {
        "knn": offline.Scored(lambda part: neighbours.scores(parity(part))),
        "table": offline.table_rule(mean),
        "random": offline.random_rule(),
        "best_static": offline.BestStatic(mean, COST_MS),
        "native": offline.Static(K - 1),
    }
    report, _ = judge.judge_all(trial(test, train), rules)
    for name, judged in report["policies"].items():
        assert judged["against_mixture"]["interval"][0] <= 0, name
        assert judged["area_against_mixture"]["interval"][0] <= 0.001, name


def test_luck_lifts_the_hindsight_oracle_but_not_the_twin_pick() -> None:
    train, test, twin = (budget_world(800, seed=seed) for seed in (1, 2, 3))
    rule = offline.table_rule(train.accuracy.mean(axis=0))
    found = {}
    for kind, truth in (("hindsight oracle", test), ("twin pick", twin)):
        here = trial(test, train, reference=offline.pick_rule(truth), reference_name=kind)
        found[kind], _ = judge.judge_all(here, {"table": rule})
    hindsight, twins = found["hindsight oracle"], found["twin pick"]
    assert hindsight["reference"]["accuracy"][-1]["value"] > 0.99
    assert twins["reference"]["accuracy"][-1]["value"] < 0.7
    assert hindsight["policies"]["table"]["by_budget"][-1]["gap"] >= 0
    assert twins["policies"]["table"]["by_budget"][-1]["gap_closed"] is None


def test_matched_latency_is_what_was_taken_not_the_budget() -> None:
    world = budget_world()
    rows = judge.judge(trial(world), trial(world).run("cheapest", offline.Static(0)))["by_budget"]
    assert [row["mean_latency_ms"] for row in rows] == pytest.approx([13.0] * len(rows))
    assert all(row["against_mixture"]["value"] == pytest.approx(0.0) for row in rows)


def halves(world: Table) -> offline.Rule:
    """The cheapest setting for even questions, the dearest for odd ones, at any budget."""
    numbers = {name: i for i, name in enumerate(world.question_id.tolist())}

    def choose(part: Table, budgets_ms: Sequence[float]) -> np.ndarray:
        odd = np.array([numbers[name] % 2 for name in part.question_id.tolist()])
        return np.tile((odd * (K - 1))[:, None], (1, len(budgets_ms)))

    return choose


def test_the_feasible_mixture_has_no_setting_that_misses_the_budget() -> None:
    accuracy = np.zeros((200, K))
    accuracy[::2, 0] = 1.0
    accuracy[:, K - 1] = 1.0
    world = table(accuracy)
    report, _ = judge.judge_all(trial(world), {"halves": halves(world)})
    rows = report["policies"]["halves"]["by_budget"]
    # 24.5 ms on average: half way from (13 ms, 50 %) to (36 ms, 100 %). Within 34 ms there is but the cheapest.
    assert [row["against_mixture"]["mixture_accuracy"] for row in rows] == pytest.approx([0.75] * 4)
    assert [row["against_feasible_mixture"]["mixture_accuracy"] for row in rows] == pytest.approx(
        [0.5, 0.5, 0.5, 0.75]
    )
    assert [row["against_feasible_mixture"]["value"] for row in rows] == pytest.approx([0.5, 0.5, 0.5, 0.25])
    assert rows[3]["against_feasible_mixture"]["interval"] == pytest.approx(rows[3]["against_mixture"]["interval"])
    mixtures = report["static"]["feasible_mixtures"]
    assert [one["settings"] for one in mixtures] == [["low/k4/b8"]] * 3 + [["low/k4/b8", "high/k8/b16"]]
    assert all(one["fits"] for one in mixtures)
    tight = trial(world, budgets_ms=(5.0,))
    report, _ = judge.judge_all(tight, {"halves": halves(world)})
    assert report["static"]["feasible_mixtures"][0] == {
        "budget_ms": pytest.approx(5.0),
        "settings": ["low/k4/b8"],
        "fits": False,
    }


def test_p_values_are_corrected_over_the_budgets_of_a_policy() -> None:
    world = content_world()
    rows = judge.judge(trial(world), trial(world).run("reader", content_rule(world)))["by_budget"]
    gains = [row["against_mixture"] for row in rows]
    # Only at 40 ms is there a gain; it is above zero in all of 300 resamples, and one of four tests.
    assert [gain["p_value"] for gain in gains] == pytest.approx([1.0, 1.0, 1.0, 2 / 301])
    assert [gain["holm_p_value"] for gain in gains] == pytest.approx([1.0, 1.0, 1.0, 8 / 301])


def test_in_one_data_set_nothing_is_gained_by_telling_data_sets_apart() -> None:
    accuracy = np.zeros((200, K))
    accuracy[::2, 0] = 1.0
    accuracy[1::2, K - 1] = 1.0
    names = np.tile(["okvqa", "text_vqa"], 100)
    world = table(accuracy, dataset=names)
    own = {
        name: offline.StaticMixture.fit(accuracy[names == name].mean(axis=0), COST_MS)
        for name in ("okvqa", "text_vqa")
    }
    report, _ = judge.judge_all(trial(world, dataset_mixtures=own), {"halves": halves(world)})
    assert report["policies"]["halves"]["against_mixture"]["value"] == pytest.approx(0.5)
    easy, hard = report["by_dataset"]["okvqa"], report["by_dataset"]["text_vqa"]
    assert (easy["num_questions"], hard["num_images"]) == (100, 100)
    assert (easy["mixture"], hard["mixture"]) == (["low/k4/b8"], ["low/k4/b8", "high/k8/b16"])
    for part, latency_ms in ((easy, 13.0), (hard, 36.0)):
        for row, budget_ms in zip(part["policies"]["halves"], BUDGETS, strict=True):
            assert (row["budget_ms"], row["mean_latency_ms"]) == (
                pytest.approx(budget_ms),
                pytest.approx(latency_ms),
            )
            assert row["accuracy"] == {"value": pytest.approx(1.0), "interval": pytest.approx([1.0, 1.0])}
            assert row["against_mixture"] == {
                "value": pytest.approx(0.0),
                "interval": pytest.approx([0.0, 0.0]),
                "mixture_accuracy": pytest.approx(1.0),
            }
    # The common mixture, of which the cheapest setting is all, is never right on the hard ones.
    report, _ = judge.judge_all(trial(world), {"halves": halves(world)})
    hard = report["by_dataset"]["text_vqa"]
    assert [row["against_mixture"]["value"] for row in hard["policies"]["halves"]] == pytest.approx([1.0] * 4)


def test_a_data_sets_interval_is_that_of_its_own_pictures() -> None:
    world = budget_world(90)
    names = np.repeat(["okvqa", "text_vqa"], [60, 30])
    images = np.array([f"i{i // 3}" for i in range(90)])
    world = replace(world, dataset=names, image_id=images)
    report, outcomes = judge.judge_all(trial(world, seed=4), {"native": offline.Static(K - 1)})
    row = report["by_dataset"]["text_vqa"]["policies"]["native"][0]
    values, pictures = outcomes[0].accuracy[60:, 0], images[60:]
    expected = statistics.clustered_bootstrap(values.tolist(), pictures.tolist(), draws=300, seed=4)
    assert row["accuracy"]["interval"] == pytest.approx(list(expected))
    assert report["by_dataset"]["text_vqa"]["num_images"] == 10


@pytest.mark.parametrize("seed", range(3))
def test_nothing_that_keeps_the_budget_beats_the_hindsight_oracle(seed: int) -> None:
    train, test = (budget_world(200, seed=seed + start) for start in (0, 10))
    mean = train.accuracy.mean(axis=0)
    rules: dict[str, offline.Rule] = {
        "random": offline.random_rule(seed),
        "table": offline.table_rule(mean),
        "best_static": offline.BestStatic(mean, COST_MS),
        "oracle": offline.pick_rule(test),
    }
    report, _ = judge.judge_all(trial(test, train), rules)
    below = {
        name: [row["below_reference"]["value"] for row in one["by_budget"]]
        for name, one in report["policies"].items()
    }
    assert min(min(values) for values in below.values()) >= 0
    assert below["oracle"] == pytest.approx([0.0] * len(BUDGETS))
    assert report["subject"] != "oracle"


def test_the_twin_pick_may_be_beaten_by_what_knows_the_averages() -> None:
    train, test, twin = (budget_world(800, seed=seed) for seed in (1, 2, 3))
    here = trial(test, train, reference=offline.pick_rule(twin), reference_name="twin pick")
    report, _ = judge.judge_all(here, {"table": offline.table_rule(train.accuracy.mean(axis=0))})
    assert report["policies"]["table"]["by_budget"][-1]["below_reference"]["value"] < 0


def test_the_subject_is_the_best_policy_unless_named() -> None:
    world = content_world()
    rules = {"cheap": offline.Static(0), "table": offline.Static(1), "reader": content_rule(world)}
    report, _ = judge.judge_all(trial(world), rules, ablated=None)
    assert report["subject"] == "reader"
    assert list(report["ablation"]) == ["reader", "table"]
    report, _ = judge.judge_all(trial(world), rules, subject="cheap")
    assert (report["subject"], report["ablation"]) == ("cheap", {})


def test_the_distance_to_the_reference_is_at_the_same_budget() -> None:
    world = content_world(100)
    rows = judge.judge(trial(world), trial(world).run("cheapest", offline.Static(0)))["by_budget"]
    assert [row["below_reference"]["value"] for row in rows] == pytest.approx([0.0, 0.0, 0.0, 0.5])


def test_timeliness_counts_measured_requests_only() -> None:
    measured_ms = np.tile(COST_MS, (100, 1))
    measured_ms[:10] += 30.0
    measured_ms[50:] = np.nan
    world = table(np.ones((100, K)), measured_ms)
    here = trial(world)
    row = judge.timeliness(here, here.run("native", offline.Static(K - 1)), 3)
    assert (row["num_measured"], row["adherence"]) == pytest.approx((50, 0.8))
    assert row["adherence_wilson"] == pytest.approx(list(statistics.wilson_interval(40, 50)))
    assert row["latency_over_budget"]["p50"] == pytest.approx(36 / 40)
    assert row["utilisation"] is None  # nothing is slower than the dearest setting
    assert row["num_utilisation"] == 0
    cheap = judge.timeliness(here, here.run("cheapest", offline.Static(0)), 3)
    assert cheap["utilisation"] == pytest.approx((10 * 43 + 40 * 13) / 50 / 40)
    nothing = trial(table(np.ones((4, K)), np.full((4, K), np.nan)))
    assert judge.timeliness(nothing, nothing.run("native", offline.Static(0)), 0)["adherence"] is None


def test_fallback_rate_and_knobs() -> None:
    world = content_world(8)
    judged = judge.judge(
        trial(world, budgets_ms=(5.0, 40.0)),
        trial(world, budgets_ms=(5.0, 40.0)).run("o", offline.pick_rule(world)),
    )
    first, last = judged["by_budget"]
    assert (first["fallback_rate"], last["fallback_rate"]) == pytest.approx((1.0, 0.0))
    assert first["knobs"] == pytest.approx({"low/k4/b8": 1.0})
    assert last["knobs"] == pytest.approx({"high/k8/b16": 0.5, "low/k4/b8": 0.5})


def test_area_runs_over_log_latency_and_rewards_the_early() -> None:
    world = budget_world()
    here = trial(world)
    native = here.frontier(here.run("native", offline.Static(K - 1)))
    mixture, hindsight = here.area(here.mixture_points)[0], here.area(here.reference_points)[0]
    assert here.area(native)[0] < mixture < hindsight
    flat = (np.full((1, 2), 1.0), np.full((1, 2), 0.7))
    assert here.area(flat)[0] == pytest.approx(0.7)


def test_ablation_needs_every_knob_that_matters() -> None:
    accuracy = np.zeros((60, K))
    accuracy[:, SPACE.settings.index(SPACE.native)] = 0.2
    # Right only where tier and depth both leave the native setting.
    for i, knobs in enumerate(SPACE):
        if knobs.tier != "high" and knobs.num_blocks == 8 and knobs.top_k == 8:
            accuracy[:, i] = 1.0
    world = table(accuracy)
    rows = judge.ablation(trial(world), offline.table_rule(accuracy.mean(axis=0)))
    assert [len(row["knobs"]) for row in rows] == [1, 1, 1, 2, 2, 2, 3]
    by_knobs = {"+".join(row["knobs"]): row["accuracy"][-1] for row in rows}
    assert by_knobs == pytest.approx(
        {
            "tier": 0.2,
            "top_k": 0.2,
            "num_blocks": 0.2,
            "tier+top_k": 0.2,
            "tier+num_blocks": 1.0,
            "top_k+num_blocks": 0.2,
            "tier+top_k+num_blocks": 1.0,
        }
    )


def test_a_gap_that_may_be_nothing_is_not_divided_by() -> None:
    gain = np.ones(101)
    assert judge.share_closed(gain, np.zeros(101)) is None
    assert judge.share_closed(gain, np.linspace(1.0, -1.0, 101)) is None
    assert judge.share_closed(gain, np.full(101, 2.0)) == {
        "value": pytest.approx(0.5),
        "interval": pytest.approx([0.5, 0.5]),
    }
