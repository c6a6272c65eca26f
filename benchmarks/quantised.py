"""Measure the loss from decoding on one-byte weights: logit error and accuracy on generated questions, as JSON.

Needs no GPU: a model's decoder is copied with the values that the one-byte weights represent, which the kernels
multiply (tests check this). As on a GPU, the prompt is read with the weights as loaded, so
that an answer's first token never changes; every later one may. Logits are compared token by token along the
answer of the weights as loaded.

    python benchmarks/quantised.py --model pocket --num_samples 200 --json OUT
"""

# ruff: noqa: E402 - threads are set before torch is imported

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from tempovlm.engine.threads import prepare

prepare()

import torch
from torch import Tensor

from output import write_json
from tempovlm import api
from tempovlm.core.cost import Cost, active_parameters
from tempovlm.core.errors import UserError
from tempovlm.core.plan import Plan
from tempovlm.core.progress import progress_bar
from tempovlm.core.request import Request
from tempovlm.core.shape import ModelShape
from tempovlm.data.catalog import load_mixed
from tempovlm.data.registry import GENERATED
from tempovlm.data.sample import Sample
from tempovlm.data.scoring import score
from tempovlm.engine.runner import Decoding, Runner
from tempovlm.engine.sampling import greedy
from tempovlm.engine.transcript import Transcript
from tempovlm.model.cache import KVCache
from tempovlm.model.narrow import NarrowDecoder
from tempovlm.model.quantised import Kind, QuantisedDecoder, imitate
from tempovlm.model.vlm import Molmo

KINDS: tuple[Kind, ...] = ("fp8", "int8")
MAX_NEW_TOKENS = 16


@dataclass(slots=True)
class Outcome:
    """Sums for one kind of weights over the questions so far.

    Attributes:
        relative: norm of the error over norm of the logits, of every step. largest: the largest error of a logit.
        scores: of the answers. differ: answers that differ from those of the weights as loaded.
    """

    relative: list[float] = field(default_factory=list)
    largest: float = 0.0
    scores: list[float] = field(default_factory=list)
    differ: int = 0

    def compare(self, ours: Tensor, exact: Tensor) -> None:
        """Take the logits of one step."""
        self.relative.append(float((ours - exact).norm() / exact.norm()))
        self.largest = max(self.largest, float((ours - exact).abs().max()))


def step_cost(cost: Cost, plan: Plan, shape: ModelShape, value_bytes: int, steps: int) -> Cost:
    """Return the cost with one-byte products, and a float32 scale a row, in each of the decode steps."""
    D, F, blocks = shape.width, shape.expert_width, len(plan.steps)
    visited = sum(step.top_k for step in plan.steps)
    values = active_parameters(plan, shape) - blocks * D * shape.num_experts
    scales = shape.vocab_size + blocks * 4 * D + visited * (2 * F + D)
    saved = steps * (values * (value_bytes - 1) - 4 * scales)
    return replace(cost, bytes={**cost.bytes, "decode": cost.bytes["decode"] - saved})


def imitation(run: Runner, kind: Kind) -> Runner:
    """Reads prompts as `run` does, and decodes with the values that one-byte weights represent."""
    decoder = imitate(run.model.decoder, kind)
    narrow = NarrowDecoder.of(decoder)
    if narrow is not None:
        return Runner(run.model, run.tokenizer, run.exact, narrow, open_answers=run.open_answers)
    with torch.device("meta"):
        model = Molmo(run.model.config)
    model.decoder = decoder
    return Runner(model, run.tokenizer, run.exact, open_answers=run.open_answers)


def answer(run: Runner, state: Decoding, request: Request) -> Transcript:
    """The greedy answer of a prompt that was read."""
    transcript, token = Transcript(request, run.tokenizer), greedy(run.limits([request])(state.logits))
    transcript.add(int(token))
    steps = run.steps(token, state, greedy, request)
    while not transcript.finish:
        transcript.add(next(steps).token)
    return transcript


