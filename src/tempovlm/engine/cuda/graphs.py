"""Decode steps on CUDA as captured graphs, keyed by plan, over a cache and buffers whose addresses never change.

The `Lane` is the state that one request decodes on: cache, step buffers and graphs. There is one, since one
request computes at a time. Of requests that are stepped alternately, the one whose turn it is has the lane: the
state of the one before is copied aside, and back when its turn comes, which takes less time than a step. A plan
whose step was never captured runs kernel by kernel and is captured later, while nobody waits. Token, position
and noise live on the device; the host reads tokens from pinned memory, at most one step late, so that the device
never waits for it. Steps may read weights of one byte (`model/quantised.py`); prompts and batches use the
weights as loaded.

The module can be imported without CUDA and Triton.

Shapes: `V` vocabulary.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from tempovlm.core.checks import wrong_argument
from tempovlm.core.decode_dtype import DecodeDtype
from tempovlm.core.plan import Plan, Step
from tempovlm.core.request import Request
from tempovlm.engine.cuda.capture import PromptReader, Recorder
from tempovlm.engine.cuda.rows import Rows
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

FP8_CAPABILITY = (8, 9)
"""CUDA compute capability from which kernels can read fp8."""

Advance = Callable[[int, int], None]
"""Callback with the numbers of captured graphs and of all graphs."""


@dataclass(frozen=True, slots=True)
class Made:
    """A token on the host, and the end of its step if the device is busy with the next one already."""

    token: int
    event: torch.cuda.Event | None = None


@dataclass(eq=False, slots=True)
class Stay:
    """A request that decodes, on the lane or set aside.

    Attributes:
        plan: of its steps; None before they begin. used: entries of the cache that hold its tokens.
        kept: its state while another request has the lane; None while it has it itself.
        is_over: whether it needs no lane any more.
    """

    plan: Plan | None = None
    used: int = 0
    kept: list[Tensor] | None = None
    is_over: bool = False

    def begin(self, plan: Plan, length: int) -> None:
        """Its prompt of `length` tokens was read."""
        self.plan, self.used = plan, length

    def advance(self) -> None:
        """A step has started, and with it another entry of the cache."""
        self.used += 1

    def set_aside(self, state: Sequence[Tensor]) -> None:
        """Keep a copy of its state, if it goes on."""
        if not self.is_over:
            self.kept = [one.clone() for one in state]

    def come_back(self, state: Sequence[Tensor]) -> None:
        """Copy what was kept to the lane's `state`."""
        for own, kept in zip(state, self.kept or (), strict=True):
            own.copy_(kept)
        self.kept = None

    def end(self) -> None:
        """It needs the lane no more."""
        self.is_over = True


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
        self._stay: Stay | None = None
        self._graphs: dict[Key, torch.cuda.CUDAGraph] = {}
        self.wanted: dict[Key, Plan] = {}

    def cache_for(self, plan: Plan) -> KVCache:
        """Return the cache entries of a plan's steps, in order; entries of an earlier request are never read."""
        used = len(plan.steps)
        return KVCache(self.cache.keys[:used], self.cache.values[:used])

    @torch.inference_mode()
    def take_over(self, cache: KVCache, plan: Plan, length: int) -> KVCache:
        """Copy the entries of a prompt of `length` tokens that was read elsewhere; return those of the lane."""
        own = self.cache_for(plan)
        for ours, theirs in ((own.keys, cache.keys), (own.values, cache.values)):
            ours[..., :length, :].copy_(theirs[..., :length, :])
        return own

    def has_graph(self, plan: Plan, *, is_drawn: bool = False) -> bool:
        """Whether a step of this plan is captured."""
        return (plan.steps, is_drawn) in self._graphs

    @torch.inference_mode()
    def admit(self, stay: Stay) -> None:
        """Give the lane to a request, with what was kept of it; the request that has the lane is set aside."""
        if self._stay is stay:
            return
        self.vacate()
        if stay.kept is not None:
            stay.come_back(self._state(stay))
        self._stay = stay

    @torch.inference_mode()
    def vacate(self) -> None:
        """Set the request aside that has the lane, if it will go on: before another one, and before a capture."""
        stay, self._stay = self._stay, None
        if stay is not None:
            stay.set_aside(self._state(stay))

    def _state(self, stay: Stay) -> list[Tensor]:
        """Return what a request needs to go on, as the lane holds it; nothing before its steps begin."""
        if stay.plan is None:
            return []
        cache, on = self.cache_for(stay.plan), self.on
        entries = [part[..., : stay.used, :] for part in (cache.keys, cache.values)]
        limit = [] if on.limit is None else [on.limit]
        return [*entries, on.token, on.position, self._temperature, self._top_p, *limit]

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
        """Return the tokens after the `first` (1,) of the request on the lane, whose prompt is in the cache.

        Its buffers are filled at once, so that it can be set aside before its first step. `length` counts the
        prompt's tokens. A `limit` (1, V) is added to the logits of the token after the first one alone.
        With `ahead`, a step starts before the token of the previous one is read; no step starts beyond
        `max_new_tokens`.
        """
        assert self._stay is not None
        self._stay.begin(plan, length)
        self.on.token.copy_(first)
        self.on.position.fill_(length)
        self._limit(limit)
        generator = None
        if request.temperature > 0:
            self._temperature.fill_(usable(request.temperature))
            self._top_p.fill_(request.top_p)
            generator = torch.Generator(self.on.x.device).manual_seed(request.seed)
            self._draw_noise(generator)  # the first token used up the seed's first numbers
        return self._steps(
            self._stay, plan, request.max_new_tokens - 1, generator, is_limited=limit is not None, ahead=ahead
        )

    def _steps(
        self,
        stay: Stay,
        plan: Plan,
        total: int,
        generator: torch.Generator | None,
        *,
        is_limited: bool,
        ahead: bool,
    ) -> Iterator[Made]:
        made = torch.empty(max(total, 0), dtype=torch.int64, pin_memory=self.is_cuda)
        under_way: deque[tuple[int, torch.cuda.Event | None]] = deque()
        started = 0
        while started < total or under_way:
            while started < total and len(under_way) < 1 + ahead:
                self.admit(stay)
                under_way.append((started, self._step(plan, generator, made[started : started + 1])))
                started += 1
                stay.advance()
                if started == 1 and is_limited:
                    self._limit(None)
            place, event = under_way.popleft()
            if event is not None:
                event.synchronize()
            yield Made(int(made[place]), event if under_way else None)

    def _limit(self, limit: Tensor | None) -> None:
        """Add `limit` (1, V), or nothing, to the logits of the steps that start from here on."""
        if self.on.limit is None:
            return
        if limit is None:
            self.on.limit.zero_()
        else:
            self.on.limit.copy_(limit)

    def _draw_noise(self, generator: torch.Generator) -> None:
        self._noise.exponential_(generator=generator)

    def _step(self, plan: Plan, generator: torch.Generator | None, made: Tensor) -> torch.cuda.Event | None:
        """Start one step, and the copy of its token to `made` (1,) on the host."""
        if generator is not None:
            self._draw_noise(generator)
        self.start_step(plan, is_drawn=generator is not None)
        made.copy_(self.on.token, non_blocking=True)
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
        """Capture a step of a plan."""
        key = plan.steps, is_drawn
        self.wanted.pop(key, None)
        if key in self._graphs or self._recorder is None:
            return
        self.vacate()
        self.on.position.zero_()
        self._graphs[key] = self._recorder.graph(lambda: self._run(plan, is_drawn))

    def capture_prompt(self, plan: Plan, length: int) -> None:
        """Capture a plan for prompts that are padded as one of this length is."""
        self.vacate()
        self.prompts.capture(plan, length)


