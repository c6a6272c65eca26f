"""Exp 5: all three knobs by GRPO, end to end, with the two-stage or the LLM-based architecture, over seeds.

The third architecture, expected accuracies, learns by regression alone (`accuracy.py`). By GRPO every seed
trains on the same split and is judged on the same test questions under the same budgets; the checkpoint is that of
the seed whose validation reward is highest.

Shapes: `n` questions, `G` tokens of a glance, `D` decoder width.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tempovlm.control.checkpoint import load_controller, save_controller
from tempovlm.control.learned.llm_based import FirstBlocks, LLMBasedController, Reading, pad_tokens
from tempovlm.control.learned.networks import Knob1PredictorBudgetLanguage, TwoStageController
from tempovlm.core.errors import UserError
from tempovlm.core.files import writing_to
from tempovlm.core.paths import write_whole
from tempovlm.core.progress import progress_bar
from tempovlm.core.units import now_ms
from tempovlm.data.sample import Sample
from tempovlm.engine.batching import encode_all
from tempovlm.engine.engine import Engine
from tempovlm.lab.core_exp.batched import SAMPLE_ERRORS
from tempovlm.lab.core_exp.plan import Job
from tempovlm.lab.exp5 import accuracy
from tempovlm.lab.fit import seeded
from tempovlm.lab.grpo.actors import LlmActor, Shared, SharedReading, TwoStageActor, new_second_stage, soften
from tempovlm.lab.grpo.algorithm import GrpoTraining, Rollout, evaluate, train
from tempovlm.lab.grpo.environment import Environment, GrpoJob, Task, gather, limits_ms, new_task
from tempovlm.lab.grpo.report import draw, finish, gain, judge
from tempovlm.lab.grpo.report import render as render_report
from tempovlm.lab.options import GrpoOptions, JointFlags
from tempovlm.lab.statistics import spread

ARCHITECTURES = ("two_stage", "llm_based", "accuracy")
CHECKPOINT = "best_controller.pt"
SCHEMA = "tempovlm.joint_report/1"

_PICTURES_AT_ONCE = 16
_TIMED = 20


@dataclass(frozen=True, slots=True, kw_only=True)
class JointJob(JointFlags, GrpoJob):
    """Exp 5.

    Attributes:
        seeds: of the trainings; the split is always that of the options' seed.
    """

    seeds: Sequence[int] = (GrpoOptions.seed,)

    def check(self) -> None:
        """Raise a `UserError` that names the first flag whose value makes no sense."""
        GrpoJob.check(self)
        if self.architecture not in ARCHITECTURES:
            raise UserError(f"--architecture {self.architecture}: choose from {', '.join(ARCHITECTURES)}")
        if self.architecture == "accuracy":
            self._check_regression()
        most = self.engine.runner.model.config.num_blocks
        if not 1 <= self.num_llm_blocks <= most:
            raise UserError(f"--num_llm_blocks {self.num_llm_blocks}: must be from 1 to {most}")
        if not self.seeds or len(set(self.seeds)) != len(self.seeds):
            raise UserError(f"--seeds {' '.join(map(str, self.seeds))}: give each seed once, and at least one")

    def _check_regression(self) -> None:
        if not self.options.regression_epochs:
            raise UserError("--warm_start: all that --architecture accuracy learns by; give some 30 epochs")
        if self.compare_with is not None:
            raise UserError("--compare_with: of policies of GRPO; leave it out with --architecture accuracy")

    @property
    def checkpoint(self) -> Path:
        """The file of the controller."""
        return self.output_dir / (accuracy.CHECKPOINT if self.architecture == "accuracy" else CHECKPOINT)


@dataclass(frozen=True, eq=False, slots=True)
class _Run:
    """A seed's training."""

    seed: int
    actor: TwoStageActor | LlmActor
    trained: GrpoTraining


def run_job(job: JointJob) -> dict[str, Any]:
    """Train every seed, judge, and write everything; returns the report.

    Raises:
        UserError: wrong input, or the folder cannot be written or another process trains in it.
    """
    if job.architecture == "accuracy":
        return accuracy.run_job(job)
    env, samples = gather(job)
    with writing_to(job.output_dir) as folder:
        return _train(job, env, samples, folder)


