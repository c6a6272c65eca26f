"""Times the choices of three policies of the pocket, whole and in parts, and writes them as JSON.

`control` is the stage of whole answers, as experiment 8 reports it: on CUDA its laps lie between events of the
device, so that what the host does while the device encodes is not in it, and what the device waits for is. The
parts are readings of the host's clock around each call, in further answers: what is hidden shows there too. Every
question is asked once, so that nothing is remembered.

    python benchmarks/control.py --device cuda --json benchmarks/results/control_h200.json

An older commit is measured by its own source: `PYTHONPATH=OLD/src python benchmarks/control.py ...`.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from output import write_json
from tempovlm import api
from tempovlm.core.request import Answer
from tempovlm.core.units import now_ms
from tempovlm.data.catalog import load_samples
from tempovlm.data.registry import GENERATED
from tempovlm.data.sample import Sample

SHARES = (0.7, 1.0, 1.5)
"""Budgets, as shares of what the largest setting takes at most: some settings fit, and all of them."""

CHECKPOINT = "two_stage_controller/stage2/best_stage2_checkpoint.pt"
FOLDERS = {"cpu": Path("checkpoints"), "cuda": Path("checkpoints/gpu_h200")}
WARM = 20
"""Answers before the first that counts."""

Times = dict[str, list[float]]


def spread(times_ms: Sequence[float]) -> dict[str, float]:
    """Least, median and ninetieth percentile."""
    return {
        "ms_least": round(min(times_ms), 4),
        "ms_median": round(statistics.median(times_ms), 4),
        "ms_p90": round(float(np.quantile(times_ms, 0.9)), 4),
        "num": len(times_ms),
    }


def watch(owner: type, name: str, times: Times) -> Callable[[], None]:
    """Time every call of a method from now on; returns what ends that."""
    run = getattr(owner, name)

    def timed(*values: Any, **named: Any) -> Any:
        begin_ms = now_ms()
        try:
            return run(*values, **named)
        finally:
            times.setdefault(name, []).append(now_ms() - begin_ms)

    own = name in vars(owner)
    setattr(owner, name, timed)
    return lambda: setattr(owner, name, run) if own else delattr(owner, name)


def ask(vlm: Any, samples: Sequence[Sample], budgets_ms: Sequence[float]) -> list[Answer]:
    """Answer each question within one of the budgets, in turn."""
    return [
        vlm.answer(sample.image_path, sample.question, budgets_ms[i % len(budgets_ms)], style=sample.style)
        for i, sample in enumerate(samples)
    ]


def measure(policy: str, device: str, samples: Sequence[Sample], budgets_ms: Sequence[float]) -> dict[str, Any]:
    """Times of one policy's choices over the samples, within budgets or, without any, those of the profile."""
    from tempovlm.control.guard import Guard
    from tempovlm.engine.runner import Runner
    from tempovlm.latency.clock import CudaClock, HostClock

    vlm = api.load("pocket", device=device, policy=policy, progress=False)
    profile, largest = vlm.calibrate(), vlm.space.index(vlm.space.largest)
    budgets_ms = budgets_ms or [round(share * profile.upper_total_ms(largest), 1) for share in SHARES]
    answers = ask(vlm, samples, budgets_ms)[WARM:]
    times: Times = {}
    chooser = type(vlm.guard_for(api.request_of(None, "what?", budgets_ms[0], {})).policy)
    clock = HostClock if device == "cpu" else CudaClock
    parts = [(Guard, "choose_tier"), (Guard, "choose_compute"), (Guard, "rehearse"), (clock, "elapsed_ms")]
    parts += [(chooser, "look"), (Runner, "see"), (chooser, "settle")]
    ends = [watch(owner, name, times) for owner, name in parts if hasattr(owner, name)]
    try:
        ask(vlm, samples, budgets_ms)
    finally:
        for end in reversed(ends):
            end()
    return {
        "control": spread([answer.timings_ms["control"] for answer in answers]),
        "total": spread([answer.timings_ms["total"] for answer in answers]),
        "parts": {name: spread(some[WARM:]) for name, some in times.items() if len(some) > WARM},
        "settings": len({answer.knobs for answer in answers}),
        "budgets_ms": budgets_ms,
        "stamp": vlm.stamp("synthetic").to_json(),
    }


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--checkpoint", type=Path, help="two-stage controller; unless told, the device's own")
    parser.add_argument("--budgets_ms", type=float, nargs="+", default=(), help="unless told, by the profile")
    parser.add_argument("--num_samples", type=int, default=240, help="questions, the warm ones beside them")
    parser.add_argument("--json", type=Path, help="file to write; standard output without it")
    flags = parser.parse_args()
    each = -(-(flags.num_samples + WARM) // len(GENERATED))
    samples = [one for name in GENERATED for one in load_samples(name, num_samples=each)]
    policies = {"two_stage": str(flags.checkpoint or FOLDERS[flags.device] / CHECKPOINT)}
    policies |= {"table": "table", "fixed": "fixed"}
    rows, stamp = {}, None
    for name, policy in policies.items():
        rows[name] = measure(policy, flags.device, samples, flags.budgets_ms)
        stamp = rows[name].pop("stamp")
    write_json({"stamp": stamp, **rows}, flags.json)


if __name__ == "__main__":
    main()
