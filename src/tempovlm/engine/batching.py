"""Several requests at once, each answered as if alone: padded on the right, with positions and masks.

Requests are grouped by plan, because one forward pass runs one plan. Times in these answers are those of the
request's group, from the moment the group starts. On CUDA the engine's company answers them instead. By a CPU's
kernels, which are as fast for one request as for several, they are answered one after another. Shapes: `B` rows,
`T` tokens, `V` vocabulary.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from tempovlm.control.guard import Choice, Guard
from tempovlm.control.policy import Sight
from tempovlm.core.plan import Plan
from tempovlm.core.request import Answer, Request
from tempovlm.core.units import now_ms
from tempovlm.engine.company.batch import soonest_ms
from tempovlm.engine.engine import Engine
from tempovlm.engine.runner import Prepared, Runner
from tempovlm.engine.sampling import sampler_for
from tempovlm.engine.transcript import Transcript
from tempovlm.engine.work import build_answer, image_size
from tempovlm.latency.clock import stage_clock
from tempovlm.model.attention import causal_mask
from tempovlm.model.cache import KVCache
from tempovlm.model.vision.tiling import Crops

_log = logging.getLogger("tempovlm")

MAX_ROWS = 32
"""Rows of a group; more requests of one plan form several groups."""


@dataclass(frozen=True, slots=True)
class _Row:
    """A request of a group, with its position in the caller's list."""

    place: int
    request: Request
    image: np.ndarray | None
    choice: Choice


def answer_batch(
    engine: Engine, requests: Sequence[Request], guard: Guard | Callable[[Request], Guard] | None = None
) -> list[Answer]:
    """Answer every request; the answers are in the order of the requests, and all clocks run from this call on.

    On CUDA the engine's company answers them: those with a budget join it, the earliest deadline first, where none
    is late by that. Elsewhere those with a budget are answered alone, one after another, the earliest deadline
    first, and each leaves the others their share of the time; then those without one, in groups. By a CPU's
    kernels they are alone, too.

    Args:
        engine: the engine.
        requests: in any order.
        guard: decides about them, or says who decides about a request; without one the native setting runs.
    """
    guard = guard or engine.native
    guards = [guard if isinstance(guard, Guard) else guard(one) for one in requests]
    company = None if engine.door.is_inside else engine.company
    _warn_of_budgets(requests, guards, together=company is not None and company.has_rows)
    if company is not None:
        return company.answer_all(zip(requests, guards, strict=True))
    has_groups = engine.runner.stages is None
    alone = [place for place, one in enumerate(requests) if one.budget_ms is not None or not has_groups]
    together = [place for place, one in enumerate(requests) if one.budget_ms is None and has_groups]
    tickets = {place: engine.line_up(requests[place], guard=guards[place]) for place in (*alone, *together[:1])}
    answers: dict[int, Answer] = {}
    try:
        alone.sort(key=lambda place: tickets[place].urgency)
        for place in alone:
            answers[place] = engine.answer_in_turn(requests[place], guards[place], tickets.pop(place))
        if together:
            with engine.door.enter(tickets.pop(together[0])), engine.computing():
                answers |= _answer_together(engine, {place: requests[place] for place in together}, guards)
    finally:
        engine.door.leave(list(tickets.values()))
    return [answers[place] for place in range(len(requests))]


def _warn_of_budgets(requests: Sequence[Request], guards: Sequence[Guard], *, together: bool) -> None:
    """Say before they run that some of the requests cannot keep their budgets."""
    left_ms = [math.inf if one.budget_ms is None else one.budget_ms - one.waited_ms for one in requests]
    hurried = sorted((place for place, left in enumerate(left_ms) if left < math.inf), key=left_ms.__getitem__)
    ends_ms = soonest_ms([guards[place] for place in hurried], together=together)
    late = sum(end > left_ms[place] for end, place in zip(ends_ms, hurried, strict=True))
    if late:
        _log.warning(
            "%d of %d requests of this batch are not expected within their budgets, even at the cheapest setting: "
            "they share one device; ask for fewer at once, or give them more time",
            late,
            len(hurried),
        )


def _answer_together(
    engine: Engine, requests: Mapping[int, Request], guards: Sequence[Guard]
) -> dict[int, Answer]:
    """Answer requests without a budget, by their places."""
    groups: dict[Plan, list[_Row]] = {}
    answers: dict[int, Answer] = {}
    for place, request in requests.items():
        image, guard = engine.runner.open(request), guards[place]
        tier = guard.choose_tier(request, image_size(image), 0.0)
        choice = guard.choose_compute(request, tier, Sight(tier.tier, None, 0, 0), 0.0)
        groups.setdefault(engine.plan(choice.knobs), []).append(_Row(place, request, image, choice))
    for plan, rows in groups.items():
        for start in range(0, len(rows), MAX_ROWS):
            part = rows[start : start + MAX_ROWS]
            done = _answer_group(engine, plan, part)
            answers |= {row.place: answer for row, answer in zip(part, done, strict=True)}
    return answers


