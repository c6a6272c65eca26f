"""Answers of a few tokens within short budgets, one after the other: how many are on time, and by what setting.

Each request has a budget in milliseconds and asks about one of eight pictures of 1024 × 768; the table of assumed
accuracies and the guard choose the setting by a calibration of this run. With random weights only times count.

    python benchmarks/budgets.py --budgets_ms 40 80
    python benchmarks/budgets.py --model molmoe-1b --random_weights --json benchmarks/results/budgets_h200.json
"""

# ruff: noqa: E402 - threads are set before torch is imported

from __future__ import annotations

import argparse
from collections import Counter
from pathlib import Path
from typing import Any

from tempovlm.engine.threads import pick_device, prepare

prepare()

import numpy as np

from company import PICTURES, QUESTION, SHAPE, engine_for
from output import write_json
from tempovlm.control.guard import Guard
from tempovlm.control.policies import assumed_table
from tempovlm.core.request import Request
from tempovlm.engine.calibration import measure
from tempovlm.engine.engine import Engine
from tempovlm.engine.environment import collect_stamp
from tempovlm.engine.glance import guarded
from tempovlm.latency.profile import LatencyProfile, OutputLength
from tempovlm.model.config import PRESETS

BUDGETS_MS = (7.0, 8.0, 10.0, 12.0, 20.0, 30.0)


def row(engine: Engine, guard: Guard, requests: list[Request]) -> dict[str, Any]:
    """Ask some requests, all with one budget."""
    answers = [engine.answer(one, guard) for one in requests]
    took_ms = [one.timings_ms["total"] for one in answers]
    settings = Counter(str(one.knobs) for one in answers)
    return {
        "budget_ms": requests[0].budget_ms,
        "requests": len(requests),
        "on_time": float(np.mean([one.budget_met for one in answers])),
        "feasible": float(np.mean([one.budget_feasible is not False for one in answers])),
        "p50_ms": float(np.median(took_ms)),
        "p99_ms": float(np.quantile(took_ms, 0.99)),
        "tokens": float(np.mean([one.num_output_tokens for one in answers])),
        "most_used": dict(settings.most_common(3)),
    }


def main() -> None:
    """Measure, and print or write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--model", default="pocket", help="pocket, or a model folder; a preset with random weights"
    )
    parser.add_argument("--random_weights", action="store_true", help="of the sizes that --model names")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--budgets_ms", type=float, nargs="+", default=BUDGETS_MS)
    parser.add_argument("--tokens", type=int, default=3, help="most tokens of an answer")
    parser.add_argument("--requests", type=int, default=300, help="of each budget")
    parser.add_argument("--json", type=Path, help="file to write; standard output without it")
    flags = parser.parse_args()
    if flags.random_weights and flags.model not in PRESETS:
        parser.error(f"--model {flags.model}: with --random_weights it must be one of {', '.join(PRESETS)}")
    engine, weights_hash = engine_for(flags.model, pick_device(flags.device), is_random=flags.random_weights)
    rng, output = np.random.default_rng(0), OutputLength.exactly(flags.tokens)
    pictures = [rng.integers(0, 256, SHAPE, dtype=np.uint8) for _ in range(PICTURES)]
    profile = LatencyProfile("", engine.space, output, measure(engine, output, pictures=pictures), None, {})
    guard = guarded(engine.runner, engine.space, assumed_table(engine.space), profile)
    run = engine.runner
    stamp = collect_stamp(
        model=engine.name, weights_hash=weights_hash, space=engine.space, device=run.device, dtype=run.dtype
    )
    rows = []
    for budget_ms in flags.budgets_ms:
        options: dict[str, Any] = {"question": QUESTION, "max_new_tokens": flags.tokens, "budget_ms": budget_ms}
        requests = [Request(images=(pictures[i % PICTURES],), **options) for i in range(flags.requests)]
        rows.append(row(engine, guard, requests))
    write_json({"stamp": stamp.to_json(), "rows": rows}, flags.json)


if __name__ == "__main__":
    main()