def logits_along(run: Runner, state: Decoding, tokens: Sequence[int]) -> Iterator[Tensor]:
    """Logits (1, V) after each of the tokens but the last."""
    for number, token in enumerate(tokens[:-1], 1):
        yield run.decode(torch.tensor([token], device=run.device), state, number)


def fresh(state: Decoding) -> Decoding:
    """The same prompt with a cache of its own."""
    return replace(state, cache=KVCache(state.cache.keys.clone(), state.cache.values.clone()))


@torch.inference_mode()
def measure(run: Runner, plan: Plan, samples: Sequence[Sample], kinds: Sequence[Kind]) -> dict[str, Outcome]:
    """Every question with the weights as loaded and with each kind."""
    others = {kind: imitation(run, kind) for kind in kinds}
    found: dict[str, Outcome] = {name: Outcome() for name in ("loaded", *kinds)}
    with progress_bar("answering questions") as advance:
        for done, sample in enumerate(samples, 1):
            request = Request(
                images=(sample.image_path,),
                question=sample.question,
                style=sample.style,
                max_new_tokens=MAX_NEW_TOKENS,
            )
            ready = run.prepare(run.open(request), plan.knobs.tier, request)
            vision = run.project(run.encode(ready.crops), ready.crops)
            state = run.prefill(ready.prompt, vision, plan, MAX_NEW_TOKENS)
            plain = answer(run, fresh(state), request)
            exact = list(logits_along(run, fresh(state), plain.tokens))
            found["loaded"].scores.append(score(sample, plain.text))
            for kind, other in others.items():
                for logits, meant in zip(logits_along(other, fresh(state), plain.tokens), exact, strict=True):
                    found[kind].compare(logits, meant)
                text = answer(other, fresh(state), request).text
                found[kind].scores.append(score(sample, text))
                found[kind].differ += text != plain.text
            advance(done, len(samples))
    return found


def quality(model: str, count: int, kinds: Sequence[Kind]) -> dict[str, Any]:
    """Logit error and accuracy of each kind at the native setting, in float32 on the CPU; with its stamp."""
    loaded = api.load(model, device="cpu", warmup=False)
    run, plan = loaded.engine.runner, loaded.engine.plan(loaded.space.native)
    samples = load_mixed(GENERATED, count)
    found = measure(run, plan, samples, kinds)
    accuracy = statistics.mean(found["loaded"].scores)
    decoder = run.model.decoder
    values_mb = sum(parameter.nbytes for parameter in decoder.parameters()) / 2 / 1e6
    rows = []
    for kind in kinds:
        outcome, own = found[kind], statistics.mean(found[kind].scores)
        rows.append(
            {
                "weights": kind,
                "relative_logit_error_mean": statistics.mean(outcome.relative),
                "relative_logit_error_max": max(outcome.relative),
                "logit_error_max": outcome.largest,
                "accuracy": own,
                "accuracy_loss": accuracy - own,
                "answers_that_differ": outcome.differ,
                "memory_mb": QuantisedDecoder.of(decoder, kind).nbytes / 1e6,
            }
        )
    return {
        "stamp": loaded.stamp("synthetic").to_json(),
        "setting": str(plan.knobs),
        "num_samples": len(samples),
        "steps": len(found[kinds[0]].relative),
        "accuracy_as_loaded": accuracy,
        "decoder_mb_bf16": values_mb,
        "rows": rows,
    }


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="pocket")
    parser.add_argument("--weights", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--num_samples", type=int, default=200, help="questions of all data sets together")
    parser.add_argument("--json", type=Path, help="file to write; standard output without it")
    flags = parser.parse_args()
    if flags.num_samples < 1:
        parser.error(f"--num_samples {flags.num_samples}: must be at least 1")
    try:
        record = quality(flags.model, flags.num_samples, flags.weights)
    except UserError as error:
        sys.exit(f"error: {error.flagged}")
    write_json(record, flags.json)


if __name__ == "__main__":
    main()
