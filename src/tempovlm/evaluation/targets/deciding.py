"""Rows of Exp 2, 3, 4 and 5: what controllers learned, and how they fare against what is hard to beat."""

from __future__ import annotations

from collections.abc import Iterable

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
    field,
    look_up,
    number,
    value_at,
)

EXP2, EXP3, EXP4, EXP5 = "Exp 2", "Exp 3", "Exp 4", "Exp 5"
JUDGED = "Controllers against baselines"

_NUM_BUDGETS = 5
_NAMES = "text_vqa coco_2014_vqa okvqa science_qa_img"
HARDWARE = {"cpu": "cpu", "h200": "H200"}
PLACE = {"cpu": "2-core CPU", "h200": "H200"}
JUDGED_MS = {"cpu": "60 80 100 150 200 300", "h200": "5 8 12 20 30"}
_LEARNED = (
    f"--results_dir results/core_exp_pocket_train --dataset_names {_NAMES} --model_path pocket "
    "--latency_estimator_path checkpoints/latency_estimator/best_latency_estimator.pt"
)
_TWO_STAGE = f"python experiments/controller/train_two_stage_controller.py {_LEARNED}"

TIME_PRICE = ("--time_price", "0.3")
"""What the shipped controllers and the baselines that they are judged by pay for time."""

LABEL_STAGE = (
    *("--knob1_variant", "glance", "--lr", "3e-4"),
    *("--batch_size", "512", "--budgets_per_question", "4"),
)
"""Flags of Exp 3, chosen by cross-validation on its training and validation questions."""

LABEL_EPOCHS = 16

VALUE_STAGE = ("--knob1_loss", "value", *TIME_PRICE, "--lr", "1e-3")
"""Flags of the first stage that Exp 4 builds on."""

GRPO_RECIPE = (
    *("--loss_type", "dr_grpo", "--group_size", "16", "--lr", "2e-5"),
    *("--beta", "0.02", "--entropy_coef", "0.001"),
)
"""Flags of Exp 4 and 5 beside the price of time."""

WARM_START, GRPO_EPOCHS = 30, 20
"""Epochs of regression, then of GRPO."""

_RECIPE = " ".join((*TIME_PRICE, *GRPO_RECIPE, "--warm_start", str(WARM_START)))


SUPERVISED_FILE = "checkpoints/controller/supervised/best_supervised_controller.pt"
VALUE_STAGE_FILE = "checkpoints/two_stage_value/stage1/best_stage1_checkpoint.pt"
STAGE2_FILE = "checkpoints/two_stage_controller/stage2/best_stage2_checkpoint.pt"
END_TO_END_FILE = "checkpoints/controller/grpo/best_controller.pt"


def _trained(folder: str, command: str) -> Source:
    return Source(
        path=f"checkpoints/{folder}/report.json", command=command, model="pocket", needs_shipped_weights=True
    )


SUPERVISED = _trained(
    "controller/supervised",
    "python experiments/controller/train_supervised_controller.py --profiling_results "
    "results/profiling/exp3_importance_comparison/text_vqa/profiling_results.json "
    "--output_dir checkpoints/controller/supervised",
)
STAGE1 = _trained(
    "two_stage_controller/stage1",
    f"{_TWO_STAGE} --stage stage1 --test_results_dir results/core_exp_pocket_val {' '.join(LABEL_STAGE)} "
    f"--num_epochs_stage1 {LABEL_EPOCHS}",
)
STAGE2 = _trained(
    "two_stage_controller/stage2",
    f"{_TWO_STAGE} --stage stage1 --output_dir checkpoints/two_stage_value {' '.join(VALUE_STAGE)} && "
    f"{_TWO_STAGE} --stage stage2 --stage1_checkpoint {VALUE_STAGE_FILE} --num_epochs_stage2 {GRPO_EPOCHS} "
    f"{_RECIPE}",
)
GRPO = _trained(
    "controller/grpo",
    f"python experiments/controller/train_controller_v2.py {_LEARNED} --seeds 0 1 2 3 4 "
    f"--compare_with {STAGE2_FILE} --num_epochs {GRPO_EPOCHS} {_RECIPE}",
)


