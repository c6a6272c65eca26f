"""Exp 3 and 4: train the two-stage controller, first the tier by labels, then top-k and depth by GRPO."""

from __future__ import annotations

import sys
from argparse import Namespace
from pathlib import Path

import tempovlm
from tempovlm.lab import script
from tempovlm.lab.options import FitOptions, GrpoOptions

SHARED = ("results_dirs", "datasets", "output_dir", "latency_estimator_path", "train_split", "data_dir")
FIRST = ("test_results_dirs", "knob1_variant", "knob1_loss", "budgets_per_question", "time_price")
SECOND = ("hidden_dim", "stage1_checkpoint")


def flags() -> script.FlagParser:
    """The script's flags."""
    parser = script.FlagParser(str(__doc__).splitlines()[0])
    add = parser.add_argument
    add("--results_dir", nargs="+", type=Path, required=True, dest="results_dirs", help="core experiment's")
    add("--test_results_dir", nargs="+", type=Path, default=[], dest="test_results_dirs", help="more to test on")
    add("--dataset_names", nargs="+", required=True, help="data sets")
    add("--model_path", required=True, help="pocket, a model folder, or a hub id")
    add("--output_dir", type=Path, default=Path("checkpoints/two_stage_controller"), help="for both stages")
    add("--stage", choices=("stage1", "stage2"), required=True, help="stage2 needs a trained stage1")
    add("--latency_estimator_path", type=Path, help="checkpoint of Exp 1; measured latencies unless told")
    add("--batch_size", type=int, help="64 rows in stage1 and 32 questions in stage2 unless told")
    add("--num_epochs_stage1", type=int, default=50, help="passes over the training questions")
    add("--num_epochs_stage2", type=int, default=100, help="likewise")
    add("--lr", type=float, default=1e-4, help="learning rate at the start")
    add("--train_split", type=float, default=0.8, help="share of the pictures for training")
    add("--knob1_variant", default="language", help="budget, language or glance: what stage1 looks at")
    add("--knob1_loss", default="label", help="label: the best setting's tier; value: what a tier is worth")
    add("--budgets_per_question", type=int, default=8, help="drawn in an epoch of stage1")
    add("--hidden_dim", type=int, default=128, help="units of a hidden layer")
    add("--stage1_checkpoint", type=Path, help="for stage2; that of --output_dir unless told")
    add("--data_dir", type=Path, help="folder of the data sets")
    add("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    add("--seed", type=script.seed, default=42, help="of the split, the start and all draws")
    return parser.add_options(GrpoOptions)


def main(argv: list[str]) -> None:
    """Train one stage, write everything, and print its report."""
    args = flags().parse_args(argv)
    args.datasets = script.check_datasets(args.dataset_names, "dataset_names")
    args.batch_size = (64 if args.stage == "stage1" else 32) if args.batch_size is None else args.batch_size
    flag = f"num_epochs_{args.stage}"
    args.num_epochs = script.positive(flag, getattr(args, flag))
    model = tempovlm.load(args.model_path, device=args.device, policy="fixed", calibrate=False, warmup=False)
    args.device = str(model.engine.device)
    own = Namespace(
        engine=model.engine, weights_hash=model.weights_hash, **{name: getattr(args, name) for name in SHARED}
    )
    sys.stdout.write(first_stage(args, own) if args.stage == "stage1" else second_stage(args, own))


def first_stage(args: Namespace, own: Namespace) -> str:
    """Exp 3; torch is imported once `load` has set the threads."""
    from tempovlm.lab.exp3_first_stage import train as two_stage
    from tempovlm.lab.exp3_first_stage.report import render

    own.options = script.options_from(FitOptions, vars(args))
    job = two_stage.Stage1Job(**vars(own), **{name: getattr(args, name) for name in FIRST})
    return render(two_stage.run_job(job)) + f"{job.folder / two_stage.CHECKPOINT}\n"


def second_stage(args: Namespace, own: Namespace) -> str:
    """Exp 4; torch is imported once `load` has set the threads."""
    from tempovlm.lab.exp4_second_stage import CHECKPOINT, Stage2Job, render, run_job

    own.options = script.options_from(GrpoOptions, vars(args))
    job = Stage2Job(**vars(own), **{name: getattr(args, name) for name in SECOND})
    return render(run_job(job)) + f"{own.output_dir / CHECKPOINT}\n"


if __name__ == "__main__":
    script.run(main)
