"""The contenders of the CPU peers' benchmark: what each runs for a row, and how a row is timed."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from tempovlm.core.knobs import KnobConfig
from tempovlm.core.plan import Plan
from tempovlm.core.units import now_ms

if TYPE_CHECKING:
    from torch import Tensor

    from tempovlm.api import TempoVLM
    from tempovlm.data.sample import Sample
    from tempovlm.model.vision.tiling import Crops

Stage = Callable[..., list[Any]]
"""A stage that is ready to run: its inputs, tensors or outputs of other stages, to its outputs."""

SETTINGS = {"k8_b16": (8, 16), "k4_b8": (4, 8)}
LENGTHS, CONTEXTS, CROPS = (289, 336, 700), (300, 700), (2, 7, 13)

Job = Callable[[], list[float]]
"""One turn at a row: its times in ms."""

TOKENS = 8
"""Tokens of one turn at a row of decode."""

MAX_NEW_TOKENS = 16

SIGMOID_SLOPE = 1.702
"""Of CLIP's activation (Radford et al. 2021)."""


class Peer(Protocol):
    """A runtime that shares the process, and has every stage of a model."""

    def encode(self, crops: int) -> Stage:
        """Make the vision transformer for a number of crops."""

    def project(self, crops: int) -> Stage:
        """Make the projector for a number of crops."""

    def prefill(self, plan: Plan, length: int | None) -> Stage:
        """Make the reading of prompts of a length, or of any."""

    def decode(self, plan: Plan, context: int) -> Stage:
        """Make a token after a context."""

    def numbers(self, output: Any) -> Tensor:
        """Copy an output of a stage."""


@dataclass(frozen=True, slots=True)
class Work:
    """A row: a stage, its size (tokens or crops) and its plan; of a whole answer neither."""

    name: str
    stage: str
    size: int = 0
    plan: Plan | None = None

    @property
    def weight(self) -> float:
        """Share of the time for this row, roughly as a turn at it takes."""
        depth = 1.0 if self.plan is None else len(self.plan.steps) / 16
        return {"prefill": self.size * depth, "decode": 100.0 * depth, "vision": 20.0 * self.size}.get(
            self.stage, 500.0
        )


@dataclass(frozen=True, slots=True)
class Contender:
    """One way to compute: who, with which types and threads.

    Attributes:
        package: for ours `tempovlm`. is_spinning: whether threads spin while they wait.
        make: makes the turn at a row; None if there is no way to compute it.
    """

    who: str
    package: str
    precision: str
    threads: int
    make: Callable[[Work], Job | None]
    is_spinning: bool = False

    @property
    def label(self) -> str:
        """Name of the variant without its threads."""
        return f"{self.who}_{self.precision}" + "_spinning" * self.is_spinning


def works_of(vlm: TempoVLM) -> list[Work]:
    """Return all rows."""
    shape, ranking = vlm.engine.runner.model.config.shape, vlm.engine.ranking
    plans = {
        name: Plan.build(KnobConfig(tier="low", top_k=top_k, num_blocks=blocks), ranking, shape)
        for name, (top_k, blocks) in SETTINGS.items()
    }
    sized = (("prefill", LENGTHS), ("decode", CONTEXTS))
    works = [
        Work(f"{stage}_{size}_{name}", stage, size, plan)
        for stage, sizes in sized
        for size in sizes
        for name, plan in plans.items()
    ]
    return [*works, *(Work(f"vision_{count}", "vision", count) for count in CROPS), Work("answer", "answer")]


def timed(run: Callable[[], Any], count: int = 1) -> list[float]:
    """Return the times in ms of some calls."""
    times_ms = []
    for _ in range(count):
        begin_ms = now_ms()
        run()
        times_ms.append(now_ms() - begin_ms)
    return times_ms


def tokens_of(length: int) -> list[int]:
    """Some ordinary tokens."""
    return [i % 97 + 16 for i in range(length)]


def crops_of(vlm: TempoVLM, count: int) -> Crops:
    """Some distinct crops."""
    import torch

    from tempovlm.model.vision.tiling import Crops, Grid

    vision = vlm.engine.runner.model.config.vision
    patches = torch.randn(
        count, vision.num_patches, vision.patch_values, generator=torch.Generator().manual_seed(0)
    )
    masks = torch.ones(count, vision.num_patches)
    return Crops(patches, torch.arange(count), masks, Grid(1, count - 1))