def _train(job: JointJob, env: Environment, samples: Sequence[Sample], folder: Path) -> dict[str, Any]:
    shared = Shared.of(job, samples) if job.architecture == "two_stage" or job.compare_with else None
    reading = None
    if job.architecture == "llm_based":
        reading = read_glances(job.engine, samples, job.num_llm_blocks)
    runs = []
    for seed in job.seeds:
        actor = _new_actor(job, env, shared, reading, seed)
        task = new_task(env, replace(job.options, seed=seed))
        title = f"{job.architecture}, seed {seed}"
        runs.append(_Run(seed, actor, train(actor, task, folder / f"seed_{seed}", title)))
    best = max(runs, key=lambda run: run.trained.best_score)
    test = new_task(env, job.options, "test")
    found = [evaluate(run.actor, env, test.validation, job.options) for run in runs]
    judged = judge(best.actor, test, best.trained)
    report = finish(job, env, judged, SCHEMA) | {
        "architecture": job.architecture,
        "best_seed": best.seed,
        "seeds": _over_seeds(runs, found),
        "compared": _compared(job, shared, found, test),
        "control_ms": control_ms(job, reading, best.actor),
    }
    _save(job, env, best, report)
    write_whole(folder / "report.json", json.dumps(report, indent=1) + "\n")
    draw(folder, best.trained.history, report)
    return report


def _new_actor(
    job: JointJob, env: Environment, shared: Shared | None, reading: Reading | None, seed: int
) -> TwoStageActor | LlmActor:
    """An untrained policy."""
    space, model = env.space, job.engine.runner.model
    if reading is not None:
        sizes = {"num_blocks": job.num_llm_blocks, **space.counts}
        controller = seeded(seed, lambda: LLMBasedController(model.config.width, job.hidden_dim, **sizes))
        controller.budget.fit(limits_ms(env))
        return LlmActor(controller.to(job.options.device), SharedReading(_first_blocks(job.engine), reading))
    assert shared is not None
    second = new_second_stage(env, shared, job.hidden_dim, seed)
    widths = (shared.language.shape[-1], job.hidden_dim, len(space.tiers))
    first = seeded(seed + 1, lambda: Knob1PredictorBudgetLanguage(*widths))
    soften(first.trunk)
    first.fit_inputs(shared.language[torch.as_tensor(env.table.rows("train"), device=shared.language.device)])
    first.budget.fit(limits_ms(env))
    return TwoStageActor(TwoStageController(first, second).to(job.options.device), shared, learn_tier=True)


def _first_blocks(engine: Engine) -> FirstBlocks:
    """The model as a reader.

    Raises:
        UserError: its family has no blocks that read for a controller.
    """
    model = engine.runner.model
    if not isinstance(model, FirstBlocks):
        raise UserError(f"--architecture llm_based: the model {engine.name} cannot read for it; use two_stage")
    return model


@torch.no_grad()
def read_glances(engine: Engine, samples: Sequence[Sample], num_blocks: int) -> Reading:
    """Run the model's first blocks over every question's glance and words; once, for all budgets.

    A picture that cannot be read leaves the places of its glance without features.
    """
    run, model = engine.runner, _first_blocks(engine)
    reader = LLMBasedController(model.config.width, 1, num_blocks=num_blocks)
    streams = [model.glance_tokens(s.question, s.style, run.tokenizer) for s in samples]
    tokens, lengths = (one.to(engine.device) for one in pad_tokens(streams))
    parts = []
    with progress_bar("reading the questions") as advance:
        for start in range(0, len(samples), _PICTURES_AT_ONCE):
            rows = slice(start, start + _PICTURES_AT_ONCE)
            advance(start, len(samples))
            parts.append(reader.read(model, glances(engine, samples[rows]), tokens[rows], lengths[rows]))
    keys, values = (torch.cat([getattr(part, name) for part in parts], dim=1) for name in ("keys", "values"))
    return Reading(keys, values, lengths)


def glances(engine: Engine, samples: Sequence[Sample]) -> Tensor:
    """(n, G, D) the pictures' global crops as projected at the lowest tier; zeros for an unreadable picture."""
    run, tier = engine.runner, engine.space.tiers[0]
    side = run.model.config.vision.pooled
    found = torch.zeros(len(samples), side * side, run.model.config.width, device=run.device, dtype=run.dtype)
    for i, sample in enumerate(samples):
        request = Job(sample, 1).request
        try:
            crops = run.prepare(run.open(request), tier, request).crops
        except (*SAMPLE_ERRORS, UserError):
            continue
        tokens = run.project(encode_all(run, [crops])[0], crops)
        if tokens is not None:
            found[i] = tokens[0]
    return found


def _over_seeds(runs: Sequence[_Run], found: Sequence[Rollout]) -> dict[str, Any]:
    """Every seed's test results, and their mean, spread and interval."""
    rows = [
        {
            "seed": run.seed,
            "best_epoch": run.trained.best_epoch,
            "accuracy": float(one.accuracy.mean()),
            "reward": float(one.rewards.mean()),
            "latency_ms": float(one.latency_ms.mean()),
            "adherence": float(one.in_time.double().mean()),
        }
        for run, one in zip(runs, found, strict=True)
    ]
    names = ("accuracy", "reward", "latency_ms", "adherence")
    return {"runs": rows, **{name: spread([row[name] for row in rows]) for name in names}}


