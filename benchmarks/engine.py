"""The engine's stages and whole answers against the hardware's floor and plain implementations, as JSON.

A floor is the larger of bytes over copy bandwidth and operations over matrix rate, both measured in the same run
on the same device; bytes and operations are those of `core/cost.py`. Peers run in the same process: `eager` is
this project's model operation by operation, `loop` a generic library's way (a Python loop over the experts that
are hit, a cache that is concatenated), and last, on a GPU with `--peers`, transformers' decoder. Before anything
is timed, `engine_reference` checks outputs against float32 and a graph's tokens against its kernels'. A row that
fails is reported and the others go on; the file is written after each. With random weights only times count.

    python benchmarks/engine.py --model molmoe-1b --random-weights --json benchmarks/results/engine_h200.json
    python benchmarks/engine.py --model pocket --device cpu --json benchmarks/results/engine_cpu.json

With `--weights fp8` or `int8` decode rows have the peer `bf16_weights`, and a trained model's loss is measured.
"""

# ruff: noqa: E402 - threads are set before torch is imported

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import math
import subprocess
import sys
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any, get_args

from tempovlm.engine.threads import pick_device, prepare

prepare()

import torch

from engine_peers import add_transformers
from engine_reference import check, engine_of, engine_without_end, fill
from engine_rows import Bench
from engine_table import slower_where_faster_was_due, table
from engine_timing import FEW
from quantised import quality
from tempovlm import api
from tempovlm.core.decode_dtype import DecodeDtype
from tempovlm.core.errors import UserError
from tempovlm.core.knobs import KnobConfig
from tempovlm.core.paths import write_whole
from tempovlm.core.units import now_ms
from tempovlm.engine.cuda.graphs import check_decode_dtype
from tempovlm.engine.engine import Engine
from tempovlm.engine.environment import collect_stamp
from tempovlm.model.config import PRESETS
from tempovlm.model.vision.tiling import Grid
from tempovlm.model.weights import empty_model

DECODES = (("decode_k8_b16_ctx700", 8, 16, 700), ("decode_k4_b8_ctx700", 4, 8, 700))
PREFILLS = (("prefill_t336_k8_b16", 336), ("prefill_t1250_k8_b16", 1250), ("prefill_t2030_k8_b16", 2030))
VISIONS = (("vision_c1", Grid(1, 1)), ("vision_c7", Grid(2, 3)), ("vision_c13", Grid(3, 4)))
ANSWERS = (
    ("answer_1080p_high_k8_b16_n10", KnobConfig(tier="high", top_k=8, num_blocks=16), 10),
    ("answer_low_k4_b8_n3", KnobConfig(tier="low", top_k=4, num_blocks=8), 3),
)
SETTING_TOKENS = 10
QUESTIONS = 200
"""Generated questions for judging one-byte weights."""


def make_engine(flags: argparse.Namespace, device: torch.device, dtype: torch.dtype) -> tuple[Engine, str]:
    """The engine to measure and the hash of its weights; an answer of it does not end before its row says so."""
    if flags.random_weights:
        model = fill(empty_model(PRESETS[flags.model], device, dtype))
        return engine_of(model, f"{flags.model}, random weights", flags.weights), "random"
    loaded = api.load(flags.model, device=flags.device, warmup=False)
    return engine_without_end(loaded.engine, flags.weights), loaded.weights_hash


def stamp(engine: Engine, weights_hash: str) -> dict[str, Any]:
    """Return the stamp of the figures, with driver and compilers."""
    run = engine.runner
    base = collect_stamp(
        model=engine.name,
        weights_hash=weights_hash,
        space=engine.space,
        device=run.device,
        dtype=run.dtype,
        decode_dtype=run.decode_dtype,
    ).to_json()
    found: dict[str, Any] = {"cuda": torch.version.cuda}
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        query = ["nvidia-smi", "--query-gpu=driver_version,clocks.max.sm,power.limit", "--format=csv,noheader"]
        found["driver"] = subprocess.run(query, capture_output=True, text=True, check=True).stdout.strip()
    with contextlib.suppress(metadata.PackageNotFoundError):
        found["triton"] = metadata.version("triton")
    return base | found


