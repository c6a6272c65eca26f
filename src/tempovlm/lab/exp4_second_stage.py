"""Exp 4: top-k and depth by GRPO, for the tier that a first stage, trained before, chooses.

Writes `{output_dir}/stage2/best_stage2_checkpoint.pt`, which holds both stages, a report and a log. Shapes: `N`
questions, `T` tiers, `V` and `L` widths of features.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from tempovlm.control.checkpoint import load_controller, save_controller
from tempovlm.control.networks import Knob1Predictor, Knob2Knob3Predictor, TwoStageController
from tempovlm.core.errors import UserError
from tempovlm.core.files import writing_to
from tempovlm.core.paths import write_whole
from tempovlm.lab.grpo.actors import Shared, TwoStageActor
from tempovlm.lab.grpo.algorithm import train
from tempovlm.lab.grpo.environment import LEAST_LEFT
from tempovlm.lab.grpo.inputs import GrpoJob, Material, gather, see
from tempovlm.lab.grpo.plots import draw
from tempovlm.lab.grpo.report import judge, render
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
        """Where the first stage is."""
        return self.stage1_checkpoint or self.output_dir / STAGE1


def run_job(job: Stage2Job) -> dict[str, Any]:
    """Train, judge and write everything; returns the report.

    Raises:
        UserError: wrong input, no first stage, or the folder cannot be written or another process trains in it.
    """
    job.check()
    knob1 = read_stage1(job)
    material = gather(job)
    with writing_to((job.output_dir / CHECKPOINT).parent) as folder:
        return _train(job, knob1, material, folder)


def _train(job: Stage2Job, knob1: Knob1Predictor, material: Material, folder: Path) -> dict[str, Any]:
    shared = see(job, material)
    second = new_second_stage(material, shared, job.hidden_dim, job.options.seed)
    controller = TwoStageController(knob1, second).to(job.options.device)
    actor = TwoStageActor(controller, shared, learn_tier=False)
    task = material.task(replace(job.options, tier_exploration=job.tier_exploration))
    trained = train(actor, task, folder, "stage 2")
    judged = judge(actor, replace(task, validation=material.test_batch(job.options.seed)), trained, material.table)
    report = finish(job, material, judged, SCHEMA)
    save_controller(
        job.output_dir / CHECKPOINT,
        kind="two_stage",
        networks={"knob1": controller.knob1, "knob2knob3": controller.knob2knob3},
        space=material.table.space,
        weights=job.weights,
        stamp=material.stamp,
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
    saved = load_controller(path, job.engine.space, job.weights)
    if "knob1" not in saved.networks:
        raise UserError(
            f"{path}: field kind is {saved.kind}, which has no first stage; give one of --stage stage1"
        )
    return cast(Knob1Predictor, saved.networks["knob1"])


def new_second_stage(material: Material, shared: Shared, hidden_dim: int, seed: int) -> Knob2Knob3Predictor:
    """Untrained, with inputs standardised by the training questions."""
    space, (least_ms, most_ms) = material.table.space, material.limits_ms
    rows = torch.as_tensor(material.split.train, device=shared.language.device)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = Knob2Knob3Predictor(
            shared.vision.shape[-1],
            shared.language.shape[-1],
            hidden_dim,
            num_top_ks=len(space.top_ks),
            num_block_counts=len(space.block_counts),
            num_tiers=len(space.tiers),
        )
        soften(net.trunk)
    net.fit_inputs(shared.vision[rows].flatten(0, 1), shared.language[rows])
    net.budget.fit((LEAST_LEFT * least_ms, most_ms))
    return net


def soften(trunk: nn.Sequential) -> None:
    """Begin with all settings equally likely: what is never drawn is never learned."""
    last = trunk[-1]
    assert isinstance(last, nn.Linear)
    with torch.no_grad():
        last.weight.mul_(0.1)
        last.bias.zero_()


def finish(job: GrpoJob, material: Material, judged: Mapping[str, Any], schema: str) -> dict[str, Any]:
    """The report: what was judged and what it was made with."""
    return {
        "schema": schema,
        **judged,
        "questions": {name: int(mask.sum()) for name, mask in material.split._asdict().items()},
        "budgets_ms": list(material.limits_ms),
        "latency": "estimator" if job.latency_estimator_path else "measured",
        "options": {**asdict(job.options), "train_split": job.train_split},
        "knob_space": material.table.space.fingerprint,
        "stamp": dict(material.stamp),
    }
