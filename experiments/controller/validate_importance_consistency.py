r"""Exp 6: how important each block is, and whether data sets and kinds of task agree on it.

Writes cross_dataset_correlation.json, merged_scores.json, importance_comparison_*.json and .png; resumes.

Examples:
    python experiments/controller/validate_importance_consistency.py --dataset_names text_vqa --model_path pocket \
        --num_samples 8 --num_joint_samples 4 --output_dir runs/exp6
"""

from __future__ import annotations

import sys
from argparse import Namespace
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import tempovlm
from tempovlm.data.registry import check_datasets
from tempovlm.lab import script
from tempovlm.lab.core_exp.plan import draw_samples
from tempovlm.lab.options import AdaptiveFlags, DataFlags, ModelFlags
from tempovlm.lab.script import flag, required
from tempovlm.lab.script import seed as read_seed


@dataclass(frozen=True, kw_only=True)
class Flags(ModelFlags, DataFlags):
    """The script's flags."""

    num_samples: int = flag(5000, "training questions of each data set, as far as it has them")
    output_dir: Path = required("folder of all files; run again with it to resume")
    num_val_samples: int | None = flag(None, "validation questions of each; default: as many as for training")
    num_joint_samples: int = flag(400, "training questions of each in the joint search")
    tier: str | None = flag(None, "vision tier; default: the native one")
    top_k: int | None = flag(None, "experts per token; default: the native number")
    max_new_tokens: int = flag(AdaptiveFlags.max_new_tokens, "most tokens of an answer")
    batch_size: int = flag(16, "questions answered together")
    merged_file: Path | None = flag(
        None, "second place for the merged scores; default: Exp 7's of --output_dir results/importance_validation"
    )
    seed: int = flag(42, "seed of the choice of questions", read=read_seed)


def flags() -> script.FlagParser:
    """Make the script's parser."""
    return script.FlagParser(__doc__, Flags)


def main(argv: list[str]) -> None:
    """Measure what is not measured yet, write everything, and print the verdict."""
    args = flags().parse_args(argv)
    for name in ("num_samples", "num_joint_samples", "max_new_tokens", "batch_size"):
        script.positive(name, getattr(args, name))
    found = run(args, check_datasets(args.datasets, "dataset_names"))
    sys.stdout.write(f"{found['verdict']['text']}\nrule: {found['rule']}\n")
    sys.stdout.write(f"ranking ({found['ranking_method']}): {' '.join(map(str, found['ranking']))}\n")
    sys.stdout.write("".join(f"{path}\n" for path in found["files"]))


def run(args: Namespace, names: list[str]) -> dict[str, Any]:
    """Load the model and the questions, and do what is not done yet."""
    model = tempovlm.load(args.model_path, device=args.device, policy="fixed", calibrate=False, warmup=False)
    native = model.space.native
    top_k = native.top_k if args.top_k is None else args.top_k
    base = replace(native, tier=args.tier or native.tier, top_k=top_k)
    model.space.validate(base)
    # Imported now that `load` has set the threads, which must be done before torch is there.
    from tempovlm.data.catalog import bed_of
    from tempovlm.lab.exp6_importance.measure import Protocol
    from tempovlm.lab.exp6_importance.study import Study, run_study, second_place

    num_val = args.num_samples if args.num_val_samples is None else args.num_val_samples
    counts = {"train": args.num_samples, "val": script.positive("num_val_samples", num_val)}
    drawn = {split: draw_samples(names, split, args.data_dir, count, args.seed) for split, count in counts.items()}
    study = Study(
        engine=model.engine,
        protocol=Protocol(base, args.max_new_tokens, args.batch_size),
        data={name: {split: some[name] for split, (some, _) in drawn.items()} for name in names},
        num_joint=args.num_joint_samples,
        output_dir=args.output_dir,
        merged_file=args.merged_file or second_place(args.output_dir),
        stamp=model.stamp(drawn["train"][1]),
        bed=bed_of(names, args.data_dir),
    )
    return run_study(study)


if __name__ == "__main__":
    script.run(main)