def _judge(device: str) -> Source:
    """The judge's report, with latencies that an estimator of the device predicts."""
    folder = f"results/evaluate/pocket_{device}"
    estimator = "best" if device == "cpu" else "recalibrated"
    command = (
        "tempovlm evaluate --results_dir results/core_exp_pocket_val --train_results_dir "
        "results/core_exp_pocket_train --twin_results_dir results/core_exp_pocket_twin --latency_estimator_path "
        f"checkpoints/latency_estimator/{estimator}_latency_estimator.pt --policies {STAGE2_FILE} "
        f"{END_TO_END_FILE} {SUPERVISED_FILE} table best_static only_tier only_top_k only_num_blocks random knn "
        f"linucb --budgets {JUDGED_MS[device]} {' '.join(TIME_PRICE)} --output_dir {folder}"
    )
    return Source(
        path=f"{folder}/judge.json",
        command=command,
        model="pocket",
        hardware=HARDWARE[device],
        needs_shipped_weights=True,
    )


JUDGE = {device: _judge(device) for device in HARDWARE}


def _accuracy_or_regret(head: str) -> Measure:
    """Accuracy of a head in percent, with the regret in points as the other way to the target."""

    def measure(content: Content) -> Reading:
        right = value_at(content, "validation", head, scale=100)
        return Reading(right, value_at(content, "validation", "regret_points"))

    return measure


def _exp2() -> Iterable[Target]:
    for head, seed in (("overall", 60), ("tier", 70), ("top_k", 65), ("num_blocks", 65)):
        yield Target(
            EXP2,
            f"exp2_{head}",
            f"labels predicted right, {head}",
            Bound("≥", 90),
            "%",
            SUPERVISED,
            _accuracy_or_regret(head),
            seed=f"> {seed} %",
            other=Bound("≤", 0.3),
            text="≥ 90 %, or regret ≤ 0.3 points",
        )
    regret = field("validation", "regret_points")
    yield Target(
        EXP2, "exp2_regret", "accuracy lost against the best label", REPORTED, "points", SUPERVISED, regret
    )


def _ceiling_gap(content: Content) -> Reading:
    return Reading(-value_at(content, "gradient_boosting", "ahead_points"))


def _exp3() -> Iterable[Target]:
    yield Target(
        EXP3,
        "exp3_tier_accuracy",
        "tier predicted right",
        Bound(">", 75),
        "%",
        STAGE1,
        field("accuracy", scale=100),
        seed="> 75 %",
    )
    yield Target(
        EXP3,
        "exp3_ceiling_gap",
        "gradient boosting on the same inputs minus ours",
        Bound("≤", 2),
        "points",
        STAGE1,
        _ceiling_gap,
    )
    yield Target(
        EXP3,
        "exp3_gain_over_budget_only",
        "ours minus budget alone, lower end of the interval",
        Bound(">", 0),
        "points",
        STAGE1,
        field("budget_only", "interval_points", 0),
        text="significantly above: > 0",
    )


def _reward_rise(content: Content) -> Reading:
    first, last = (value_at(content, "reward", when) for when in ("untrained", "end"))
    return Reading(number(last - first, "reward"))


def _training() -> Iterable[Target]:
    """Exp 4 and 5: training itself, and the test questions under the latencies that the reward counted."""
    for experiment, name, source in ((EXP4, "exp4", STAGE2), (EXP5, "exp5", GRPO)):
        about, rises = "validation reward, last tenth of the epochs minus untrained", Bound(">", 0)
        yield Target(experiment, f"{name}_reward_rise", about, rises, "", source, _reward_rise, seed="rises")
        for other, words in (("fixed", "the best fixed setting"), ("table", "the best table")):
            yield Target(
                experiment,
                f"{name}_over_{other}",
                f"accuracy minus that of {words}, predicted latencies, lower end of the interval",
                Bound(">", 0),
                "points",
                source,
                field("gain", other, "accuracy", "interval", 0, scale=100),
                seed="better" if other == "fixed" else NO_SEED,
            )


