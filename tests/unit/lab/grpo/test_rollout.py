from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from estimator_fakes import RATES, SPACE, TABLE

import grpo_toy
from tempovlm.data.sample import Sample
from tempovlm.engine.engine import Engine
from tempovlm.lab.grpo.algorithm import best_settings, chosen_log_probs, entropy, outcome, roll_out
from tempovlm.lab.grpo.environment import MASKED, OnlineAccuracy
from tempovlm.lab.options import GrpoOptions
from tempovlm.lab.table import Table
from tempovlm.latency.estimator import Estimator

OPTIONS = GrpoOptions()
ROWS = torch.tensor([0, 1])


def test_outcomes_by_hand() -> None:
    world = grpo_toy.world()
    batch = world.batch(ROWS, torch.tensor([20.0, 41.0], dtype=torch.float64), mask=False)
    # The cheapest and the dearest setting: 10 and 40 ms; a question about the picture, and one about compute.
    found = outcome(world, batch, torch.tensor([[0, 11], [0, 11]]), torch.zeros(2, 2), OPTIONS)
    assert found.latency_ms.tolist() == [pytest.approx([10, 40]), pytest.approx([10, 40])]
    assert found.accuracy.tolist() == [pytest.approx([0, 1]), pytest.approx([0, 1])]
    assert found.rewards.tolist() == [pytest.approx([0, 0.5]), [0, 1]]
    assert found.in_time.tolist() == [[True, False], [True, True]]
    assert batch.left_ms.tolist() == [[15, 5, pytest.approx(0.2)], [36, 26, 16]]


def test_the_mask_is_the_guards() -> None:
    world = grpo_toy.world()
    allowed = world.allowed(ROWS, torch.tensor([15.0, 5.0], dtype=torch.float64))
    assert allowed[0].nonzero().flatten().tolist() == [0, 1, 2]
    assert allowed[1].nonzero().flatten().tolist() == [0], "where nothing fits, the cheapest runs"


@pytest.mark.parametrize("learn_tier", [True, False])
def test_masked_settings_are_never_drawn_and_the_rest_is_a_distribution(learn_tier: bool) -> None:
    world, actor = grpo_toy.world(), grpo_toy.actor(learn_tier=learn_tier)
    rows, budgets = torch.arange(48), torch.full((48,), 16.0, dtype=torch.float64)
    batch = world.batch(rows, budgets, mask=True)
    torch.testing.assert_close(actor(batch).exp().sum(dim=1), torch.ones(48))
    options = replace(OPTIONS, num_generations=20)
    found = roll_out(actor, world, batch, options, torch.Generator().manual_seed(0))
    assert found.settings.shape == (48, 20)
    assert found.in_time.all()
    assert set(found.settings.unique().tolist()) == {0, 1, 2}
    assert torch.isfinite(found.log_probs).all()


def test_draws_repeat_with_their_seed_and_follow_the_policy() -> None:
    world, actor = grpo_toy.world(), grpo_toy.actor(learn_tier=True)
    batch = world.batch(ROWS, torch.tensor([41.0, 41.0], dtype=torch.float64), mask=False)
    options = replace(OPTIONS, num_generations=4000)
    first, again = (roll_out(actor, world, batch, options, torch.Generator().manual_seed(3)) for _ in range(2))
    assert torch.equal(first.settings, again.settings)
    shares = torch.stack([torch.bincount(row, minlength=12) / 4000 for row in first.settings])
    torch.testing.assert_close(shares, actor(batch).exp().detach(), atol=0.03, rtol=0)
    torch.testing.assert_close(first.log_probs, chosen_log_probs(actor(batch), first.settings).detach())


def test_a_tier_from_outside_is_kept() -> None:
    world, actor = grpo_toy.world(), grpo_toy.actor(learn_tier=False)
    tiers = torch.tensor([2, -1])
    budgets = torch.tensor([41.0, 41.0], dtype=torch.float64)
    batch = world.batch(ROWS, budgets, mask=False, tiers=tiers)
    by_tier = actor(batch).exp().view(2, 3, 4).sum(dim=2)
    assert by_tier[0].tolist() == [0, 0, pytest.approx(1)]
    assert by_tier[1].max().item() == pytest.approx(1)


def test_what_is_served_is_the_tier_first() -> None:
    """The likeliest setting is in a tier that is not the likeliest."""
    probabilities = torch.tensor([[0.0, 0.0, 0.0, 0.35, 0.2, 0.2, 0.2, 0.05, 0, 0, 0, 0]])
    assert best_settings(probabilities.clamp(min=1e-30).log(), 3).item() == 4


def test_entropy_of_masked_distributions() -> None:
    logs = torch.tensor([[0.5, 0.5, 0.0, 0.0]]).log().clamp(min=MASKED).requires_grad_()
    value = entropy(logs)
    value.sum().backward()
    assert value.item() == pytest.approx(np.log(2))
    assert logs.grad is not None
    assert torch.isfinite(logs.grad).all()


