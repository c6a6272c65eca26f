"""Exp 6: how important each block is, and whether data sets and kinds of task agree on it.

Run again with the same `--output_dir` to resume. Writes cross_dataset_correlation.json, merged_scores.json and,
for each data set, importance_comparison_*.json and .png.
"""

from __future__ import annotations

import sys
from argparse import Namespace
from dataclasses import replace
from pathlib import Path
from typing import Any

import tempovlm
from tempovlm.lab import script
from tempovlm.lab.core_exp.plan import draw_samples

MERGED = Path("results/importance/merged_scores.json")
"""Where Exp 7 looks for the scores."""


def flags() -> script.FlagParser:
    """The script's flags."""
    parser = script.FlagParser(str(__doc__).splitlines()[0])
    add = parser.add_argument
    add("--dataset_names", nargs="+", required=True, help="data sets, or files of your own questions")
    add("--model_path", required=True, help="pocket, a model folder, or a hub id")
    add("--num_samples", type=int, default=5000, help="training questions of each data set, as far as it has them")
    add("--output_dir", type=Path, required=True, help="for everything; run again with it to resume")
    add("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    add("--num_val_samples", type=int, help="validation questions of each; as many as for training unless told")
    add("--num_joint_samples", type=int, default=400, help="training questions of each in the joint search")
    add("--tier", help="vision tier; the native one unless told")
    add("--top_k", type=int, help="experts per token; native unless told")
    add("--max_new_tokens", type=int, default=16, help="cap on generated tokens")
    add("--batch_size", type=int, default=16, help="questions answered together")
    add("--data_dir", type=Path, help="folder of the data sets")
    add("--merged_file", type=Path, default=MERGED, help="second place for the merged scores")
    add("--seed", type=script.seed, default=42, help="of the draw of questions")
    return parser


def main(argv: list[str]) -> None:
    """Measure what is not measured yet, write everything, and print the verdict."""
    args = flags().parse_args(argv)
    names = script.check_datasets(args.dataset_names, "dataset_names")
    for flag in ("num_samples", "num_joint_samples", "max_new_tokens", "batch_size"):
        script.positive(flag, getattr(args, flag))
    found = run(args, names)
    sys.stdout.write(f"{found['verdict']['text']}\nrule: {found['rule']}\n")
    sys.stdout.write(f"ranking ({found['ranking_method']}): {' '.join(map(str, found['ranking']))}\n")
    sys.stdout.write(f"{args.output_dir / 'cross_dataset_correlation.json'}\n{args.merged_file}\n")


def run(args: Namespace, names: list[str]) -> dict[str, Any]:
    """Load the model and the questions, and do what is not done yet."""
    model = tempovlm.load(args.model_path, device=args.device, policy="fixed", calibrate=False, warmup=False)
    native = model.space.native
    top_k = native.top_k if args.top_k is None else args.top_k
    base = replace(native, tier=args.tier or native.tier, top_k=top_k)
    model.space.validate(base)
    # Imported now that `load` has set the threads, which must be done before torch is there.
    from tempovlm.lab.exp6_importance.measure import Protocol
    from tempovlm.lab.exp6_importance.study import Study, run_study

    num_val = args.num_samples if args.num_val_samples is None else args.num_val_samples
    counts = {"train": args.num_samples, "val": script.positive("num_val_samples", num_val)}
    drawn = {split: draw_samples(names, split, args.data_dir, count, args.seed) for split, count in counts.items()}
    study = Study(
        engine=model.engine,
        protocol=Protocol(base, args.max_new_tokens, args.batch_size),
        data={name: {split: some[name] for split, (some, _) in drawn.items()} for name in names},
        num_joint=args.num_joint_samples,
        output_dir=args.output_dir,
        merged_file=args.merged_file,
        stamp=model.stamp(drawn["train"][1]),
    )
    return run_study(study)


if __name__ == "__main__":
    script.run(main)
