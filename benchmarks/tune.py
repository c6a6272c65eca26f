"""Measures the loss of `tempovlm tune` against asking every setting every question, on stored answers.

Draws questions from the pocket's core experiment many times, tunes on each draw, and compares at five budgets the
setting that is chosen then with the one that an exhaustive sweep of the same questions would choose: on these
questions, and on all others. Latencies are medians of a core experiment with times. Nothing is timed here.

    python benchmarks/tune.py
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np

from tempovlm.control.select import TIE, best
from tempovlm.core.files import make_folder
from tempovlm.core.knobs import KnobSpace
from tempovlm.core.paths import write_whole
from tempovlm.lab.core_exp.store import read_results
from tempovlm.lab.tune import estimates, race

ROOT = Path(__file__).resolve().parents[1]
RESULT = ROOT / "benchmarks" / "results" / "tune.json"
BUDGETS_MS = (40.0, 70.0, 90.0, 110.0, 150.0)


def read(accuracies: Path, times: Path, space: KnobSpace) -> tuple[np.ndarray, np.ndarray, dict[str, Any]]:
    """(N, K) accuracies, (K,) median totals and the accuracies' stamp."""
    frame, timed = read_results([accuracies], space=space), read_results([times], space=space)
    knobs = ["tier", "top_k", "num_blocks"]
    order = [(one.tier, one.top_k, one.num_blocks) for one in space]
    table = frame.pivot(index=["dataset", "question_id"], columns=knobs, values="accuracy")[order]
    costs_ms = timed.groupby(knobs)["T_total"].median()[order]
    return table.to_numpy(), costs_ms.to_numpy(), next(iter(frame.attrs["stamps"].values()))


def simulate(accuracy: np.ndarray, costs_ms: np.ndarray, space: KnobSpace, num_samples: int, draws: int) -> Any:
    """Regrets (draws, budgets) on the drawn questions and on the others, in points, and the share of the work."""
    rng = np.random.default_rng(0)
    own, others, work = [], [], []
    for draw in range(draws):
        places = rng.choice(len(accuracy), num_samples, replace=False)
        drawn, rest = accuracy[places], np.delete(accuracy, places, axis=0).mean(axis=0)
        found, kept = race(lambda q, left, a=drawn: a[np.ix_(q, left)], num_samples, space, costs_ms, draw)
        work.append(float((~np.isnan(found) * costs_ms).sum() / costs_ms.sum() / num_samples))
        means, tuned = drawn.mean(axis=0), estimates(found, kept, space)
        pairs = [
            tuple(int(best(scores, costs_ms <= budget_ms, costs_ms, tie=TIE)) for scores in (means, tuned))
            for budget_ms in BUDGETS_MS
        ]
        own.append([100 * (means[i] - means[j]) for i, j in pairs])
        others.append([100 * (rest[i] - rest[j]) for i, j in pairs])
    return np.array(own), np.array(others), np.array(work)


def main() -> None:
    """Simulate and write the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--accuracies", type=Path, default=ROOT / "results" / "core_exp_pocket_val")
    parser.add_argument("--times", type=Path, default=ROOT / "results" / "core_exp_pocket_cpu")
    parser.add_argument("--num_samples", type=int, default=100)
    parser.add_argument("--draws", type=int, default=200)
    parser.add_argument("--output", type=Path, default=RESULT)
    args = parser.parse_args()
    make_folder(args.output.parent)

    from tempovlm.api import model_folder
    from tempovlm.model.weights import read_config

    space = KnobSpace.for_model(read_config(model_folder("pocket")).shape)
    accuracy, costs_ms, stamp = read(args.accuracies, args.times, space)
    own, others, work = simulate(accuracy, costs_ms, space, args.num_samples, args.draws)
    rows = [
        {
            "budget_ms": budget_ms,
            "regret_points": round(float(own[:, i].mean()), 3),
            "held_out_regret_points": round(float(others[:, i].mean()), 3),
            "held_out_regret_p95_points": round(float(np.quantile(others[:, i], 0.95)), 3),
            "share_within_one_point": round(float((own[:, i] <= 1 + 1e-9).mean()), 3),
        }
        for i, budget_ms in enumerate(BUDGETS_MS)
    ]
    result = {
        "budgets": rows,
        "share_of_exhaustive_work": {"mean": round(float(work.mean()), 3), "max": round(float(work.max()), 3)},
        "num_samples": args.num_samples,
        "draws": args.draws,
        "accuracies": args.accuracies.name,
        "times": args.times.name,
        "stamp": stamp,
    }
    write_whole(args.output, json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