def our_job(vlm: TempoVLM, sample: Sample | None, work: Work) -> Job:
    """A turn of ours, with the number of threads that the product computes with; answers need a sample."""
    import torch

    from tempovlm.model.prompt import Prompt

    engine, run = vlm.engine, vlm.engine.runner
    computing = getattr(engine, "computing", contextlib.nullcontext)  # the first version lacks it
    if work.stage == "answer":
        assert sample is not None
        given: dict[str, Any] = {"style": sample.style, "max_new_tokens": MAX_NEW_TOKENS}
        return lambda: [vlm.answer(sample.image_path, sample.question, **given).timings_ms["total"]]
    if work.stage == "vision":
        crops = crops_of(vlm, work.size)

        def encode() -> list[float]:
            with computing():
                return timed(lambda: run.encode(crops))

        return encode
    assert work.plan is not None
    plan, prompt = work.plan, Prompt(torch.tensor(tokens_of(work.size)), None, 0)

    def prefill() -> list[float]:
        with computing():
            return timed(lambda: run.prefill(prompt, None, plan, MAX_NEW_TOKENS))

    if work.stage == "prefill":
        return prefill
    state, token = run.prefill(prompt, None, plan, MAX_NEW_TOKENS), torch.tensor([16])

    def decode() -> list[float]:
        with computing():
            run.decode(token, state, 1)
            return timed(lambda: run.decode(token, state, 1), TOKENS)

    return decode


def peer_job(peer: Peer, vlm: TempoVLM, sample: Sample, work: Work) -> Job:
    """A turn of a peer that shares the process."""
    import torch

    embedding = vlm.engine.runner.model.decoder.embedding.detach()
    if work.stage == "answer":
        return _peer_answer(peer, vlm, sample)
    if work.stage == "vision":
        patches, stage = crops_of(vlm, work.size).patches, peer.encode(work.size)
        return lambda: timed(lambda: stage(patches))
    assert work.plan is not None
    x = embedding[torch.tensor(tokens_of(work.size))][None].clone()
    prefill = peer.prefill(work.plan, work.size)
    if work.stage == "prefill":
        return lambda: timed(lambda: prefill(x))
    _, *past = prefill(x)
    decode, one = peer.decode(work.plan, work.size), x[:, :1].clone()

    def turn() -> list[float]:
        decode(one, *past)
        return timed(lambda: decode(one, *past), TOKENS)

    return turn


def _peer_answer(peer: Peer, vlm: TempoVLM, sample: Sample) -> Job:
    """Our preparation, and the peer's stages; as many tokens as in ours, all with the context of the first."""
    import torch

    from tempovlm.core.request import Request

    engine, run = vlm.engine, vlm.engine.runner
    plan = engine.plan(vlm.space.native)
    given: dict[str, Any] = {"style": sample.style, "max_new_tokens": MAX_NEW_TOKENS}
    request = Request(images=(sample.image_path,), question=sample.question, **given)
    ours = vlm.answer(sample.image_path, sample.question, **given)
    ready = run.prepare(run.open(request), plan.knobs.tier, request)
    assert ready.crops is not None
    crops, length = len(ready.crops.patches), len(ready.prompt.tokens)
    encode, project = peer.encode(crops), peer.project(crops)
    prefill, decode = peer.prefill(plan, length), peer.decode(plan, length)

    @torch.inference_mode()
    def answer() -> None:
        with engine.computing():
            now = run.prepare(run.open(request), plan.knobs.tier, request)
        assert now.crops is not None
        (features,) = encode(now.crops.patches)
        (tokens,) = project(features, now.crops.masks)
        prompt = now.prompt
        logits, *past = prefill(run.model.embed(prompt.tokens[None], peer.numbers(tokens), prompt.slots))
        token = peer.numbers(logits).argmax(-1)
        for _ in range(ours.num_output_tokens - 1):
            logits, *_ = decode(run.model.decoder.embedding[token][None].clone(), *past)
            token = peer.numbers(logits).argmax(-1)

    return lambda: timed(answer)


def take_turns(jobs: Sequence[Job], limit_ms: float, repeats: int) -> list[list[float]]:
    """Times of each job.

    The one that has used the least time is next, so that a slow one gets fewer turns; each has two at least, and
    at most `repeats`. The first turn of all is not counted.
    """
    times_ms: list[list[float]] = [[] for _ in jobs]
    turns = [0] * len(jobs)
    for job in jobs:
        job()
    used_ms, begin_ms = np.zeros(len(jobs)), now_ms()
    while True:
        open_ = [i for i in range(len(jobs)) if turns[i] < repeats]
        if now_ms() - begin_ms > limit_ms:
            open_ = [i for i in open_ if turns[i] < min(2, repeats)]
        if not open_:
            return times_ms
        chosen = min(open_, key=lambda i: (turns[i] >= 2, used_ms[i]))
        before_ms = now_ms()
        times_ms[chosen] += jobs[chosen]()
        used_ms[chosen] += now_ms() - before_ms
        turns[chosen] += 1


def llama_job(process: Any, files: dict[Plan, Path], work: Work) -> Job | None:
    """A turn of llama.cpp, by its own clock; it has no picture's stages."""
    if work.plan is None:
        return None
    path, tokens = files[work.plan], tokens_of(work.size)
    if work.stage == "prefill":
        return lambda: [process.ask(path, tokens, 1)["prompt_ms"]]
    return lambda: process.ask(path, tokens, TOKENS + 1)["token_ms"]
