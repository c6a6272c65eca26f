from __future__ import annotations

import contextlib
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import grpo_toy
from tempovlm.core.errors import UserError
from tempovlm.lab.grpo.algorithm import (
    STATE,
    advantages,
    chosen_log_probs,
    evaluate,
    grpo_loss,
    knob_shares,
    measures,
    outcome,
    roll_out,
    train,
)
from tempovlm.lab.grpo.report import by_budget, judge, oracle_choice, render, table_choice
from tempovlm.lab.log import LOG, logged
from tempovlm.lab.options import GrpoOptions

OPTIONS = GrpoOptions(num_generations=8)


@pytest.mark.parametrize("learn_tier", [True, False])
def test_gradients_reach_every_head(learn_tier: bool) -> None:
    actor, task = grpo_toy.actor(learn_tier=learn_tier), grpo_toy.task(OPTIONS)
    found = roll_out(actor, task.env, task.validation, OPTIONS, torch.Generator().manual_seed(0))
    log_probs = chosen_log_probs(actor(found.batch), found.settings)
    gains = advantages(found.rewards).to(log_probs)
    grpo_loss(log_probs, found.log_probs, gains, replace(OPTIONS, entropy_coef=0.0)).loss.backward()
    controller = actor.controller
    head = controller.knob2knob3.trunk[-1]
    assert isinstance(head, torch.nn.Linear)
    assert head.weight.grad is not None
    assert (head.weight.grad.abs().sum(dim=1) > 0).all(), "top-k and depth each have outputs of their own"
    firsts = [p.grad for p in controller.knob1.parameters()]
    assert all((grad is not None and bool(grad.abs().sum() > 0)) is learn_tier for grad in firsts if learn_tier)
    assert learn_tier or all(grad is None for grad in firsts)


@pytest.mark.parametrize("mask", [False, True])
def test_it_finds_the_best_setting_for_each_budget(tmp_path: Path, mask: bool) -> None:
    """Tight: the picture's question needs the medium tier, the other one compute. Wide: the most of either."""
    # Without a mask only a penalty that outweighs any answer keeps the policy in time.
    options = replace(OPTIONS, mask_infeasible=mask, penalty=0.5 if mask else 3.0)
    task, actor = grpo_toy.task(options, num_epochs=30 if mask else 40), grpo_toy.actor(learn_tier=True)
    before = measures(task.env, [evaluate(actor, task.env, task.validation, options)])
    trained = train(actor, task, tmp_path, "toy")
    found = evaluate(actor, task.env, task.validation, options)
    after = measures(task.env, [found])
    best = outcome(
        task.env, task.validation, oracle_choice(task.env, task.validation, options), found.rewards, options
    )
    assert before["reward"] < 0.7 * float(best.rewards.mean())
    assert after["reward"] > 0.97 * float(best.rewards.mean())
    assert after["adherence"] == pytest.approx(1)
    assert trained.best_score == pytest.approx(after["reward"])
    assert trained.start_reward == pytest.approx(before["reward"])
    assert trained.history[-1]["train"]["reward"] > trained.history[0]["train"]["reward"] + 0.1
    tight = task.validation.budget_ms < 30
    by_kind = found.settings[tight].flatten(), torch.as_tensor(grpo_toy.kinds())[task.validation.rows[tight]]
    tiers = by_kind[0] // 4
    assert (tiers[by_kind[1]] == 1).all()
    assert (tiers[~by_kind[1]] == 0).all()


