"""Exp 1 from result files to a checkpoint and its report: metrics, transfer, tables and figures."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from tempovlm.core.errors import UserError
from tempovlm.core.files import writing_to
from tempovlm.core.knobs import KnobSpace
from tempovlm.core.paths import write_whole
from tempovlm.core.shape import ModelShape
from tempovlm.lab.exp1_estimator.baselines import CHOICE_RULE, choose, fit_candidates
from tempovlm.lab.exp1_estimator.data import Rows, Split, rows_from_frame, split_rows, thin
from tempovlm.lab.exp1_estimator.plots import draw_report, draw_transfer
from tempovlm.lab.exp1_estimator.train import Candidate, error_metrics, stage_metrics
from tempovlm.lab.log import training_log
from tempovlm.lab.options import EstimatorFlags, EstimatorOptions
from tempovlm.latency.conformal import coverage, coverage_by_group
from tempovlm.latency.cores import LEVELS
from tempovlm.latency.estimator import Estimator
from tempovlm.latency.features import STAGES, CostTable
from tempovlm.latency.recalibration import choose_measurements, recalibrate
from tempovlm.model.config import MOLMOE_1B, PRESETS

CHECKPOINT = "best_latency_estimator.pt"
MOVED_CHECKPOINT = "recalibrated_latency_estimator.pt"
SCHEMA = "tempovlm.estimator_report/1"

COUNTS = (0, 5, 10, 25, 50)
"""Numbers of measurements on the other device."""

_MOVE_WITH = 25
_TRANSFER_SEEDS = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class Job(EstimatorFlags):
    """Inputs, options and output folder of Exp 1.

    Attributes:
        shape, transfer_shape: sizes of the models; None takes those that the results are stamped with.
    """

    options: EstimatorOptions
    shape: ModelShape | None = None
    transfer_shape: ModelShape | None = None


@dataclass(frozen=True, slots=True)
class Source:
    """Rows of one device, with the costs of their model and their stamp; empty for files without one."""

    rows: Rows
    table: CostTable
    stamp: Mapping[str, Any]


def read_source(dirs: Sequence[Path], datasets: Sequence[str], shape: ModelShape | None) -> Source:
    """Read results that must all be of one device and one model.

    Raises:
        UserError: they are missing, damaged, or of several devices or models.
    """
    from tempovlm.lab.core_exp.store import read_results

    frame = read_results(dirs, datasets)
    stamps = [stamp for stamp in frame.attrs["stamps"].values() if stamp is not None]
    for name in ("hardware", "device", "weights", "threads"):
        found = sorted({str(stamp[name]) for stamp in stamps})
        if len(found) > 1:
            raise UserError(
                f"--results_dir: field {name} of the stamps differs ({', '.join(found)}); train on one device and "
                "move the estimator with --transfer_results_dir"
            )
    stamp = stamps[0] if stamps else {}
    if shape is None:
        shape = _stamped_shape(stamp)
    space = KnobSpace.for_model(shape)
    frame = read_results(dirs, datasets, space)
    return Source(rows_from_frame(frame, space, shape), CostTable(space, shape), stamp)


def _stamped_shape(stamp: Mapping[str, Any]) -> ModelShape:
    """Return the shape of the model that a stamp names; files without a stamp are all of MolmoE-1B."""
    if not stamp:
        return MOLMOE_1B.shape
    name = str(stamp["model"])
    preset = next((PRESETS[known] for known in sorted(PRESETS) if name.lower().startswith(known)), None)
    if preset is None:
        raise UserError(f"--results_dir: measured with model {name}, whose sizes are not known: give --model_path")
    return preset.shape


def run_job(job: Job) -> dict[str, Any]:
    """Train, choose, test, move, and write every file; return the report.

    Raises:
        UserError: invalid input, or the folder cannot be written.
    """
    job.options.check()
    source = read_source(job.results_dirs, job.datasets, job.shape)
    other = _read_transfer(job)
    rows = thin(source.rows, job.max_samples, job.options.seed)
    split = split_rows(rows, source.table.space, train_split=job.train_split, seed=job.options.seed)
    with writing_to(job.output_dir):
        return _train(job, source, other, split, rows)


def _train(job: Job, source: Source, other: Source | None, split: Split, rows: Rows) -> dict[str, Any]:
    with training_log(job.output_dir) as log:
        candidates = fit_candidates(source.table, split, job.options, source.stamp, log)
    winner, judged = choose(candidates, split)
    estimators = {name: candidate.estimator for name, candidate in candidates.items()}
    tested = {
        name: {part: _metrics(estimator, rows) for part, rows in split.parts.items() if len(rows)}
        for name, estimator in estimators.items()
    }
    report: dict[str, Any] = {
        "schema": SCHEMA,
        "winner": winner,
        "choice_rule": CHOICE_RULE,
        "judged": judged,
        "candidates": tested,
        "coverage": {part: _coverage(estimators[winner], rows) for part, rows in split.parts.items() if len(rows)},
        "coverage_noise": _coverage_noise(candidates[winner], split),
        "error_by_setting": _by_setting(estimators[winner], rows.take(~np.isin(rows.images, split.train.images))),
        "split": {
            "by": "picture, and settings held out",
            "rows": {part: len(rows) for part, rows in split.parts.items()},
            "pictures": {part: len(np.unique(rows.images)) for part, rows in split.parts.items()},
            "choice_settings": [str(source.table.space.settings[i]) for i in split.choice_settings],
            "held_out_settings": [str(source.table.space.settings[i]) for i in split.held_out_settings],
        },
        "options": asdict(job.options),
        "knob_space": source.table.space.fingerprint,
        "stamp": dict(source.stamp),
    }
    best = replace(estimators[winner], notes={"judged": judged[winner], "metrics": tested[winner]})
    best.save(job.output_dir / CHECKPOINT)
    report["transfer"] = None if other is None else _transfer(job, best, other)
    write_whole(job.output_dir / "report.json", json.dumps(report, indent=1) + "\n")
    draw_report(job.output_dir, estimators, split, winner, source.stamp)
    return report


def _metrics(estimator: Estimator, rows: Rows) -> dict[str, Any]:
    """Compute the errors of the rows' medians: of each stage, and of totals as `total`."""
    times = estimator.predict(rows.workload)
    total = error_metrics(rows.total_ms, times.total_ms(rows.steps)) if len(rows) else {}
    return {**stage_metrics(rows.ms, times.ms[..., 0]), "total": total}