def _stability() -> Iterable[Target]:
    """Exp 5 over its seeds, and against Exp 4."""
    yield Target(EXP5, "exp5_seeds", "training runs compared", Bound("≥", 5), "seeds", GRPO, _num_seeds)
    accuracy = ("compared", "over_seeds", "accuracy")
    for name, words, path, seed in (
        ("over_exp4", "", ("mean",), "better"),
        ("over_exp4_low", ": lower end of the interval", ("interval", 0), NO_SEED),
        ("over_exp4_high", ": upper end of the interval", ("interval", 1), NO_SEED),
    ):
        about = f"accuracy minus that of Exp 4, mean over seeds{words}"
        measure = field(*accuracy, *path, scale=100)
        yield Target(EXP5, f"exp5_{name}", about, REPORTED, "points", GRPO, measure, seed=seed)
    spread = field("seeds", "accuracy", "std", scale=100)
    about = "accuracy, standard deviation over seeds"
    yield Target(EXP5, "exp5_accuracy_spread", about, REPORTED, "points", GRPO, spread)


def _num_seeds(content: Content) -> Reading:
    return Reading(float(len(look_up(content, "seeds", "runs"))))


def _policy(content: Content, checkpoint: str) -> Content:
    """What the judge says about a checkpoint, whose path is its name there.

    Raises:
        AbsentError: it was not judged.
    """
    for name, judged in look_up(content, "policies").items():
        if name.rpartition("/")[2] == checkpoint.rpartition("/")[2]:
            return judged
    raise AbsentError(f"policy {checkpoint} was not judged")


def _budgets_won(name: str) -> Measure:
    """Share of the budgets, in percent, where the gain over the static mixture has an interval above zero."""

    def measure(content: Content) -> Reading:
        rows = look_up(_policy(content, name), "by_budget")
        if len(rows) < _NUM_BUDGETS:
            raise AbsentError(f"it judges {len(rows)} budgets of at least {_NUM_BUDGETS}")
        won = sum(value_at(row, "against_mixture", "interval", 0) > 0 for row in rows)
        return Reading(number(won / len(rows), "by_budget", 100))

    return measure


def _gap_closed(name: str) -> Measure:
    def measure(content: Content) -> Reading:
        if look_up(content, "oracle", "kind") != "noise-corrected":
            raise AbsentError("its oracle is not noise-corrected")
        return Reading(value_at(_policy(content, name), "gap_closed", "value", scale=100))

    return measure


def _area_gain(name: str, other: str) -> Measure:
    """Mean accuracy over log latency of one policy's frontier minus another's, in points."""

    def measure(content: Content) -> Reading:
        areas = [value_at(_policy(content, policy), "area", "value", scale=100) for policy in (name, other)]
        return Reading(number(areas[0] - areas[1], "area"))

    return measure


def _judged(device: str) -> Iterable[Target]:
    def row(name: str, about: str, bound: Bound, unit: str, measure: Measure, seed: str = NO_SEED) -> Target:
        return Target(
            JUDGED,
            f"judge_{name}_{device}",
            f"{about} ({PLACE[device]})",
            bound,
            unit,
            JUDGE[device],
            measure,
            seed=seed,
        )

    for policy, path in (("two_stage", STAGE2_FILE), ("end_to_end", END_TO_END_FILE)):
        name = policy.replace("_", "-")
        yield row(
            f"{policy}_above_mixture",
            f"{name}: budgets where it is above the static mixture at equal latency, interval above zero",
            Bound("≥", 100),
            "%",
            _budgets_won(path),
            "better",
        )
        yield row(
            f"{policy}_gap_closed",
            f"{name}: share of the gap between static mixture and twin oracle",
            Bound("≥", 50),
            "%",
            _gap_closed(path),
        )
    yield row(
        "two_stage_over_supervised",
        "two-stage (GRPO) minus supervised, area under the accuracy-latency frontier",
        Bound(">", 0),
        "points",
        _area_gain(STAGE2_FILE, SUPERVISED_FILE),
    )
    yield row(
        "end_to_end_over_two_stage",
        "Exp 5 minus Exp 4, area under the accuracy-latency frontier",
        REPORTED,
        "points",
        _area_gain(END_TO_END_FILE, STAGE2_FILE),
        "better",
    )


ROWS = (
    *_exp2(),
    *_exp3(),
    *_training(),
    *_stability(),
    *(target for device in HARDWARE for target in _judged(device)),
)
