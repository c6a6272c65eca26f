"""Exp 2: train the supervised controller, which goes from the budget to a setting, on the tables of Exp 7.

Writes `best_supervised_controller.pt`, `report.json` and a training log to `--output_dir`; resumes.
"""

from __future__ import annotations

import sys
from pathlib import Path

from tempovlm.engine.threads import pick_device, prepare
from tempovlm.lab import script
from tempovlm.lab.options import FitOptions


def flags() -> script.FlagParser:
    """The script's flags."""
    parser = script.FlagParser(str(__doc__).splitlines()[0])
    add = parser.add_argument
    add("--profiling_results", nargs="+", type=Path, required=True, help="profiling_results.json of Exp 7")
    add("--output_dir", type=Path, required=True, help="for the checkpoint, the report and the log")
    add("--batch_size", type=int, default=64, help="budgets of a batch")
    add("--num_epochs", type=int, default=50, help="passes over the budgets")
    add("--lr", type=float, default=1e-4, help="learning rate at the start")
    add("--train_split", type=float, default=0.8, help="share of the budgets for training")
    add("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    add("--seed", type=script.seed, default=42, help="of the budgets, the start and the order of rows")
    add("--hidden_dim", type=int, default=128, help="units of a hidden layer")
    add("--num_budgets", type=int, default=20_000, help="budgets drawn, log-uniformly over the feasible range")
    add("--latency_quantile", default="p95", help="mean, p50, p95 or p99: the total that must fit a budget")
    add("--grad_accum", type=int, default=1, help="batches to a step")
    add("--lr_schedule", default="cosine", help="cosine or constant")
    return parser


def main(argv: list[str]) -> None:
    """Train, write everything, and print accuracy by budget."""
    args = flags().parse_args(argv)
    script.positive("num_budgets", args.num_budgets)
    prepare()
    # Imported now that threads are set, which must be done before torch is there.
    from tempovlm.lab import exp2_supervised as supervised

    job = supervised.SupervisedJob(
        profiling_results=args.profiling_results,
        output_dir=args.output_dir,
        options=script.options_from(FitOptions, {**vars(args), "device": str(pick_device(args.device))}),
        train_split=args.train_split,
        num_budgets=args.num_budgets,
        latency_quantile=args.latency_quantile,
    )
    report = supervised.run_job(job)
    sys.stdout.write(supervised.render(report) + f"{args.output_dir / supervised.CHECKPOINT}\n")


if __name__ == "__main__":
    script.run(main)
