"""Measures answers with company: a number of requests in flight, at one setting or at mixed ones, as JSON.

As many threads as requests in flight ask one engine; each asks again as soon as it has its answer, a different
question about one of eight pictures of 1024 × 768. A row has the answers a second, and the median, the 99th
percentile and the maximum of the times from call to answer, at the native setting, at the cheapest, or at
settings drawn at random. `cpu_ms` is the process's own time for an answer, all threads together. `batches` has
the rates of `answer_batch`. With `--baseline` another checkout of this repository is measured first, by its own
source, in the same run: `baseline_answers_per_s` is its rate with one request in flight, and its own rows and
batches stand under `baseline`. With random weights only times count.

Where requests are answered together, each row of several is measured again for `--predict_seconds`, with a
deadline far away and by a calibration of this run: `predicted_over_taken` says how far off the times were that
those among others were told (docs/measuring.md).

    python benchmarks/company.py --json benchmarks/results/company_cpu.json
    python benchmarks/company.py --model molmoe-1b --random_weights --baseline ../old --json company_h200.json
"""

# ruff: noqa: E402 - threads are set before torch is imported

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from tempovlm.engine.threads import pick_device, prepare

prepare()

import numpy as np
import torch

from engine_reference import engine_of, fill
from tempovlm import api
from tempovlm.control.guard import Guard
from tempovlm.core.knobs import KnobConfig, KnobSpace
from tempovlm.core.request import Answer, Request
from tempovlm.engine.batching import answer_batch
from tempovlm.engine.engine import Engine
from tempovlm.engine.environment import collect_stamp
from tempovlm.model.config import PRESETS
from tempovlm.model.weights import empty_model

NAMES = ("native", "cheapest", "mixed")
IN_FLIGHT = (1, 2, 4, 8, 16)
PICTURES, SHAPE = 8, (768, 1024, 3)
TOKENS = 6
QUESTION = "what does the sign on the left of the door say in the second picture from above"

Ask = Callable[[int], tuple[Request, KnobConfig]]
Reply = Callable[[Request, KnobConfig], Answer]


def settings_of(name: str, space: KnobSpace) -> list[KnobConfig]:
    """Return the settings that requests take in turn: one, or many drawn at random."""
    if name == "mixed":
        return [space.settings[i] for i in np.random.default_rng(0).integers(len(space), size=4096)]
    return [space.native if name == "native" else space.cheapest]


def draw_pictures() -> list[np.ndarray]:
    """Return the pictures that requests are about."""
    rng = np.random.default_rng(0)
    return [rng.integers(0, 256, SHAPE, dtype=np.uint8) for _ in range(PICTURES)]


def asker(name: str, space: KnobSpace) -> Ask:
    """Return the function that makes the n-th request of a kind and its setting."""
    pictures = draw_pictures()
    settings, words = settings_of(name, space), QUESTION.split()

    def ask(number: int) -> tuple[Request, KnobConfig]:
        question = " ".join(words[: 3 + number % (len(words) - 3)]) + "?"
        request = Request(images=(pictures[number % PICTURES],), question=question, max_new_tokens=TOKENS)
        return request, settings[number % len(settings)]

    return ask


def at_setting(engine: Engine) -> Reply:
    """Return the function that answers a request without a deadline at a setting."""
    return lambda request, knobs: engine.answer(request, Guard.fixed(knobs, engine.space))


def in_flight(reply: Reply, ask: Ask, count: int, seconds: float) -> dict[str, Any]:
    """Ask from `count` threads for some seconds; return the rate, and the times of all answers."""
    numbers, lock, gate = iter(range(1 << 30)), threading.Lock(), threading.Barrier(count)
    took_ms: list[float] = []

    def run() -> None:
        gate.wait()
        end_s = time.perf_counter() + seconds
        while (begin_s := time.perf_counter()) < end_s:
            with lock:
                request, knobs = ask(next(numbers))
            reply(request, knobs)
            took_ms.append(1e3 * (time.perf_counter() - begin_s))

    with ThreadPoolExecutor(count) as pool:
        begin_s, begin_cpu_s = time.perf_counter(), time.process_time()
        for done in [pool.submit(run) for _ in range(count)]:
            done.result()
        passed_s, cpu_s = time.perf_counter() - begin_s, time.process_time() - begin_cpu_s
    return {
        "answers_per_s": len(took_ms) / passed_s,
        **percentiles(took_ms),
        "cpu_ms": 1e3 * cpu_s / len(took_ms),
    }


def percentiles(took_ms: Sequence[float]) -> dict[str, float]:
    """Return the median, the 99th percentile and the maximum."""
    p50, p99 = np.quantile(took_ms, (0.5, 0.99))
    return {"p50_ms": float(p50), "p99_ms": float(p99), "max_ms": max(took_ms)}


def batch(engine: Engine, ask: Ask, size: int, seconds: float) -> dict[str, Any]:
    """Ask batches of a size, one after the other."""

    def run() -> list[Answer]:
        asked = [ask(number) for number in range(size)]
        guards = {id(request): Guard.fixed(knobs, engine.space) for request, knobs in asked}
        return answer_batch(engine, [request for request, _ in asked], lambda one: guards[id(one)])

    run()
    begin_s, count = time.perf_counter(), 0
    while (passed_s := time.perf_counter() - begin_s) < seconds or not count:
        run()
        count += 1
    return {"answers_per_s": size * count / passed_s}


