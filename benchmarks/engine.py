"""The engine's stages and whole answers against the hardware's floor and plain implementations, as JSON.

A floor is the larger of bytes over copy bandwidth and operations over matrix rate, both measured in the same run
on the same device; bytes and operations are those of `core/cost.py`. Peers run in the same process: `eager` is
this project's model operation by operation, `loop` a generic library's way (a Python loop over the experts that
are hit, a cache that is concatenated). Before anything is timed, `engine_reference` checks outputs against float32
and a graph's tokens against its kernels'. Random weights measure time and nothing else.

    python benchmarks/engine.py --model molmoe-1b --random-weights --json benchmarks/results/engine_h200.json
    python benchmarks/engine.py --model pocket --device cpu --json benchmarks/results/engine_cpu.json

With `--weights fp8` or `int8` decode rows have the peer `bf16_weights`, and a trained model's loss is measured.
"""

# ruff: noqa: E402 - threads are set before torch is imported

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import subprocess
from collections.abc import Callable
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import Any, get_args

from tempovlm.engine.threads import prepare

prepare()

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from engine_reference import QUESTION, check, engine_of, engine_without_end, fill, loop_forward
from engine_table import slower_where_faster_was_due, table
from engine_timing import FEW, measure_floor, spread, timed
from quantised import quality, step_cost
from tempovlm import api
from tempovlm.control.guard import Guard
from tempovlm.core.cost import Cost, plan_cost
from tempovlm.core.errors import UserError
from tempovlm.core.knobs import KnobConfig
from tempovlm.core.plan import Plan
from tempovlm.core.request import STAGES, Answer, Request
from tempovlm.core.units import now_ms
from tempovlm.core.weights import Weights
from tempovlm.engine.engine import Engine
from tempovlm.engine.graphs import GraphDecoder, check_weights
from tempovlm.engine.runner import Runner
from tempovlm.model.config import PRESETS
from tempovlm.model.prompt import Prompt
from tempovlm.model.tiling import Grid, cut_batch
from tempovlm.model.weights import empty_model
from tempovlm.profiling.environment import collect_stamp
from tempovlm.profiling.progress import progress_bar

DECODES = (("decode_k8_b16_ctx700", 8, 16, 700), ("decode_k4_b8_ctx700", 4, 8, 700))
PREFILLS = (("prefill_t336_k8_b16", 336), ("prefill_t1250_k8_b16", 1250), ("prefill_t2030_k8_b16", 2030))
VISIONS = (("vision_c1", Grid(1, 1)), ("vision_c7", Grid(2, 3)), ("vision_c13", Grid(3, 4)))
ANSWERS = (
    ("answer_1080p_high_k8_b16_n10", KnobConfig(tier="high", top_k=8, num_blocks=16), 10),
    ("answer_low_k4_b8_n3", KnobConfig(tier="low", top_k=4, num_blocks=8), 3),
)
SETTING_TOKENS = 10
QUESTIONS = 200
"""Generated questions that weights of one byte are judged by."""