def _coverage(estimator: Estimator, rows: Rows) -> dict[str, dict[str, float | None]]:
    """Compute the share of single measurements at or below each predicted level, for stages and totals."""
    single = rows.single
    times = estimator.predict(single.workload)
    totals = np.stack([times.total_ms(single.steps, level) for level in LEVELS], axis=-1)[:, None]
    shares = (*coverage(single.ms, times.ms), *coverage(single.total_ms[:, None], totals))
    return {
        name: {str(level): _number(value) for level, value in zip(LEVELS, cells, strict=True)}
        for name, cells in zip((*STAGES, "total"), shares, strict=True)
    }


def _coverage_noise(candidate: Candidate, split: Split) -> dict[str, Any]:
    """Estimate the chance error of the test's coverage, and how many pictures would be enough.

    Errors of one picture hang together, so that its share of covered measurements is one draw. The spread of the
    shares is that of the training pictures, each predicted by a model that had not seen it; the margins are as
    noisy as the training pictures are few, the test as its own are.
    """
    rows, train, test = split.train, *(len(np.unique(part.images)) for part in (split.train, split.test))
    single, places = rows.single, rows.places
    times = candidate.estimator.times(candidate.left_out[places], single.workload)
    shares = coverage_by_group(single.ms, times.ms, rows.images[places])
    spread = np.nanstd(shares, axis=0, ddof=1)
    per_picture = 1 / train + 1 / test
    stages: dict[str, Any] = {}
    for i, stage in enumerate(STAGES):
        stages[stage] = {}
        for k, level in enumerate(LEVELS):
            sd = float(spread[i, k])
            stages[stage][str(level)] = {
                "sd_of_pictures": _number(sd),
                "standard_error": _number(sd * per_picture**0.5),
            }
    return {"pictures": {"train": train, "test": test}, "stages": stages}


def _number(value: float) -> float | None:
    return round(float(value), 5) if np.isfinite(value) else None


def _by_setting(estimator: Estimator, rows: Rows) -> dict[str, dict[str, float | None]]:
    """Compute the median relative error of each stage at each measured setting."""
    medians, setting = estimator.predict(rows.workload).ms[..., 0], rows.workload.setting
    result = {}
    for i in np.unique(setting):
        metrics = stage_metrics(rows.ms[setting == i], medians[setting == i])
        result[str(estimator.space.settings[i])] = {stage: metrics[stage]["median_ape"] for stage in STAGES}
    return result


