"""Exp 4: top-k and depth by GRPO, for the tier that a first stage, trained before, chooses.

Writes `{output_dir}/stage2/best_stage2_checkpoint.pt`, which holds both stages, a report and a log. Shapes: `N`
questions, `T` tiers, `V` and `L` widths of features.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

from tempovlm.control.checkpoint import load_controller, save_controller
from tempovlm.control.learned.networks import Knob1Predictor, TwoStageController
from tempovlm.core.errors import UserError
from tempovlm.core.files import writing_to
from tempovlm.core.paths import write_whole
from tempovlm.lab.grpo.actors import Shared, TwoStageActor, new_second_stage
from tempovlm.lab.grpo.algorithm import train
from tempovlm.lab.grpo.environment import Environment, GrpoJob, gather, new_task
from tempovlm.lab.grpo.report import draw, finish, judge, render
from tempovlm.lab.options import SecondStageFlags

__all__ = ["CHECKPOINT", "STAGE1", "Stage2Job", "render", "run_job"]

STAGE1 = "stage1/best_stage1_checkpoint.pt"
CHECKPOINT = "stage2/best_stage2_checkpoint.pt"
"""Within the output directory, as the seed document has them."""

SCHEMA = "tempovlm.stage2_report/1"


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage2Job(SecondStageFlags, GrpoJob):
    """Exp 4.

    Attributes:
        tier_exploration: share of the training draws whose tier is drawn evenly, since the guard may lower a tier
            when serving and the second stage must be good there too.
    """

    tier_exploration: float = 0.1

    @property
    def stage1_path(self) -> Path:
        """Path of the first stage."""
        return self.stage1_checkpoint or self.output_dir / STAGE1


def run_job(job: Stage2Job) -> dict[str, Any]:
    """Train, judge and write everything; returns the report.

    Raises:
        UserError: wrong input, no first stage, or the folder cannot be written or another process trains in it.
    """
    job.check()
    knob1 = read_stage1(job)
    env, samples = gather(job)
    with writing_to((job.output_dir / CHECKPOINT).parent) as folder:
        return _train(job, knob1, env, Shared.of(job, samples), folder)


def _train(
    job: Stage2Job, knob1: Knob1Predictor, env: Environment, shared: Shared, folder: Path
) -> dict[str, Any]:
    second = new_second_stage(env, shared, job.hidden_dim, job.options.seed)
    controller = TwoStageController(knob1, second).to(job.options.device)
    actor = TwoStageActor(controller, shared, learn_tier=False)
    options = replace(job.options, tier_exploration=job.tier_exploration)
    trained = train(actor, new_task(env, options), folder, "stage 2")
    judged = judge(actor, new_task(env, options, "test"), trained)
    report = finish(job, env, judged, SCHEMA)
    save_controller(
        job.output_dir / CHECKPOINT,
        kind="two_stage",
        networks={"knob1": controller.knob1, "knob2knob3": controller.knob2knob3},
        space=env.space,
        weights_hash=job.weights_hash,
        stamp=env.table.stamp,
        options={"policy": "two_stage", **report["options"]},
        metrics=judged["policies"]["policy"],
    )
    write_whole(folder / "report.json", json.dumps(report, indent=1) + "\n")
    draw(folder, trained.history, report)
    return report


def read_stage1(job: Stage2Job) -> Knob1Predictor:
    """The first stage of a checkpoint of Exp 3, or of another second stage.

    Raises:
        UserError: there is none, or it is of another model or knob space.
    """
    path = job.stage1_path
    if not path.is_file():
        raise UserError(f"{path}: no first stage; run with --stage stage1 first, or give --stage1_checkpoint")
    saved = load_controller(path, job.engine.space, job.weights_hash)
    if "knob1" not in saved.networks:
        raise UserError(
            f"{path}: field kind is {saved.kind}, which has no first stage; give one of --stage stage1"
        )
    return cast(Knob1Predictor, saved.networks["knob1"])
