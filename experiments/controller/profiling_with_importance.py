"""Exp 7: accuracy and latency of every setting, the blocks chosen by importance.

Measures anew, or sums up results of the core experiment; writes a table and two figures for each data set.
"""

from __future__ import annotations

import json
import sys
from argparse import Namespace
from pathlib import Path

import tempovlm
from tempovlm.api import model_folder
from tempovlm.core.paths import write_whole
from tempovlm.lab import script
from tempovlm.lab.core_exp.plan import SweepPlan, draw_samples
from tempovlm.lab.core_exp.processes import Share


def flags() -> script.FlagParser:
    """The script's flags."""
    parser = script.FlagParser(str(__doc__).splitlines()[0])
    add = parser.add_argument
    add("--model_path", required=True, help="pocket, a model folder, or a hub id")
    add("--importance_scores_file", type=Path, help="block importances; the model's own ranking unless told")
    add("--datasets", nargs="+", required=True, help="data sets, or files of your own questions")
    add("--output_dir", type=Path, required=True, help="for the tables and figures")
    add("--results_dir", nargs="+", type=Path, help="sum up these results instead of measuring anew")
    add("--num_samples", type=int, default=500, help="questions of each data set")
    add("--batch_size", type=int, default=1, help="questions answered together for accuracy")
    add("--latency_samples", type=int, default=40, help="questions of each data set that are timed")
    add("--repeats", type=int, help="passes that time each of them once at each setting")
    add("--max_new_tokens", nargs="+", type=int, help="caps, given to the questions in turn")
    add("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    add("--split", choices=("val", "train"), default="val", help="which questions")
    add("--data_dir", type=Path, help="folder of the data sets")
    add("--seed", type=script.seed, help="of the draw of questions and the order of timing")
    return parser.with_defaults(SweepPlan)


def main(argv: list[str]) -> None:
    """Measure where there is nothing to sum up, then write a table for each data set."""
    args = flags().parse_args(argv)
    names = script.check_datasets(args.datasets, "datasets")
    for flag in ("num_samples", "batch_size", "latency_samples", "repeats"):
        script.positive(flag, getattr(args, flag))
    folders = args.results_dir or measure(args, names)
    if folders:
        write_tables(args, names, folders)


def measure(args: Namespace, names: list[str]) -> list[Path]:
    """The core experiment with this ranking, into `{output_dir}/core_exp`; nothing but of the first process."""
    share = Share.of_process()
    device, warmup = share.device(args.device), share.rank == 0  # the others time nothing
    model = tempovlm.load(args.model_path, device=device, policy="fixed", calibrate=False, warmup=warmup)
    # Imported now that `load` has set the threads, which must be done before torch is there.
    from tempovlm.lab.core_exp.ledger import Ledger
    from tempovlm.lab.core_exp.sweep import conduct, with_ranking

    engine = with_ranking(model.engine, args.importance_scores_file)
    options = {name: getattr(args, name) for name in ("batch_size", "repeats", "seed", "latency_samples")}
    plan = SweepPlan(settings=model.space.settings, max_new_tokens=tuple(args.max_new_tokens), **options)
    samples, source = draw_samples(names, args.split, args.data_dir, args.num_samples, args.seed)
    folder, conditions = args.output_dir / "core_exp", plan.conditions(args.split)
    ledger = Ledger(folder, model.stamp(source), engine.ranking, conditions, "parquet", share.rank)
    return [folder] if conduct(engine, samples, plan, ledger, share) else []


def write_tables(args: Namespace, names: list[str], folders: list[Path]) -> None:
    """`profiling_results.json`, `frontier.png` and `stages.png` for each data set."""
    from tempovlm.lab.core_exp.ranking import ranking_of
    from tempovlm.lab.core_exp.store import read_results
    from tempovlm.lab.exp7_profiles.plots import save_plots
    from tempovlm.lab.exp7_profiles.summary import summarise

    ranking, space = ranking_of(folders, args.importance_scores_file, model_folder(args.model_path))
    frame = read_results(folders, names, space)
    for name in names:
        records = summarise(frame, name, args.split, ranking)
        path = args.output_dir / name / "profiling_results.json"
        write_whole(path, json.dumps(records, ensure_ascii=False) + "\n")
        for written in (path, *save_plots(path.parent, records)):
            sys.stdout.write(f"{written}\n")


if __name__ == "__main__":
    script.run(main)
