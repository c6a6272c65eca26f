"""Several requests at once, each answered as if alone: padded on the right, with positions and masks.

Requests are grouped by plan, because one forward pass runs one plan. Times in these answers are those of the
request's group, from the moment the group starts. Shapes: `B` rows, `T` tokens, `V` vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from tempovlm.control.guard import Choice, Guard
from tempovlm.control.policy import Sight
from tempovlm.core.plan import Plan
from tempovlm.core.request import Answer, Request
from tempovlm.engine.engine import Engine, build_answer, image_size
from tempovlm.engine.runner import Prepared, Runner
from tempovlm.engine.sampling import sampler_for
from tempovlm.engine.transcript import Transcript
from tempovlm.latency.clock import stage_clock
from tempovlm.model.attention import causal_mask
from tempovlm.model.cache import KVCache
from tempovlm.model.vision.tiling import Crops

MAX_ROWS = 32
"""Rows of a group; more requests of one plan form several groups."""


@dataclass(frozen=True, slots=True)
class _Row:
    """A request of a group, with its position in the caller's list."""

    place: int
    request: Request
    image: np.ndarray | None
    choice: Choice


def answer_batch(engine: Engine, requests: Sequence[Request], guard: Guard | None = None) -> list[Answer]:
    """Answer every request, in order.

    Each request's setting is chosen as if it ran alone, and the choice assumes the
    usual time of opening a picture. Deadlines do not stop a batch. A policy that glances must see a picture
    before it chooses, so requests that it decides about are answered alone, one after another.
    """
    with engine.computing():
        return _answer_batch(engine, requests, guard or engine.native)


def _answer_batch(engine: Engine, requests: Sequence[Request], chooser: Guard) -> list[Answer]:
    groups: dict[Plan, list[_Row]] = {}
    answers: dict[int, Answer] = {}
    for place, request in enumerate(requests):
        if request.budget_ms is not None and chooser.policy.sees_glance:
            answers[place] = engine.answer(request, chooser)
            continue
        image = engine.runner.open(request)
        choice = _choose(chooser, request, image)
        groups.setdefault(engine.plan(choice.knobs), []).append(_Row(place, request, image, choice))
    for plan, rows in groups.items():
        for start in range(0, len(rows), MAX_ROWS):
            part = rows[start : start + MAX_ROWS]
            done = _answer_group(engine, plan, part)
            answers |= {row.place: answer for row, answer in zip(part, done, strict=True)}
    return [answers[place] for place in range(len(requests))]


def _choose(guard: Guard, request: Request, image: np.ndarray | None) -> Choice:
    """Make both choices at once, before any picture is encoded."""
    profile = guard.profile
    tier = guard.choose_tier(request, image_size(image), profile.open_ms if profile else 0.0)
    looking_ms = 0.0
    if profile is not None:
        in_tier = next(i for i, knobs in enumerate(guard.space) if knobs.tier == tier.tier)
        looking_ms = profile.p50_prefix_ms(in_tier)
    return guard.choose_compute(request, tier, Sight(tier.tier, None, 0, 0), looking_ms)


def _answer_group(engine: Engine, plan: Plan, rows: list[_Row]) -> list[Answer]:
    clock, run = stage_clock(engine.device), engine.runner
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
    return [build_answer(engine, row.request, row.choice, one, text, reading) for row, one, text in parts]


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
    parts = iter(run.model.vision(together, live).split([len(one.patches) for one in pictures]))
    return [None if one is None else next(parts) for one in crops]


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
        embedded = []
        for one, features in zip(ready, vision, strict=True):
            tokens = one.prompt.tokens.to(run.device, non_blocking=True).unsqueeze(0)
            embedded.append(run.model.embed(tokens, features, one.prompt.slots)[0])
        x = torch.nn.utils.rnn.pad_sequence(embedded, batch_first=True)
        lengths = torch.tensor([len(row) for row in embedded], device=run.device)
        B, T, _ = x.shape
        cache = KVCache.allocate(run.model.config, len(plan.steps), B, T + room, x)
        return cls(run.model.prefill(x, plan, cache, lengths), plan, cache, lengths, T)

    @torch.inference_mode()
    def decode(self, run: Runner, tokens: Tensor, count: int) -> Tensor:
        """Return logits (B, V) after the generated tokens (B,), the `count`-th, counted from 0."""
        start = self.longest + count
        place = torch.arange(start + 1, device=run.device)
        valid = (place < self.lengths.unsqueeze(1)) | (place >= self.longest)
        mask = causal_mask(valid, 1)
        tokens = tokens.clamp(min=0)  # a row that has ended may hold no valid token
        return run.model.decode(tokens, self.plan, self.cache, start, self.lengths + count, mask)
