"""References that are fitted on training questions, and baselines by name."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from decision_worlds import COST_MS, K, content_world, table

from tempovlm.core.errors import UserError
from tempovlm.lab.judge import inputs as judge_inputs
from tempovlm.lab.judge.inputs import Known
from tempovlm.lab.judge.offline import pick_rule


def test_a_static_mixture_is_of_the_training_questions_of_one_data_set_or_of_all() -> None:
    accuracy = np.zeros((4, K))
    accuracy[:2, 0] = 1.0
    accuracy[2:, K - 1] = 1.0
    train_ms = np.outer([1.0, 1.0, 2.0, 4.0], COST_MS)
    train = table(accuracy, train_ms, dataset=np.repeat(["okvqa", "text_vqa"], 2))
    train = replace(train, upper_ms=np.tile(1.5 * COST_MS, (4, 1)))
    every = judge_inputs.static_mixture(train)
    assert every.settings.tolist() == [0]  # as often right as the dearest
    np.testing.assert_allclose(every.accuracy[[0, 1, K - 1]], [0.5, 0.0, 0.5])
    np.testing.assert_allclose(every.latency_ms, 1.5 * COST_MS)
    np.testing.assert_allclose(every.fit_ms, 1.5 * COST_MS)
    hard = judge_inputs.static_mixture(train, "text_vqa")
    assert hard.settings.tolist() == [0, K - 1]
    np.testing.assert_allclose(hard.latency_ms, 3 * COST_MS)
    upper = replace(train, upper_ms=np.outer([1.0, 2.0, 3.0, 6.0], COST_MS))
    np.testing.assert_allclose(judge_inputs.static_mixture(upper).fit_ms, 3 * COST_MS)
    np.testing.assert_allclose(judge_inputs.static_mixture(upper, "text_vqa").fit_ms, 4.5 * COST_MS)


def test_names_of_baselines() -> None:
    train = content_world(20)
    known = Known(
        train=train,
        level=0.9,
        content=lambda: pytest.fail("nobody looks at content here"),
        oracle=pick_rule(train),
    )
    judged = content_world(6)
    for name in judge_inputs.BASELINES:
        if name not in judge_inputs.LOOKING:
            chosen = known.rule(name)(judged, (20.0, 99.0))
            assert chosen.shape == (6, 2)
            assert name == "fixed" or (COST_MS[chosen[:, 0]] <= 20.0).all()
    assert known.rule("oracle") is known.oracle
    for unknown in ("magic", "only_colour", "kn"):
        with pytest.raises(UserError, match=f"--policies {unknown}"):
            known.rule(unknown)