def test_interrupted_and_resumed_it_ends_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    task = grpo_toy.task(replace(OPTIONS, beta=0.05), num_epochs=4, warm_start=2)
    whole = grpo_toy.actor(learn_tier=True)
    train(whole, task, tmp_path / "whole", "toy")

    def stop(done: int, _: int) -> None:
        if done == 2:
            raise KeyboardInterrupt

    part, folder = grpo_toy.actor(learn_tier=True), tmp_path / "part"
    with monkeypatch.context() as patch:
        patch.setattr("tempovlm.lab.fit.progress_bar", lambda _: contextlib.nullcontext(stop))
        with pytest.raises(KeyboardInterrupt):
            train(part, task, folder, "toy")
    with (folder / LOG).open("a") as file:
        file.write('{"epoch": 3, "lo')
    assert (folder / STATE).is_file()
    other = replace(task, options=replace(task.options, lr=0.5))
    with pytest.raises(UserError, match=r"begun with lr 0\.01, not 0\.5"):
        train(grpo_toy.actor(learn_tier=True), other, folder, "toy")
    again = grpo_toy.actor(learn_tier=True, seed=9)
    train(again, task, folder, "toy")
    for ours, theirs in zip(whole.parameters(), again.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    assert (folder / LOG).read_text() == (tmp_path / "whole" / LOG).read_text()


def test_a_finished_training_is_not_repeated_unless_something_changed(tmp_path: Path) -> None:
    task, first = grpo_toy.task(OPTIONS), grpo_toy.actor(learn_tier=True)
    train(first, task, tmp_path, "toy")
    log = (tmp_path / LOG).read_text()
    again = grpo_toy.actor(learn_tier=True, seed=9)
    assert len(train(again, task, tmp_path, "toy").history) == 3
    assert torch.equal(next(first.parameters()), next(again.parameters()))
    assert (tmp_path / LOG).read_text() == log
    train(again, replace(task, options=replace(task.options, lr=0.1)), tmp_path, "toy")
    assert (tmp_path / LOG).read_text() != log


def test_another_first_stage_is_another_training(tmp_path: Path) -> None:
    task = grpo_toy.task(OPTIONS)
    train(grpo_toy.actor(learn_tier=False), task, tmp_path, "toy")
    log = (tmp_path / LOG).read_text()
    other = grpo_toy.actor(learn_tier=False, seed=9)
    given = next(other.controller.knob1.parameters()).clone()
    train(other, task, tmp_path, "toy")
    assert torch.equal(next(other.controller.knob1.parameters()), given)
    assert (tmp_path / LOG).read_text() != log


def test_a_damaged_state_is_named(tmp_path: Path) -> None:
    (tmp_path / STATE).write_bytes(b"no state")
    with pytest.raises(UserError, match="no state of a training"):
        train(grpo_toy.actor(learn_tier=True), grpo_toy.task(OPTIONS), tmp_path, "toy")


def test_every_epoch_is_logged(tmp_path: Path) -> None:
    train(grpo_toy.actor(learn_tier=True), grpo_toy.task(OPTIONS), tmp_path, "toy")
    records = [json.loads(line) for line in (tmp_path / LOG).read_text().splitlines()]
    assert [record["epoch"] for record in records] == [1, 2, 3]
    assert {"loss", "clip_fraction", "kl", "flat_groups", "entropy", "lr"} <= set(records[0])
    for part in ("train", "val"):
        assert {"reward", "accuracy", "latency_ms", "adherence", "utilisation", "knobs"} == set(records[0][part])
    assert sum(records[0]["train"]["knobs"]["top_k"].values()) == pytest.approx(1)
    assert records[0]["entropy"] > 1
    assert 0 <= records[0]["flat_groups"] < 1
    assert list((tmp_path / "tensorboard").iterdir())


def test_several_steps_on_the_same_draws_move_the_ratio(tmp_path: Path) -> None:
    once = train(
        grpo_toy.actor(learn_tier=True), grpo_toy.task(replace(OPTIONS, num_iterations=1)), tmp_path / "a", "toy"
    )
    often = train(
        grpo_toy.actor(learn_tier=True), grpo_toy.task(replace(OPTIONS, num_iterations=8)), tmp_path / "b", "toy"
    )
    assert [record["clip_fraction"] for record in once.history] == pytest.approx([0, 0, 0])
    assert once.history[0]["ratio"] == pytest.approx(1)
    assert max(record["clip_fraction"] for record in often.history) > 0


@pytest.mark.parametrize(
    ("loss_type", "scale", "is_told"),
    [
        ("dr_grpo", "group", True),
        ("dr_grpo", "none", False),
        ("dr_grpo", "batch", False),
        ("grpo", "group", False),
    ],
)
def test_dr_grpo_that_divides_by_the_spread_is_told(
    loss_type: str, scale: str, is_told: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    options = replace(OPTIONS, loss_type=loss_type, scale_rewards=scale)
    train(grpo_toy.actor(learn_tier=True), grpo_toy.task(options, num_epochs=1), tmp_path, "toy")
    assert ("--scale_rewards none" in caplog.text) is is_told


def test_trainings_by_other_loss_types_are_one_and_scales_are_not(tmp_path: Path) -> None:
    ends = {}
    for loss_type, scale in (("grpo", "group"), ("dr_grpo", "group"), ("dr_grpo", "none")):
        actor = grpo_toy.actor(learn_tier=True)
        options = replace(OPTIONS, loss_type=loss_type, scale_rewards=scale)
        train(actor, grpo_toy.task(options, num_epochs=1), tmp_path / f"{loss_type}_{scale}", "toy")
        ends[loss_type, scale] = next(actor.controller.knob2knob3.parameters()).detach()
    torch.testing.assert_close(ends["grpo", "group"], ends["dr_grpo", "group"])
    assert not torch.allclose(ends["dr_grpo", "group"], ends["dr_grpo", "none"], rtol=1e-4)


def test_accumulated_batches_make_one_step(tmp_path: Path) -> None:
    counts = []
    for accumulate in (1, 2):
        task = grpo_toy.task(replace(OPTIONS, num_iterations=1), grad_accum=accumulate, num_epochs=1)
        actor = grpo_toy.actor(learn_tier=True)
        hits: list[int] = []
        parameter = next(actor.controller.knob2knob3.parameters())
        before = parameter._version
        train(actor, task, tmp_path / str(accumulate), "toy")
        hits.append(parameter._version - before)
        counts += hits
    assert counts[0] > counts[1]


def test_the_report_by_hand(tmp_path: Path) -> None:
    task, actor = grpo_toy.task(OPTIONS, num_epochs=12), grpo_toy.actor(learn_tier=True)
    trained = train(actor, task, tmp_path, "toy")
    report = judge(actor, task, trained)
    found = report["policies"]
    # At 41 ms the dearest setting serves all; at 21 ms it is the better half of each kind that counts.
    assert found["oracle"]["accuracy"] == pytest.approx((1 + 1 + 1 + 0.5) / 4)
    assert found["table"]["adherence"] == pytest.approx(1)
    assert found["oracle"]["reward"] >= max(found["policy"]["reward"], found["table"]["reward"])
    assert report["gain"]["oracle"]["accuracy"]["mean"] <= 0
    assert [row["requests"] for row in report["by_budget"]] == [20, 19, 19, 19, 19]
    text = render(report)
    assert "oracle" in text
    assert f"end {report['reward']['end']:.4f}" in text


def test_the_table_takes_the_cheaper_of_equals() -> None:
    task = grpo_toy.task()
    chosen = table_choice(task.rows, task.env, task.validation)
    wide = task.validation.budget_ms > 30
    assert set(chosen[wide].flatten().tolist()) == {11}
    # Within 21 ms: low with both (mean 0.5) at 20 ms, or medium as it is (mean 0.25).
    assert set(chosen[~wide].flatten().tolist()) == {3}
    # At 41 ms: 0.5 - 1.1 · 20 / 41 beats 1 - 1.1 · 40 / 41.
    priced = table_choice(task.rows, task.env, task.validation, 1.1)
    assert set(priced[wide].flatten().tolist()) == {3}


def test_shares_of_knobs() -> None:
    shares = knob_shares(grpo_toy.SPACE, torch.tensor([0, 0, 11, 5]))
    assert shares["tier"] == pytest.approx({"low": 0.5, "medium": 0.25, "high": 0.25})
    assert shares["top_k"] == pytest.approx({"1": 0.75, "2": 0.25})
    assert shares["num_blocks"] == pytest.approx({"2": 0.5, "4": 0.5})


def test_budgets_are_grouped_from_tight_to_wide() -> None:
    task = grpo_toy.task()
    rows = by_budget(
        {
            "policy": outcome(
                task.env, task.validation, torch.zeros(96, 1, dtype=torch.int64), torch.zeros(96, 1), OPTIONS
            )
        },
        task.validation,
    )
    assert [row["budget_ms"][0] for row in rows] == pytest.approx([21, 21, 21, 41, 41])


@pytest.mark.parametrize(
    ("change", "flag"),
    [
        ({"batch_size": 0}, "--batch_size 0"),
        ({"lr": 0.0}, "--lr 0.0"),
        ({"lr_schedule": "step"}, "--lr_schedule step"),
        ({"tier_exploration": 2.0}, "--tier_exploration 2.0"),
    ],
)
def test_wrong_options_are_named(change: dict[str, object], flag: str) -> None:
    with pytest.raises(UserError, match=flag):
        replace(GrpoOptions(), **change).check()  # type: ignore[arg-type]


def test_of_equally_good_epochs_the_last_is_kept(tmp_path: Path) -> None:
    """Where every choice is worth the same, training is not thrown away for the start."""
    task = grpo_toy.task(replace(OPTIONS, alpha=0.0, entropy_coef=0.1), num_epochs=2)
    trained = train(grpo_toy.actor(learn_tier=True), task, tmp_path, "toy")
    assert trained.best_score == trained.start_reward == 0
    assert trained.best_epoch == 2


def test_a_training_that_diverges_is_told(tmp_path: Path) -> None:
    task = grpo_toy.task(OPTIONS, num_epochs=2)
    task = replace(task, options=replace(task.options, lr=1e30))
    with pytest.raises(UserError, match="--lr: the training diverged"):
        train(grpo_toy.actor(learn_tier=True), task, tmp_path, "toy")


def test_a_damaged_log_is_named(tmp_path: Path) -> None:
    (tmp_path / LOG).write_text('{"epo\n')
    with pytest.raises(UserError, match=r"training_log\.jsonl: damaged"):
        logged(tmp_path, 1)
