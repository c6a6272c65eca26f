r"""The core experiment: accuracy and latency of every knob setting on one set of questions.

Run alone or by `torchrun --nproc_per_node N`, whose processes share the GPUs: several a GPU are faster, as long as
each has a core. Run again to resume. Writes one Parquet file a data set to `--output_dir`, which the other
experiments read.

Examples:
    python experiments/core_exp/run_core_experiment.py --dataset_names text_vqa --model_path pocket \
        --num_samples 8 --latency_samples 2 --repeats 2 --output_dir runs/core
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tempovlm.core.errors import UserError
from tempovlm.data.registry import check_datasets
from tempovlm.lab import script
from tempovlm.lab.core_exp.plan import SweepPlan
from tempovlm.lab.core_exp.run import RunFlags, run_sweep
from tempovlm.lab.script import flag, required


@dataclass(frozen=True, kw_only=True)
class Flags(RunFlags):
    """The script's flags, beside those of `SweepPlan`."""

    output_dir: Path = required("folder of the results; run again with it to resume")
    num_samples: int = flag(300, "questions of each data set")
    tiers: Sequence[str] | None = flag(None, "vision tiers; default: all")
    top_k: Sequence[int] | None = flag(None, "experts per token; default: all of the knob space")
    num_blocks: Sequence[int] | None = flag(None, "depths; default: all of the knob space")
    latency_only: bool = flag(False, "leave out batched accuracy: only the timed questions get rows")
    format: Literal["parquet", "json"] = flag("parquet", "json writes the predecessor's layout")


def flags() -> script.FlagParser:
    """Make the script's parser."""
    return script.FlagParser(__doc__, Flags, SweepPlan)


def main(argv: list[str]) -> None:
    """Run or resume the sweep."""
    args = flags().parse_args(argv)
    args.datasets = check_datasets(args.datasets, "dataset_names")
    for name in ("num_samples", "repeats"):
        script.positive(name, getattr(args, name))
    if args.batch_size is not None:
        script.positive("batch_size", args.batch_size)
    if args.latency_only and args.latency_samples == 0:
        raise UserError("--latency_only: nothing would be run; give --latency_samples")
    args.batch_size = 0 if args.latency_only else args.batch_size
    paths = run_sweep(vars(args), args.output_dir, args.tiers, args.top_k, args.num_blocks)
    sys.stdout.write("".join(f"{path}\n" for path in paths[:4]))
    if len(paths) > 4:
        sys.stdout.write(f"and {len(paths) - 4} more\n")


if __name__ == "__main__":
    script.run(main)
