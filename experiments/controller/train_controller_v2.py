r"""Exp 5: train a controller of all three knobs by GRPO, end to end, on results of the core experiment.

With `--environment queue` the policy predicts accuracies, against which the price of lane time is set, and the
reward of a choice is what all requests of its episode of a shared queue earn.

With `--architecture accuracy` an ensemble of all seeds expects the accuracy of every setting, by regression alone.

Writes `best_controller.pt` (`best_accuracy.pt`), `report.json` and a log of every seed to `--output_dir`; resumes.
The test bed that the results name is drawn in the cache directory if it is missing.

Examples:
    python experiments/controller/train_controller_v2.py --results_dir results/core_exp_pocket_train \
        --dataset_names text_vqa --model_path pocket --seeds 0 1 --num_epochs 20 --output_dir runs/exp5
    python experiments/controller/train_controller_v2.py --environment queue --arrivals trace.csv --results_dir \
        results/core_exp_pocket_train results/core_exp_pocket_val results/core_exp_pocket_cpu --dataset_names \
        text_vqa --model_path pocket --seeds 0 1 2 --warm_start 30 --num_epochs 8 --batch_size 4 --lr 0.03 \
        --group_size 8 --scale_rewards none --hidden_dim 64 --output_dir runs/queue
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tempovlm
from tempovlm.data.registry import check_datasets
from tempovlm.lab import script
from tempovlm.lab.options import GrpoOptions, JointFlags, ModelFlags, QueueFlags
from tempovlm.lab.script import flag
from tempovlm.lab.script import seed as read_seed


@dataclass(frozen=True, kw_only=True)
class Flags(ModelFlags, JointFlags, QueueFlags):
    """Flags of this script alone, and those of the experiment."""

    environment: Literal["answers", "queue"] = flag(
        "answers", "what acts: single answers under budgets, or requests that share a lane"
    )
    latency_estimator_path: Path | None = flag(
        Path("checkpoints/latency_estimator/best_latency_estimator.pt"), "checkpoint of Exp 1"
    )
    latency_source: Literal["estimator", "measured"] = flag("estimator", "where the reward's latencies come from")
    estimator_only: bool = flag(
        False, "run and measure nothing: accuracy from the table, latency from the estimator"
    )
    batch_size: int = flag(64, "questions of a batch")
    seeds: Sequence[int] | None = flag(
        None, "train once with each, for the spread; default: --seed", read=read_seed
    )


def flags() -> script.FlagParser:
    """Make the script's parser."""
    return script.FlagParser(__doc__, Flags, GrpoOptions)


def main(argv: list[str]) -> None:
    """Train, write everything, and print the report."""
    args = flags().parse_args(argv)
    args.datasets = check_datasets(args.datasets, "dataset_names")
    if args.estimator_only and (args.accuracy_source, args.latency_source) != ("table", "estimator"):
        raise tempovlm.UserError("--estimator_only: leave --accuracy_source and --latency_source as they are")
    model = tempovlm.load(args.model_path, device=args.device, policy="fixed", calibrate=False, warmup=False)
    # Imported now that `load` has set the threads, which must be done before torch is there.
    from tempovlm.lab.exp5 import end_to_end as joint

    args.device, args.engine, args.weights_hash = str(model.engine.device), model.engine, model.weights_hash
    args.seeds = args.seeds or [args.seed]
    if args.latency_source == "measured":
        args.latency_estimator_path = None
    args.options = script.options_from(GrpoOptions, vars(args))
    if args.environment == "queue":
        from tempovlm.lab.queue_grpo import study

        report = study.run_job(script.options_from(study.QueueJob, vars(args)))
        sys.stdout.write(study.render(report) + f"{args.output_dir / study.CHECKPOINTS[study.LEARNED]}\n")
        return
    job = script.options_from(joint.JointJob, vars(args))
    sys.stdout.write(joint.render(joint.run_job(job)) + f"{job.checkpoint}\n")


if __name__ == "__main__":
    script.run(main)
