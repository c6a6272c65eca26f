"""Exp 1: train the latency estimator on results of the core experiment, and compare it with simpler models.

Writes `best_latency_estimator.pt`, `report.json`, a training log and figures to `--output_dir`.
"""

from __future__ import annotations

import sys
from argparse import Namespace
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING

from tempovlm.api import model_folder
from tempovlm.core.shape import ModelShape
from tempovlm.engine.threads import pick_device, prepare
from tempovlm.lab import script

if TYPE_CHECKING:
    from tempovlm.lab.exp1_estimator.train import Options


def flags() -> script.FlagParser:
    """The script's flags."""
    parser = script.FlagParser(str(__doc__).splitlines()[0])
    add = parser.add_argument
    add("--results_dir", nargs="+", type=Path, required=True, help="results of one device")
    add("--dataset_names", nargs="+", required=True, help="data sets")
    add("--output_dir", type=Path, required=True, help="for the checkpoint, the report and the figures")
    add("--batch_size", type=int, default=64, help="rows of a batch")
    add("--num_epochs", type=int, default=50, help="passes over the training rows")
    add("--lr", type=float, default=1e-3, help="learning rate at the start")
    add("--train_split", type=float, default=0.8, help="share of the pictures for training")
    add("--device", default="auto", help="auto, cpu, cuda or cuda:N: where the network is trained")
    add("--seed", type=script.seed, default=42, help="of the split, the start and the order of rows")
    add("--max_samples", type=int, help="rows at most, drawn at random; all unless told")
    add("--hidden_dim", type=int, default=64, help="units of a hidden layer")
    add("--num_layers", type=int, default=2, help="hidden layers")
    add("--loss", default="log", help="log: quantile loss of log-latency; mse: squared error in ms")
    add("--grad_accum", type=int, default=1, help="batches to a step")
    add("--lr_schedule", default="cosine", help="cosine or constant")
    add("--model_path", help="the measured model, where its stamp names neither pocket nor molmoe-1b")
    add("--transfer_results_dir", nargs="+", type=Path, default=[], help="results of another device to move to")
    add("--transfer_model_path", help="the model measured there, likewise")
    return parser


def main(argv: list[str]) -> None:
    """Train, write everything, and print two tables."""
    args = flags().parse_args(argv)
    names = script.check_datasets(args.dataset_names, "dataset_names")
    if args.max_samples is not None:
        script.positive("max_samples", args.max_samples)
    prepare()
    # Imported now that threads are set, which must be done before torch is there.
    from tempovlm.lab.exp1_estimator import report

    job = report.Job(
        results_dirs=args.results_dir,
        datasets=names,
        output_dir=args.output_dir,
        options=options(args),
        train_split=args.train_split,
        max_samples=args.max_samples,
        shape=shape_of(args.model_path),
        transfer_dirs=args.transfer_results_dir,
        transfer_shape=shape_of(args.transfer_model_path),
    )
    sys.stdout.write(report.render(report.run_job(job)) + f"{args.output_dir / report.CHECKPOINT}\n")


def options(args: Namespace) -> Options:
    """The flags about training."""
    from tempovlm.lab.exp1_estimator.train import Options

    names = [field.name for field in fields(Options) if field.name in vars(args) and field.name != "device"]
    return Options(**{name: getattr(args, name) for name in names}, device=str(pick_device(args.device)))


def shape_of(model: str | None) -> ModelShape | None:
    """The sizes of a model that is named; None without a name."""
    if model is None:
        return None
    from tempovlm.model.weights import read_config

    return read_config(model_folder(model)).shape


if __name__ == "__main__":
    script.run(main)
