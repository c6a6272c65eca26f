r"""Exp 2: train the supervised controller, which goes from the budget to a setting, on the tables of Exp 7.

Writes `best_supervised_controller.pt`, `report.json` and a training log to `--output_dir`; resumes.

Examples:
    python experiments/controller/train_supervised_controller.py \
        --profiling_results results/profiling/exp3_importance_comparison/text_vqa/profiling_results.json \
        --output_dir runs/exp2
"""

from __future__ import annotations

import sys

from tempovlm.engine.threads import pick_device, prepare
from tempovlm.lab import script
from tempovlm.lab.options import DeviceFlags, FitOptions, SupervisedFlags


def flags() -> script.FlagParser:
    """Make the script's parser."""
    return script.FlagParser(__doc__, DeviceFlags, SupervisedFlags, FitOptions)


def main(argv: list[str]) -> None:
    """Train, write everything, and print accuracy by budget."""
    args = flags().parse_args(argv)
    script.positive("num_budgets", args.num_budgets)
    prepare()
    # Imported now that threads are set, which must be done before torch is there.
    from tempovlm.lab import exp2_supervised as supervised

    args.device = str(pick_device(args.device))
    options = script.options_from(FitOptions, vars(args))
    job = script.options_from(supervised.SupervisedJob, {**vars(args), "options": options})
    report = supervised.run_job(job)
    sys.stdout.write(supervised.render(report) + f"{args.output_dir / supervised.CHECKPOINT}\n")


if __name__ == "__main__":
    script.run(main)
