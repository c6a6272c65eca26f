"""Measure the importance of each block: accuracy without it, its change of the stream, a joint search.

Models are measured as they are served: batched greedy answers, scored by the rule of the sample's data set.
Teacher forcing would be faster on generated data, but it has no official score, and a removed block changes where
an answer ends. A picture is encoded once for all plans. Every score is stored as it is found, one line a question,
so that a run can be killed and resumed. Shapes: `B` questions, `T` tokens, `D` width, `N` blocks.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import pairwise, takewhile
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from tempovlm.core.errors import UserError
from tempovlm.core.knobs import KnobConfig
from tempovlm.core.paths import write_whole
from tempovlm.core.plan import Plan, Ranking, Step
from tempovlm.core.progress import Advance, silent
from tempovlm.data.digest import Digests, question_digests, refuse_others
from tempovlm.data.sample import Sample, check_unique
from tempovlm.data.scoring import score
from tempovlm.engine.batching import Ragged, embed_all
from tempovlm.engine.engine import Engine
from tempovlm.lab.core_exp.batched import Seen, decode_greedily, error_line, prepare_all, see_all
from tempovlm.lab.core_exp.failures import AGAIN, tell_failures
from tempovlm.lab.core_exp.plan import Job
from tempovlm.lab.statistics import Floats
from tempovlm.model.attention import Span
from tempovlm.model.cache import KVCache
from tempovlm.model.decoder import Decoder

SCHEMA = "tempovlm.importance_scores/1"

_log = logging.getLogger("tempovlm")

Blocks = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Protocol:
    """Options for answering while blocks are removed.

    Attributes:
        base: the setting with the tier and top-k of every plan.
        max_new_tokens: cap on generated tokens.
        batch_size: questions answered together.
    """

    base: KnobConfig
    max_new_tokens: int
    batch_size: int

    def plan(self, blocks: Blocks) -> Plan:
        """Return the plan that runs only these blocks."""
        knobs = replace(self.base, num_blocks=len(blocks))
        return Plan(knobs, tuple(Step(block, knobs.top_k) for block in blocks))


def ablations(num_blocks: int) -> list[Blocks]:
    """List all blocks, then all but each one: single importances are the differences."""
    every = tuple(range(num_blocks))
    return [every, *(without(every, block) for block in every)]


def without(blocks: Blocks, block: int) -> Blocks:
    """Leave one block out."""
    return tuple(other for other in blocks if other != block)


@dataclass(frozen=True, slots=True)
class Scores:
    """Scores of `n` questions under several plans.

    Attributes:
        images: of each question. scores: (n, plans), from 0 to 1. influence: (n, N), NaN where not measured.
        errors: question → one line, for those that could not be answered.
    """

    images: tuple[str, ...]
    scores: Floats
    influence: Floats
    errors: Mapping[str, str]

    @property
    def drops(self) -> Floats:
        """Return (n, plans - 1): the first plan's score minus each other plan's, question by question."""
        return self.scores[:, :1] - self.scores[:, 1:]


class ScoreFile:
    """Scores on disk: a line that describes the run, then one JSON line for each question.

    Raises:
        UserError: the file is of another run, or damaged in its middle.
    """

    def __init__(self, path: Path, header: Mapping[str, Any]) -> None:
        self.path = path
        self._header = {"schema": SCHEMA, **json.loads(json.dumps(header))}
        self.rows: dict[str, dict[str, Any]] = {}
        if path.is_file():
            self._read()
        else:
            write_whole(path, json.dumps(self._header) + "\n")

    def _read(self) -> None:
        data = self.path.read_bytes()
        whole = data[: data.rfind(b"\n") + 1]
        if not whole:
            whole = (json.dumps(self._header) + "\n").encode()
        lines = whole.decode("utf-8", "replace").splitlines()
        try:
            header, rows = dict(json.loads(lines[0])), [json.loads(line) for line in lines[1:]]
            self.rows = {row["question_id"]: row for row in rows}
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{self.path}: damaged ({error}); delete it to measure again") from None
        for name, ours in self._header.items():
            if header.get(name) != ours:
                raise UserError(
                    f"{self.path}: field {name} is of another run; use another --output_dir or delete the file"
                )
        if whole != data:
            # A line cut off by a kill: its question is asked again.
            self.path.write_bytes(whole)

    @contextmanager
    def appending(self) -> Iterator[Callable[[list[dict[str, Any]]], None]]:
        """Yield a function that stores rows, each batch on disk before it returns."""
        with self.path.open("a", encoding="utf-8") as file:
            yield lambda rows: self._append(file, rows)

    def _append(self, file: TextIO, rows: list[dict[str, Any]]) -> None:
        file.write("".join(json.dumps(row) + "\n" for row in rows))
        file.flush()
        self.rows |= {row["question_id"]: row for row in rows}

    def scores(self, samples: Sequence[Sample], num_blocks: int) -> Scores:
        """Collect the scores of these samples, in their order; failed ones are among the errors."""
        rows = [self.rows[str(sample.question_id)] for sample in samples if str(sample.question_id) in self.rows]
        good = [row for row in rows if "error" not in row]
        nothing = [float("nan")] * num_blocks
        return Scores(
            tuple(row["image_id"] for row in good),
            np.array([row["scores"] for row in good], dtype=np.float64),
            np.array([row.get("influence") or nothing for row in good], dtype=np.float64),
            {row["question_id"]: row["error"] for row in rows if "error" in row},
        )

    def lacking(self, samples: Sequence[Sample], digests: Digests) -> list[Sample]:
        """List the samples that have no score, or failed.

        Raises:
            UserError: a score is about another question of the same id.
        """
        scored = {name: row for name, row in self.rows.items() if "error" not in row}
        known = {name: str(row["question"]) for name, row in scored.items() if "question" in row}
        if len(known) < len(scored):
            _log.warning(
                "%s: written by an earlier version, which did not record the questions; used unchecked", self.path
            )
        refuse_others(known, digests, str(self.path))
        return [sample for sample in samples if str(sample.question_id) not in scored]


def measure(
    engine: Engine,
    samples: Sequence[Sample],
    plans: Sequence[Blocks],
    file: ScoreFile,
    protocol: Protocol,
    advance: Advance = silent,
    *,
    influence: bool = False,
) -> Scores:
    """Score every sample under every plan, except those already in the file.

    `influence` also measures how far blocks turn the stream; the first plan must then run all of them.
    """
    check_unique([str(sample.question_id) for sample in samples], [file.path] * len(samples))
    digests = question_digests(samples)
    todo = file.lacking(samples, digests)
    done = len(samples) - len(todo)
    advance(done, len(samples))
    with file.appending() as append:
        for start in range(0, len(todo), protocol.batch_size):
            part = todo[start : start + protocol.batch_size]
            rows = _measure_batch(engine, part, plans, protocol, influence)
            append([row | {"question": digests[row["question_id"]]} for row in rows])
            done += len(part)
            advance(done, len(samples))
    found = file.scores(samples, engine.runner.model.config.num_blocks)
    errors = [f"{name}: {error}" for name, error in found.errors.items()]
    tell_failures(errors, len(samples), "questions", AGAIN)
    return found


def _measure_batch(
    engine: Engine, samples: Sequence[Sample], plans: Sequence[Blocks], protocol: Protocol, influence: bool
) -> list[dict[str, Any]]:
    jobs = [Job(sample, protocol.max_new_tokens) for sample in samples]
    ready, failed = prepare_all(engine, jobs, protocol.base.tier)
    rows = [_identity(job.sample) | {"error": error_line(error)} for job, error in failed]
    if not ready:
        return rows
    seen = see_all(engine.runner, ready)
    table, turns = np.empty((len(seen), len(plans))), np.empty((0, 0))
    for i, answered in enumerate(answer_plans(engine, seen, [protocol.plan(blocks) for blocks in plans])):
        table[:, i] = [score(one.job.sample, text) for one, text in zip(seen, answered.texts, strict=True)]
        if influence and i == 0:
            turns = block_influence(answered.hidden, answered.lengths).cpu().numpy()
    for i, one in enumerate(seen):
        row = _identity(one.job.sample) | {"scores": [round(float(value), 6) for value in table[i]]}
        if influence:
            row["influence"] = [round(float(value), 6) for value in turns[i]]
        rows.append(row)
    return rows


def _identity(sample: Sample) -> dict[str, Any]:
    return {"question_id": str(sample.question_id), "image_id": str(sample.image_id)}


@dataclass(frozen=True, slots=True)
class Answered:
    """A batch under one plan: texts, and the stream (B, T, D) before its first block and after each.

    `hidden` is reused for the next plan: look at it before asking for that.
    """

    texts: list[str]
    hidden: list[Tensor]
    lengths: Tensor


@torch.inference_mode()
def answer_plans(engine: Engine, seen: Sequence[Seen], plans: Sequence[Plan]) -> Iterator[Answered]:
    """Answer a padded batch greedily under each plan, in order.

    A plan begins where it differs from the one before: the stream up to there is kept, and so are the cache's
    entries, whose place is the number of the step. All single ablations together cost half of what they would.
    """
    run = engine.runner
    decoder, most = run.model.decoder, max(one.job.max_new_tokens for one in seen)
    if not isinstance(decoder, Decoder):
        raise UserError(f"--model {engine.name}: another family than Molmo, whose blocks are run one by one here")
    x, lengths = embed_all(run, [one.ready for one in seen], [one.vision for one in seen])
    B, T, _ = x.shape
    positions = torch.minimum(torch.arange(T, device=x.device).expand(B, T), (lengths - 1).unsqueeze(1))
    cos, sin = decoder.rotary(positions)
    span = Span(0, cos, sin, None)
    cache = KVCache.allocate(run.model.config, max(len(plan.steps) for plan in plans), B, T + most, x)
    hidden, before = [x], list[Step]()
    for plan in plans:
        common = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(before, plan.steps, strict=False)))
        del hidden[common + 1 :]
        for i, (block, top_k) in enumerate(plan.steps[common:], common):
            hidden.append(decoder.blocks[block](hidden[-1], span, cache, i, top_k))
        before = list(plan.steps)
        logits = decoder.logits(hidden[-1][torch.arange(B, device=x.device), lengths - 1])
        yield Answered(_decode(engine, seen, Ragged(logits, plan, cache, lengths, T)), hidden, lengths)


def _decode(engine: Engine, seen: Sequence[Seen], state: Ragged) -> list[str]:
    """Return the texts of a batch."""
    most = max(one.job.max_new_tokens for one in seen)
    transcripts = decode_greedily(engine.runner, [one.job.request for one in seen], state, most)
    return [transcript.text for transcript in transcripts]


@torch.inference_mode()
def block_influence(hidden: Sequence[Tensor], lengths: Tensor) -> Tensor:
    """Compute how far each block turns the stream: 1 - cosine of input and output, mean over real tokens: (B, N).

    It costs no pass of its own: it looks at the prefill of all blocks, `hidden` being N + 1 times (B, T, D).

    Source: X. Men et al., ShortGPT: layers in large language models are more redundant than you expect, 2024
    (arXiv 2403.03853), equation 1.
    """
    real = torch.arange(hidden[0].shape[1], device=lengths.device) < lengths[:, None]
    turns = [1 - F.cosine_similarity(a.float(), b.float(), dim=-1) for a, b in pairwise(hidden)]
    return torch.stack([(turn * real).sum(dim=1) / lengths for turn in turns], dim=1)


Evaluate = Callable[[int, Sequence[Blocks]], Sequence[float]]
"""Step number and candidate sets of blocks → accuracy of each."""


@dataclass(frozen=True, slots=True)
class Removal:
    """One step of the joint search: the removed block, the remaining ones, its accuracy and the candidates'."""

    block: int
    blocks: Blocks
    accuracy: float
    candidates: Mapping[int, float]


