"""The rows of the engine's benchmark, each with its floor and its peers in the same process."""

from __future__ import annotations

import math
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from engine_reference import QUESTION, loop_forward
from engine_timing import measure_floor, spread, timed
from quantised import step_cost
from tempovlm.control.guard import Guard
from tempovlm.core.cost import Cost, plan_cost
from tempovlm.core.knobs import KnobConfig
from tempovlm.core.plan import Plan
from tempovlm.core.progress import progress_bar
from tempovlm.core.request import STAGES, Answer, Request
from tempovlm.core.units import now_ms
from tempovlm.engine.cuda.graphs import GraphDecoder
from tempovlm.engine.engine import Engine
from tempovlm.engine.runner import Runner
from tempovlm.model.prompt import Prompt
from tempovlm.model.vision.device_crops import taps
from tempovlm.model.vision.tiling import Crops, Grid, cut_batch, cut_crops


class Bench:
    """One model on one device, and the rows measured so far."""

    def __init__(self, engine: Engine, repeats: int, setting_repeats: int, end_ms: float = math.inf) -> None:
        run = engine.runner
        self.end_ms = end_ms
        self.engine, self.run, self.model = engine, run, run.model
        self.device, self.shape = run.device, run.model.config.shape
        self.plain = Runner(run.model, run.tokenizer)
        is_quantised = run.decode_dtype != "bf16"
        self.unquantised = GraphDecoder(run.model) if is_quantised else None
        self.repeats, self.setting_repeats = repeats, setting_repeats
        self.peer_repeats = max(repeats // 10, 2)
        self.floor = measure_floor(run.device, run.dtype, max(repeats // 4, 3))
        self.rows: list[dict[str, Any]] = []
        pixels = np.random.default_rng(0).integers(0, 256, (1080, 1920, 3), dtype=np.uint8)
        self.picture = pixels

    def plan(self, top_k: int, num_blocks: int) -> Plan:
        """Return a plan by the engine's ranking, cut to the model's blocks."""
        knobs = KnobConfig(
            tier="low", top_k=min(top_k, self.shape.num_experts), num_blocks=min(num_blocks, self.shape.num_blocks)
        )
        return Plan.build(knobs, self.engine.ranking, self.shape)

    def cost(self, plan: Plan, **amounts: int) -> Cost:
        """Return the cost of a request. Default: no picture and one generated token."""
        amounts = {"num_crops": 0, "vision_tokens": 0, "text_tokens": 1, "output_tokens": 1, **amounts}
        size, cost = (
            self.run.dtype.itemsize,
            plan_cost(plan, self.shape, **amounts, value_bytes=self.run.dtype.itemsize),
        )
        if self.run.decode_dtype == "bf16":
            return cost
        return step_cost(cost, plan, self.shape, size, amounts["output_tokens"] - 1)

    def add(self, name: str, times_ms: list[float], bound: dict[str, float], **more: Any) -> None:
        """Keep a row."""
        self.rows.append(
            {"name": name, **spread(times_ms), **bound, "repeats": len(times_ms), "peers": {}, **more}
        )

    def skip(self, name: str, reason: str) -> None:
        """Record a row that this model cannot have."""
        empty = dict.fromkeys(("ms_median", "ms_p10", "ms_p90", "floor_ms", "bytes", "flops"))
        self.rows.append({"name": name, **empty, "peers": {}, "reason": reason})

    def attempt(self, names: Sequence[str], run: Callable[[], None]) -> None:
        """Run `measure`, which records these rows; a failure or the end of the time is recorded in their place."""
        failure = "not measured: the time that --max_minutes allows is over"
        if now_ms() < self.end_ms:
            try:
                run()
                return
            except Exception as error:  # noqa: BLE001 - whatever fails, the other rows are measured
                failure = " ".join(f"failed: {type(error).__name__}: {error}".split())[:300]
        print(f"{names[0]}{' and others' * (len(names) > 1)}: {failure}", file=sys.stderr, flush=True)
        kept = {row["name"]: row for row in self.rows}
        for name in names:
            if name in kept:
                kept[name]["failure"] = failure
            else:
                self.skip(name, failure)

    @property
    def failures(self) -> list[str]:
        """Names of the rows that failed as a whole or in part."""
        reasons = {row["name"]: str(row.get("failure", row.get("reason", ""))) for row in self.rows}
        return [name for name, reason in reasons.items() if reason.startswith("failed")]

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
        pixels = torch.from_numpy(self.picture).unsqueeze(0)
        crops = cut_batch(pixels, grid, self.model.config.vision, exact=False)
        ready = replace(crops, patches=crops.patches[0].to(self.device, self.run.dtype))

        def both(run: Runner) -> Tensor | None:
            return run.project(run.encode(ready), ready)

        both(self.run)
        self.run.settle()
        times_ms = self.times(lambda: both(self.run))
        cost = self.cost(self.plan(8, 16), num_crops=grid.num_crops, distinct_crops=len(ready.patches))
        self.add(name, times_ms, self.floor.of(cost, "vision_encoder", "projector"))
        if self.run.vision is not None:
            self.peer("kernels_without_graph", self.times(lambda: both(self.plain), few=True))

    def preprocess(self, name: str) -> None:
        """Decoded RGB in host memory to crops that the device has finished, by the host's clock."""
        pixels, request, host = self.picture, Request(images=(), question=QUESTION), torch.device("cpu")

        def finish(crops: Crops | None) -> None:
            assert crops is not None
            crops.patches.to(self.device, self.run.dtype)
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)

        def prepare() -> None:
            finish(self.run.prepare(pixels, "high", request).crops)

        def on_host() -> None:
            finish(cut_crops(pixels, "high", self.model.config.vision, exact=True))

        self.add(name, timed(prepare, self.repeats, host), {"floor_ms": 0.0, "bytes": 0.0, "flops": 0.0})
        self.peer("exact_on_host", timed(on_host, self.peer_repeats, host))
        if self.device.type == "cuda":
            self.peer("new_size", timed(prepare, self.peer_repeats, host, taps.cache_clear))

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
                if turn > 1 and now_ms() > self.end_ms:
                    break
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
