"""Measures deadlines with company: long answers, callers at once, stopped answers, and the time after a burst.

Each part asks one model of this machine, whose clock is the caller's:

- `lengths`: caps of 1 to 200 tokens and mixed styles under budgets from feasible to ample, finished or stopped;
- `callers`: threads that ask at the same moment, with that many times the median of the native setting;
- `stop`: the high tier under budgets far below what it takes;
- `burst`: other work on all cores while requests run, then single requests until the tier is as before.

    python benchmarks/deadlines.py --json benchmarks/results/deadlines_cpu.json
"""

from __future__ import annotations

import argparse
import logging
import multiprocessing
import os
import statistics
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from output import write_json
from tempovlm import api
from tempovlm.core.request import Answer
from tempovlm.data.catalog import load_samples
from tempovlm.data.registry import DATASETS, GENERATED
from tempovlm.data.sample import Sample

CAPS = (1, 2, 4, 8, 16, 40, 100, 200)
STYLES = (*(DATASETS[name].style for name in GENERATED if DATASETS[name].task == "vqa"), "long_caption")
SHARES = (1.0, 1.3, 2.0, 4.0)
"""Budgets, as multiples of the least that is expected to suffice for the request."""

STOP_MS = (5.0, 10.0, 20.0, 60.0)


def samples_of(num_samples: int) -> list[Sample]:
    """Questions of all generated data sets in turn."""
    each = -(-num_samples // len(GENERATED))
    columns = [load_samples(name, "val", num_samples=each) for name in GENERATED]
    return [sample for row in zip(*columns, strict=True) for sample in row][:num_samples]


def share_in_time(answers: Sequence[Answer], slack: float = 1.0) -> float:
    """Share of the answers that took no longer than their budget times the slack."""
    return sum(a.timings_ms["total"] <= slack * float(a.budget_ms or 0) for a in answers) / len(answers)


def lengths(vlm: api.TempoVLM, samples: Sequence[Sample], on_deadline: str) -> dict[str, Any]:
    """Ask with all caps and styles, in random order, under budgets that are feasible for each."""
    rng = np.random.default_rng(0)
    answers: list[Answer] = []
    for number, sample in enumerate(samples):
        cap, style = CAPS[number % len(CAPS)], STYLES[number // len(CAPS) % len(STYLES)]
        fields = {"style": style, "max_new_tokens": cap, "on_deadline": on_deadline}
        request = api.request_of(sample.image_path, sample.question, 1.0, fields)
        least_ms = vlm.guard_for(request).budgets_ms().min()
        budget_ms = float(least_ms * SHARES[int(rng.integers(len(SHARES)))])
        answers.append(vlm.answer(sample.image_path, sample.question, budget_ms, **fields))
    late = [a.timings_ms["total"] / float(a.budget_ms or 1) for a in answers if not a.budget_met]
    return {
        "num": len(answers),
        "on_time": round(share_in_time(answers), 4),
        "within_1.1": round(share_in_time(answers, 1.1), 4),
        "worst_ratio": round(max(a.timings_ms["total"] / float(a.budget_ms or 1) for a in answers), 3),
        "late": [round(one, 3) for one in sorted(late)],
        "longest_tokens": max(a.num_output_tokens for a in answers),
    }


def callers(
    vlm: api.TempoVLM, samples: Sequence[Sample], count: int, native_ms: float, rounds: int
) -> dict[str, Any]:
    """Ask from `count` threads at once, each with `count` times the median of the native setting."""
    answers: list[Answer] = []
    for turn in range(rounds):
        some, gate = [samples[(turn * count + i) % len(samples)] for i in range(count)], threading.Barrier(count)

        def ask(sample: Sample, gate: threading.Barrier = gate) -> None:
            gate.wait()
            answers.append(vlm.answer(sample.image_path, sample.question, count * native_ms))

        threads = [threading.Thread(target=ask, args=(sample,)) for sample in some]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    ratios = [a.timings_ms["total"] / float(a.budget_ms or 1) for a in answers]
    return {
        "num": len(answers),
        "on_time": round(share_in_time(answers), 4),
        "budget_ms": round(count * native_ms, 1),
        "worst_ratio": round(max(ratios), 3),
        "median_queue_ms": round(statistics.median(a.timings_ms["queue"] for a in answers), 1),
    }


def stopped(vlm: api.TempoVLM, samples: Sequence[Sample]) -> dict[str, Any]:
    """Ask the high tier under budgets that it cannot keep."""
    found = {}
    for budget_ms in STOP_MS:
        took_ms = [
            vlm.answer(s.image_path, s.question, budget_ms, tier="high", on_deadline="stop").timings_ms["total"]
            for s in samples[:40]
        ]
        found[f"{budget_ms:g}"] = {
            "median_ms": round(statistics.median(took_ms), 2),
            "worst_ms": round(max(took_ms), 2),
        }
    return found


def _burn(stop: Any) -> None:
    values = np.random.default_rng(0).random((400, 400))
    while not stop.is_set():
        values = np.tanh(values @ values.T / 400)


def burst(vlm: api.TempoVLM, samples: Sequence[Sample], budget_ms: float) -> dict[str, Any]:
    """Count the answers after a burst until the tier is as before for good."""

    def ask(number: int) -> Answer:
        sample = samples[number % len(samples)]
        return vlm.answer(sample.image_path, sample.question, budget_ms)

    before = [ask(i) for i in range(60)]
    usual = {a.knobs.tier for a in before[20:]}
    stop = multiprocessing.get_context("spawn").Event()
    others = [
        multiprocessing.get_context("spawn").Process(target=_burn, args=(stop,), daemon=True)
        for _ in range(len(os.sched_getaffinity(0)))
    ]
    for one in others:
        one.start()
    time.sleep(3.0)
    during = [ask(i) for i in range(24)]
    stop.set()
    for one in others:
        one.join()
    after = [ask(i) for i in range(200)]
    other = [place for place, a in enumerate(after) if a.knobs.tier not in usual]
    return {
        "budget_ms": budget_ms,
        "before_on_time": share_in_time(before),
        "during_on_time": round(share_in_time(during), 4),
        "during_other_tiers": sum(a.knobs.tier not in usual for a in during),
        "after_on_time": share_in_time(after),
        "after_other_tiers": len(other),
        "answers_until_as_before": other[-1] + 1 if other else 0,
    }


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="pocket", help="pocket, or a model folder")
    parser.add_argument("--num_samples", type=int, default=400, help="requests of the part about lengths")
    parser.add_argument("--json", type=Path, help="file to write; standard output without it")
    args = parser.parse_args()
    logging.getLogger("tempovlm").setLevel(logging.ERROR)
    samples = samples_of(args.num_samples)
    vlm = api.load(args.model, progress=False)
    vlm.calibrate()
    native_ms = statistics.median(vlm.answer(s.image_path, s.question).timings_ms["total"] for s in samples[:40])
    result: dict[str, Any] = {"stamp": vlm.stamp("synthetic").to_json(), "native_ms": round(native_ms, 2)}
    for name in ("finish", "stop"):
        result[f"lengths_{name}"] = lengths(vlm, samples, name)
    for count in (2, 4):
        result[f"callers_{count}"] = callers(vlm, samples, count, native_ms, 200 // count)
    result["stop"] = stopped(vlm, samples)
    request = api.request_of(samples[0].image_path, samples[0].question, 1.0, {})
    enough_ms = vlm.guard_for(request).budgets_ms()[vlm.space.index(vlm.space.native)]
    result["burst"] = burst(vlm, samples, round(1.2 * float(enough_ms), 1))
    write_json(result, args.json)


if __name__ == "__main__":
    main()
