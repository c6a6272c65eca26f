r"""Exp 7: accuracy and latency of every setting, the blocks chosen by importance.

Measures anew, or sums up results of the core experiment; writes a table and two figures for each data set.

Examples:
    python experiments/controller/profiling_with_importance.py --datasets text_vqa --model_path pocket \
        --results_dir results/core_exp_pocket_val results/core_exp_pocket_cpu --output_dir runs/exp7
"""

from __future__ import annotations

import json
import sys
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tempovlm.api import model_folder
from tempovlm.core.paths import write_whole
from tempovlm.data.registry import check_datasets
from tempovlm.lab import script
from tempovlm.lab.core_exp.plan import SweepPlan
from tempovlm.lab.core_exp.run import RunFlags, run_sweep
from tempovlm.lab.script import flag, required


@dataclass(frozen=True, kw_only=True)
class Flags(RunFlags):
    """The script's flags, beside those of `SweepPlan`."""

    datasets: Sequence[str] = required("data sets, or files of your own questions")
    output_dir: Path = required("folder of the tables and figures")
    results_dir: Sequence[Path] | None = flag(None, "sum up these results instead of measuring anew")
    num_samples: int = flag(500, "questions of each data set")
    batch_size: int = flag(1, "questions answered together for accuracy")
    latency_samples: int = flag(40, "questions of each data set that are timed")


def flags() -> script.FlagParser:
    """Make the script's parser."""
    return script.FlagParser(__doc__, Flags, SweepPlan)


def main(argv: list[str]) -> None:
    """Measure where there is nothing to sum up, then write a table for each data set."""
    args = flags().parse_args(argv)
    args.datasets = check_datasets(args.datasets, "datasets")
    for name in ("num_samples", "batch_size", "latency_samples", "repeats"):
        script.positive(name, getattr(args, name))
    measured = args.output_dir / "core_exp"
    if args.results_dir or run_sweep(vars(args), measured):
        write_tables(args, args.results_dir or [measured])


def write_tables(args: Namespace, folders: list[Path]) -> None:
    """Write `profiling_results.json`, `frontier.png` and `stages.png` for each data set."""
    from tempovlm.lab.core_exp.ranking import ranking_of
    from tempovlm.lab.core_exp.store import read_results
    from tempovlm.lab.exp7_profiles.plots import save_plots
    from tempovlm.lab.exp7_profiles.summary import summarise

    ranking, space = ranking_of(folders, args.importance_scores_file, model_folder(args.model_path))
    frame = read_results(folders, args.datasets, space)
    for name in args.datasets:
        records = summarise(frame, name, args.split, ranking)
        path = args.output_dir / name / "profiling_results.json"
        write_whole(path, json.dumps(records, ensure_ascii=False) + "\n")
        for written in (path, *save_plots(path.parent, records)):
            sys.stdout.write(f"{written}\n")


if __name__ == "__main__":
    script.run(main)
