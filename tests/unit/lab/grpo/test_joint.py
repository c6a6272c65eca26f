from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import grpo_results
import numpy as np
import pytest
import torch
from grpo_results import SPACE, WEIGHTS

from tempovlm.control.checkpoint import load_controller
from tempovlm.control.learned.llm_based import LLMBasedController
from tempovlm.core.errors import UserError
from tempovlm.data.catalog import load_samples
from tempovlm.engine.engine import Engine
from tempovlm.lab.core_exp.plan import Job
from tempovlm.lab.exp5 import accuracy
from tempovlm.lab.exp5.accuracy import served_accuracy
from tempovlm.lab.exp5.end_to_end import CHECKPOINT, JointJob, glances, read_glances, render, run_job
from tempovlm.lab.grpo.actors import LlmActor, SharedReading
from tempovlm.lab.grpo.algorithm import best_settings
from tempovlm.lab.grpo.environment import Batch
from tempovlm.lab.statistics import spread
from tempovlm.lab.table import Table
from tempovlm.testbed.make import make_testbed


@pytest.fixture(scope="module")
def bed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder, few = tmp_path_factory.mktemp("beds") / "bed", (grpo_results.DATASET,)
    return make_testbed(folder, 5, 1, seed=1, progress=False, datasets=few)


@pytest.fixture(scope="module")
def results(bed: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return grpo_results.write_results(tmp_path_factory.mktemp("results"), bed)


@pytest.fixture
def job(engine: Engine, bed: Path, results: Path, tmp_path: Path) -> JointJob:
    return JointJob(engine=engine, **grpo_results.job_fields(bed, results, tmp_path))


def test_both_stages_over_seeds_beside_exp_4(job: JointJob) -> None:
    first = run_job(job)
    assert first["compared"] is None
    again = replace(
        job, output_dir=job.output_dir / "more", seeds=(42, 43), compare_with=job.output_dir / CHECKPOINT
    )
    report = run_job(again)
    runs = report["seeds"]["runs"]
    assert [row["seed"] for row in runs] == [42, 43]
    assert runs[0] == first["seeds"]["runs"][0], "a seed's training does not depend on the others"
    gains = report["compared"]["gains"]
    if first["best_seed"] == 42:
        assert gains[0]["accuracy"]["mean"] == pytest.approx(0), "compared with itself"
    low, high = report["seeds"]["reward"]["interval"]
    assert low <= report["seeds"]["reward"]["mean"] <= high
    saved = load_controller(again.output_dir / CHECKPOINT, SPACE, WEIGHTS)
    assert saved.kind == "two_stage"
    assert saved.options["policy"] == "grpo"
    for seed in (42, 43):
        lines = (again.output_dir / f"seed_{seed}" / "training_log.jsonl").read_text().splitlines()
        knobs = [json.loads(line)["val"]["knobs"] for line in lines]
        assert [set(one) for one in knobs] == [{"tier", "top_k", "num_blocks"}] * 2
    assert "over seeds" in render(report)
    assert "less that of Exp 4" in render(report)


def test_the_llm_based_one(job: JointJob) -> None:
    report = run_job(replace(job, architecture="llm_based", num_llm_blocks=1))
    assert report["control_ms"] > 0
    saved = load_controller(job.output_dir / CHECKPOINT, SPACE, WEIGHTS)
    assert saved.kind == "llm_based"
    controller = saved.networks["controller"]
    assert isinstance(controller, LLMBasedController)
    assert controller.num_blocks == 1
    assert saved.metrics["control_ms"] == pytest.approx(report["control_ms"])
    assert "own time" in render(report)


def test_expected_accuracies_by_regression(job: JointJob) -> None:
    few = replace(job, architecture="accuracy", seeds=(0, 1), options=replace(job.options, warm_start=2))
    report = run_job(few)
    runs = report["seeds"]["runs"]
    assert [row["seed"] for row in runs] == [0, 1]
    for name in ("accuracy", "over_table"):
        assert report["seeds"][name]["mean"] == pytest.approx(np.mean([row[name] for row in runs]))
    assert "over the table" in render(report)
    saved = load_controller(few.output_dir / accuracy.CHECKPOINT, SPACE, WEIGHTS)
    assert saved.kind == "seen_value"
    assert saved.networks["accuracy"].sizes["hidden_dim"] == 2 * few.hidden_dim, "all seeds, side by side"
    again = run_job(replace(few, output_dir=few.output_dir / "alone", seeds=(0,)))
    assert again["seeds"]["runs"][0]["accuracy"] == pytest.approx(runs[0]["accuracy"]), (
        "a seed does not see the others"
    )


def test_the_guard_picks_by_what_the_picture_says_at_the_chosen_tier() -> None:
    space = SPACE.subset(
        {"tier": SPACE.tiers[:2], "top_k": SPACE.top_ks[:1], "num_blocks": SPACE.block_counts[:2]}
    )
    table = Table.of(space, np.array([[0.0, 1.0, 1.0, 0.0]]), np.array([[10.0, 20.0, 30.0, 40.0]]))
    rows, budget_ms = np.array([0, 0, 0]), np.array([25.0, 50.0, 1.0])
    first, seen = np.array([[0.1, 0.2, 0.9, 0.1]]), np.array([[0.9, 0.1, 0.2, 0.8]])
    served = served_accuracy(table, rows, budget_ms, first, seen)
    # 25 ms fit the first tier alone, of which the picture prefers the first setting; at 50 ms it is the second
    # tier's last one; where nothing fits, the cheapest runs.
    assert served.tolist() == pytest.approx([0.0, 0.0, 0.0])
    assert served_accuracy(table, rows, budget_ms, first, first).tolist() == pytest.approx([1.0, 1.0, 0.0])


@pytest.mark.parametrize(
    ("wrong", "flag"), [({"compare_with": Path("x.pt")}, "--compare_with"), ({"seeds": ()}, "--seeds")]
)
def test_flags_that_expected_accuracies_do_not_take(job: JointJob, wrong: dict[str, object], flag: str) -> None:
    with pytest.raises(UserError, match=flag):
        run_job(replace(job, architecture="accuracy", **wrong))  # type: ignore[arg-type]
    with pytest.raises(UserError, match="--warm_start"):
        run_job(replace(job, architecture="accuracy", options=replace(job.options, warm_start=0)))


def test_what_is_trained_on_is_what_a_request_gives(engine: Engine, bed: Path) -> None:
    """The stored reading of a question leads to the choice that a single pass over the request makes."""
    samples = load_samples(grpo_results.DATASET, "train", data_dir=bed)[:3]
    torch.manual_seed(0)
    controller = LLMBasedController(engine.runner.model.config.width, 16)
    reading = read_glances(engine, samples, 2)
    budgets = torch.tensor([30.0, 50.0, 90.0], dtype=torch.float64)
    batch = Batch(torch.arange(3), budgets, torch.zeros(3, 3))
    actor = LlmActor(controller, SharedReading(engine.runner.model, reading))
    with torch.no_grad():
        found = actor(batch)
    run, model = engine.runner, engine.runner.model
    for i, sample in enumerate(samples):
        request = Job(sample, 1).request
        ready = run.prepare(run.open(request), "low", request)
        vision = run.project(run.encode(ready.crops), ready.crops)
        assert vision is not None
        torch.testing.assert_close(glances(engine, [sample])[0], vision[0].clone(), atol=1e-5, rtol=1e-4)
        tokens = model.glance_tokens(sample.question, sample.style, run.tokenizer).unsqueeze(0)
        with torch.no_grad():
            budget = budgets[i : i + 1].float()
            tier, top_k, blocks = controller(
                model, vision[:1].clone(), tokens, torch.tensor([tokens.shape[1]]), budget
            )
        joint_logits = tier[0, :, None, None] + top_k[0, None, :, None] + blocks[0, None, None, :]
        expected = joint_logits.flatten().log_softmax(dim=0)
        torch.testing.assert_close(found[i], expected, atol=1e-4, rtol=1e-3)


def test_each_action_changes_the_plan_that_runs(engine: Engine) -> None:
    """Every head moves its own knob of the setting, and with it the steps or the crops."""
    seen = set()
    for index in range(len(SPACE)):
        logs = torch.full((1, len(SPACE)), -9.0)
        logs[0, index] = 0.0
        knobs = SPACE.settings[int(best_settings(logs, len(SPACE.tiers)))]
        assert knobs == SPACE.settings[index]
        seen.add((knobs.tier, engine.plan(knobs).steps))
    assert len(seen) == len(SPACE)


def test_masks_hold_for_the_llm_based_policy(engine: Engine) -> None:
    torch.manual_seed(0)
    model = engine.runner.model
    controller = LLMBasedController(
        model.config.width, 8, num_top_ks=len(SPACE.top_ks), num_block_counts=len(SPACE.block_counts)
    )
    tokens = torch.zeros(1, 60, dtype=torch.int64)
    reading = controller.read(model, None, tokens, torch.tensor([60]))
    actor = LlmActor(controller, SharedReading(model, reading))
    allowed = torch.zeros(1, len(SPACE), dtype=torch.bool)
    allowed[0, [3, 17]] = True
    with torch.no_grad():
        found = actor(Batch(torch.tensor([0]), torch.tensor([50.0]), torch.zeros(1, 3), allowed)).exp()
    assert found[0, [3, 17]].sum().item() == pytest.approx(1)
    assert found.sum().item() == pytest.approx(1)


def test_spread_by_hand() -> None:
    found = spread([1.0, 2.0, 3.0])
    assert (found["mean"], found["std"]) == pytest.approx((2.0, 1.0))
    assert found["interval"] == pytest.approx([2 - 4.302653 / 3**0.5, 2 + 4.302653 / 3**0.5])
    assert spread([1.0])["interval"] is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"architecture": "one_stage"}, "--architecture one_stage"),
        ({"num_llm_blocks": 7}, "--num_llm_blocks 7"),
        ({"seeds": (1, 1)}, "--seeds 1 1"),
        ({"train_split": 1.5}, "--train_split 1.5"),
        ({"latency_estimator_path": Path("none.pt")}, "none.pt: no such file"),
    ],
)
def test_wrong_flags_are_named(job: JointJob, change: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        run_job(replace(job, **change))  # type: ignore[arg-type]
