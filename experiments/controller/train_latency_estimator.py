r"""Exp 1: train the latency estimator on results of the core experiment, and compare it with simpler models.

Writes `best_latency_estimator.pt`, `report.json`, a training log and figures to `--output_dir`.

Examples:
    python experiments/controller/train_latency_estimator.py --results_dir results/core_exp_pocket_cpu \
        --dataset_names text_vqa --output_dir runs/exp1
"""

from __future__ import annotations

import sys
from dataclasses import dataclass

from tempovlm.api import model_folder
from tempovlm.core.shape import ModelShape
from tempovlm.data.registry import check_datasets
from tempovlm.engine.threads import pick_device, prepare
from tempovlm.lab import script
from tempovlm.lab.options import DeviceFlags, EstimatorFlags, EstimatorOptions
from tempovlm.lab.script import flag


@dataclass(frozen=True, kw_only=True)
class Flags(DeviceFlags, EstimatorFlags):
    """Flags of this script alone."""

    model_path: str | None = flag(None, "the measured model; default: pocket or molmoe-1b, by the results' stamp")
    transfer_model_path: str | None = flag(None, "the model of --transfer_results_dir; default: by their stamp")


def flags() -> script.FlagParser:
    """Make the script's parser."""
    return script.FlagParser(__doc__, Flags, EstimatorOptions)


def main(argv: list[str]) -> None:
    """Train, write everything, and print two tables."""
    args = flags().parse_args(argv)
    args.datasets = check_datasets(args.datasets, "dataset_names")
    if args.max_samples is not None:
        script.positive("max_samples", args.max_samples)
    prepare()
    # Imported now that threads are set, which must be done before torch is there.
    from tempovlm.lab.exp1_estimator import report

    args.device = str(pick_device(args.device))
    shapes = {"shape": shape_of(args.model_path), "transfer_shape": shape_of(args.transfer_model_path)}
    options = script.options_from(EstimatorOptions, vars(args))
    job = script.options_from(report.Job, {**vars(args), **shapes, "options": options})
    sys.stdout.write(report.render(report.run_job(job)) + f"{args.output_dir / report.CHECKPOINT}\n")


def shape_of(model: str | None) -> ModelShape | None:
    """The sizes of a model that is named; None without a name."""
    if model is None:
        return None
    from tempovlm.model.weights import read_config

    return read_config(model_folder(model)).shape


if __name__ == "__main__":
    script.run(main)
