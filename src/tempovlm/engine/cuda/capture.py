"""Capture CUDA work as graphs: the recorder, and the graphs of prompts of bucketed lengths.

A prompt is padded on the right to the next bucket. Attention is causal, so no real token sees the padding; the
result is read at the last real token, whose place is a number on the device. Padding is zeros, which all visit the
same experts. Above some length the device is busier than the host that feeds it, and a graph gains nothing.

Shapes: `T` tokens, `D` width, `V` vocabulary.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tempovlm.core.plan import Plan, Step
from tempovlm.core.shape import padded_length
from tempovlm.model.cache import KVCache
from tempovlm.model.config import VisionConfig
from tempovlm.model.prompt import num_image_tokens
from tempovlm.model.vision.tiling import grids_of
from tempovlm.model.vlm import Molmo

GRAPH_LIMIT = 2048
"""Longer prompts run without a graph: their activations would stay reserved."""

MAX_GRAPHS = 768
"""Number of prompt graphs of one lane; the least recently used one is dropped first."""

USUAL_TEXT = (16, 64)
"""Fewest and most tokens beside the picture's that a warm-up expects: format, style and a question."""

Key = tuple[tuple[Step, ...], int]
"""Key of a prompt's graph: the steps of a plan, and the bucket."""


def usual_buckets(tiers: Collection[str], vision: VisionConfig) -> list[int]:
    """Return the padded lengths of prompts with a picture at some tiers and a question of the usual length."""
    images = {num_image_tokens(grid, vision) for tier in tiers for grid in grids_of(tier)}
    least, most = USUAL_TEXT
    return sorted({padded_length(image + text) for image in images for text in range(least, most + 1)})


@dataclass(frozen=True, slots=True)
class Recorder:
    """Captures graphs, all on one stream and from one memory pool: graphs that share it must not overlap."""

    device: torch.device
    stream: torch.cuda.Stream
    pool: Any

    @classmethod
    def on(cls, device: torch.device) -> Recorder | None:
        """Return a recorder for a CUDA device; None for a CPU."""
        if device.type != "cuda":
            return None
        return cls(device, torch.cuda.Stream(device), torch.cuda.graph_pool_handle())

    def graph(self, run: Callable[[], object]) -> torch.cuda.CUDAGraph:
        """Return a graph of the work that `run` starts; runs it once before, to compile and allocate.

        Garbage is not collected meanwhile: to free the graph of a model that is gone would spoil the capture.
        """
        current = torch.cuda.current_stream(self.device)
        self.stream.wait_stream(current)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.stream(self.stream):
            run()
            self.stream.synchronize()
            with without_collection():
                graph.capture_begin(self.pool, capture_error_mode="thread_local")
                try:
                    run()
                except BaseException:
                    with suppress(RuntimeError):  # an invalid capture must not hide the cause
                        graph.capture_end()
                    raise
                graph.capture_end()
        current.wait_stream(self.stream)
        return graph


@contextmanager
def without_collection() -> Iterator[None]:
    """Context in which no garbage is collected."""
    is_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if is_enabled:
            gc.enable()


class PromptReader:
    """Reads prompts into one cache, with graphs where captured.

    Attributes:
        wanted: prompts that ran without a graph since the last capture, though one could have served.
    """

    def __init__(self, model: Molmo, cache: KVCache, recorder: Recorder | None) -> None:
        like, config = model.decoder.embedding, model.config
        self._model, self._cache, self._recorder = model, cache, recorder
        # The experts of other types read counts on the host.
        self._is_graphed = recorder is not None and like.dtype == torch.bfloat16
        self._limit = min(GRAPH_LIMIT, cache.capacity)
        self._x = torch.zeros(1, self._limit, config.width, dtype=like.dtype, device=like.device)
        self._last = torch.zeros(1, dtype=torch.int64, device=like.device)
        self._logits = torch.zeros(1, config.embedding_size, dtype=like.dtype, device=like.device)
        self._graphs: dict[Key, torch.cuda.CUDAGraph] = {}
        self.wanted: dict[Key, Plan] = {}

    @torch.inference_mode()
    def read(self, x: Tensor, plan: Plan) -> Tensor:
        """Return logits (1, V) after the last of the embeddings (1, T, D); fills the cache.

        A bucket that was not captured is read by the next larger one that was: by a graph, padding costs less time
        than kernel by kernel the host's.
        """
        bucket = padded_length(x.shape[1])
        if not self._is_graphed or bucket > self._limit:
            return self._model.prefill(x, plan, self._entries(plan))
        if (plan.steps, bucket) not in self._graphs:
            self.wanted[plan.steps, bucket] = plan
        while (plan.steps, bucket) not in self._graphs:
            bucket = padded_length(bucket + 1)
            if bucket > self._limit:
                return self._model.prefill(x, plan, self._entries(plan))
        graph = self._graphs.pop((plan.steps, bucket))
        self._graphs[plan.steps, bucket] = graph  # mark as most recently used
        self.pad(x, bucket)
        with torch.cuda.device_of(x):
            graph.replay()
        return self._logits.clone()

    def pad(self, x: Tensor, bucket: int) -> None:
        """Copy embeddings (1, T, D), and zeros up to the bucket, to where `run` reads them."""
        T = x.shape[1]
        self._x[:, :T].copy_(x)
        self._x[:, T:bucket].zero_()
        self._last.fill_(T - 1)

    @torch.inference_mode()
    def run(self, plan: Plan, bucket: int) -> Tensor:
        """The captured work: the padded prompt through the plan's blocks, and its last real token's logits."""
        decoder = self._model.decoder
        positions = torch.arange(bucket, device=self._x.device).unsqueeze(0)
        hidden = decoder(self._x[:, :bucket], positions, plan, self._entries(plan))
        return self._logits.copy_(decoder.logits(hidden.index_select(1, self._last)[:, 0]))

    def capture(self, plan: Plan, length: int) -> None:
        """Capture a plan for all prompts of this length's bucket; the cache must not be in use."""
        bucket = padded_length(length)
        key = plan.steps, bucket
        self.wanted.pop(key, None)
        if self._recorder is None or not self._is_graphed or key in self._graphs or bucket > self._limit:
            return
        self._last.zero_()  # entries of a longer prompt may lie outside this bucket
        self._graphs[key] = self._recorder.graph(lambda: self.run(plan, bucket))
        while len(self._graphs) > MAX_GRAPHS:
            del self._graphs[next(iter(self._graphs))]

    def _entries(self, plan: Plan) -> KVCache:
        used = len(plan.steps)
        return KVCache(self._cache.keys[:used], self._cache.values[:used])
