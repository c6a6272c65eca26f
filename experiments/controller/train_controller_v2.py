"""Exp 5: train a controller of all three knobs by GRPO, end to end, on results of the core experiment.

Writes `best_controller.pt`, `report.json` and a log of every seed to `--output_dir`; resumes.
"""

from __future__ import annotations

import sys
from pathlib import Path

import tempovlm
from tempovlm.lab import script
from tempovlm.lab.options import GrpoOptions

FIELDS = ("output_dir", "architecture", "hidden_dim", "num_llm_blocks", "train_split", "compare_with", "data_dir")

ESTIMATOR = Path("checkpoints/latency_estimator/best_latency_estimator.pt")


def flags() -> script.FlagParser:
    """The script's flags."""
    parser = script.FlagParser(str(__doc__).splitlines()[0])
    add = parser.add_argument
    add("--results_dir", nargs="+", type=Path, required=True, help="results of the core experiment")
    add("--dataset_names", nargs="+", required=True, help="data sets")
    add("--model_path", required=True, help="pocket, a model folder, or a hub id")
    add("--output_dir", type=Path, default=Path("checkpoints/controller/grpo"), help="for all files")
    add("--architecture", default="two_stage", help="two_stage or llm_based")
    add("--latency_estimator_path", type=Path, default=ESTIMATOR, help="checkpoint of Exp 1")
    add("--latency_source", choices=("estimator", "measured"), default="estimator", help="of the reward")
    add("--estimator_only", action="store_true", help="nothing run, nothing measured: table and estimator")
    add("--batch_size", type=int, default=64, help="questions of a batch")
    add("--num_epochs", type=int, default=100, help="passes over the training questions")
    add("--lr", type=float, default=1e-4, help="learning rate at the start")
    add("--hidden_dim", type=int, default=128, help="units of a hidden layer")
    add("--num_llm_blocks", type=int, default=2, help="of the model, that the LLM-based controller runs")
    add("--train_split", type=float, default=0.8, help="share of the pictures for training")
    add("--compare_with", type=Path, help="checkpoint of Exp 4 to be judged beside it")
    add("--data_dir", type=Path, help="folder of the data sets")
    add("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    add("--seed", type=script.seed, default=42, help="of the split and, without --seeds, of the training")
    add("--seeds", nargs="+", type=script.seed, help="train once with each, for the spread")
    return parser.add_options(GrpoOptions)


def main(argv: list[str]) -> None:
    """Train, write everything, and print the report."""
    args = flags().parse_args(argv)
    names = script.check_datasets(args.dataset_names, "dataset_names")
    if args.estimator_only and (args.accuracy_source, args.latency_source) != ("table", "estimator"):
        raise tempovlm.UserError("--estimator_only: leave --accuracy_source and --latency_source as they are")
    model = tempovlm.load(args.model_path, device=args.device, policy="fixed", calibrate=False, warmup=False)
    # Imported now that `load` has set the threads, which must be done before torch is there.
    from tempovlm.lab import exp5_end_to_end as joint

    job = joint.JointJob(
        engine=model.engine,
        weights_hash=model.weights_hash,
        results_dirs=args.results_dir,
        datasets=names,
        latency_estimator_path=None if args.latency_source == "measured" else args.latency_estimator_path,
        seeds=args.seeds or [args.seed],
        options=script.options_from(GrpoOptions, {**vars(args), "device": str(model.engine.device)}),
        **{name: getattr(args, name) for name in FIELDS},
    )
    sys.stdout.write(joint.render(joint.run_job(job)) + f"{args.output_dir / joint.CHECKPOINT}\n")


if __name__ == "__main__":
    script.run(main)