def table_75() -> Table:
    """Two questions, the first timed at every setting: no answer is as long as the second's."""
    return Table.of(
        SPACE,
        np.zeros((2, len(SPACE))),
        np.stack((np.arange(len(SPACE)) + 10.0, np.full(len(SPACE), np.nan))),
        text_tokens=np.array([20.0, 40.0]),
        vision_tokens=np.array([[80.0, 200.0, 400.0]] * 2),
        crops=np.array([[[1, 1], [2, 2], [3, 3]]] * 2),
        output_tokens=np.stack((np.full(len(SPACE), 2.0), np.full(len(SPACE), 4.0))),
    )


def times(opening_ms: float = 3.0) -> pd.DataFrame:
    """Every setting timed twice, as the estimator's median and as a tenth more, with the opening before it."""
    exact = table_75().predicted_ms(Estimator(TABLE, RATES))[0] + opening_ms
    rows = [
        {
            "tier": knobs.tier,
            "top_k": knobs.top_k,
            "num_blocks": knobs.num_blocks,
            "source": "a",
            "T_total": total * factor,
            "T_preprocess": opening_ms,
            "T_vision_encoder": 10.0 * (1 + SPACE.tiers.index(knobs.tier)),
            "T_projector": None,
        }
        for knobs, total in zip(SPACE, exact, strict=True)
        for factor in (1.0, 1.1)
    ]
    return pd.DataFrame(rows)


def test_predicted_costs_add_the_opening_and_do_not_know_the_answers_length() -> None:
    estimator = Estimator(TABLE, RATES, stamp={"hardware": "x", "device": "cpu"})
    bare = table_75()
    predicted = bare.predicted_ms(estimator)
    unknown = replace(bare, measured_ms=np.full_like(predicted, np.nan)).for_training(estimator)
    np.testing.assert_allclose(unknown.latency_ms, predicted)
    table = replace(bare, measured_ms=predicted + 3.0).for_training(estimator)
    np.testing.assert_allclose(table.latency_ms, predicted + 3.0)
    np.testing.assert_allclose(table.look_ms - unknown.look_ms, 3.0)
    assert (table.upper_ms[0] > table.latency_ms[0]).all(), "its answers are shorter than the longest"
    np.testing.assert_allclose(table.upper_ms[1], table.latency_ms[1])
    assert (np.repeat(table.look_ms, 25, axis=1) < table.latency_ms).all()
    assert (table.look_ms > 3.0).all()
    assert table.stamp == estimator.stamp
    # Of other questions' preprocessing, which was timed on the estimator's device, the median counts.
    others = replace(
        bare,
        measured_ms=np.full_like(predicted, np.nan),
        times=times(4.0),
        stamps={"a/o.parquet": estimator.stamp},
    )
    np.testing.assert_allclose(others.for_training(estimator).latency_ms, predicted + 4.0)


def test_measured_costs_take_the_question_before_the_setting() -> None:
    timed = times()
    half = replace(table_75(), times=timed)
    half.measured_ms[0, 0] = np.nan  # so that these questions do not tell all settings' medians
    table = half.for_training(None)
    by_setting = timed.groupby(["tier", "top_k", "num_blocks"])["T_total"]
    medians = [by_setting.median()[k.tier, k.top_k, k.num_blocks] for k in SPACE]
    np.testing.assert_allclose(table.latency_ms[0], [medians[0], *(np.arange(1, len(SPACE)) + 10.0)])
    np.testing.assert_allclose(table.latency_ms[1], medians)
    assert (table.upper_ms[1] > table.latency_ms[1]).all()
    assert table.look_ms.tolist() == [pytest.approx([13.0, 23.0, 33.0])] * 2


def test_the_model_runs_what_was_drawn_once(engine: Engine, picture_file: Path) -> None:
    about = {"image_path": picture_file, "style": "vqa2", "dataset": "okvqa", "split": "train"}
    samples = [
        Sample(question_id=str(i), image_id="p", question="what is the color", answers=("dog",), **about)
        for i in range(2)
    ]
    source = OnlineAccuracy(engine, samples, max_new_tokens=2)
    rows, settings = torch.tensor([0, 1]), torch.tensor([[0, 0, 30], [1, 59, 1]])
    first = source(rows, settings)
    assert source.runs == 4
    assert torch.isfinite(first).all()
    assert torch.equal(source(rows, settings), first)
    assert source.runs == 4, "nothing is run twice"
    assert torch.isnan(source.known).sum() == source.known.numel() - 4


def test_a_question_that_fails_counts_as_wrong(engine: Engine, tmp_path: Path) -> None:
    missing = Sample(
        question_id="1",
        image_id="p",
        image_path=tmp_path / "none.png",
        question="what",
        answers=("dog",),
        style="vqa2",
        dataset="okvqa",
        split="train",
    )
    source = OnlineAccuracy(engine, [missing])
    assert source(torch.tensor([0]), torch.tensor([[5]])).item() == pytest.approx(0)
    assert source.failures == 1
