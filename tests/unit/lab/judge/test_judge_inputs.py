"""What the judge is given: which latencies policies go by and are charged, and how baselines are named."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from decision_worlds import COST_MS, K, content_world, table
from estimator_fakes import RATES, TABLE

from tempovlm.core.errors import UserError
from tempovlm.lab.judge import inputs as judge_inputs
from tempovlm.lab.judge.inputs import Known, Part, latencies
from tempovlm.lab.judge.offline import oracle_rule
from tempovlm.lab.table import DecisionTable
from tempovlm.latency.estimator import Estimator

ZEROS = np.zeros(3)


def part(made: DecisionTable, prepare_ms: tuple[float, ...] = (0.0, 0.0, 0.0)) -> Part:
    return Part(made, np.array(prepare_ms), ZEROS)


def pocket_table(count: int = 4) -> DecisionTable:
    """Questions of the pocket's space with nothing measured."""
    settings = len(TABLE.space)
    small = table(np.zeros((count, K)))
    return replace(
        small,
        space=TABLE.space,
        accuracy=np.zeros((count, settings)),
        output_tokens=np.full((count, settings), 3.0),
        latency_ms=np.full((count, settings), np.nan),
    )


def test_measured_questions_are_charged_what_was_measured() -> None:
    train_ms = np.outer(np.linspace(1.0, 2.0, 11), COST_MS)
    train = part(table(np.zeros((11, K)), train_ms))
    found = latencies(part(content_world(4)), train, None, 0.9)
    np.testing.assert_allclose(found.decided_ms, np.tile(1.9 * COST_MS, (4, 1)))
    np.testing.assert_allclose(found.scored_ms, np.tile(COST_MS, (4, 1)))
    assert found.scored_by.startswith("measured")


def test_others_are_charged_the_median_of_the_setting() -> None:
    unmeasured = part(table(np.zeros((3, K)), np.full((3, K), np.nan)))
    train = part(table(np.zeros((5, K)), np.outer(np.arange(1.0, 6.0), COST_MS)))
    found = latencies(unmeasured, train, None, 0.5)
    np.testing.assert_allclose(found.scored_ms, np.tile(3 * COST_MS, (3, 1)))
    assert found.scored_by.startswith("median")
    # Where training questions were not timed at every setting, the judged ones stand in.
    found = latencies(train, unmeasured, None, 0.5)
    np.testing.assert_allclose(found.decided_ms[0], 3 * COST_MS)
    with pytest.raises(UserError, match="give --latency_estimator_path"):
        latencies(unmeasured, unmeasured, None, 0.5)


def test_an_estimator_is_raised_by_preparing_the_picture_which_it_leaves_out() -> None:
    estimator = Estimator(TABLE, RATES, total_margins=np.log([1.0, 1.1, 1.3]))
    made = pocket_table()
    bare = latencies(part(made), part(made), estimator, 0.9)
    np.testing.assert_allclose(bare.decided_ms, 1.1 * bare.scored_ms)
    prepared = latencies(part(made), part(made, (1.0, 2.0, 4.0)), estimator, 0.9)
    added_ms = prepared.scored_ms - bare.scored_ms
    np.testing.assert_allclose(added_ms[:, :25], 1.0)
    np.testing.assert_allclose(added_ms[:, 25:50], 2.0)
    np.testing.assert_allclose(added_ms[:, 50:], 4.0)
    assert "latency estimator" in prepared.decided_by


def test_a_static_mixture_is_of_the_training_questions_of_one_data_set_or_of_all() -> None:
    accuracy = np.zeros((4, K))
    accuracy[:2, 0] = 1.0
    accuracy[2:, K - 1] = 1.0
    train_ms = np.outer([1.0, 1.0, 2.0, 4.0], COST_MS)
    train = part(table(accuracy, train_ms, dataset=np.repeat(["okvqa", "text_vqa"], 2)))
    found = latencies(train, train, None, 0.5)
    every = judge_inputs.static_mixture(train, found)
    assert every.settings.tolist() == [0]  # as often right as the dearest
    np.testing.assert_allclose(every.accuracy[[0, 1, K - 1]], [0.5, 0.0, 0.5])
    np.testing.assert_allclose(every.latency_ms, 1.5 * COST_MS)
    np.testing.assert_allclose(every.fit_ms, 1.5 * COST_MS)
    hard = judge_inputs.static_mixture(train, found, "text_vqa")
    assert hard.settings.tolist() == [0, K - 1]
    np.testing.assert_allclose(hard.latency_ms, 3 * COST_MS)
    decided = replace(found, decided_ms=np.outer([1.0, 2.0, 3.0, 6.0], COST_MS))
    np.testing.assert_allclose(judge_inputs.static_mixture(train, decided).fit_ms, 3 * COST_MS)
    np.testing.assert_allclose(judge_inputs.static_mixture(train, decided, "text_vqa").fit_ms, 4.5 * COST_MS)


def test_names_of_baselines() -> None:
    train = part(content_world(20))
    known = Known(
        train=train,
        train_latencies=latencies(train, train, None, 0.9),
        level=0.9,
        content=lambda: pytest.fail("nobody looks at content here"),
        oracle=oracle_rule(train.table),
    )
    judged = content_world(6)
    for name in judge_inputs.BASELINES:
        if name not in judge_inputs.LOOKING:
            chosen = known.rule(name)(judged, judged.latency_ms, (20.0, 99.0))
            assert chosen.shape == (6, 2)
            assert name == "fixed" or (COST_MS[chosen[:, 0]] <= 20.0).all()
    assert known.rule("oracle") is known.oracle
    for unknown in ("magic", "only_colour", "kn"):
        with pytest.raises(UserError, match=f"--policies {unknown}"):
            known.rule(unknown)
