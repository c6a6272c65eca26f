"""Tiny trainings, stored epoch by epoch: another loss, draw or step shows as another number.

`PYTHONPATH=tests python tests/golden/test_training_stored.py` writes it anew, to be read before it is committed.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import stores

import grpo_toy
import stage1_toy
import stamps
import tiny_model
from tempovlm.lab import exp2_supervised as supervised
from tempovlm.lab.exp3_first_stage import train as two_stage
from tempovlm.lab.grpo.algorithm import train
from tempovlm.lab.log import LOG
from tempovlm.lab.options import FitOptions, GrpoOptions

STORE = Path(__file__).with_name("training.json")
FAST = FitOptions(num_epochs=3, batch_size=32, lr=3e-3, hidden_dim=16)
NEAR = GrpoOptions(num_generations=8, beta=0.05)
GRPO: dict[str, tuple[bool, GrpoOptions, dict[str, Any]]] = {
    "both stages": (True, NEAR, {}),
    "second stage": (False, NEAR, {"tier_exploration": 0.5, "grad_accum": 2}),
    "warm start": (True, NEAR, {"warm_start": 2}),
    "price of time": (True, replace(NEAR, time_price=0.3), {}),
    "no mask": (True, replace(NEAR, mask_infeasible=False, penalty=3.0, num_iterations=4), {}),
    "dr_grpo": (True, replace(NEAR, loss_type="dr_grpo", scale_rewards="none", num_iterations=4), {}),
}
STAGE1: dict[str, dict[str, Any]] = {
    "label by language": {"knob1_label": "literal"},
    "label by budget": {"knob1_label": "literal", "knob1_variant": "budget"},
    "label by glance": {"knob1_label": "literal", "knob1_variant": "glance"},
    "smoothed label": {},
    "value": {"knob1_loss": "value"},
    "value at a price": {"knob1_loss": "value", "time_price": 0.3},
}


def grpo(folder: Path, name: str) -> dict[str, Any]:
    learn_tier, options, loop = GRPO[name]
    trained = train(grpo_toy.actor(learn_tier=learn_tier), grpo_toy.task(options, **loop), folder, "toy")
    rewards = {"start": trained.start_reward, "untrained": trained.untrained_reward, "best": trained.best_score}
    return {"rewards": rewards, "best_epoch": trained.best_epoch, "epochs": epochs(folder)}


def stage1(folder: Path, name: str) -> dict[str, Any]:
    job = replace(stage1_toy.job(folder, options=replace(stage1_toy.FAST, num_epochs=3)), **STAGE1[name])
    report = two_stage.train_stage1(job, *stage1_toy.world())
    kept = ("accuracy", "lost_points", "best_epoch", "best_validation_score", "worth", "gain", "by_dataset")
    return {"report": {one: report[one] for one in kept if one in report}, "epochs": epochs(job.folder)}


def supervised_only(folder: Path, name: str) -> dict[str, Any]:
    options = replace(FAST, lr_schedule=name)
    path = folder / "profiling_results.json"
    path.write_text(json.dumps(settings()))
    job = supervised.SupervisedJob(
        profiling_results=[path], output_dir=folder / "out", options=options, num_budgets=400
    )
    report = supervised.run_job(job)
    return {
        **{one: report[one] for one in ("best_epoch", "validation", "by_budget")},
        "epochs": epochs(job.output_dir),
    }


def settings() -> list[dict[str, Any]]:
    """Every setting; the dearer it is, the better, but for a plateau of the first tier."""
    stamp = replace(stamps.STAMP, knob_space=tiny_model.SPACE.fingerprint).to_json()
    rows = []
    for i, knobs in enumerate(tiny_model.SPACE):
        total_ms = tiny_model.nominal_ms(tiny_model.SPACE, i)
        values = {"tier": knobs.tier, "top_k": knobs.top_k, "num_blocks": knobs.num_blocks, "num_samples": 10}
        times = {"T_total": total_ms, "T_total_p95": 1.1 * total_ms}
        rows.append(
            {**values, **times, "accuracy": 0.3 if knobs.tier == "low" else 0.3 + 0.01 * i, "stamp": stamp}
        )
    return rows


def epochs(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / LOG).read_text().splitlines()]


TRAINERS = {
    **{f"GRPO, {name}": (grpo, name) for name in GRPO},
    **{f"stage 1, {name}": (stage1, name) for name in STAGE1},
    **{f"supervised, {name}": (supervised_only, name) for name in ("cosine", "constant")},
}


def trained(name: str, folder: Path) -> Mapping[str, Any]:
    trainer, variant = TRAINERS[name]
    return trainer(folder, variant)


@pytest.mark.parametrize("name", TRAINERS)
def test_training_is_the_stored_one(name: str, tmp_path: Path) -> None:
    found = list(stores.differences(trained(name, tmp_path), stores.read(STORE)[name], rel=1e-4, least=2e-6))
    assert not found, found[:10]


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as top:
        found = {}
        for number, one in enumerate(TRAINERS):
            (folder := Path(top, str(number))).mkdir()
            found[one] = trained(one, folder)
        stores.write(STORE, found)
