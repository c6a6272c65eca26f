r"""Replay simulated requests against a running server, and compare who is answered right and on time.

Asks the questions of `simulate.py` with the same flags, with their pictures, at the same times. The times in
`--results_dir` must be this machine's own: the first command takes them. Nothing else may run meanwhile.
Each finished row is kept beside `--json` (`NAME.unfinished.json`) until all are there: after a kill the same
command goes on behind it.

Examples:
    python experiments/core_exp/run_core_experiment.py --dataset_names text_vqa --model_path pocket \
        --latency_only --latency_samples 16 --repeats 3 --output_dir runs/times
    python experiments/serving/replay.py --arrivals poisson --loads 0.5 1.0 1.7 --num_requests 300 \
        --policies native table --price derived 0 --json runs/replay.json \
        --results_dir results/core_exp_pocket_val results/core_exp_pocket_train runs/times
    taskset --cpu-list 2,3 python experiments/serving/replay.py --server_cores 0 1 --arrivals poisson --loads 1.0 \
        --num_requests 300 --policies table
    python experiments/serving/replay.py --url http://127.0.0.1:8000 --arrivals trace.csv --first_request 4409 \
        --num_requests 300 --policies table --simulated runs/load.json
"""

from __future__ import annotations

import sys

from tempovlm.lab import script
from tempovlm.lab.queueing.replay import Replay


def flags() -> script.FlagParser:
    """Make the script's parser."""
    return script.FlagParser(__doc__, Replay)


def main(argv: list[str]) -> None:
    """Replay, and print the table."""
    replay = script.options_from(Replay, vars(flags().parse_args(argv)))
    from tempovlm.engine.threads import prepare

    prepare()
    from tempovlm.lab.queueing.agreement import render_agreement
    from tempovlm.lab.queueing.replay import run_replay
    from tempovlm.lab.queueing.study import render_rows

    report = run_replay(replay)
    sys.stdout.write(f"{render_rows(report['rows'])}\n{render_agreement(report)}")
    if replay.json is not None:
        sys.stdout.write(f"{replay.json}\n")


if __name__ == "__main__":
    script.run(main)
