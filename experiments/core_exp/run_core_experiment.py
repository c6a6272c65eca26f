"""The core experiment: accuracy and latency of every knob setting on one set of questions.

Run alone or, with several GPUs, by `torchrun --nproc_per_node N`; run again to resume. Writes one Parquet file a
data set to `--output_dir`, which the other experiments read.
"""

from __future__ import annotations

import sys
from argparse import Namespace
from pathlib import Path

import tempovlm
from tempovlm.lab import script
from tempovlm.lab.core_exp.plan import SweepPlan, choose_settings, draw_samples
from tempovlm.lab.core_exp.processes import Share


def flags() -> script.FlagParser:
    """The script's flags."""
    parser = script.FlagParser(str(__doc__).splitlines()[0])
    add = parser.add_argument
    add("--model_path", required=True, help="pocket, a model folder, or a hub id")
    add("--dataset_names", nargs="+", required=True, help="data sets, or files of your own questions")
    add("--output_dir", type=Path, required=True, help="results directory; run again with it to resume")
    add("--num_samples", type=int, default=300, help="questions of each data set")
    add("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    add("--tiers", nargs="+", help="vision tiers; all unless told")
    add("--top_k", nargs="+", type=int, help="experts per token; all of the knob space unless told")
    add("--num_blocks", nargs="+", type=int, help="depths; all of the knob space unless told")
    add("--importance_scores_file", type=Path, help="which blocks run first; the model's own ranking unless told")
    add("--split", choices=("val", "train"), default="val", help="which questions")
    add("--twins", action="store_true", help="ask about the pictures' twins, for the noise-corrected oracle")
    add("--data_dir", type=Path, help="folder of the data sets")
    add("--batch_size", type=int, help="questions answered together for accuracy")
    add("--latency_only", action="store_true", help="no batched accuracy: only the timed questions get rows")
    add("--latency_samples", type=int, help="questions of each data set that are timed at batch 1")
    add("--repeats", type=int, help="passes that time each of them once at each setting")
    add("--warmup", type=int, help="untimed answers before a question's first pass in each run")
    add("--max_new_tokens", nargs="+", type=int, help="caps, given to the questions in turn")
    add("--seed", type=script.seed, help="of the draw of questions and the order of timing")
    add("--format", choices=("parquet", "json"), default="parquet", help="json: the predecessor's layout")
    return parser.with_defaults(SweepPlan)


def main(argv: list[str]) -> None:
    """Run or resume the sweep."""
    args = flags().parse_args(argv)
    names = script.check_datasets(args.dataset_names, "dataset_names")
    for flag in ("num_samples", "batch_size", "repeats"):
        script.positive(flag, getattr(args, flag))
    if args.latency_only and args.latency_samples == 0:
        raise tempovlm.UserError("--latency_only: nothing would be run; give --latency_samples")
    paths = sweep(args, names)
    sys.stdout.write("".join(f"{path}\n" for path in paths[:4]))
    if len(paths) > 4:
        sys.stdout.write(f"and {len(paths) - 4} more\n")


def sweep(args: Namespace, names: list[str]) -> list[Path]:
    """Load the model and the questions, and do what is not done yet."""
    share = Share.of_process()
    device = share.device(args.device)
    warmup = share.rank == 0 and args.latency_samples > 0  # nothing else is timed
    model = tempovlm.load(args.model_path, device=device, policy="fixed", calibrate=False, warmup=warmup)
    # Imported now that `load` has set the threads, which must be done before torch is there.
    from tempovlm.lab.core_exp.ledger import Ledger
    from tempovlm.lab.core_exp.sweep import conduct, with_ranking

    engine = with_ranking(model.engine, args.importance_scores_file)
    plan = SweepPlan(
        settings=choose_settings(model.space, args.tiers, args.top_k, args.num_blocks),
        batch_size=0 if args.latency_only else args.batch_size,
        latency_samples=args.latency_samples,
        repeats=args.repeats,
        warmup=args.warmup,
        max_new_tokens=tuple(args.max_new_tokens),
        seed=args.seed,
        twins=args.twins,
    )
    samples, source = draw_samples(names, args.split, args.data_dir, args.num_samples, args.seed, args.twins)
    conditions = plan.conditions(args.split)
    ledger = Ledger(args.output_dir, model.stamp(source), engine.ranking, conditions, args.format, share.rank)
    return conduct(engine, samples, plan, ledger, share)


if __name__ == "__main__":
    script.run(main)
