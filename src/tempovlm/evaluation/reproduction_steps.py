"""The steps of `tempovlm reproduce`: which scripts run, with which flags, and what they leave where.

The run's folder is laid out like the repository, so that every step finds what the steps before it left where the
experiment protocol says. Text only: it runs nothing, and knows no script beyond its flags.
"""

from __future__ import annotations

from pathlib import Path

from tempovlm.data.registry import GENERATED
from tempovlm.evaluation.reproduction import RATES_MS, SWEEPS, TAKE, Counts, Setup, Step
from tempovlm.evaluation.targets.chain import (
    END_TO_END_FILE,
    ESTIMATOR_FILE,
    GRPO_EPOCHS,
    GRPO_RECIPE,
    LABEL_EPOCHS,
    LABEL_STAGE,
    STAGE2_FILE,
    SUPERVISED_FILE,
    VALUE_STAGE_FILE,
    WARM_START,
    value_stage,
)
from tempovlm.evaluation.targets.devices import ANSWERED_MS, JUDGED_MS, time_price
from tempovlm.evaluation.targets.measuring import PROFILES

_REMOVED, _SEARCHED, _RANKED = 17, 84, 11
"""Plans of a question in Exp 6: whole and without each of 16 blocks, in the joint search, and by the rankings."""

_SETTINGS = 75


def steps(setup: Setup) -> tuple[Step, ...]:
    """The chain, in the experiment protocol's order: Exp 6, 7, 1, 2, 3, 4, 5, 8."""
    drawn = [_drawing(setup)] if setup.data_dir is None else []
    return (
        *drawn,
        _importance(setup),
        *_measuring(setup),
        *_first_trainings(setup),
        *_controllers(setup),
        *_judging(setup),
    )


def _drawing(setup: Setup) -> Step:
    c = setup.counts
    words = ("make", "--out", "data", "--num_train", c.train_pictures, "--num_val", c.val_pictures)
    return Step(
        name="data",
        title="test bed",
        counts=f"{c.train_pictures} training and {c.val_pictures} validation pictures each",
        command="data",
        words=_texts(*words),
        results=tuple(f"data/{name}" for name in GENERATED),
        about_ms=len(GENERATED) * (c.train_pictures + 2 * c.val_pictures) * RATES_MS["picture drawn"],
    )


def _importance(setup: Setup) -> Step:
    c = setup.counts
    return Step(
        name="exp6",
        title="Exp 6, importance of blocks",
        counts=f"{c.importance} training and validation questions each, {c.joint} in the joint search",
        command="experiments/controller/validate_importance_consistency.py",
        words=_texts(
            *_named(setup),
            *_common(setup),
            *("--num_samples", c.importance, "--num_joint_samples", c.joint, "--tier", "medium"),
            *("--output_dir", "results/importance_validation"),
        ),
        results=(
            "results/importance_validation/cross_dataset_correlation.json",
            "results/importance/merged_scores.json",
        ),
        about_ms=len(GENERATED)
        * (2 * c.importance * (_REMOVED + _RANKED) + c.joint * _SEARCHED)
        * RATES_MS["plan of a question"],
    )


def _measuring(setup: Setup) -> list[Step]:
    """Accuracies and times of all settings, and Exp 7, which sums them up."""
    c, place = setup.counts, setup.place
    timing = Step(
        name="core_times",
        title="core experiment, times",
        counts=f"{c.timed} questions each, {c.repeats} answers at every setting",
        command="experiments/core_exp/run_core_experiment.py",
        words=_texts(
            *_named(setup),
            *_common(setup),
            *("--output_dir", f"results/core_exp_pocket_{place}", "--latency_only", "--warmup", 0),
            *("--num_samples", 4 * c.timed, "--latency_samples", c.timed, "--repeats", c.repeats),
        ),
        results=_parquet(f"core_exp_pocket_{place}"),
        about_ms=len(GENERATED) * c.timed * c.repeats * _SETTINGS * RATES_MS["timed answer"],
    )
    profiling = Step(
        name="exp7",
        title="Exp 7, accuracy and time of every setting",
        counts=f"{c.val} questions each, of which {c.timed} timed",
        command="experiments/controller/profiling_with_importance.py",
        words=_texts(
            *("--model_path", setup.model, "--datasets", *GENERATED, "--output_dir", PROFILES),
            *("--results_dir", f"results/{SWEEPS['val']}", f"results/core_exp_pocket_{place}"),
        ),
        results=tuple(f"{PROFILES}/{name}/profiling_results.json" for name in GENERATED),
        about_ms=15_000,
    )
    return [*(_answering(setup, part) for part in SWEEPS), timing, profiling]