def _answer_group(engine: Engine, plan: Plan, rows: list[_Row]) -> list[Answer]:
    clock, run, accepted_ms = stage_clock(engine.device), engine.runner, now_ms()
    ready = [run.prepare(row.image, row.choice.knobs.tier, row.request) for row in rows]
    clock.mark("preprocess")
    patches = encode_all(run, [one.crops for one in ready])
    clock.mark("vision_encoder")
    vision = [run.project(p, one.crops) for p, one in zip(patches, ready, strict=True)]
    clock.mark("projector")
    clock.mark("control")
    transcripts = [Transcript(row.request, run.tokenizer) for row in rows]
    samplers = [sampler_for(row.request, engine.device) for row in rows]
    most = max(row.request.max_new_tokens for row in rows)
    state = Ragged.prefill(run, ready, vision, plan, most)
    limits, tokens = run.limits([row.request for row in rows]), None
    logits = state.logits
    for count in range(most):
        logits = limits(logits, tokens, count)
        tokens = torch.cat([sample(row) for sample, row in zip(samplers, logits.split(1), strict=True)])
        for transcript, token in zip(transcripts, tokens.tolist(), strict=True):
            if not transcript.finish:
                transcript.add(token)
        clock.mark("decode" if count else "prefill")
        if all(transcript.finish for transcript in transcripts):
            break
        logits = state.decode(run, tokens, count)
    reading = clock.read()
    parts = zip(rows, ready, transcripts, strict=True)
    return [
        build_answer(engine, row.request, row.choice, one, text, reading, accepted_ms) for row, one, text in parts
    ]


@torch.inference_mode()
def encode_all(run: Runner, crops: Sequence[Crops | None]) -> list[Tensor | None]:
    """Encode all pictures' distinct crops in one pass; return a tensor for each picture."""
    pictures = [one for one in crops if one is not None]
    if not pictures:
        return [None] * len(crops)
    together = torch.cat([one.patches for one in pictures]).to(run.device, run.dtype)
    live = None
    if any(one.live is not None for one in pictures):
        every = [torch.ones(len(c.patches), dtype=torch.bool) if c.live is None else c.live for c in pictures]
        live = torch.cat(every).to(run.device)
    parts = iter(run.see_crops(together, live).split([len(one.patches) for one in pictures]))
    return [None if one is None else next(parts) for one in crops]


@torch.inference_mode()
def embed_all(run: Runner, ready: Sequence[Prepared], vision: Sequence[Tensor | None]) -> tuple[Tensor, Tensor]:
    """Return embedded prompts (B, T, D), padded on the right, and their lengths (B,)."""
    prompts = zip((one.prompt for one in ready), vision, strict=True)
    embedded = run.model.embed_packed([(prompt.tokens, seen, prompt.slots) for prompt, seen in prompts])
    lengths = torch.tensor([len(row) for row in embedded], device=run.device)
    return torch.nn.utils.rnn.pad_sequence(embedded, batch_first=True), lengths


@dataclass(frozen=True, slots=True)
class Ragged:
    """Prompts of different lengths after they were read, padded on the right."""

    logits: Tensor
    plan: Plan
    cache: KVCache
    lengths: Tensor
    longest: int

    @classmethod
    @torch.inference_mode()
    def prefill(
        cls, run: Runner, ready: Sequence[Prepared], vision: Sequence[Tensor | None], plan: Plan, room: int
    ) -> Ragged:
        """Embed each prompt, pad, and run the plan over all of them."""
        return cls.read(run, *embed_all(run, ready, vision), plan, room)

    @classmethod
    @torch.inference_mode()
    def read(cls, run: Runner, x: Tensor, lengths: Tensor, plan: Plan, room: int) -> Ragged:
        """Run the plan over prompts of `embed_all`, which stay as they are, with room for generated tokens."""
        B, T, _ = x.shape
        cache = KVCache.allocate(run.model.config, len(plan.steps), B, T + room, x)
        return cls(run.read(x, plan, cache, lengths), plan, cache, lengths, T)

    @torch.inference_mode()
    def decode(self, run: Runner, tokens: Tensor, count: int) -> Tensor:
        """Return logits (B, V) after the generated tokens (B,), the `count`-th, counted from 0."""
        start = self.longest + count
        place = torch.arange(start + 1, device=run.device)
        valid = (place < self.lengths.unsqueeze(1)) | (place >= self.longest)
        mask = causal_mask(valid, 1)
        tokens = tokens.clamp(min=0)  # a row that has ended may hold no valid token
        return run.model.decode(tokens, self.plan, self.cache, start, self.lengths + count, mask)
