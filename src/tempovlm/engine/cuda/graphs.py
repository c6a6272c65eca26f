"""Decode steps on CUDA as captured graphs, keyed by plan, over a cache and buffers whose addresses never change.

A `Lane` is the state that one request decodes on: cache, step buffers and graphs. Requests that are stepped
alternately take a lane each; if none is free, the caller decodes without one. A plan whose step was never
captured runs kernel by kernel and is captured later, between requests. Token, position and noise live on
the device; the host reads tokens from pinned memory, at most one step late, so that the device never waits for it.
Steps may read weights of one byte (`model/quantised.py`), made once for all lanes; prompts, batches and requests
without a lane use the weights as loaded.

The module can be imported without CUDA and Triton.

Shapes: `V` vocabulary.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from tempovlm.core.checks import wrong_argument
from tempovlm.core.decode_dtype import DecodeDtype
from tempovlm.core.plan import Plan, Step
from tempovlm.core.request import Request
from tempovlm.engine.cuda.capture import PromptReader, Recorder
from tempovlm.engine.sampling import candidates, usable
from tempovlm.model.cache import KVCache
from tempovlm.model.decoder import BROKEN, is_plain
from tempovlm.model.family import VisionLanguageModel
from tempovlm.model.layers import HAS_TRITON
from tempovlm.model.quantised import TYPES, AnyDecoder, QuantisedDecoder
from tempovlm.model.vlm import Molmo

if TYPE_CHECKING:
    from tempovlm.model.kernels.decode import StepBuffers
    from tempovlm.model.kernels.tiles import Tiling

Key = tuple[tuple[Step, ...], bool]
"""Key of a graph: the steps of a plan, and whether tokens are sampled."""

LANES = 2
"""Requests that decode at a time on graphs; each costs a cache of the model's whole context."""

FP8_CAPABILITY = (8, 9)
"""CUDA compute capability from which kernels can read fp8."""

Advance = Callable[[int, int], None]
"""Callback with the numbers of captured graphs and of all graphs."""


@dataclass(frozen=True, slots=True)
class Made:
    """A token on the host, and the end of its step if the device is busy with the next one already."""

    token: int
    event: torch.cuda.Event | None = None