def engine_for(model: str, device: torch.device, *, is_random: bool) -> tuple[Engine, str]:
    """Return an engine that is warmed up, and the hash of its weights; with random ones of a preset's sizes."""
    if not is_random:
        loaded = api.load(model, device=str(device), progress=False)
        return loaded.engine, loaded.weights_hash
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    engine = engine_of(fill(empty_model(PRESETS[model], device, dtype)), f"{model}, random weights")
    engine.warmup()
    return engine, "random"


def predictor(engine: Engine, seconds: float) -> Callable[[Ask, int], dict[str, Any]]:
    """Calibrate, and return the function that measures predictions for `seconds` a row; nothing for 0 of them."""
    if not seconds:
        return lambda _ask, _count: {}
    from company_predictions import Predictions, calibrated  # an older checkout may lack it

    profile = calibrated(engine, TOKENS, draw_pictures())

    def found(ask: Ask, count: int) -> dict[str, Any]:
        if profile is None or count == 1:
            return {"predicted_over_taken": None}
        predictions = Predictions(engine, profile)
        in_flight(predictions.answer, ask, count, seconds)
        return {"predicted_over_taken": predictions.summary()}

    return found


def measure(flags: argparse.Namespace) -> dict[str, Any]:
    """Measure the package that is imported."""
    engine, weights_hash = engine_for(flags.model, pick_device(flags.device), is_random=flags.random_weights)
    run = engine.runner
    stamp = collect_stamp(
        model=engine.name, weights_hash=weights_hash, space=engine.space, device=run.device, dtype=run.dtype
    )
    rows, batches, reply, foreseen = [], [], at_setting(engine), predictor(engine, flags.predict_seconds)
    for name in flags.names:
        ask = asker(name, engine.space)
        for number in range(2 * PICTURES):  # what belongs to a picture's size is made once
            reply(*ask(number))
        for count in flags.in_flight:
            found = in_flight(reply, ask, count, flags.seconds) | foreseen(ask, count)
            rows.append({"name": name, "in_flight": count, **found})
            print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
        for size in flags.batches:
            batches.append({"name": name, "size": size, **batch(engine, ask, size, flags.seconds)})
            print(json.dumps(batches[-1]), file=sys.stderr, flush=True)
    return {"stamp": stamp.to_json(), "rows": rows, "batches": batches}


def measure_tree(tree: Path, flags: argparse.Namespace, *more: str) -> dict[str, Any]:
    """Measure a checkout in a process of its own, by its own source, with `more` flags."""
    words = [*(a for a in sys.argv[1:] if a != "--once"), *more]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join((f"{tree}/src", f"{tree}/benchmarks", *sys.path[1:]))}
    command = [sys.executable, "-P", str(Path(__file__).resolve()), *words, "--once"]
    done = subprocess.run(
        command, env=env, stdout=subprocess.PIPE, text=True, check=False, timeout=flags.timeout_s
    )
    if done.returncode:
        sys.exit(f"{tree}: could not be measured; its messages are above")
    return json.loads(done.stdout)


def with_baseline(found: dict[str, Any], baseline: dict[str, Any]) -> dict[str, Any]:
    """Return the result with the other checkout's rate of one request in flight in each row."""
    alone = {row["name"]: row["answers_per_s"] for row in baseline["rows"] if row["in_flight"] == 1}
    rows = [row | {"baseline_answers_per_s": alone.get(row["name"])} for row in found["rows"]]
    return found | {"rows": rows, "baseline": baseline}


def read_flags() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--model", default="pocket", help="pocket, or a model folder; with --random_weights a preset"
    )
    parser.add_argument("--random_weights", action="store_true", help="of the sizes that --model names")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--names", nargs="+", choices=NAMES, default=NAMES)
    parser.add_argument("--in_flight", type=int, nargs="+", default=IN_FLIGHT, help="requests at a time")
    parser.add_argument("--batches", type=int, nargs="*", default=IN_FLIGHT, help="sizes for answer_batch")
    parser.add_argument("--seconds", type=float, default=3.0, help="time of a row")
    parser.add_argument(
        "--predict_seconds", type=float, default=3.0, help="time for a row's predictions; 0 for none"
    )
    parser.add_argument("--baseline", type=Path, help="checkout to compare with; without it, this one's own rates")
    parser.add_argument("--timeout_s", type=float, default=1800.0, help="most seconds for a checkout")
    parser.add_argument("--json", type=Path, help="file to write; standard output without it")
    parser.add_argument("--once", action="store_true", help=argparse.SUPPRESS)
    flags = parser.parse_args()
    if flags.random_weights and flags.model not in PRESETS:
        parser.error(f"--model {flags.model}: with --random_weights it must be one of {', '.join(PRESETS)}")
    if flags.baseline is not None and not (flags.baseline / "src" / "tempovlm").is_dir():
        parser.error(f"--baseline {flags.baseline}: no checkout of this repository; it has no src/tempovlm")
    return flags


def main() -> None:
    """Measure, and print or write."""
    from output import write_json  # an older checkout, measured by its own source, may lack it

    flags = read_flags()
    if flags.once:
        print(json.dumps(measure(flags)))
        return
    baseline = (
        None if flags.baseline is None else measure_tree(flags.baseline.resolve(), flags, "--predict_seconds", "0")
    )
    found = measure_tree(Path(__file__).resolve().parents[1], flags)
    write_json(with_baseline(found, found if baseline is None else baseline), flags.json)


if __name__ == "__main__":
    main()
