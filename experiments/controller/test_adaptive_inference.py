"""Exp 8: answer a data set within budgets through the whole pipeline, with a trained controller behind the guard.

Writes knobs, stage times, answer and score of each sample, and totals by budget. What is done is kept beside the
result file, so the same command resumes.
"""

from __future__ import annotations

import sys
from argparse import Namespace
from pathlib import Path

from tempovlm.api import POLICIES, TempoVLM, load
from tempovlm.core.errors import UserError
from tempovlm.core.request import check_budget_ms
from tempovlm.engine.threads import prepare
from tempovlm.lab import script


def flags() -> script.FlagParser:
    """The script's flags."""
    parser = script.FlagParser(str(__doc__).splitlines()[0])
    add = parser.add_argument
    add("--model_path", default="pocket", help="pocket, a model folder, or a hub id")
    add("--controller_path", default="auto", help="checkpoint of any controller; auto, table or fixed without one")
    add("--dataset", nargs="+", default=["text_vqa"], help="data sets or files of your own, mixed in equal parts")
    add("--num_samples", type=int, default=100, help="questions in all; each is answered at every budget")
    add("--latency_budget", nargs="+", type=float, default=[200.0], help="one or several budgets in milliseconds")
    add("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    add("--output_path", type=Path, help="result file; results/adaptive_inference/DATASET_BUDGET.json unless told")
    add("--data_dir", type=Path, help="folder of the data; the test bed in the cache directory unless told")
    add("--on_deadline", choices=("finish", "stop"), default="finish", help="finish a late answer, or stop it")
    add("--max_new_tokens", type=int, default=16, help="cap on the tokens of an answer")
    add("--seed", type=script.seed, default=42, help="picks the samples and the order of the budgets")
    return parser


def main(argv: list[str]) -> None:
    """Answer, write the result file, and print the totals."""
    args = flags().parse_args(argv)
    names = tuple(script.check_datasets(args.dataset, "dataset", together=True))
    for name in ("num_samples", "max_new_tokens"):
        script.positive(name, getattr(args, name))
    budgets_ms = tuple(sorted(set(args.latency_budget)))
    for budget_ms in budgets_ms:
        check_budget_ms(budget_ms, "latency_budget")
    if args.output_path is not None and (not args.output_path.name or args.output_path.is_dir()):
        raise UserError(f"--output_path {args.output_path}: a folder; give the name of a file")
    prepare()
    # Imported now that threads are set, which must be done before torch is there.
    from tempovlm.lab import exp8_adaptive as adaptive

    plan = adaptive.Plan(
        datasets=names,
        budgets_ms=budgets_ms,
        num_samples=args.num_samples,
        controller=args.controller_path,
        on_deadline=args.on_deadline,
        max_new_tokens=args.max_new_tokens,
        data_dir=args.data_dir,
        seed=args.seed,
    )
    path = args.output_path or adaptive.default_path(names, budgets_ms)
    sys.stdout.write(adaptive.render(adaptive.run(controlled(args), plan, path)) + f"{path}\n")


def controlled(args: Namespace) -> TempoVLM:
    """The model with its controller, on a calibrated machine."""
    from tempovlm.control.policies import is_tuned

    named = args.controller_path in POLICIES or is_tuned(args.controller_path)
    if not named and not Path(args.controller_path).is_file():
        raise UserError(
            f"--controller_path {args.controller_path}: no such file; give a checkpoint, auto, table, table:NAME "
            "or fixed"
        )
    model = load(args.model_path, device=args.device, policy=args.controller_path)
    if args.controller_path != "fixed":
        model.calibrate()
    return model


if __name__ == "__main__":
    script.run(main)