def measure(bench: Bench, quick: bool, save: Callable[[], None]) -> None:
    """All rows; `save` is called after each."""

    def row(run: Callable[..., None], name: str, *how: Any) -> None:
        bench.attempt([name], lambda: run(name, *how))
        save()

    def answers(jobs: list[tuple[str, KnobConfig, int]], repeats: int) -> None:
        bench.attempt([name for name, _, _ in jobs], lambda: bench.answers(jobs, repeats))
        save()

    for decode in DECODES:
        row(bench.decode, *decode)
    for prefill in PREFILLS:
        row(bench.prefill, *prefill)
    if bench.device.type == "cuda":  # the peers' memory does not count for the engine
        with contextlib.suppress(RuntimeError):  # a fault of the device stays, and the rows that follow report it
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(bench.device)
    for vision in VISIONS:
        row(bench.vision, *vision)
    row(bench.preprocess, "preprocess_1080p_high")
    for job in ANSWERS:
        answers([job], bench.repeats)
    space = bench.engine.space
    settings = (space.cheapest, space.native, space.largest) if quick else tuple(space)
    answers(
        [(f"setting_{k.tier}_k{k.top_k}_b{k.num_blocks}", k, SETTING_TOKENS) for k in settings],
        bench.setting_repeats,
    )


def record_of(bench: Bench, **known: Any) -> dict[str, Any]:
    """Return the result: the rows so far, and their stamp."""
    return {
        **known,
        "floor": {
            "copy_gb_per_s": bench.floor.bytes_per_ms / 1e6,
            "product_tflop_per_s": bench.floor.flops_per_ms / 1e9,
        },
        "failures": bench.failures,
        "not_monotone": slower_where_faster_was_due(bench.rows),
        "rows": bench.rows,
    }


def read_flags() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=tuple(PRESETS), default="pocket")
    parser.add_argument("--random-weights", "--random_weights", action="store_true")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--weights", choices=get_args(DecodeDtype), default="bf16", help="what decode steps read")
    parser.add_argument("--repeats", type=int, default=200)
    parser.add_argument("--setting-repeats", "--setting_repeats", type=int, default=30)
    parser.add_argument("--quick", action="store_true", help="few repeats and three settings: not for figures")
    parser.add_argument("--peers", action="store_true", help="also time transformers' decoder, on a GPU")
    parser.add_argument("--max_minutes", "--max-minutes", type=float, help="start no row after this many minutes")
    parser.add_argument("--json", type=Path, help="file to write")
    flags = parser.parse_args()
    if flags.model != "pocket" and not flags.random_weights:
        parser.error(f"--model {flags.model} needs --random-weights: its weights are not part of the package")
    try:
        check_decode_dtype(flags.weights, pick_device(flags.device))
    except UserError as error:
        parser.error(error.flagged)
    return flags


def warm_up(engine: Engine) -> dict[str, Any]:
    """Capture every decode step, counting memory from here on; return time and number."""
    if engine.device.type == "cuda":
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(engine.device)
    begin_ms = now_ms()
    captured = engine.warmup()
    return {"warmup_ms": now_ms() - begin_ms, "captured_graphs": captured} if captured else {}


def main() -> None:
    """Check, measure, print and write; the exit status is 1 if a row failed."""
    flags, begin_ms = read_flags(), now_ms()
    device = pick_device(flags.device)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    checks = check(flags.model, device, dtype, flags.weights)
    print("self-checks passed:", json.dumps(checks), flush=True)
    engine, weights_hash = make_engine(flags, device, dtype)
    repeats, setting_repeats = (FEW, 1) if flags.quick else (flags.repeats, flags.setting_repeats)
    end_ms = math.inf if flags.max_minutes is None else begin_ms + flags.max_minutes * 60e3
    bench = Bench(engine, repeats, setting_repeats, end_ms)
    known = {"stamp": stamp(engine, weights_hash), "checks": checks, **warm_up(engine)}

    def save() -> None:
        if flags.json:
            write_whole(flags.json, json.dumps(record_of(bench, **known), indent=1) + "\n")

    measure(bench, flags.quick, save)
    if device.type == "cuda":
        known["peak_gb"] = torch.cuda.max_memory_reserved(device) / 1e9
    if flags.peers:
        left_s = max((end_ms - now_ms()) / 1e3, 0.0)
        known["transformers"] = add_transformers(bench.rows, engine.runner.model, bench.peer_repeats, left_s, save)
    if flags.weights != "bf16" and not flags.random_weights:
        known["quality"] = quality(flags.model, QUESTIONS, [flags.weights])
    save()
    record = record_of(bench, **known)
    print(json.dumps({name: record[name] for name in record if name not in ("rows", "checks")}, indent=1))
    print(table(bench.rows))
    sys.exit(1 if bench.failures else 0)


if __name__ == "__main__":
    main()
