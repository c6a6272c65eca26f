r"""Exp 3 and 4: train the two-stage controller, first the tier by labels, then top-k and depth by GRPO.

The test bed that the results name is drawn in the cache directory if it is missing.

Examples:
    python experiments/controller/train_two_stage_controller.py --stage stage1 --model_path pocket \
        --results_dir results/core_exp_pocket_train results/core_exp_pocket_cpu --dataset_names text_vqa \
        --output_dir runs/two_stage
    python experiments/controller/train_two_stage_controller.py --stage stage2 --model_path pocket \
        --results_dir results/core_exp_pocket_train results/core_exp_pocket_cpu --dataset_names text_vqa \
        --output_dir runs/two_stage
"""

from __future__ import annotations

import sys
from argparse import Namespace
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tempovlm
from tempovlm.data.registry import check_datasets
from tempovlm.lab import script
from tempovlm.lab.options import FirstStageFlags, FitOptions, GrpoOptions, ModelFlags, SecondStageFlags
from tempovlm.lab.script import flag, required


@dataclass(frozen=True, kw_only=True)
class Flags(ModelFlags, FirstStageFlags, SecondStageFlags):
    """Flags of this script alone, and those of both experiments."""

    output_dir: Path = required("folder of both stages' files")
    stage: Literal["stage1", "stage2"] = required("what to train; stage2 needs a trained stage1")
    batch_size: int | None = flag(
        None, f"default: {FitOptions.batch_size} rows in stage1 and {GrpoOptions.batch_size} questions in stage2"
    )
    num_epochs: int | None = None
    """One of the next two."""
    num_epochs_stage1: int = flag(FitOptions.num_epochs, "passes over the training questions in stage1")
    num_epochs_stage2: int = flag(GrpoOptions.num_epochs, "passes over the training questions in stage2")


def flags() -> script.FlagParser:
    """Make the script's parser."""
    return script.FlagParser(__doc__, Flags, GrpoOptions)


def main(argv: list[str]) -> None:
    """Train one stage, write everything, and print its report."""
    args = flags().parse_args(argv)
    args.datasets = check_datasets(args.datasets, "dataset_names")
    name = f"num_epochs_{args.stage}"
    args.num_epochs = script.positive(name, getattr(args, name))
    model = tempovlm.load(args.model_path, device=args.device, policy="fixed", calibrate=False, warmup=False)
    args.device, args.engine, args.weights_hash = str(model.engine.device), model.engine, model.weights_hash
    sys.stdout.write(first_stage(args) if args.stage == "stage1" else second_stage(args))


def first_stage(args: Namespace) -> str:
    """Run Exp 3; torch is imported once `load` has set the threads."""
    from tempovlm.lab.exp3_first_stage import train as two_stage
    from tempovlm.lab.exp3_first_stage.report import render

    args.options = script.options_from(FitOptions, vars(args))
    job = script.options_from(two_stage.Stage1Job, vars(args))
    return render(two_stage.run_job(job)) + f"{job.folder / two_stage.CHECKPOINT}\n"


def second_stage(args: Namespace) -> str:
    """Run Exp 4; torch is imported once `load` has set the threads."""
    from tempovlm.lab.exp4_second_stage import CHECKPOINT, Stage2Job, render, run_job

    args.options = script.options_from(GrpoOptions, vars(args))
    job = script.options_from(Stage2Job, vars(args))
    return render(run_job(job)) + f"{args.output_dir / CHECKPOINT}\n"


if __name__ == "__main__":
    script.run(main)