def eliminate(num_blocks: int, keep: int, evaluate: Evaluate, tie_break: Sequence[float]) -> list[Removal]:
    """Eliminate backwards: remove the block whose absence costs least given those already gone, down to `keep`.

    Single removals do not compose: two blocks that can stand in for each other look dispensable, each alone. The
    two ends always run and are no candidates. Equal accuracies go by the smaller `tie_break`, then by the later
    block.
    """
    blocks, removals = tuple(range(num_blocks)), list[Removal]()
    while len(blocks) > max(keep, 2):
        candidates = blocks[1:-1]
        accuracies = evaluate(len(removals), [without(blocks, block) for block in candidates])
        found = dict(zip(candidates, accuracies, strict=True))
        gone = max(candidates, key=lambda block: (found[block], -tie_break[block], block))
        blocks = without(blocks, gone)
        removals.append(Removal(gone, blocks, found[gone], found))
    return removals


def joint_ranking(removals: Sequence[Removal], importance: Sequence[float]) -> Ranking:
    """Rank survivors by their single importance, then the removed blocks, the last removed first; ends lead."""
    gone = [removal.block for removal in removals]
    rest = [block for block in single_ranking(importance).order if block not in gone]
    return Ranking((*rest, *reversed(gone)))


def single_ranking(importance: Sequence[float]) -> Ranking:
    """Rank blocks by falling importance, equal ones in order; both ends, which always run, lead."""
    last = len(importance) - 1
    ends = sorted({0, last}, key=lambda block: -importance[block])
    inner = sorted(range(1, last), key=lambda block: (-importance[block], block))
    return Ranking((*ends, *inner))
