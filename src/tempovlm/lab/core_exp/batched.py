"""Answers many questions at many settings: a picture is encoded once for all settings of a tier.

The texts equal those of `Engine.answer`, as golden tests check. Nothing is timed here.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from tempovlm.core.knobs import KnobConfig
from tempovlm.core.plan import Plan
from tempovlm.core.records import SweepRow
from tempovlm.core.request import Request
from tempovlm.data.sample import Sample
from tempovlm.data.scoring import score
from tempovlm.engine.batching import Ragged, embed_all, encode_all
from tempovlm.engine.engine import Engine
from tempovlm.engine.runner import Prepared, Runner
from tempovlm.engine.sampling import greedy
from tempovlm.engine.transcript import Transcript
from tempovlm.lab.core_exp.plan import Job

Ready = list[tuple[Job, Prepared]]
"""Number of questions whose crops are cut at a time."""

SAMPLE_ERRORS = (ArithmeticError, LookupError, OSError, RuntimeError, ValueError)
"""Exceptions of a single bad sample: an unreadable file, a context that is too short, memory.

Anything else is a fault of the program and stops the run.
"""


@dataclass(frozen=True, slots=True)
class Seen:
    """A question with its encoded picture; `vision` is None without a picture."""

    job: Job
    ready: Prepared
    vision: Tensor | None


@dataclass(frozen=True, slots=True)
class Prompts:
    """Questions with their prompts, embedded once for all settings of a tier.

    Attributes:
        seen: the questions. x: (B, T, D), padded on the right. lengths: (B,) tokens of each.
    """

    seen: Sequence[Seen]
    x: Tensor
    lengths: Tensor

    @classmethod
    def of(cls, run: Runner, seen: Sequence[Seen]) -> Prompts:
        """Embed the prompts of some questions."""
        return cls(seen, *embed_all(run, [one.ready for one in seen], [one.vision for one in seen]))

    def part(self, which: slice) -> Prompts:
        """Return some of the questions, padded to the longest of them."""
        lengths = self.lengths[which]
        return Prompts(self.seen[which], self.x[which, : int(lengths.max())], lengths)


def blank_row(sample: Sample, knobs: KnobConfig, error: str | None = None) -> SweepRow:
    """Return a row with its question and setting, and an error."""
    return SweepRow(
        dataset=sample.dataset,
        split=sample.split,
        question_id=str(sample.question_id),
        image_id=str(sample.image_id),
        template=sample.template,
        **knobs.as_dict(),
        error=error,
    )


def error_line(error: Exception) -> str:
    """Format an exception as one line."""
    return " ".join(f"{type(error).__name__}: {error}".split())


def answer_settings(engine: Engine, jobs: Sequence[Job], settings: Sequence[KnobConfig]) -> Iterator[SweepRow]:
    """Answer every job at every setting, all of one tier, and yield a row for each; failures are rows too.

    Raises:
        ValueError: the settings are of several tiers.
    """
    tiers = {knobs.tier for knobs in settings}
    if len(tiers) != 1:
        raise ValueError(f"settings of {len(tiers)} tiers: give those of one")
    ready, failed = prepare_all(engine, jobs, settings[0].tier)
    for job, error in failed:
        yield from _failed([job], settings, error)
    yield from _see_and_answer(engine, ready, settings)


def prepare_all(engine: Engine, jobs: Iterable[Job], tier: str) -> tuple[Ready, list[tuple[Job, Exception]]]:
    """Open pictures and cut their crops; return the jobs that are ready to be encoded, and the failures."""
    ready: Ready = []
    failed: list[tuple[Job, Exception]] = []
    for job in jobs:
        try:
            image = engine.runner.open(job.request)
            ready.append((job, engine.runner.prepare(image, tier, job.request)))
        except SAMPLE_ERRORS as error:
            failed.append((job, error))
    return ready, failed


def see_all(run: Runner, ready: Ready) -> list[Seen]:
    """Encode the pictures together."""
    patches = encode_all(run, [one.crops for _, one in ready])
    return [Seen(job, one, run.project(p, one.crops)) for p, (job, one) in zip(patches, ready, strict=True)]


def _see_and_answer(engine: Engine, ready: Ready, settings: Sequence[KnobConfig]) -> Iterator[SweepRow]:
    """Encode the pictures, in halves if memory is short, and answer at every setting."""
    if not ready:
        return
    try:
        seen = see_all(engine.runner, ready)
        prompts = Prompts.of(engine.runner, seen)
    except SAMPLE_ERRORS as error:
        if len(ready) == 1:
            yield from _failed([ready[0][0]], settings, error)
            return
        middle = len(ready) // 2
        yield from _see_and_answer(engine, ready[:middle], settings)
        yield from _see_and_answer(engine, ready[middle:], settings)
        return
    for knobs in settings:
        yield from _answer(engine, prompts, knobs)


def _answer(engine: Engine, prompts: Prompts, knobs: KnobConfig) -> Iterator[SweepRow]:
    """Answer together, in halves after a failure; a single question that fails becomes a row with its error."""
    seen = prompts.seen
    try:
        transcripts = decode_group(engine, prompts, engine.plan(knobs))
        rows = [_row(one, transcript, knobs) for one, transcript in zip(seen, transcripts, strict=True)]
    except SAMPLE_ERRORS as error:
        if len(seen) == 1:
            yield from _failed([seen[0].job], [knobs], error)
            return
        middle = len(seen) // 2
        yield from _answer(engine, prompts.part(slice(0, middle)), knobs)
        yield from _answer(engine, prompts.part(slice(middle, None)), knobs)
        return
    yield from rows


def decode_group(engine: Engine, prompts: Prompts, plan: Plan) -> list[Transcript]:
    """Answer a padded batch greedily under a plan."""
    run, most = engine.runner, max(one.job.max_new_tokens for one in prompts.seen)
    state = Ragged.read(run, prompts.x, prompts.lengths, plan, most)
    return decode_greedily(run, [one.job.request for one in prompts.seen], state, most)


@torch.inference_mode()
def decode_greedily(run: Runner, requests: Sequence[Request], state: Ragged, most: int) -> list[Transcript]:
    """Generate at most `most` tokens for a prefilled batch; rows that have ended are still computed."""
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


def _row(one: Seen, transcript: Transcript, knobs: KnobConfig) -> SweepRow:
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