class Bench:
    """One model on one device, and the rows that were measured so far."""

    def __init__(self, engine: Engine, repeats: int, setting_repeats: int) -> None:
        run = engine.runner
        self.engine, self.run, self.model = engine, run, run.model
        self.device, self.shape = run.device, run.model.config.shape
        self.plain = Runner(run.model, run.tokenizer)
        is_quantised = run.decode_weights != "bf16"
        self.unquantised = GraphDecoder(run.model, lanes=1) if is_quantised else None
        self.repeats, self.setting_repeats = repeats, setting_repeats
        self.peer_repeats = max(repeats // 10, 2)
        self.floor = measure_floor(run.device, run.dtype, max(repeats // 4, 3))
        self.rows: list[dict[str, Any]] = []
        pixels = np.random.default_rng(0).integers(0, 256, (1080, 1920, 3), dtype=np.uint8)
        self.picture = Image.fromarray(pixels)

    def plan(self, top_k: int, num_blocks: int) -> Plan:
        """A plan by the engine's ranking; cut to what the model has."""
        knobs = KnobConfig(
            tier="low", top_k=min(top_k, self.shape.num_experts), num_blocks=min(num_blocks, self.shape.num_blocks)
        )
        return Plan.build(knobs, self.engine.ranking, self.shape)

    def cost(self, plan: Plan, **amounts: int) -> Cost:
        """What a request costs; nothing is looked at and nothing is generated unless told."""
        amounts = {"num_crops": 0, "vision_tokens": 0, "text_tokens": 1, "output_tokens": 1, **amounts}
        size, cost = (
            self.run.dtype.itemsize,
            plan_cost(plan, self.shape, **amounts, value_bytes=self.run.dtype.itemsize),
        )
        if self.run.decode_weights == "bf16":
            return cost
        return step_cost(cost, plan, self.shape, size, amounts["output_tokens"] - 1)

    def add(self, name: str, times_ms: list[float], bound: dict[str, float], **more: Any) -> None:
        """Keep a row."""
        self.rows.append(
            {"name": name, **spread(times_ms), **bound, "repeats": len(times_ms), "peers": {}, **more}
        )

    def skip(self, name: str, reason: str) -> None:
        """Keep a row that this model cannot have."""
        empty = dict.fromkeys(("ms_median", "ms_p10", "ms_p90", "floor_ms", "bytes", "flops"))
        self.rows.append({"name": name, **empty, "peers": {}, "reason": reason})

    def token(self) -> Tensor:
        """Some token."""
        return torch.tensor([7], device=self.device)

    def prompt(self, length: int) -> Prompt:
        """A prompt of text alone."""
        return Prompt(torch.arange(length) % 97 + 16, None, 0)

    def decode(self, name: str, top_k: int, num_blocks: int, context: int) -> None:
        """One token after `context` others."""
        plan = self.plan(top_k, num_blocks)
        bound = self.floor.of(self.cost(plan, text_tokens=context, output_tokens=2), "decode")
        with self.run.lane() as lane:
            state = self.run.prefill(self.prompt(context), None, plan, 4, lane)
            if lane is None:
                self.add(name, self.times(lambda: self.run.decode(self.token(), state, 1)), bound)
            else:
                kernels_ms = self.times(lambda: lane.start_step(plan), lambda: lane.on.position.fill_(context))
        if self.run.graphs is not None:
            self.add(name, self.graph_times(self.run.graphs, plan, context), bound)
            self.peer("kernels_without_graph", kernels_ms)
        if self.unquantised is not None:
            self.peer("bf16_weights", self.graph_times(self.unquantised, plan, context))
        eager = self.plain.prefill(self.prompt(context), None, plan, 4)
        self.peer("eager", self.times(lambda: self.plain.decode(self.token(), eager, 1), few=True))
        past: dict[int, tuple[Tensor, Tensor]] = {}
        loop_forward(self.model, self.embedded(context), plan, past)
        self.peer(
            "loop", self.times(lambda: loop_forward(self.model, self.embedded(1), plan, dict(past)), few=True)
        )

    def graph_times(self, graphs: GraphDecoder, plan: Plan, context: int) -> list[float]:
        """Times of a captured step after `context` tokens."""
        graphs.warmup([plan])
        with graphs.lane() as lane:
            assert lane is not None
            self.run.prefill(self.prompt(context), None, plan, 4, lane)
            return self.times(lambda: lane.start_step(plan), lambda: lane.on.position.fill_(context))

    def prefill(self, name: str, length: int) -> None:
        """The last token's logits of a prompt."""
        limit = self.model.config.max_sequence_length
        if length >= limit:
            self.skip(name, f"the model's context is {limit} tokens")
            return
        plan, prompt = self.plan(8, 16), self.prompt(length)
        if self.run.graphs is not None:
            self.run.graphs.warmup([plan], lengths=[length])
        with self.run.lane() as lane:
            times_ms = self.times(lambda: self.run.prefill(prompt, None, plan, 1, lane))
        self.add(name, times_ms, self.floor.of(self.cost(plan, text_tokens=length), "prefill"))
        self.peer("eager", self.times(lambda: self.plain.prefill(prompt, None, plan, 1), few=True))
        self.peer("loop", self.times(lambda: loop_forward(self.model, self.embedded(length), plan, {}), few=True))

    def vision(self, name: str, grid: Grid) -> None:
        """Distinct crops that are on the device to features of the decoder's width."""
        pixels = torch.from_numpy(np.array(self.picture)).unsqueeze(0)
        crops = cut_batch(pixels, grid, self.model.config.vision, exact=False)
        ready = replace(crops, patches=crops.patches[0].to(self.device, self.run.dtype))
        times_ms = self.times(lambda: self.run.project(self.run.encode(ready), ready))
        cost = self.cost(self.plan(8, 16), num_crops=grid.num_crops, distinct_crops=len(ready.patches))
        self.add(name, times_ms, self.floor.of(cost, "vision_encoder", "projector"))

    def preprocess(self, name: str) -> None:
        """Decoded RGB in host memory to crops on the device."""
        pixels, request = np.asarray(self.picture), Request(images=(), question=QUESTION)

        def once() -> None:
            crops = self.run.prepare(pixels, "high", request).crops
            assert crops is not None
            crops.patches.to(self.device, self.run.dtype)

        self.add(name, self.times(once), {"floor_ms": 0.0, "bytes": 0.0, "flops": 0.0})

    def answer(self, knobs: KnobConfig, count: int) -> Answer:
        """A whole answer of `count` tokens."""
        request = Request(images=(self.picture,), question=QUESTION, max_new_tokens=count)
        return self.engine.answer(request, Guard.fixed(knobs, self.engine.space))

    def answer_bound(self, knobs: KnobConfig, answer: Answer) -> dict[str, float]:
        """The floor of an answer's stages; preparing the picture counts as nothing."""
        rows, columns = answer.tiling or (0, 0)
        cost = self.cost(
            self.engine.plan(knobs),
            num_crops=rows * columns + 1,
            vision_tokens=answer.num_vision_tokens,
            text_tokens=answer.num_text_tokens,
            output_tokens=answer.num_output_tokens,
        )
        return self.floor.of(cost, "vision_encoder", "projector", "prefill", "decode")

    def answers(self, jobs: list[tuple[str, KnobConfig, int]], repeats: int) -> None:
        """Whole answers, interleaved; a row for each, with the medians of its stages."""
        kept: dict[str, list[Answer]] = {name: [] for name, _, _ in jobs}
        with progress_bar("answers") as advance:
            for turn in range(repeats + 1):
                for i, (name, knobs, count) in enumerate(jobs):
                    answer = self.answer(knobs, count)
                    if turn:
                        kept[name].append(answer)
                    advance(turn * len(jobs) + i + 1, (repeats + 1) * len(jobs))
        for name, knobs, count in jobs:
            found = kept[name]
            if any(answer.num_output_tokens != count for answer in found):
                self.skip(name, f"an answer ended before its {count} tokens")
                continue
            stages = {stage: statistics.median(a.timings_ms[stage] for a in found) for stage in STAGES}
            self.add(
                name,
                [a.timings_ms["total"] for a in found],
                self.answer_bound(knobs, found[0]),
                stages_ms=stages,
                tokens=found[0].num_output_tokens,
                positions=found[0].num_vision_tokens + found[0].num_text_tokens,
            )

    def embedded(self, length: int) -> Tensor:
        """Embeddings (1, length, D) of some tokens."""
        return self.model.embed(self.prompt(length).tokens.to(self.device).unsqueeze(0), None, None)

    def times(
        self, run: Callable[[], Any], before: Callable[[], Any] = lambda: None, few: bool = False
    ) -> list[float]:
        """Times of a call, fewer for the slow peers."""
        return timed(run, self.peer_repeats if few else self.repeats, self.device, before)

    def peer(self, name: str, times_ms: list[float]) -> None:
        """Put a peer beside the last row."""
        self.rows[-1]["peers"][name] = statistics.median(times_ms)


def make_engine(flags: argparse.Namespace, device: torch.device, dtype: torch.dtype) -> tuple[Engine, str]:
    """The engine to measure and the hash of its weights; an answer of it does not end before its row says so."""
    if flags.random_weights:
        model = fill(empty_model(PRESETS[flags.model], device, dtype))
        return engine_of(model, f"{flags.model}, random weights", flags.weights), "random"
    loaded = api.load(flags.model, device=flags.device, warmup=False)
    return engine_without_end(loaded.engine, flags.weights), loaded.weights


def stamp(engine: Engine, weights: str) -> dict[str, Any]:
    """What the figures belong to, with driver and compilers."""
    run = engine.runner
    base = collect_stamp(
        model=engine.name,
        weights=weights,
        space=engine.space,
        device=run.device,
        dtype=run.dtype,
        decode_weights=run.decode_weights,
    ).to_json()
    found: dict[str, Any] = {"cuda": torch.version.cuda}
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        query = ["nvidia-smi", "--query-gpu=driver_version,clocks.max.sm,power.limit", "--format=csv,noheader"]
        found["driver"] = subprocess.run(query, capture_output=True, text=True, check=True).stdout.strip()
    with contextlib.suppress(metadata.PackageNotFoundError):
        found["triton"] = metadata.version("triton")
    return base | found


def measure(bench: Bench, quick: bool) -> None:
    """All rows."""
    for name, top_k, num_blocks, context in DECODES:
        bench.decode(name, top_k, num_blocks, context)
    for name, length in PREFILLS:
        bench.prefill(name, length)
    for name, grid in VISIONS:
        bench.vision(name, grid)
    bench.preprocess("preprocess_1080p_high")
    bench.answers(list(ANSWERS), bench.repeats)
    space = bench.engine.space
    settings = (space.cheapest, space.native, space.largest) if quick else tuple(space)
    jobs = [(f"setting_{k.tier}_k{k.top_k}_b{k.num_blocks}", k, SETTING_TOKENS) for k in settings]
    bench.answers(jobs, bench.setting_repeats)


def main() -> None:
    """Check, measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=tuple(PRESETS), default="pocket")
    parser.add_argument("--random-weights", "--random_weights", action="store_true")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--weights", choices=get_args(Weights), default="bf16", help="what decode steps read")
    parser.add_argument("--repeats", type=int, default=200)
    parser.add_argument("--setting-repeats", "--setting_repeats", type=int, default=30)
    parser.add_argument("--quick", action="store_true", help="few repeats and three settings: not for figures")
    parser.add_argument("--json", type=Path, help="file to write")
    flags = parser.parse_args()
    try:
        device = api.pick_device(flags.device)
        check_weights(flags.weights, device)
    except UserError as error:
        parser.error(str(error))
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    if flags.model != "pocket" and not flags.random_weights:
        parser.error(f"--model {flags.model} needs --random-weights: its weights are not part of the package")
    checks = check(flags.model, device, dtype, flags.weights)
    print("self-checks passed:", json.dumps(checks))
    engine, weights = make_engine(flags, device, dtype)
    repeats, setting_repeats = (FEW, 1) if flags.quick else (flags.repeats, flags.setting_repeats)
    bench = Bench(engine, repeats, setting_repeats)
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    begin_ms = now_ms()
    captured = engine.warmup()
    warmup_ms = now_ms() - begin_ms
    measure(bench, flags.quick)
    record: dict[str, Any] = {
        "stamp": stamp(engine, weights),
        "floor": {
            "copy_gb_per_s": bench.floor.bytes_per_ms / 1e6,
            "product_tflop_per_s": bench.floor.flops_per_ms / 1e9,
        },
        "checks": checks,
        "not_monotone": slower_where_faster_was_due(bench.rows),
        "rows": bench.rows,
    }
    if device.type == "cuda":
        record |= {"warmup_ms": warmup_ms, "captured_graphs": captured}
        record["peak_gb"] = torch.cuda.max_memory_reserved(device) / 1e9
    if flags.weights != "bf16" and not flags.random_weights:
        record["quality"] = quality(flags.model, QUESTIONS, [flags.weights])
    print(json.dumps({name: record[name] for name in record if name not in ("rows", "checks")}, indent=1))
    print(table(bench.rows))
    if flags.json:
        flags.json.parent.mkdir(parents=True, exist_ok=True)
        flags.json.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