class GraphDecoder:
    """The lane of one model, and the requests that decode on it.

    Args:
        model: must not move afterwards, because graphs hold its addresses.
        ahead: start a step before the token of the previous one is read. An answer that ends with the end token
            then wastes a step, but no time is lost between steps.
        tiling: tiling of the kernels, for measurements.
        is_limited: True if some tokens can be forbidden for a step.
        recorder: captures the graphs; by default one of its own.
        weights: weights that steps read; other than `bf16`, copies of the decoder's matrices beside the original.

    Attributes:
        rows: several requests' prompts and steps at once; None where steps read other weights than prompts, or
            there are no kernels for many tokens.
    """

    def __init__(
        self,
        model: Molmo,
        *,
        ahead: bool = True,
        tiling: Tiling | None = None,
        decode_dtype: DecodeDtype = "bf16",
        is_limited: bool = False,
        recorder: Recorder | None = None,
    ) -> None:
        recorder = recorder or Recorder.on(model.decoder.embedding.device)
        self.ahead, self.decode_dtype = ahead, decode_dtype
        decoder = model.decoder if decode_dtype == "bf16" else QuantisedDecoder.of(model.decoder, decode_dtype)
        self._lane = Lane(model, decoder, recorder, tiling, is_limited=is_limited)
        self.rows = Rows.of(model, recorder, is_limited=is_limited) if decode_dtype == "bf16" else None

    @contextmanager
    def lane(self) -> Iterator[Lane]:
        """Yield the lane to a new request, which needs it no more when the block ends."""
        stay = Stay()
        self._lane.admit(stay)
        try:
            yield self._lane
        finally:
            stay.end()

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

    def settle(self, is_quiet: Callable[[], bool]) -> None:
        """Capture the steps and prompts that ran without a graph, one after the other, while it is quiet."""
        lane = self._lane
        for (_, bucket), plan in list(lane.prompts.wanted.items()):
            if is_quiet():
                lane.capture_prompt(plan, bucket)
        for (_, is_drawn), plan in list(lane.wanted.items()):
            if is_quiet():
                lane.capture(plan, is_drawn=is_drawn)
        if self.rows is not None:
            self.rows.settle(is_quiet)

    def warmup(
        self,
        plans: Iterable[Plan],
        advance: Advance | None = None,
        lengths: Collection[int] = (),
        usual: Collection[Plan] = (),
    ) -> int:
        """Capture greedy steps of all plans, and prompts of some lengths; return how many graphs.

        Plans with equal steps, which differ only in their vision tier, share a graph. In rows the `usual` plans
        have graphs of their own.
        """
        distinct, lane, rows = list({plan.steps: plan for plan in plans}.values()), self._lane, self.rows
        jobs: list[Callable[[], None]] = [partial(lane.capture, plan) for plan in distinct]
        jobs += [partial(lane.capture_prompt, plan, length) for length in lengths for plan in distinct]
        if rows is not None:
            jobs += [partial(rows.capture, key) for key in rows.jobs(distinct, usual)]
        for done, job in enumerate(jobs, 1):
            job()
            if advance is not None:
                advance(done, len(jobs))
        return len(jobs)


def graph_decoder(
    model: VisionLanguageModel,
    decode_dtype: DecodeDtype = "bf16",
    *,
    is_limited: bool = False,
    recorder: Recorder | None = None,
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
    return GraphDecoder(model, decode_dtype=decode_dtype, is_limited=is_limited, recorder=recorder)


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