def _answering(setup: Setup, part: str) -> Step:
    """Accuracies of a split or of the twins: taken from the repository, or measured."""
    c, folder = setup.counts, SWEEPS[part]
    count, split = (c.train if part == "train" else c.val), ("train" if part == "train" else "val")
    name, kind = f"core_{part}", {"train": "training", "val": "validation", "twin": "twin"}[part]
    counts = f"{count} {kind} questions each at every setting"
    if setup.has_shipped:
        return Step(
            name=name,
            title="core experiment, answers that are shipped",
            counts=f"at most {counts}",
            command=TAKE,
            words=(folder, split, str(count)),
            results=_parquet(folder),
            about_ms=len(GENERATED) * count * RATES_MS["question read"],
        )
    more = ("--twins",) if part == "twin" else ()
    return Step(
        name=name,
        title="core experiment, answers",
        counts=counts,
        command="experiments/core_exp/run_core_experiment.py",
        words=_texts(
            *_named(setup),
            *("--output_dir", f"results/{folder}", "--num_samples", count, "--split", split, *more),
            *_common(setup),
        ),
        results=_parquet(folder),
        about_ms=len(GENERATED) * count * RATES_MS["question at all settings"],
    )


def _first_trainings(setup: Setup) -> list[Step]:
    """Exp 1 and 2, which run no model."""
    c, sweep, device = setup.counts, f"results/core_exp_pocket_{setup.place}", ("--device", setup.device)
    estimator = Step(
        name="exp1",
        title="Exp 1, latency estimator",
        counts=f"{c.timed} questions each at every setting",
        command="experiments/controller/train_latency_estimator.py",
        words=_texts(
            *("--results_dir", sweep, "--dataset_names", *GENERATED, "--model_path", setup.model),
            *("--output_dir", "checkpoints/latency_estimator", *device, *_epochs(c, "--num_epochs")),
        ),
        results=(ESTIMATOR_FILE, "checkpoints/latency_estimator/report.json"),
        about_ms=2 * RATES_MS["boosting"],
    )
    supervised = Step(
        name="exp2",
        title="Exp 2, supervised controller",
        counts=f"{c.budgets} budgets",
        command="experiments/controller/train_supervised_controller.py",
        words=_texts(
            *("--profiling_results", f"{PROFILES}/{GENERATED[0]}/profiling_results.json"),
            *("--output_dir", "checkpoints/controller/supervised", "--num_budgets", c.budgets),
            *(*device, *_epochs(c, "--num_epochs")),
        ),
        results=(SUPERVISED_FILE, "checkpoints/controller/supervised/report.json"),
        about_ms=50 * RATES_MS["epoch"],
    )
    return [estimator, supervised]


