"""Rows of the core experiment, Exp 1 (latency estimator), Exp 6 (importance) and Exp 7 (profiling)."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from tempovlm.data.registry import GENERATED
from tempovlm.evaluation.targets.base import (
    NO_SEED,
    REPORTED,
    AbsentError,
    Bound,
    Content,
    Measure,
    Reading,
    Source,
    Target,
    extreme,
    field,
    look_up,
    number,
    value_at,
)
from tempovlm.evaluation.targets.devices import GPUS, HARDWARE, PLACE

CORE, EXP1, EXP6, EXP7 = "Core experiment", "Exp 1", "Exp 6", "Exp 7"

_NAMES = " ".join(GENERATED)
STAGES = ("vision_encoder", "projector", "prefill", "decode_per_token")
_PARTS = {"images": "test", "settings": "held_out"}
_MEASUREMENTS = 25


def _sweep(name: str, model: str, device: str | None, more: str, *, is_accuracy: bool = False) -> Source:
    """Results of the core experiment: a folder of Parquet files."""
    folder = model if model == "pocket" else f"{model}-random"
    where = "" if device is None else f"--device {'cpu' if device == 'cpu' else 'cuda'} "
    command = (
        f"python experiments/core_exp/run_core_experiment.py --model_path {folder} --dataset_names {_NAMES} "
        f"--output_dir results/{name} {where}{more}"
    )
    return Source(
        path=f"results/{name}",
        command=command,
        model=model,
        hardware=None if device is None else HARDWARE[device],
        needs_shipped_weights=is_accuracy,
    )


_TIMED = "--latency_only --latency_samples 40 --repeats 5"
ACCURACY_VAL = _sweep("core_exp_pocket_val", "pocket", None, "--num_samples 300", is_accuracy=True)
ACCURACY_TRAIN = _sweep(
    "core_exp_pocket_train", "pocket", None, "--num_samples 600 --split train", is_accuracy=True
)
SWEEPS = {device: _sweep(f"core_exp_pocket_{device}", "pocket", device, _TIMED) for device in HARDWARE}
SWEEPS_FULL = {
    gpu: _sweep(f"core_exp_molmoe_{gpu}", "molmoe-1b", gpu, f"{_TIMED} --max_new_tokens 1 2 4 8 16 32")
    for gpu in GPUS
}


def estimator_command(folder: str, results: str, transfer: str | None = None) -> str:
    """Exp 1 on a sweep, moved to another one where one is named."""
    moved = "" if transfer is None else f" --transfer_results_dir results/{transfer}"
    return (
        f"python experiments/controller/train_latency_estimator.py --results_dir results/{results} "
        f"--dataset_names {_NAMES} --output_dir {folder}{moved}"
    )


def _estimator(folder: str, results: str, model: str, device: str, transfer: str) -> Source:
    command = estimator_command(f"checkpoints/{folder}", results, transfer)
    return Source(
        path=f"checkpoints/{folder}/report.json", command=command, model=model, hardware=HARDWARE[device]
    )


ESTIMATOR_CPU = _estimator("latency_estimator", "core_exp_pocket_cpu", "pocket", "cpu", "core_exp_pocket_h200")
ESTIMATORS_FULL = {
    gpu: _estimator(
        f"latency_estimator_molmoe_{gpu}",
        f"core_exp_molmoe_{gpu}",
        "molmoe-1b",
        gpu,
        f"core_exp_pocket_{gpu}",
    )
    for gpu in GPUS
}

_IMPORTANCE_COMMAND = (
    f"python experiments/controller/validate_importance_consistency.py --dataset_names {_NAMES} "
    "--model_path pocket --num_samples 5000 --output_dir results/importance_validation"
)
CORRELATION = Source(
    path="results/importance_validation/cross_dataset_correlation.json",
    command=_IMPORTANCE_COMMAND,
    model="pocket",
    needs_shipped_weights=True,
)
MERGED = replace(CORRELATION, path="results/importance/merged_scores.json")


PROFILES = "results/profiling/exp3_importance_comparison"


def _profile(dataset: str) -> Source:
    command = (
        "python experiments/controller/profiling_with_importance.py --model_path pocket --importance_scores_file "
        f"results/importance/merged_scores.json --datasets {_NAMES} --output_dir {PROFILES} --num_samples 500 "
        "--batch_size 1"
    )
    path = f"{PROFILES}/{dataset}/profiling_results.json"
    return Source(path=path, command=command, model="pocket", needs_shipped_weights=True)


@dataclass(frozen=True, slots=True)
class Device:
    """Where Exp 1 is judged, and by which bounds: relative errors in percent, times in milliseconds."""

    name: str
    about: str
    source: Source
    median: float
    p95: float
    decode_mae_ms: float
    r2: float
    sweeps: tuple[tuple[str, str, Source], ...]


def _on_gpu(gpu: str) -> Device:
    pocket, full = f"pocket, {PLACE[gpu]}", f"full size, {PLACE[gpu]}"
    sweeps = ((f"pocket_{gpu}", pocket, SWEEPS[gpu]), (f"molmoe_{gpu}", full, SWEEPS_FULL[gpu]))
    return Device(gpu, full, ESTIMATORS_FULL[gpu], 2, 6, 0.05, 0.99, sweeps)


DEVICES = (
    Device("cpu", "pocket, CPU", ESTIMATOR_CPU, 5, 15, 1.0, 0.9, (("pocket_cpu", "pocket, CPU", SWEEPS["cpu"]),)),
    *map(_on_gpu, GPUS),
)


def _winner(part: str, stage: str, metric: str, scale: float = 1.0) -> Measure:
    """A measure: a metric of the model that is shipped, on one of its tests."""
    return lambda c: Reading(value_at(c, "candidates", look_up(c, "winner"), part, stage, metric, scale=scale))


def _worst_of_tests(stage: str, metric: str) -> Measure:
    def measure(content: Content) -> Reading:
        winner = look_up(content, "candidates", look_up(content, "winner"))
        return Reading(max(value_at(winner, part, stage, metric) for part in _PARTS.values()))

    return measure


def _least_r2(stage: str) -> Measure:
    def measure(content: Content) -> Reading:
        winner = look_up(content, "candidates", look_up(content, "winner"))
        return Reading(min(value_at(winner, part, stage, "r2") for part in _PARTS.values()))

    return measure


def _coverage_gap(level: float) -> Measure:
    """How far the worst stage's coverage is off its level, in points."""

    def measure(content: Content) -> Reading:
        gaps = []
        for stage in STAGES:
            share = value_at(content, "coverage", "test", stage, str(level))
            gaps.append(number(abs(share - level), "coverage", 100))
        return Reading(max(gaps))

    return measure


