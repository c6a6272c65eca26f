r"""Exp 8: answer a data set within budgets through the whole pipeline, with a trained controller behind the guard.

Writes totals by budget to the result file, and knobs, stage times, answer and score of each request to a Parquet
file beside it. What is done is kept there too, so the same command resumes.

Examples:
    python experiments/controller/test_adaptive_inference.py --latency_budget 100 200 --num_samples 20 \
        --output_path runs/exp8.json
"""

from __future__ import annotations

import sys
from argparse import Namespace
from dataclasses import dataclass
from pathlib import Path

from tempovlm.api import POLICIES, TempoVLM, load
from tempovlm.core.errors import UserError
from tempovlm.core.request import check_budget_ms
from tempovlm.data.registry import check_datasets
from tempovlm.engine.threads import prepare
from tempovlm.lab import script
from tempovlm.lab.options import AdaptiveFlags, ModelFlags
from tempovlm.lab.script import flag


@dataclass(frozen=True, kw_only=True)
class Flags(AdaptiveFlags, ModelFlags):
    """Flags of this script alone, and those of the experiment."""

    model_path: str = flag("pocket", "pocket, a model folder, or a hub id")
    output_path: Path | None = flag(None, "result file; default: results/adaptive_inference/DATASET_BUDGET.json")


def flags() -> script.FlagParser:
    """Make the script's parser."""
    return script.FlagParser(__doc__, Flags)


def main(argv: list[str]) -> None:
    """Answer, write the result file, and print the totals."""
    args = flags().parse_args(argv)
    args.datasets = check_datasets(args.datasets, "dataset", together=True)
    for name in ("num_samples", "max_new_tokens"):
        script.positive(name, getattr(args, name))
    args.budgets_ms = sorted(set(args.budgets_ms))
    for budget_ms in args.budgets_ms:
        check_budget_ms(budget_ms, "latency_budget")
    if args.output_path is not None and (not args.output_path.name or args.output_path.is_dir()):
        raise UserError(f"--output_path {args.output_path}: a folder; give the name of a file")
    prepare()
    # Imported now that threads are set, which must be done before torch is there.
    from tempovlm.lab import exp8_adaptive as adaptive

    plan = script.options_from(adaptive.Plan, vars(args))
    path = args.output_path or adaptive.default_path(plan.datasets, plan.budgets_ms)
    adaptive.check_output(path)
    sys.stdout.write(adaptive.render(adaptive.run(controlled(args), plan, path)) + f"{path}\n")


def controlled(args: Namespace) -> TempoVLM:
    """The model with its controller, on a calibrated machine."""
    from tempovlm.control.own_policy import is_own_policy
    from tempovlm.control.policies import is_tuned

    named = args.controller in POLICIES or is_tuned(args.controller) or is_own_policy(args.controller)
    if not named and not Path(args.controller).is_file():
        raise UserError(
            f"--controller_path {args.controller}: no such file; give a checkpoint, auto, table, table:NAME, "
            "fixed, or module:Class or file.py:Class of your own"
        )
    model = load(args.model_path, device=args.device, policy=args.controller)
    if args.controller != "fixed":
        model.calibrate()
    return model


if __name__ == "__main__":
    script.run(main)