def _controllers(setup: Setup) -> list[Step]:
    """Exp 3, 4 and 5."""
    c, sweep = setup.counts, f"results/core_exp_pocket_{setup.place}"
    learned = f"{c.train} questions each" + (f", {c.epochs} epochs" if c.epochs else "")
    words = (
        *("--results_dir", f"results/{SWEEPS['train']}", sweep, "--dataset_names", *GENERATED),
        *("--model_path", setup.model, "--data_dir", setup.data, "--device", setup.device),
        *("--latency_estimator_path", ESTIMATOR_FILE),
    )
    first_epochs = _epochs(c, "--num_epochs_stage1")
    warm, epochs = c.epochs or WARM_START, c.epochs or GRPO_EPOCHS
    recipe = (*time_price(setup.place), *GRPO_RECIPE, "--warm_start", warm)
    looked_ms = len(GENERATED) * min(c.train, c.train_pictures) * RATES_MS["picture looked at"]

    def stage(name: str, title: str, folder: str, part: str, about_ms: float, *own: object) -> Step:
        return Step(
            name=name,
            title=title,
            counts=learned,
            command="experiments/controller/train_two_stage_controller.py",
            words=_texts(*words, "--output_dir", folder, "--stage", part, *own),
            results=tuple(f"{folder}/{part}/{file}" for file in (f"best_{part}_checkpoint.pt", "report.json")),
            about_ms=about_ms,
        )

    both, by_value = (str(Path(file).parents[1]) for file in (STAGE2_FILE, VALUE_STAGE_FILE))
    boosting_ms, trained_ms = RATES_MS["boosting"], (WARM_START + GRPO_EPOCHS) * RATES_MS["epoch"]
    second = ("--stage1_checkpoint", VALUE_STAGE_FILE, "--num_epochs_stage2", epochs, *recipe)
    by_label = (*LABEL_STAGE, "--num_epochs_stage1", c.epochs or LABEL_EPOCHS)
    stages = [
        stage("exp3", "Exp 3, first stage by labels", both, "stage1", looked_ms + boosting_ms, *by_label),
        stage(
            "value_stage",
            "first stage by value, for Exp 4",
            by_value,
            "stage1",
            boosting_ms,
            *(*value_stage(setup.place), *first_epochs),
        ),
        stage("exp4", "Exp 4, second stage by GRPO", both, "stage2", trained_ms, *second),
    ]
    joint = Step(
        name="exp5",
        title="Exp 5, all knobs by GRPO",
        counts=f"{learned}, {len(c.seeds)} seeds",
        command="experiments/controller/train_controller_v2.py",
        words=_texts(
            *words,
            *("--output_dir", str(Path(END_TO_END_FILE).parent), "--compare_with", STAGE2_FILE),
            *("--seeds", *c.seeds, "--num_epochs", epochs, *recipe),
        ),
        results=(END_TO_END_FILE, str(Path(END_TO_END_FILE).with_name("report.json"))),
        about_ms=len(c.seeds) * trained_ms,
    )
    return [*stages, joint]


def _judging(setup: Setup) -> list[Step]:
    c, place = setup.counts, setup.place
    answered = f"results/adaptive_inference/pocket_{place}.json"
    budgets = ANSWERED_MS[place].split()
    adaptive = Step(
        name="exp8",
        title="Exp 8, requests within budgets",
        counts=f"{c.requests} requests at each of {len(budgets)} budgets",
        command="experiments/controller/test_adaptive_inference.py",
        words=_texts(
            *("--model_path", setup.model, "--controller_path", STAGE2_FILE, "--dataset", *GENERATED),
            *("--num_samples", c.requests, "--latency_budget", *budgets, "--output_path", answered),
            *_common(setup),
        ),
        results=(answered,),
        about_ms=RATES_MS["calibration"] + c.requests * len(budgets) * RATES_MS["answer within a budget"],
    )
    folder, results = (
        f"results/evaluate/pocket_{place}",
        {part: f"results/{name}" for part, name in SWEEPS.items()},
    )
    judge = Step(
        name="judge",
        title="controllers against baselines",
        counts=f"{c.val} questions each, {c.draws} resamples",
        command="evaluate",
        words=_texts(
            *("--results_dir", results["val"], f"results/core_exp_pocket_{place}"),
            *("--train_results_dir", results["train"], "--twin_results_dir", results["twin"]),
            *("--latency_estimator_path", ESTIMATOR_FILE, "--model", setup.model, "--device", setup.device),
            *("--policies", STAGE2_FILE, END_TO_END_FILE, SUPERVISED_FILE),
            *(
                "table",
                "best_static",
                "random",
                "knn",
                "linucb",
                "--budgets",
                *JUDGED_MS[place].split(),
                *time_price(place),
            ),
            *("--data_dir", setup.data, "--draws", c.draws, "--shuffles", c.shuffles, "--output_dir", folder),
        ),
        results=tuple(f"{folder}/{name}" for name in ("judge.json", "judge.html")),
        about_ms=len(GENERATED) * min(c.val, c.val_pictures) * RATES_MS["picture looked at"]
        + RATES_MS["statistics"],
    )
    return [adaptive, judge]


def _common(setup: Setup) -> tuple[object, ...]:
    """Flags of everything that answers questions."""
    place = ("--device", setup.device, "--data_dir", setup.data)
    return (*place, "--max_new_tokens", setup.counts.max_new_tokens)


def _named(setup: Setup) -> tuple[object, ...]:
    return ("--dataset_names", *GENERATED, "--model_path", setup.model)


def _texts(*words: object) -> tuple[str, ...]:
    return tuple(map(str, words))


def _epochs(counts: Counts, flag: str) -> tuple[object, ...]:
    return () if counts.epochs is None else (flag, counts.epochs)


def _parquet(folder: str) -> tuple[str, ...]:
    return tuple(f"results/{folder}/{name}.parquet" for name in GENERATED)