def _compared(job: JointJob, shared: Shared | None, found: Sequence[Rollout], test: Task) -> dict[str, Any] | None:
    """Every seed's gain over a checkpoint of Exp 4, question by question, and the gains' mean over seeds."""
    if job.compare_with is None or shared is None:
        return None
    saved = load_controller(job.compare_with, test.env.space, job.weights_hash)
    if saved.kind != "two_stage":
        raise UserError(f"{job.compare_with}: field kind is {saved.kind}; give a checkpoint of --stage stage2")
    networks: Mapping[str, Any] = saved.networks
    pair = TwoStageController(networks["knob1"], networks["knob2knob3"]).to(job.options.device)
    other = evaluate(TwoStageActor(pair, shared, learn_tier=False), test.env, test.validation, test.options)
    images = test.env.table.image_id[test.validation.rows.numpy()].tolist()
    gains = [gain(one, other, images) for one in found]
    return {
        "with": str(job.compare_with.name),
        "accuracy": float(other.accuracy.mean()),
        "reward": float(other.rewards.mean()),
        "gains": gains,
        "over_seeds": {name: spread([one[name]["mean"] for one in gains]) for name in ("accuracy", "reward")},
    }


@torch.inference_mode()
def control_ms(job: JointJob, reading: Reading | None, actor: nn.Module) -> float | None:
    """Median time of the LLM-based controller for one request, blocks and heads; None for the other one.

    The vision encoder's time for the glance is not in it, since the answer uses its output.
    """
    if reading is None or not isinstance(actor, LlmActor):
        return None
    model, config = actor.shared.model, job.engine.runner.model.config
    tokens = torch.zeros(1, int(reading.lengths.max()), dtype=torch.int64, device=job.engine.device)
    glance = torch.zeros(1, config.vision.pooled**2, config.width, device=job.engine.device)
    lengths, budget_ms = (
        torch.tensor([tokens.shape[1]], device=tokens.device),
        torch.tensor([100.0]).to(tokens.device),
    )
    times_ms = []
    for _ in range(_TIMED):
        start_ms = now_ms()
        actor.controller(model, glance, tokens, lengths, budget_ms).tier.argmax().item()
        times_ms.append(now_ms() - start_ms)
    return float(np.median(times_ms[_TIMED // 4 :]))


def _save(job: JointJob, env: Environment, best: _Run, report: Mapping[str, Any]) -> None:
    controller = best.actor.controller
    networks: dict[str, nn.Module] = {"controller": controller}
    if isinstance(controller, TwoStageController):
        networks = {"knob1": controller.knob1, "knob2knob3": controller.knob2knob3}
    save_controller(
        job.output_dir / CHECKPOINT,
        kind=job.architecture,
        networks=networks,
        space=env.space,
        weights_hash=job.weights_hash,
        stamp=env.table.stamp,
        options={"policy": "grpo" if job.architecture == "two_stage" else "llm_based", **report["options"]},
        metrics={**report["policies"]["policy"], "control_ms": report["control_ms"]},
    )


def render(report: Mapping[str, Any]) -> str:
    """The tables of the report as text."""
    if report["architecture"] == "accuracy":
        return accuracy.render(report)
    lines = [f"{'seed':<8} {'best epoch':>10} {'reward':>8} {'accuracy':>9} {'latency ms':>11} {'in time':>8}"]
    for row in report["seeds"]["runs"]:
        mark = "*" if row["seed"] == report["best_seed"] else " "
        lines.append(
            f"{mark} {row['seed']:<6} {row['best_epoch']:>10} {row['reward']:>8.4f} {row['accuracy']:>9.4f} "
            f"{row['latency_ms']:>11.2f} {row['adherence']:>8.1%}"
        )
    for name in ("accuracy", "reward"):
        lines.append(f"{name} over seeds: {_range(report['seeds'][name])}")
    if report["compared"] is not None:
        lines.append(f"accuracy less that of Exp 4: {_range(report['compared']['over_seeds']['accuracy'])}")
    if report["control_ms"] is not None:
        lines.append(f"the controller's own time: {report['control_ms']:.2f} ms a request")
    return "\n".join(lines) + "\n\n" + render_report(report)


def _range(found: Mapping[str, Any]) -> str:
    if found["interval"] is None:
        return f"{found['mean']:.4f} (one seed)"
    low, high = found["interval"]
    return f"{found['mean']:.4f} [{low:.4f}, {high:.4f}], standard deviation {found['std']:.4f}"
