"""Search the best tiling of a decode step's products on this GPU, by the time of a whole step.

Random weights at a model's sizes. Kernels of a step overlap, so that none is timed alone: one kernel's cut is
varied at a time, the fastest is kept, and the next kernel's is varied. The printed `Tiling` is what
`model/kernels/tiles.py` should hold for this GPU. Nothing is written.

    python benchmarks/tune_decode.py --model molmoe-1b
"""

# ruff: noqa: E402 - threads are set before torch is imported

from __future__ import annotations

import argparse
import math
import statistics
from collections.abc import Callable, Iterator
from dataclasses import fields, replace
from itertools import product

from tempovlm.engine.threads import pick_device, prepare

prepare()

import torch
from triton.runtime.errors import OutOfResources

from engine_reference import fill
from tempovlm.core.cost import plan_cost
from tempovlm.core.knobs import KnobConfig
from tempovlm.core.plan import Plan, Step
from tempovlm.engine.cuda.capture import Recorder
from tempovlm.model.cache import KVCache
from tempovlm.model.config import PRESETS
from tempovlm.model.kernels import decode
from tempovlm.model.kernels.decode import StepBuffers
from tempovlm.model.kernels.tiles import Tile, Tiling
from tempovlm.model.vlm import Molmo
from tempovlm.model.weights import empty_model

ROWS, COLUMNS, WARPS = (1, 2, 4, 8), (1024, 2048), (4, 8)
LEAST_VALUES, MOST_VALUES = 2048, 16384
"""Values of a program's tile between which loads fill the memory's pipes and registers suffice."""

SPLITS, TOKENS = (8, 16, 32), (32, 64)
CONTEXT = 700


def tiles() -> Iterator[Tile]:
    """Return the tiles to try."""
    for rows, columns, warps in product(ROWS, COLUMNS, WARPS):
        if LEAST_VALUES <= rows * columns <= MOST_VALUES:
            yield Tile(rows, columns, warps)


def replayed_ms(run: Callable[[], None], recorder: Recorder | None, repeats: int) -> float:
    """Median time of a graph of `run`; without a GPU it only runs."""
    if recorder is None:
        run()
        return float("nan")
    graph = recorder.graph(run)
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(repeats)]
    stream = torch.cuda.current_stream(recorder.device)
    for begin, end in events:
        begin.record(stream)
        graph.replay()
        end.record(stream)
    stream.synchronize()
    return statistics.median(begin.elapsed_time(end) for begin, end in events)


def candidates(name: str, tiling: Tiling) -> Iterator[Tiling]:
    """Yield tilings that differ from this one in one kernel."""
    if name == "attention":
        for splits, tokens, warps in product(SPLITS, TOKENS, WARPS):
            yield replace(tiling, splits=splits, tokens=tokens, attention_warps=warps)
        return
    for tile in tiles():
        yield replace(tiling, **{name: tile})


def step_ms(model: Molmo, plan: Plan, cache: KVCache, tiling: Tiling, repeats: int) -> float:
    """Return the median time of a step with this tiling; infinite if it exceeds the device's limits."""
    device = model.decoder.embedding.device
    on = StepBuffers.allocate(model.config, model.config.num_experts, device, tiling)
    on.position.fill_(CONTEXT)

    def step() -> None:
        decode.forward(model.decoder, plan, cache, on)

    try:
        with torch.inference_mode():
            return replayed_ms(step, Recorder.on(device), repeats)
    except (OutOfResources, RuntimeError):
        return math.inf


def tune(model: Molmo, plan: Plan, repeats: int, limit: int | None) -> Tiling:
    """Find the fastest tiling of every kernel, printed as it is found."""
    cache = KVCache.allocate(model.config, len(plan.steps), 1, 2 * CONTEXT, model.decoder.embedding)
    best = Tiling()
    best_ms = step_ms(model, plan, cache, best, repeats)
    print(f"as it is: {best_ms * 1e3:.1f} us a step", flush=True)
    for name in ("hidden", "down", "qkv", "attention", "out", "router", "head"):
        found = [(best_ms, "kept", best)]
        for tiling in list(candidates(name, best))[:limit]:
            cut = f"{tiling.splits} x {tiling.tokens}, {tiling.attention_warps} warps"
            cut = cut if name == "attention" else str(getattr(tiling, name))
            found.append((step_ms(model, plan, cache, tiling, repeats), cut, tiling))
        found.sort(key=lambda one: one[0])
        print(
            f"{name}: " + "; ".join(f"{cut} {spent_ms * 1e3:.1f} us" for spent_ms, cut, _ in found[:3]), flush=True
        )
        best_ms, _, best = found[0]
    return best


def main() -> None:
    """Tune and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=tuple(PRESETS), default="molmoe-1b")
    parser.add_argument("--top-k", "--top_k", type=int, default=8)
    parser.add_argument("--num-blocks", "--num_blocks", type=int, default=16, help="copies of a block")
    parser.add_argument("--repeats", type=int, default=50)
    parser.add_argument("--limit", type=int, help="maximum candidates of a kernel; default: all")
    parser.add_argument("--device", default="cuda", help="cuda or cuda:1; cpu interprets the kernels, untimed")
    flags = parser.parse_args()
    device = pick_device(flags.device)
    config = replace(PRESETS[flags.model], num_blocks=flags.num_blocks)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    model = fill(empty_model(config, device, dtype))
    knobs = KnobConfig(tier="low", top_k=flags.top_k, num_blocks=flags.num_blocks)
    plan = Plan(knobs, tuple(Step(i, flags.top_k) for i in range(flags.num_blocks)))
    best = tune(model, plan, flags.repeats, flags.limit)
    cost = plan_cost(plan, config.shape, 0, 0, CONTEXT, 2)
    print(f"bytes of a step with {flags.num_blocks} blocks: {cost.bytes['decode'] / 1e6:.1f} MB")
    print(f"Tiling({', '.join(f'{f.name}={getattr(best, f.name)!r}' for f in fields(best))})")


if __name__ == "__main__":
    main()