def _transfer_error(content: Content) -> Reading:
    """Median error of the worst stage on the other device, from 25 measurements, in percent."""
    if look_up(content, "transfer") is None:
        raise AbsentError("field transfer is empty")
    for row in look_up(content, "transfer", "curve"):
        if row.get("measurements") == _MEASUREMENTS:
            stages = look_up(row, "median_ape")
            found = [value_at(stages, stage, "median", scale=100) for stage in STAGES if stage in stages]
            return Reading(extreme(max, found, "transfer.curve.median_ape"))
    raise AbsentError(f"there is no transfer from {_MEASUREMENTS} measurements")


def _prediction_cost(content: Content) -> Reading:
    return Reading(value_at(content, "judged", look_up(content, "winner"), "predict_ms"))


def _errors(device: Device) -> Iterable[Target]:
    def row(name: str, about: str, bound: Bound, unit: str, measure: Measure, seed: str = NO_SEED) -> Target:
        return Target(
            name=f"exp1_{name}_{device.name}",
            about=f"{about} ({device.about})",
            experiment=EXP1,
            bound=bound,
            unit=unit,
            source=device.source,
            measure=measure,
            seed=seed,
        )

    for stage, words, mae_ms, seed in (
        ("prefill", "prefill", 5.0, "MAE < 5 ms"),
        ("decode_per_token", "decode per token", device.decode_mae_ms, "MAE < 1 ms"),
    ):
        worst = _worst_of_tests(stage, "mae_ms")
        yield row(f"{stage}_mae", f"{words}: mean absolute error", Bound("<", mae_ms), "ms", worst, seed)
        for unseen, part in _PARTS.items():
            for metric, limit in (("median", device.median), ("p95", device.p95)):
                yield row(
                    f"{stage}_{metric}_{unseen}",
                    f"{words}: {metric} error on held-out {unseen}",
                    Bound("≤", limit),
                    "%",
                    _winner(part, stage, f"{metric}_ape", 100),
                    seed,
                )
    for stage in STAGES:
        bound = Bound("≥", device.r2) if device.r2 > 0.9 else Bound(">", device.r2)
        yield row(f"r2_{stage}", f"R² of {stage.replace('_', ' ')}", bound, "", _least_r2(stage), "> 0.9")
    for level, limit in ((0.5, 3), (0.9, 2), (0.99, 1)):
        yield row(
            f"coverage_p{level * 100:.0f}",
            f"coverage of P{level * 100:.0f}, worst stage: distance from {level * 100:.0f} %",
            Bound("≤", limit),
            "points",
            _coverage_gap(level),
        )
    yield row(
        "transfer",
        f"median error of the worst stage on another device, from {_MEASUREMENTS} measurements there",
        Bound("≤", 5),
        "%",
        _transfer_error,
    )


