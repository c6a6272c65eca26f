"""Prompts and decode steps of several requests at once on CUDA, over a cache with a row for each of them.

Prompts of one plan are read in a pass without padding between them, into free rows. A decode step advances all
rows together, whatever their plans: it runs the blocks that any of them needs, each with the most experts that any
of them visits there, and a row adds nothing in blocks that its plan skips. Steps are captured for 2, 4 and 8 rows.
A warm-up captures what serves all plans: those without a graph of their own share the cheapest one that covers
them, until their own is captured while nobody waits. A row is joined and left between two steps.

Shapes: `R` rows, `N` tokens of all prompts, `D` width, `V` vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from tempovlm.core.knobs import KnobSpace
from tempovlm.core.plan import Plan, Step
from tempovlm.engine.cuda.capture import Recorder, usual_buckets
from tempovlm.engine.sampling import greedy
from tempovlm.model.cache import KVCache
from tempovlm.model.config import ModelConfig
from tempovlm.model.layers import has_kernels
from tempovlm.model.packed import Pack, can_run_rows, run_rows
from tempovlm.model.vlm import Molmo

ROWS = 8
"""Requests that decode together."""

ROW_BUCKETS = (2, 4, ROWS)
"""Numbers of rows that a captured step has."""

ROOM = 128
"""Entries of a row beside those of the longest usual prompt: for the answer, or a longer question."""

PACK_BUCKETS = (512, 768, 1024, 1536, 2048, 2560, 3072)
"""Tokens of packs that are captured; of more, the device is busier than the host that feeds it."""

PACK_TOKENS = 4096
"""Most tokens of a pack."""

Steps = tuple[Step, ...]


@dataclass(frozen=True, slots=True)
class Arriving:
    """Tokens on the host once the event has come; None where they are there."""

    _tokens: Tensor
    _event: torch.cuda.Event | None

    @property
    def are_there(self) -> bool:
        """Whether nothing has to be waited for."""
        return self._event is None or self._event.query()

    def read(self) -> list[int]:
        """Wait for them."""
        if self._event is not None:
            self._event.synchronize()
        return self._tokens.tolist()


def arriving(tokens: Tensor) -> Arriving:
    """Start to copy tokens to the host."""
    if not tokens.is_cuda:
        return Arriving(tokens.clone(), None)
    made = torch.empty(tokens.shape, dtype=tokens.dtype, pin_memory=True).copy_(tokens, non_blocking=True)
    event = torch.cuda.Event()
    event.record(torch.cuda.current_stream(tokens.device))
    return Arriving(made, event)


def row_tokens(config: ModelConfig) -> int:
    """Return the tokens that a row has room for: longer prompts decode alone."""
    longest = usual_buckets(KnobSpace.for_model(config.shape).tiers, config.vision)[-1]
    return min(config.max_sequence_length, longest + ROOM)


class Rows:
    """A cache with a row for each request, the rows' states, and the graphs that advance them."""

    def __init__(self, model: Molmo, recorder: Recorder, *, is_limited: bool = False) -> None:
        config, like = model.config, model.decoder.embedding
        device, D, V = like.device, config.width, config.embedding_size
        self.capacity = row_tokens(config)
        self._decoder, self._recorder = model.decoder, recorder
        self._plans: list[Plan | None] = [None] * ROWS
        self._are_left = False

        def zeros(*shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        entries = config.num_blocks, ROWS * self.capacity, D
        self._keys, self._values = zeros(*entries, dtype=like.dtype), zeros(*entries, dtype=like.dtype)
        self._first = torch.arange(ROWS, device=device) * self.capacity
        self._starts = torch.arange(ROWS + 1, device=device, dtype=torch.int32) * self.capacity
        self._numbers = torch.arange(ROWS + 1, device=device, dtype=torch.int32)
        self._token = zeros(ROWS)
        self._state = zeros(2 + config.num_blocks, ROWS, dtype=torch.int32)
        """The place of each row's token, 1 if it is in use, and its experts in each block."""
        self._limit = zeros(ROWS, V, dtype=torch.float32) if is_limited else None
        self._x = zeros(PACK_TOKENS, D, dtype=like.dtype)
        self._places = zeros(2, PACK_TOKENS)
        self._bounds = zeros(3, ROWS + 1, dtype=torch.int32)
        self._logits = zeros(ROWS, V, dtype=like.dtype)
        self._graphs: dict[tuple[str, Steps, int], torch.cuda.CUDAGraph] = {}
        self._covers: dict[tuple[Steps, int], Steps] = {}
        self._wanted: dict[tuple[str, Steps, int], None] = {}

    @classmethod
    def of(cls, model: Molmo, recorder: Recorder | None, *, is_limited: bool = False) -> Rows | None:
        """Return rows for a model with kernels on CUDA whose heads they take; None for others."""
        like = model.decoder.embedding
        is_fit = has_kernels(like.detach(), like.detach()) and can_run_rows(model.config)
        return cls(model, recorder, is_limited=is_limited) if is_fit and recorder is not None else None

    @property
    def free(self) -> list[int]:
        """Rows that nobody uses, lowest first."""
        return [row for row, plan in enumerate(self._plans) if plan is None]

    def fits(self, length: int, max_new_tokens: int) -> bool:
        """Whether a row has room for a prompt and its answer; a step more than needed may run."""
        return length + max_new_tokens + 1 <= self.capacity

    def reads_at_once(self, plan: Plan, total: int) -> bool:
        """Whether prompts of `total` tokens can be read in one pass without waiting for the host.

        By a graph, or because no graph would help; otherwise a graph is captured later, while nobody waits.
        """
        size = next((one for one in PACK_BUCKETS if one >= total), None)
        if size is not None and ("prompts", plan.steps, size) not in self._graphs:
            self._wanted["prompts", plan.steps, size] = None
        return size is None or any(one >= total for one in self._captured(plan.steps))

    @torch.inference_mode()
    def read(self, prompts: Sequence[Tensor], rows: Sequence[int], plan: Plan) -> Tensor:
        """Return logits (R, V) after prompts (T, D), one for each of some rows, and fill the rows."""
        lengths = [len(one) for one in prompts]
        total = sum(lengths)
        bucket = min((size for size in self._captured(plan.steps) if size >= total), default=total)
        torch.cat(list(prompts), out=self._x[:total])
        self._x[total:bucket].zero_()
        places = torch.empty(2, bucket, dtype=torch.int64, pin_memory=True)
        bounds = torch.empty(3, ROWS + 1, dtype=torch.int32, pin_memory=True)
        fill_pack(places.numpy(), bounds.numpy(), lengths, [row * self.capacity for row in rows])
        self._places[:, :bucket].copy_(places, non_blocking=True)
        self._bounds.copy_(bounds, non_blocking=True)
        self._start(("prompts", plan.steps, bucket))
        return self._logits[: len(prompts)].clone()

    def _captured(self, steps: Steps) -> list[int]:
        """Tokens of the captured packs of a plan."""
        return [size for size in PACK_BUCKETS if ("prompts", steps, size) in self._graphs]

    def _start(self, key: tuple[str, Steps, int]) -> None:
        """Start captured work, or the same kernel by kernel."""
        graph = self._graphs.get(key)
        with torch.cuda.device_of(self._x):
            if graph is not None:
                graph.replay()
            else:
                self._work(key)()
                if key[0] == "step":
                    self._wanted[key] = None

    def _work(self, key: tuple[str, Steps, int]) -> Callable[[], None]:
        kind, steps, size = key
        return partial(self._read if kind == "prompts" else self._advance, steps, size)

    @torch.inference_mode()
    def _read(self, steps: Steps, size: int) -> None:
        """Read the prompts in the buffers, of `size` tokens with those that are padding."""
        ends, starts, used = self._bounds
        places, entries = self._places[:, :size]
        longest = min(size, self.capacity)
        pack = Pack(places, entries, ends, starts, used[:ROWS], longest, self.capacity)
        hidden = run_rows(self._decoder, self._x[:size], steps, pack, self._keys, self._values)
        self._logits.copy_(self._decoder.logits(hidden.index_select(0, ends[1:] - 1)))

    @torch.inference_mode()
    def copy_in(self, row: int, cache: KVCache, plan: Plan, length: int) -> None:
        """Copy a prompt of `length` tokens that was read into the lane's cache to a row."""
        begin = row * self.capacity
        for ours, theirs in ((self._keys, cache.keys), (self._values, cache.values)):
            own = ours[:, begin : begin + length].unflatten(-1, (theirs.shape[2], -1))
            entries = theirs[: len(plan.steps), 0, :, :length].transpose(1, 2)
            if len(entries) == len(own):
                own.copy_(entries)
                continue
            for (index, _), entry in zip(plan.steps, entries, strict=True):
                own[index].copy_(entry)

    @torch.inference_mode()
    def join(
        self, rows: Sequence[int], plan: Plan, lengths: Sequence[int], first: Tensor, limit: Tensor | None = None
    ) -> None:
        """Take `B` rows whose prompts of some `lengths` were read; their answers begin with `first` (B,).

        A `limit` (B, V) is added to the logits of the tokens after those.
        """
        self._forget()
        experts = dict(plan.steps)
        column = [1, *(experts.get(block, 0) for block in range(len(self._state) - 2))]
        state = torch.tensor([[length, *column] for length in lengths], dtype=torch.int32, pin_memory=True)
        device = self._state.device
        places = torch.tensor(rows, pin_memory=True).to(device, non_blocking=True)
        self._state.index_copy_(1, places, state.to(device, non_blocking=True).t())
        self._token.index_copy_(0, places, first)
        if self._limit is not None:
            self._limit.index_fill_(0, places, 0.0)
            if limit is not None:
                self._limit.index_copy_(0, places, limit)
        for row in rows:
            self._plans[row] = plan

    def leave(self, row: int) -> None:
        """Give a row up."""
        self._plans[row] = None
        self._are_left = True

    def _forget(self) -> None:
        """Clear the states of the rows that were given up."""
        if self._are_left:
            used = torch.tensor([plan is not None for plan in self._plans], dtype=torch.int32, pin_memory=True)
            self._state.mul_(used.to(self._state.device, non_blocking=True))
            self._are_left = False

    @torch.inference_mode()
    def advance(self) -> Arriving:
        """Start a step of all rows in use; return their tokens, by row."""
        self._forget()
        of_plans = {plan.steps for plan in self._plans if plan is not None}
        highest = max(row for row, plan in enumerate(self._plans) if plan is not None)
        size = next(bucket for bucket in ROW_BUCKETS if bucket > highest)
        needed = union(of_plans)
        steps = self._cover(needed, size)
        if steps != needed and needed in of_plans:
            self._wanted["step", needed, size] = None
        self._start(("step", steps, size))
        return arriving(self._token[:size])

    def _cover(self, steps: Steps, size: int) -> Steps:
        """Return the cheapest captured steps that run all of some steps; those themselves if there are none."""
        found = self._covers.get((steps, size))
        if found is None:
            needed = dict(steps)
            captured = [key[1] for key in self._graphs if key[0] == "step" and key[2] == size]
            fit = [one for one in captured if all(dict(one).get(i, 0) >= top_k for i, top_k in needed.items())]
            found = min(fit, key=cost, default=steps)
            if fit:
                self._covers[steps, size] = found
        return found

    @torch.inference_mode()
    def _advance(self, steps: Steps, size: int) -> None:
        """Replace the tokens of the first `size` rows by the next ones; count the places of those in use on."""
        place, is_used = self._state[0, :size], self._state[1, :size]
        pack = Pack(
            place.long(),
            self._first[:size] + place,
            self._numbers[: size + 1],
            self._starts[: size + 1],
            place + 1,
            1,
            self.capacity,
            self._state[2:, :size].contiguous(),
        )
        x = F.embedding(self._token[:size].clamp(min=0), self._decoder.embedding)
        logits = self._decoder.logits(run_rows(self._decoder, x, steps, pack, self._keys, self._values)).float()
        if self._limit is not None:
            logits += self._limit[:size]
            self._limit[:size].zero_()
        self._token[:size].copy_(greedy(logits))
        place.add_(is_used)

    def capture(self, key: tuple[str, Steps, int]) -> None:
        """Capture prompts or a step, unless a row is in use."""
        if key not in self._graphs and len(self.free) == ROWS:
            self._wanted.pop(key, None)
            self._state.zero_()
            self._bounds.zero_()
            self._bounds[0, 1:] = key[2]
            self._places.fill_(-1)
            self._places[0].zero_()
            self._graphs[key] = self._recorder.graph(self._work(key))
            self._covers.clear()

    def settle(self, is_quiet: Callable[[], bool]) -> None:
        """Capture what lacked a graph of its own, one after the other, while it is quiet."""
        for key in list(self._wanted):
            if is_quiet():
                self.capture(key)

    def jobs(self, plans: Collection[Plan], usual: Collection[Plan]) -> list[tuple[str, Steps, int]]:
        """Return what a warm-up for some plans captures, the largest first.

        Packs and steps of the `usual` plans, and steps that serve all others: of each depth, those of the plan
        with the most experts.
        """
        most: dict[tuple[int, ...], Steps] = {}
        for steps in sorted({plan.steps for plan in plans}, key=cost):
            most[tuple(index for index, _ in steps)] = steps
        own = {plan.steps: None for plan in usual}
        all_steps = {**own, **dict.fromkeys(most.values())}
        packs = [("prompts", steps, size) for size in reversed(PACK_BUCKETS) for steps in own]
        return packs + [("step", steps, size) for size in ROW_BUCKETS for steps in all_steps]


def fill_pack(places: np.ndarray, bounds: np.ndarray, lengths: Sequence[int], begins: Sequence[int]) -> None:
    """Write where the tokens of `R` prompts stand, by a few calls of NumPy for each prompt.

    Args:
        places: (2, N) int64, of each token its place in its prompt and its entry of the cache; 0, -1 of padding.
        bounds: (3, more than R) int32, of each prompt: its tokens' bounds, its first entry, its length.
        lengths: of the prompts.
        begins: the first entries of their rows.
    """
    places[0], places[1], bounds[:] = 0, -1, 0
    end = 0
    for i, (length, begin) in enumerate(zip(lengths, begins, strict=True)):
        places[0, end : end + length] = np.arange(length)
        places[1, end : end + length] = np.arange(begin, begin + length)
        end += length
        bounds[:, i] = bounds[0, i], begin, length
        bounds[0, i + 1 :] = end


def cost(steps: Steps) -> tuple[int, int]:
    """Return the blocks, and the experts that a token visits in all of them.

    A block more than a row needs takes its whole time; experts beyond a row's own number hardly any, because they
    are those that are visited anyway.
    """
    return len(steps), sum(top_k for _, top_k in steps)


def union(every: Iterable[Steps]) -> Steps:
    """Return all blocks that some steps run, each with the most experts that any of them visits there."""
    most: dict[int, int] = {}
    for index, top_k in (step for steps in every for step in steps):
        most[index] = max(most.get(index, 0), top_k)
    return tuple(Step(*one) for one in sorted(most.items()))