class Lane:
    """One request's cache, buffers and graphs.

    Attributes:
        cache: entries of every block for one row. on: inputs and outputs of a step. prompts: fills the cache.
        wanted: steps that ran without a graph since the last capture.
    """

    def __init__(
        self,
        model: Molmo,
        decoder: AnyDecoder,
        recorder: Recorder | None,
        tiling: Tiling | None = None,
        *,
        is_limited: bool = False,
    ) -> None:
        from tempovlm.model.kernels import decode

        config, like = model.config, model.decoder.embedding
        self._decoder, self._kernels, self._recorder = decoder, decode, recorder
        self.is_cuda = like.is_cuda
        capacity, device = config.max_sequence_length, like.device
        self.cache = KVCache.allocate(config, config.num_blocks, 1, capacity, like)
        self.prompts = PromptReader(model, self.cache, recorder)
        self.on: StepBuffers = decode.StepBuffers.allocate(
            config, config.num_experts, device, tiling, is_limited=is_limited
        )
        self._noise = torch.ones_like(self.on.logits)
        self._temperature, self._top_p = torch.ones(2, 1, 1, device=device)
        self._generator = torch.Generator(device)
        self._made = torch.empty(capacity, dtype=torch.int64, pin_memory=self.is_cuda)
        self._graphs: dict[Key, torch.cuda.CUDAGraph] = {}
        self.wanted: dict[Key, Plan] = {}

    def cache_for(self, plan: Plan) -> KVCache:
        """Return the cache entries of a plan's steps, in order; entries of an earlier request are never read."""
        used = len(plan.steps)
        return KVCache(self.cache.keys[:used], self.cache.values[:used])

    def has_graph(self, plan: Plan, *, is_drawn: bool = False) -> bool:
        """Whether a step of this plan is captured."""
        return (plan.steps, is_drawn) in self._graphs

    def steps(
        self,
        first: Tensor,
        plan: Plan,
        length: int,
        request: Request,
        limit: Tensor | None = None,
        *,
        ahead: bool,
    ) -> Iterator[Made]:
        """Yield the tokens after the `first` (1,) of a request whose prompt of `length` tokens is in the cache.

        A `limit` (1, V) is added to the logits of the token after the first one alone.
        With `ahead`, a step starts before the token of the previous one is read; no step starts beyond
        `max_new_tokens`.
        """
        key = plan.steps, request.temperature > 0
        self._start(first, length, request)
        self._limit(limit)
        under_way: deque[tuple[int, torch.cuda.Event | None]] = deque()
        started, total = 0, request.max_new_tokens - 1
        while started < total or under_way:
            while started < total and len(under_way) < 1 + ahead:
                under_way.append((started, self._step(key, plan, started)))
                started += 1
                if started == 1 and limit is not None:
                    self._limit(None)
            place, event = under_way.popleft()
            if event is not None:
                event.synchronize()
            yield Made(int(self._made[place]), event if under_way else None)

    def _start(self, first: Tensor, length: int, request: Request) -> None:
        self.on.token.copy_(first)
        self.on.position.fill_(length)
        if request.temperature > 0:
            self._temperature.fill_(usable(request.temperature))
            self._top_p.fill_(request.top_p)
            self._generator.manual_seed(request.seed)
            self._draw_noise()  # the first token used up the seed's first numbers

    def _limit(self, limit: Tensor | None) -> None:
        """Add `limit` (1, V), or nothing, to the logits of the steps that start from here on."""
        if self.on.limit is None:
            return
        if limit is None:
            self.on.limit.zero_()
        else:
            self.on.limit.copy_(limit)

    def _draw_noise(self) -> None:
        self._noise.exponential_(generator=self._generator)

    def _step(self, key: Key, plan: Plan, index: int) -> torch.cuda.Event | None:
        """Start one step, and the copy of its token to place `index` on the host."""
        _, is_drawn = key
        if is_drawn:
            self._draw_noise()
        self.start_step(plan, is_drawn=is_drawn)
        self._made[index : index + 1].copy_(self.on.token, non_blocking=True)
        if not self.is_cuda:
            return None
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self.on.x.device))
        return event

    def start_step(self, plan: Plan, *, is_drawn: bool = False) -> None:
        """Replace the token by the next one and increment the position; by a graph if one is captured."""
        key = plan.steps, is_drawn
        graph = self._graphs.get(key)
        with torch.cuda.device_of(self.on.x):
            if graph is not None:
                graph.replay()
            else:
                self._run(plan, is_drawn)
                self.wanted[key] = plan

    @torch.inference_mode()
    def _run(self, plan: Plan, is_drawn: bool) -> None:
        """Run the kernels of one step."""
        self._kernels.forward(self._decoder, plan, self.cache_for(plan), self.on)
        if not is_drawn:
            self._kernels.pick(self.on)
            return
        # argmax(p / e) with exponential e is a draw from p (the Gumbel trick) and needs no host.
        logits = self.on.logits if self.on.limit is None else self.on.logits + self.on.limit
        is_sound, kept = candidates(logits, self._temperature, self._top_p)
        self.on.token.copy_(torch.where(is_sound, (kept / self._noise).argmax(dim=-1), BROKEN))
        self.on.position.add_(1)

    def capture(self, plan: Plan, *, is_drawn: bool = False) -> None:
        """Capture a step of a plan; the lane must not be in use."""
        key = plan.steps, is_drawn
        self.wanted.pop(key, None)
        if key in self._graphs or self._recorder is None:
            return
        self.on.position.zero_()
        self._graphs[key] = self._recorder.graph(lambda: self._run(plan, is_drawn))

    def wait(self) -> None:
        """Wait until the device has finished the work of this lane."""
        if self.is_cuda:
            torch.cuda.current_stream(self.on.x.device).synchronize()