def _sums(device: Device) -> Iterable[Target]:
    for name, about, source in device.sweeps:
        for kind, words, bound, unit, measure in (
            ("stage_sum", "sum of stages against the total, largest difference", Bound("≤", 1), "%", "stage_gap"),
            (
                "zero_decodes",
                "rows of two or more tokens whose decode time is zero",
                Bound("≤", 0),
                "rows",
                "zero_decodes",
            ),
        ):
            yield Target(
                name=f"exp1_{kind}_{name}",
                about=f"{words} ({about})",
                experiment=EXP1,
                bound=bound,
                unit=unit,
                source=source,
                measure=field(measure, scale=100 if unit == "%" else 1),
            )


def _exp1() -> Iterable[Target]:
    for device in DEVICES:
        yield from _errors(device)
        yield from _sums(device)
    yield Target(
        name="exp1_prediction_cost",
        about="one prediction of all 75 settings, CPU",
        experiment=EXP1,
        bound=Bound("≤", 0.2),
        unit="ms",
        source=ESTIMATOR_CPU,
        measure=_prediction_cost,
    )


def _exp6() -> Iterable[Target]:
    def row(name: str, about: str, path: tuple[str, ...], bound: Bound = REPORTED, seed: str = NO_SEED) -> Target:
        return Target(
            name=f"exp6_{name}",
            about=about,
            experiment=EXP6,
            bound=bound,
            unit="",
            source=CORRELATION,
            measure=field(*path),
            seed=seed,
        )

    within, differ = "mean correlation between VQA data sets", "within VQA minus VQA with other tasks"
    summary, difference = ("summary", "within_vqa"), ("summary", "difference")
    yield row("vqa_correlation", within, (*summary, "estimate"), Bound(">", 0.9), "> 0.9")
    for end in ("low", "high"):
        yield row(f"vqa_correlation_{end}", f"{within}: {end} end of its interval", (*summary, end))
    yield row("task_difference", differ, (*difference, "estimate"), REPORTED, "evident")
    for end in ("low", "high"):
        yield row(f"task_difference_{end}", f"{differ}: {end} end of its interval", (*difference, end))
    yield row("ranking_agreement", "joint ranking against single removals", ("ranking_agreement", "single"))
    yield Target(
        name="exp6_joint_gain",
        about="accuracy of the joint ranking minus that of single removals, validation pictures, mean over depths",
        experiment=EXP6,
        bound=REPORTED,
        unit="points",
        source=MERGED,
        measure=_joint_gain,
    )


def _joint_gain(content: Content) -> Reading:
    means = []
    for name in ("joint", "single"):
        cells = look_up(content, "accuracy_by_depth", "val", name)
        found = [value_at(cells, depth, "accuracy", scale=100) for depth in cells]
        extreme(min, found, f"accuracy_by_depth.val.{name}")
        means.append(sum(found) / len(found))
    return Reading(number(means[0] - means[1], "accuracy_by_depth"))


def _least(name: str) -> Measure:
    return lambda content: Reading(extreme(min, [value_at(one, name) for one in content], name))


def _count(content: Content) -> Reading:
    return Reading(
        float(len({tuple(look_up(one, k) for k in ("tier", "top_k", "num_blocks")) for one in content}))
    )


def _core() -> Iterable[Target]:
    def row(name: str, about: str, bound: Bound, unit: str, source: Source, measure: str) -> Target:
        return Target(
            name=f"core_{name}",
            about=about,
            experiment=CORE,
            bound=bound,
            unit=unit,
            source=source,
            measure=field(measure, scale=100 if unit == "%" else 1),
        )

    for name, least, source in (("val", 300, ACCURACY_VAL), ("train", 600, ACCURACY_TRAIN)):
        about = f"{name} questions of each data set answered at all settings"
        yield row(f"questions_{name}", about, Bound("≥", least), "questions", source, "questions")
        yield row(f"settings_{name}", f"settings answered, {name}", Bound("≥", 75), "settings", source, "settings")
    for name, about, source in (sweep for device in DEVICES for sweep in device.sweeps):
        images = 60 if source in SWEEPS_FULL.values() else 40
        for kind, words, bound, unit in (
            ("timed_settings", "settings timed", Bound("≥", 75), "settings"),
            ("timed_images", "pictures timed", Bound("≥", images), "pictures"),
            ("repeats", "repeats of a timed answer, fewest", Bound("≥", 5), "repeats"),
        ):
            yield row(f"{kind}_{name}", f"{words} ({about})", bound, unit, source, kind)


def _exp7() -> Iterable[Target]:
    for dataset in GENERATED:
        for name, about, limit, unit, measure in (
            ("settings", "settings profiled", 75, "settings", _count),
            ("questions", "questions at each setting", 300, "questions", _least("num_samples")),
        ):
            yield Target(
                name=f"exp7_{name}_{dataset}",
                about=f"{about}, {dataset}",
                experiment=EXP7,
                bound=Bound("≥", limit),
                unit=unit,
                source=_profile(dataset),
                measure=measure,
            )


ROWS = (*_core(), *_exp6(), *_exp7(), *_exp1())
