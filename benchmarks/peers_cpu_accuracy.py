"""The answers of the CPU's peers: their logits and accuracy beside those of torch in float32."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import peers_cpu_llama as llama
from peers_cpu_stages import MAX_NEW_TOKENS, Peer
from tempovlm import api
from tempovlm.core.plan import Plan
from tempovlm.core.progress import progress_bar
from tempovlm.core.request import Request
from tempovlm.data.sample import Sample
from tempovlm.data.scoring import score
from tempovlm.engine.runner import Decoding, Prepared, Runner
from tempovlm.engine.sampling import greedy
from tempovlm.engine.transcript import Transcript
from tempovlm.model.cache import KVCache

POINTS = 0.2
"""Loss of accuracy, in points of a hundred, up to which a precision counts."""

_ROWS = 4096
"""Rows of the embedding that a file for llama.cpp gets for prompts."""

Reader = Callable[[Prepared], Decoding]
"""Encodes a picture and reads a prompt."""


@dataclass(slots=True)
class Outcome:
    """Sums for one way to compute, over the questions so far."""

    largest: list[float] = field(default_factory=list)
    mean: list[float] = field(default_factory=list)
    is_first_equal: list[bool] = field(default_factory=list)
    scores: list[float] = field(default_factory=list)
    differ: int = 0

    def compare(self, logits: Tensor, meant: Tensor) -> None:
        """Take the logits (1, V) of a first token."""
        error = (logits - meant).abs()
        self.largest.append(float(error.max()))
        self.mean.append(float(error.mean()))
        self.is_first_equal.append(bool(logits.argmax() == meant.argmax()))

    def row(self, who: str, reference: Outcome) -> dict[str, Any]:
        """Return the result; accuracies are None where only first tokens were made."""
        points = 100 * (statistics.mean(self.scores) - statistics.mean(reference.scores)) if self.scores else None
        equal = statistics.mean(self.is_first_equal)
        counts = 100 * (1 - equal) <= POINTS if points is None else abs(points) <= POINTS
        return {
            "who": who,
            "num_samples": len(self.mean),
            "logit_error_max": max(self.largest),
            "logit_error_mean": statistics.mean(self.mean),
            "equal_first_tokens": equal,
            "accuracy_points": points,
            "answers_that_differ": self.differ if self.scores else None,
            "counts": counts,
        }


def our_reader(run: Runner, plan: Plan) -> Reader:
    """Read by a runner."""

    def read(ready: Prepared) -> Decoding:
        vision = run.project(run.encode(ready.crops), ready.crops)
        return run.prefill(ready.prompt, vision, plan, MAX_NEW_TOKENS)

    return read


def peer_reader(peer: Peer, run: Runner, plan: Plan) -> Reader:
    """Read by a peer, to a cache of ours; its picture stages are made once for each number of crops."""
    prefill, stages = peer.prefill(plan, None), {}

    def read(ready: Prepared) -> Decoding:
        crops = ready.crops
        assert crops is not None
        for count in {len(crops.patches), len(crops.index)} - stages.keys():
            stages[count] = peer.encode(count), peer.project(count)
        features = peer.numbers(stages[len(crops.patches)][0](crops.patches)[0])[crops.index]
        tokens = peer.numbers(stages[len(crops.index)][1](features, crops.masks)[0])
        x = run.model.embed(ready.prompt.tokens[None], tokens, ready.prompt.slots)
        logits, *past = map(peer.numbers, prefill(x))
        length = len(ready.prompt.tokens)
        cache = KVCache.allocate(run.model.config, len(plan.steps), 1, length + MAX_NEW_TOKENS, x)
        for i, (keys, values) in enumerate(zip(past[::2], past[1::2], strict=True)):
            cache.write(i, 0, keys, values)
        return Decoding(logits, plan, cache, length)

    return read


def _text(run: Runner, state: Decoding, request: Request) -> str:
    """The greedy answer of a prompt that was read."""
    transcript, token = Transcript(request, run.tokenizer), greedy(run.limits([request])(state.logits))
    transcript.add(int(token))
    steps = run.steps(token, state, greedy, request)
    while not transcript.finish:
        transcript.add(next(steps).token)
    return transcript.text


@torch.inference_mode()
def measure(
    vlm: api.TempoVLM, readers: dict[str, Reader], samples: Sequence[Sample], folder: Path | None
) -> list[dict[str, Any]]:
    """Answer questions at the native setting by torch in float32 and in each other way.

    Args:
        vlm: torch in float32, which decodes after every reader.
        readers: others, by name.
        samples: the questions.
        folder: for files of llama.cpp, whose first tokens are compared; None leaves it out.
    """
    run, plan = vlm.engine.runner, vlm.engine.plan(vlm.space.native)
    reference, found = Outcome(), {name: Outcome() for name in readers}
    prompts: list[tuple[Tensor, Tensor]] = []
    with progress_bar("answering questions") as advance, vlm.engine.computing():
        for done, sample in enumerate(samples, 1):
            given: dict[str, Any] = {"style": sample.style, "max_new_tokens": MAX_NEW_TOKENS}
            request = Request(images=(sample.image_path,), question=sample.question, **given)
            ready = run.prepare(run.open(request), plan.knobs.tier, request)
            vision = run.project(run.encode(ready.crops), ready.crops)
            state = run.prefill(ready.prompt, vision, plan, MAX_NEW_TOKENS)
            prompts.append(
                (run.model.embed(ready.prompt.tokens[None], vision, ready.prompt.slots)[0], state.logits)
            )
            meant = _text(run, state, request)
            reference.compare(state.logits, state.logits)
            reference.scores.append(score(sample, meant))
            for name, read in readers.items():
                other = read(ready)
                found[name].compare(other.logits, state.logits)
                text = _text(run, other, request)
                found[name].scores.append(score(sample, text))
                found[name].differ += text != meant
            advance(done, len(samples))
    if folder is not None:
        found |= _first_tokens(vlm, plan, prompts, folder)
    return [outcome.row(name, reference) for name, outcome in found.items()]


def _first_tokens(
    vlm: api.TempoVLM, plan: Plan, prompts: Sequence[tuple[Tensor, Tensor]], folder: Path
) -> dict[str, Outcome]:
    """The shares of first tokens by llama.cpp, as logarithms, beside those of torch."""
    model, size = vlm.engine.runner.model, vlm.engine.runner.model.config.embedding_size
    found = {f"{llama.NAME}_{precision}": Outcome() for precision in llama.PRECISIONS}
    process = llama.Llama(1)
    try:
        for number, part in enumerate(_parts(prompts)):
            for precision, outcome in zip(llama.PRECISIONS, found.values(), strict=True):
                path = folder / f"words_{number}_{precision}.gguf"
                llama.write_gguf(path, model, plan, precision, torch.cat([x for x, _ in part]))
                start, rows = size, size + sum(len(x) for x, _ in part)
                for x, logits in part:
                    answer = process.ask(path, range(start, start + len(x)), 1, rows)
                    outcome.compare(
                        torch.tensor([llama.log_softmax(answer["log_probs"], size)]), logits.log_softmax(-1)
                    )
                    start += len(x)
                path.unlink()
    finally:
        process.close()
    return found


def _parts(prompts: Sequence[tuple[Tensor, Tensor]]) -> Iterator[list[tuple[Tensor, Tensor]]]:
    part: list[tuple[Tensor, Tensor]] = []
    for prompt in prompts:
        if part and sum(len(x) for x, _ in [*part, prompt]) > _ROWS:
            yield part
            part = []
        part.append(prompt)
    yield part
