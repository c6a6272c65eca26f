"""Work of several requests in one pass: their pictures, and prompts of equal plans.

Shapes: `U` distinct crops, `C` crops, `P` patches of a crop, `F` features of a patch, `G` tokens of a crop, `T`
tokens of a prompt, `D` decoder width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate

import torch
from torch import Tensor

from tempovlm.core.plan import Step
from tempovlm.engine.company.member import Member
from tempovlm.engine.cuda.rows import PACK_BUCKETS
from tempovlm.engine.cuda.vision_graphs import MAX_CROPS
from tempovlm.engine.runner import Decoding, Runner
from tempovlm.latency.clock import StageClock
from tempovlm.model.vision.encoder import only_live
from tempovlm.model.vision.tiling import Crops

LONG_TOKENS = PACK_BUCKETS[-1] // 2
"""Longer prompts are read alone: two of them have no graph."""


@dataclass(frozen=True, slots=True)
class Read:
    """A member whose picture is encoded, (C, G, D); its prompt too, if it was read in a pack.

    Attributes:
        clocks: of the stages that it shared.
        state: after the prompt, in a cache of its own. token: (1,) the first one.
    """

    member: Member
    vision: Tensor | None
    clocks: tuple[StageClock, ...]
    state: Decoding | None = None
    token: Tensor | None = None


def packs(reads: Iterable[Read]) -> list[list[Read]]:
    """Sort members by the steps of their plans, into packs that a graph can have; long prompts stay apart."""
    of_steps: dict[tuple[Step, ...], list[Read]] = {}
    found = []
    for one in reads:
        steps = one.member.plan.steps
        pack = of_steps.get(steps, [])
        if len(one.member) > LONG_TOKENS:
            found.append([one])
        elif pack and sum(len(other.member) for other in pack) + len(one.member) <= PACK_BUCKETS[-1]:
            pack.append(one)
        else:
            of_steps[steps] = [one]
            found.append(of_steps[steps])
    return found


def embed(run: Runner, pack: Sequence[Read]) -> list[Tensor]:
    """Return embeddings (T, D) of the prompts of a pack, with their pictures."""
    prompts = [(one.member.ready.prompt, one.vision) for one in pack]
    return run.model.embed_packed([(prompt.tokens, seen, prompt.slots) for prompt, seen in prompts])


def first_token(run: Runner, one: Read, state: Decoding) -> Tensor:
    """Return the first token (1,) of an answer."""
    return one.member.sample(run.limits([one.member.request])(state.logits))


def encode_together(run: Runner, crops: Sequence[Crops | None]) -> list[Tensor | None]:
    """Encode the distinct crops of all pictures; return features (U, P, F) of each picture."""
    pictures = [one for one in crops if one is not None]
    if not pictures or run.features is not None:
        return [run.encode(one) for one in crops]
    patches = [one.patches.to(run.device, non_blocking=True) for one in pictures]
    counts = [len(one) for one in patches]
    if run.vision is not None and sum(counts) <= MAX_CROPS:
        every = run.vision.encode.together(patches)
    else:
        stage = run.see_crops if run.vision is None else run.vision.encode
        every = in_chunks(stage, torch.cat(patches).to(run.dtype))
    parts = iter(every.split(counts))
    return [None if one is None else _live(next(parts), one) for one in crops]


def _live(features: Tensor, crops: Crops) -> Tensor:
    return only_live(features, None if crops.live is None else crops.live.to(features.device, non_blocking=True))


def project_together(
    run: Runner, features: Sequence[Tensor | None], crops: Sequence[Crops | None]
) -> list[Tensor | None]:
    """Project all crops of all pictures; return tokens (C, G, D) of each picture."""
    if run.vision is None:
        return [run.project(*one) for one in zip(features, crops, strict=True)]
    pictures = [(f, c) for f, c in zip(features, crops, strict=True) if f is not None and c is not None]
    if not pictures:
        return [None] * len(crops)
    index, masks = _of_all(tuple((c.index, c.masks, len(f)) for f, c in pictures), run.device)
    every = torch.cat([f for f, _ in pictures]) if len(pictures) > 1 else pictures[0][0]
    if len(index) != len(every):
        every = every.index_select(0, index)
    parts = iter(in_chunks(run.vision.project, every, masks).split([len(c.index) for _, c in pictures]))
    return [None if one is None else next(parts) for one in crops]


@lru_cache(maxsize=64)
def _of_all(pictures: tuple[tuple[Tensor, Tensor, int], ...], device: torch.device) -> tuple[Tensor, Tensor]:
    """Return index (C,) and masks (C, P) of all crops of some pictures, from those of each and its distinct crops.

    Kept for pictures with the same tensors, which all of one shape have.
    """
    begins = accumulate((count for *_, count in pictures), initial=0)
    index = [own.to(device) + begin for (own, *_), begin in zip(pictures, begins, strict=False)]
    return torch.cat(index), torch.cat([masks.to(device) for _, masks, _ in pictures])


def in_chunks(stage: Callable[..., Tensor], *values: Tensor) -> Tensor:
    """Run a stage on values whose first dimension is crops, as many at a time as have a graph."""
    made = [stage(*chunk) for chunk in zip(*(value.split(MAX_CROPS) for value in values), strict=True)]
    return made[0] if len(made) == 1 else torch.cat(made)