def transfer_curve(
    estimator: Estimator,
    other: Source,
    counts: Sequence[int] = COUNTS,
    seeds: int = _TRANSFER_SEEDS,
    seed: int = 0,
) -> list[dict[str, Any]]:
    """Compute the error on another device by number of measurements: median, least and largest over seeds.

    The error is the median relative one. The measurements are as far apart in settings and pictures as the pool
    allows; the test is on other pictures.
    """
    names = np.unique(other.rows.images)
    result = []
    for count in counts:
        errors: dict[str, list[float]] = {name: [] for name in (*STAGES, "total")}
        for draw in range(seeds):
            order = np.random.default_rng([seed, draw]).permutation(len(names))
            of_pool = np.isin(other.rows.images, names[order[: max(1, len(names) // 2)]])
            pool, test = other.rows.take(of_pool), other.rows.take(~of_pool)
            chosen = choose_measurements(other.table, pool.workload, count, draw, pool.images)
            moved = recalibrate(estimator, pool.take(chosen), table=other.table, stamp=other.stamp)
            for name, metrics in _metrics(moved, test).items():
                if metrics.get("median_ape") is not None:
                    errors[name].append(metrics["median_ape"])
        stages = {
            name: {"median": float(np.median(v)), "least": min(v), "most": max(v)}
            for name, v in errors.items()
            if v
        }
        result.append({"measurements": count, "median_ape": stages})
    return result


def _read_transfer(job: Job) -> Source | None:
    """Read the other device's measurements, before the training, which takes long."""
    if not job.transfer_dirs:
        return None
    other = read_source(job.transfer_dirs, job.datasets, job.transfer_shape or job.shape)
    if len(np.unique(other.rows.images)) < 2:
        raise UserError("--transfer_results_dir: measured on one picture; two are needed, one to test on")
    return other


def _transfer(job: Job, best: Estimator, other: Source) -> dict[str, Any]:
    """Compute the curve, draw it, and save an estimator of the other device from 25 measurements."""
    curve = transfer_curve(best, other, seed=job.options.seed)
    chosen = choose_measurements(other.table, other.rows.workload, _MOVE_WITH, job.options.seed, other.rows.images)
    measured = other.rows.take(chosen)
    recalibrate(best, measured, table=other.table, stamp=other.stamp).save(job.output_dir / MOVED_CHECKPOINT)
    draw_transfer(job.output_dir / "transfer.png", curve, best.stamp, other.stamp)
    return {"curve": curve, "stamp": dict(other.stamp), "checkpoint": MOVED_CHECKPOINT, "seeds": _TRANSFER_SEEDS}


def render(report: Mapping[str, Any]) -> str:
    """Return the candidates' table and the errors of the one that is shipped, as text."""
    lines = ["model        left-out error  all settings ms   test prefill / decode   held-out prefill / decode"]
    for name, judged in report["judged"].items():
        cells = []
        for part in ("test", "held_out"):
            stages = report["candidates"][name].get(part)
            values = [stages[s]["median_ape"] for s in ("prefill", "decode_per_token")] if stages else [None, None]
            cells.append(" / ".join("-" if v is None else f"{v:.2%}" for v in values))
        mark = "*" if name == report["winner"] else " "
        lines.append(
            f"{mark} {name:<10} {judged['error']:>14.2%} {judged['predict_ms']:>16.3f}   {cells[0]:<22} {cells[1]}"
        )
    lines += [
        "",
        f"* shipped: {report['choice_rule']}",
        "",
        f"{'stage':<18} {'test MAE, R²':>20} {'held-out':>20}",
    ]
    best = report["candidates"][report["winner"]]
    for stage in STAGES:
        cells = []
        for part in ("test", "held_out"):
            found = best.get(part, {}).get(stage, {})
            mae_ms, r2 = found.get("mae_ms"), found.get("r2")
            cells.append(("-" if mae_ms is None else f"{mae_ms:.4f} ms") + ("" if r2 is None else f", {r2:.4f}"))
        lines.append(f"{stage:<18} {cells[0]:>20} {cells[1]:>20}")
    return "\n".join(lines) + "\n"