class GraphDecoder:
    """The lanes of one model.

    Args:
        model: must not move afterwards, because graphs hold its addresses.
        lanes: number of requests that decode at a time; each costs a cache of the model's whole context.
        ahead: start a step before the token of the previous one is read. An answer that ends with the end token
            then wastes a step, but no time is lost between steps.
        tiling: tiling of the kernels, for measurements.
        is_limited: True if some tokens can be forbidden for a step.
        weights: weights that steps read; other than `bf16`, copies of the decoder's matrices beside the original.
    """

    def __init__(
        self,
        model: Molmo,
        *,
        lanes: int = LANES,
        ahead: bool = True,
        tiling: Tiling | None = None,
        decode_dtype: DecodeDtype = "bf16",
        is_limited: bool = False,
    ) -> None:
        recorder = Recorder.on(model.decoder.embedding.device)
        self.ahead, self.decode_dtype = ahead, decode_dtype
        decoder = model.decoder if decode_dtype == "bf16" else QuantisedDecoder.of(model.decoder, decode_dtype)
        self._lanes = tuple(Lane(model, decoder, recorder, tiling, is_limited=is_limited) for _ in range(lanes))
        self._free = list(self._lanes)

    @contextmanager
    def lane(self) -> Iterator[Lane | None]:
        """Yield a lane for one request, None if all are taken; it is free again when the block ends."""
        try:
            lane = self._free.pop()
        except IndexError:
            yield None
            return
        try:
            yield lane
        finally:
            lane.wait()
            self._free.append(lane)

    def steps(
        self,
        lane: Lane,
        first: Tensor,
        plan: Plan,
        length: int,
        request: Request,
        limit: Tensor | None = None,
    ) -> Iterator[Made]:
        """Like `Lane.steps`, but not ahead for a request that may stop at its deadline."""
        may_run_ahead = self.ahead and (request.budget_ms is None or request.on_deadline == "finish")
        return lane.steps(first, plan, length, request, limit, ahead=may_run_ahead)

    def settle(self) -> None:
        """Capture, on the free lanes, the steps and prompts that ran without a graph."""
        for lane in list(self._free):
            for (_, bucket), plan in list(lane.prompts.wanted.items()):
                lane.prompts.capture(plan, bucket)
            for (_, is_drawn), plan in list(lane.wanted.items()):
                lane.capture(plan, is_drawn=is_drawn)

    def warmup(self, plans: Iterable[Plan], advance: Advance | None = None, lengths: Collection[int] = ()) -> int:
        """Capture greedy steps of all plans on all lanes, and prompts of some lengths; return how many graphs.

        Plans with equal steps, which differ only in their vision tier, share a graph. Prompts are captured on the
        lane that a request takes while no other is running; those of other lanes are captured later. No request
        may be running.
        """
        distinct = {plan.steps: plan for plan in plans}
        jobs: list[tuple[Lane, Plan, int | None]] = [
            (lane, plan, None) for plan in distinct.values() for lane in self._lanes
        ]
        jobs += [(self._free[-1], plan, length) for plan in distinct.values() for length in lengths]
        for done, (lane, plan, length) in enumerate(jobs, 1):
            if length is None:
                lane.capture(plan)
            else:
                lane.prompts.capture(plan, length)
            if advance is not None:
                advance(done, len(jobs))
        return len(jobs)


def graph_decoder(
    model: VisionLanguageModel, decode_dtype: DecodeDtype = "bf16", *, is_limited: bool = False
) -> GraphDecoder | None:
    """A decoder for a model on CUDA; None on a CPU, where Triton is not installed and for other families.

    Raises:
        UserError: decode steps cannot read such weights on this device.
    """
    device = model.decoder.embedding.device
    check_decode_dtype(decode_dtype, device)
    if not (isinstance(model, Molmo) and is_plain(model.decoder)):
        if decode_dtype != "bf16":
            raise wrong_argument(
                "weights", decode_dtype, "this family of models has no kernels that read them; use bf16"
            )
        return None
    if device.type != "cuda" or not HAS_TRITON:
        return None
    return GraphDecoder(model, decode_dtype=decode_dtype, is_limited=is_limited)


def check_decode_dtype(decode_dtype: str, device: torch.device) -> None:
    """Raise a `UserError` unless decode steps on this device can read such weights."""
    if decode_dtype == "bf16":
        return
    if decode_dtype not in TYPES:
        raise wrong_argument("weights", decode_dtype, f"unknown; choose from bf16, {', '.join(TYPES)}")
    if device.type != "cuda":
        raise wrong_argument(
            "weights", decode_dtype, f"only for decoding on CUDA, and the device is {device}; use bf16"
        )
    if not HAS_TRITON:
        raise wrong_argument("weights", decode_dtype, "needs Triton, which is not installed; pip install triton")
    if decode_dtype == "fp8" and torch.cuda.get_device_capability(device) < FP8_CAPABILITY:
        raise wrong_argument(
            "weights", decode_dtype, "this GPU cannot convert fp8, which came with Ada and Hopper; use int8"
        )
