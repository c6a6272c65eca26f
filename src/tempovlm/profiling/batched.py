"""Answers of many questions at many settings: pictures are encoded once, every setting of a tier reads them.

The texts are those of `Engine.answer`, which golden tests hold. Nothing is timed here.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from tempovlm.core.knobs import KnobConfig
from tempovlm.core.plan import Plan
from tempovlm.core.records import SweepRow
from tempovlm.core.request import Request
from tempovlm.data.sample import Sample
from tempovlm.data.scoring import score
from tempovlm.engine.batching import Ragged, encode_all
from tempovlm.engine.engine import Engine
from tempovlm.engine.runner import Prepared, Runner
from tempovlm.engine.sampling import greedy
from tempovlm.engine.transcript import Transcript

SAMPLE_ERRORS = (ArithmeticError, LookupError, OSError, RuntimeError, ValueError)
"""What a single bad sample can raise: an unreadable file, a context that is too short, memory.

Anything else is a fault of the program and stops the run.
"""


@dataclass(frozen=True, slots=True)
class Job:
    """A question with its cap on generated tokens, the end token included."""

    sample: Sample
    max_new_tokens: int

    @property
    def request(self) -> Request:
        """What the engine is asked, greedily."""
        sample = self.sample
        return Request(
            images=(sample.image_path,),
            question=sample.question,
            style=sample.style,
            max_new_tokens=self.max_new_tokens,
        )


@dataclass(frozen=True, slots=True)
class _Seen:
    """A question whose picture was encoded; `vision` is None without a picture."""

    job: Job
    ready: Prepared
    vision: Tensor | None


def blank_row(sample: Sample, knobs: KnobConfig, error: str | None = None) -> SweepRow:
    """A row that says which question and setting it is about."""
    return SweepRow(
        dataset=sample.dataset,
        split=sample.split,
        question_id=str(sample.question_id),
        image_id=str(sample.image_id),
        template=sample.template,
        tier=knobs.tier,
        top_k=knobs.top_k,
        num_blocks=knobs.num_blocks,
        error=error,
    )


def error_line(error: Exception) -> str:
    """An exception as one line."""
    return " ".join(f"{type(error).__name__}: {error}".split())


def answer_settings(engine: Engine, jobs: Sequence[Job], settings: Sequence[KnobConfig]) -> Iterator[SweepRow]:
    """A row for every job at every setting, all settings of one tier; failures are rows too.

    Raises:
        ValueError: the settings are of several tiers.
    """
    tiers = {knobs.tier for knobs in settings}
    if len(tiers) != 1:
        raise ValueError(f"settings of {len(tiers)} tiers: give those of one")
    ready: list[tuple[Job, Prepared]] = []
    for job in jobs:
        try:
            image = engine.runner.open(job.request)
            ready.append((job, engine.runner.prepare(image, settings[0].tier, job.request)))
        except SAMPLE_ERRORS as error:
            yield from _failed([job], settings, error)
    yield from _see_and_answer(engine, ready, settings)


def _see_and_answer(
    engine: Engine, ready: Sequence[tuple[Job, Prepared]], settings: Sequence[KnobConfig]
) -> Iterator[SweepRow]:
    """Encode the pictures, in halves where they are too much at once, and answer at every setting."""
    if not ready:
        return
    run = engine.runner
    try:
        patches = encode_all(run, [one.crops for _, one in ready])
        vision = [run.project(p, one.crops) for p, (_, one) in zip(patches, ready, strict=True)]
    except SAMPLE_ERRORS as error:
        if len(ready) == 1:
            yield from _failed([ready[0][0]], settings, error)
            return
        middle = len(ready) // 2
        yield from _see_and_answer(engine, ready[:middle], settings)
        yield from _see_and_answer(engine, ready[middle:], settings)
        return
    seen = [_Seen(job, one, features) for (job, one), features in zip(ready, vision, strict=True)]
    for knobs in settings:
        yield from _answer(engine, seen, knobs)


def _answer(engine: Engine, seen: Sequence[_Seen], knobs: KnobConfig) -> Iterator[SweepRow]:
    """Answer together, in halves where that fails; a single question that fails is a row with its error."""
    try:
        transcripts = decode_group(engine, seen, engine.plan(knobs))
        rows = [_row(one, transcript, knobs) for one, transcript in zip(seen, transcripts, strict=True)]
    except SAMPLE_ERRORS as error:
        if len(seen) == 1:
            yield from _failed([seen[0].job], [knobs], error)
            return
        middle = len(seen) // 2
        yield from _answer(engine, seen[:middle], knobs)
        yield from _answer(engine, seen[middle:], knobs)
        return
    yield from rows


def decode_group(engine: Engine, seen: Sequence[_Seen], plan: Plan) -> list[Transcript]:
    """Greedy answers of a padded batch under a plan."""
    run, most = engine.runner, max(one.job.max_new_tokens for one in seen)
    state = Ragged.prefill(run, [one.ready for one in seen], [one.vision for one in seen], plan, most)
    return decode_greedily(run, [one.job.request for one in seen], state, most)


@torch.inference_mode()
def decode_greedily(run: Runner, requests: Sequence[Request], state: Ragged, most: int) -> list[Transcript]:
    """Answers of at most `most` tokens to a batch that was read; rows that have ended are computed on."""
    transcripts, logits = [Transcript(request, run.tokenizer) for request in requests], state.logits
    limits, tokens = run.limits(requests), None
    for count in range(most):
        tokens = greedy(limits(logits, tokens, count))
        for transcript, token in zip(transcripts, tokens.tolist(), strict=True):
            if not transcript.finish:
                transcript.add(token)
        if all(transcript.finish for transcript in transcripts):
            break
        logits = state.decode(run, tokens, count)
    return transcripts


def _row(one: _Seen, transcript: Transcript, knobs: KnobConfig) -> SweepRow:
    grid = one.ready.crops.grid if one.ready.crops else None
    return replace(
        blank_row(one.job.sample, knobs),
        tiling=None if grid is None else (grid.rows, grid.cols),
        vision_tokens=one.ready.prompt.num_vision_tokens,
        text_tokens=one.ready.prompt.num_text_tokens,
        output_tokens=len(transcript.tokens),
        accuracy=score(one.job.sample, transcript.text),
        prediction=transcript.text,
    )


def _failed(jobs: Sequence[Job], settings: Sequence[KnobConfig], error: Exception) -> Iterator[SweepRow]:
    return (blank_row(job.sample, knobs, error_line(error)) for job in jobs for knobs in settings)
