"""The core experiment: every question at every setting, first for accuracy in batches, then for latency alone.

Accuracy is split over the processes of `torchrun` by batch. Batches are the same whatever the number of processes
is and wherever a run was interrupted, because a row may depend, by rounding, on the others of its batch. Latency
is measured by the first process when all others have ended, one whole answer of the engine at a time, under the
machine's lock. The machine's speed drifts, so every pass times all questions once at every setting, in a new
order: all pictures see the same spells. What is done is kept by a `Ledger`, so any part can be interrupted and
resumed.
"""

from __future__ import annotations

import contextlib
import logging
import statistics
from collections import defaultdict
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random
from typing import Any

from tempovlm.control.guard import Guard
from tempovlm.core.errors import UserError
from tempovlm.core.knobs import KnobConfig, KnobSpace
from tempovlm.core.records import CONTROL_FIELD, REPEAT_FIELDS, STAGE_FIELDS, Key, SweepRow
from tempovlm.core.request import Answer
from tempovlm.data.catalog import load_samples
from tempovlm.data.sample import Sample, check_unique
from tempovlm.data.scoring import score
from tempovlm.engine.engine import Engine
from tempovlm.profiling.batched import SAMPLE_ERRORS, Job, answer_settings, blank_row, error_line
from tempovlm.profiling.entry import Share
from tempovlm.profiling.machine import BUSY_CORES, busy_cores, machine_lock
from tempovlm.profiling.parts import Ledger
from tempovlm.profiling.progress import Advance, progress_bar
from tempovlm.profiling.ranking import read_ranking

DIGITS = 4
"""Of a millisecond; clocks are not finer, and files of rounded numbers are half as large."""

_log = logging.getLogger("tempovlm")

Todo = tuple[str, tuple[KnobConfig, ...], list[Job]]
"""A data set, the settings of a tier, and a batch of its questions that lack an answer at all of them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SweepPlan:
    """What to run.

    Attributes:
        settings: where in the knob space.
        batch_size: questions answered together for accuracy; 0 leaves accuracy to the latency subset.
        latency_samples: how many questions of each data set are timed, on as many pictures; 0 times none.
        repeats: passes over the timed questions. warmup: answers at each setting that are thrown away before a
            question is first timed, in a resumed run too, whose process may lack what the last one had warmed.
        max_new_tokens: caps on generated tokens, given to the questions in turn.
        seed: of the order in which questions and settings are timed.
        twins: ask about each picture's twin, the same scene with other noise and a small shift.
    """

    settings: tuple[KnobConfig, ...]
    batch_size: int = 32
    latency_samples: int = 0
    repeats: int = 5
    warmup: int = 1
    max_new_tokens: tuple[int, ...] = (16,)
    seed: int = 42
    twins: bool = False

    def __post_init__(self) -> None:
        least = (("latency_samples", 0), ("warmup", 0), ("repeats", 1))
        values = [(name, getattr(self, name), floor) for name, floor in least]
        values += [("max_new_tokens", cap, 1) for cap in self.max_new_tokens]
        for name, value, floor in values:
            if value < floor:
                raise UserError(f"--{name} {value}: must be at least {floor}")

    def jobs(self, samples: Sequence[Sample]) -> list[Job]:
        """Each question with its cap, which depends on its place, not on how many there are."""
        caps = self.max_new_tokens
        return [Job(sample, caps[i % len(caps)]) for i, sample in enumerate(samples)]

    def conditions(self, split: str) -> dict[str, Any]:
        """What must not change when a sweep is resumed."""
        caps = list(self.max_new_tokens)
        return {"split": split, "seed": self.seed, "max_new_tokens": caps, "twins": self.twins}

    def latency_jobs(self, samples: Sequence[Sample]) -> list[Job]:
        """The first questions on different pictures; where there are too few pictures, the next questions."""
        first: list[Job] = []
        others: list[Job] = []
        seen: set[str] = set()
        for job in self.jobs(samples):
            (others if job.sample.image_id in seen else first).append(job)
            seen.add(job.sample.image_id)
        return (first + others)[: self.latency_samples]


def choose_settings(
    space: KnobSpace,
    tiers: Sequence[str] | None = None,
    top_ks: Sequence[int] | None = None,
    block_counts: Sequence[int] | None = None,
) -> tuple[KnobConfig, ...]:
    """The settings of a space with these values of each knob; None takes all.

    Raises:
        UserError: a value is not legal for the model.
    """
    chosen = space.native
    for tier in tiers or ():
        space.validate(replace(chosen, tier=tier))
    for top_k in top_ks or ():
        space.validate(replace(chosen, top_k=top_k))
    for num_blocks in block_counts or ():
        space.validate(replace(chosen, num_blocks=num_blocks))
    return tuple(
        knobs
        for knobs in space
        if (not tiers or knobs.tier in tiers)
        and (not top_ks or knobs.top_k in top_ks)
        and (not block_counts or knobs.num_blocks in block_counts)
    )


def draw_samples(
    datasets: Sequence[str], split: str, data_dir: Path | None, num_samples: int, seed: int, twins: bool = False
) -> tuple[dict[str, list[Sample]], str]:
    """The same questions for every setting, by data set, and where their data is from.

    With `twins` they are asked about the twins of their pictures.

    Raises:
        UserError: a data set is missing, or a picture has no twin.
    """
    drawn = {
        name: load_samples(name, split, data_dir=data_dir, num_samples=num_samples, seed=seed) for name in datasets
    }
    drawn = {name: [_twin(sample) for sample in samples] for name, samples in drawn.items()} if twins else drawn
    return drawn, ", ".join(sorted({sample.data_source for some in drawn.values() for sample in some}))


def _twin(sample: Sample) -> Sample:
    """The same question about the twin of its picture."""
    if sample.twin_path is None:
        raise UserError(
            f"--twins: {sample.image_path} of {sample.dataset} has no twin; generated validation sets do"
        )
    return replace(sample, image_path=sample.twin_path)


def with_ranking(engine: Engine, scores: Path | None) -> Engine:
    """The same model with the blocks of a file of importances first; the engine itself without a file."""
    if scores is None:
        return engine
    ranking, run = read_ranking(scores, len(engine.ranking.order)), engine.runner
    letters = engine.option_letters
    return Engine(run.model, run.tokenizer, ranking=ranking, name=engine.name, option_letters=letters)


def run_sweep(
    engine: Engine, datasets: Mapping[str, Sequence[Sample]], plan: SweepPlan, ledger: Ledger, share: Share
) -> list[Path]:
    """Do what the plan asks for and is not done yet; returns the merged files (none but of the first process).

    Raises:
        UserError: the output cannot be written.
    """
    for name, samples in datasets.items():
        check_unique([str(sample.question_id) for sample in samples], [f"data set {name}"] * len(samples))
    jobs = {name: plan.jobs(samples) for name, samples in datasets.items()} if plan.batch_size else {}
    todo = _todo(jobs, plan, ledger, share)
    if share.rank > 0 and todo:
        ledger.await_first()
    with progress_bar(_title("accuracy", jobs, share)) as advance:
        run_accuracy(engine, todo, ledger, advance)
    if share.rank > 0:
        ledger.say_done()
        return []
    ledger.wait_for_others(share.world, share.began_s)
    _check_whole(jobs, plan, ledger)
    order = {name: [str(sample.question_id) for sample in samples] for name, samples in datasets.items()}
    paths = {name: ledger.merge(name, order[name]) for name in jobs}
    timed = {name: plan.latency_jobs(samples) for name, samples in datasets.items()}
    if any(timed.values()):
        with progress_bar(_title("latency", timed, Share())) as advance:
            run_latency(engine, timed, plan, ledger, advance)
        paths = {name: ledger.merge(name, order[name]) for name in datasets}
    return [path for some in paths.values() for path in some]


def _title(what: str, jobs: Mapping[str, Sequence[Job]], share: Share) -> str:
    part = f", process {share.rank} of {share.world}" if share.world > 1 else ""
    return f"{what} of {sum(map(len, jobs.values()))} questions{part}"


def run_accuracy(engine: Engine, todo: Sequence[Todo], ledger: Ledger, advance: Advance) -> None:
    """Answer in batches; each batch at the settings of a tier that it lacks is one part."""
    done, total = 0, sum(len(settings) * len(some) for _, settings, some in todo)
    for name, settings, some in todo:
        rows = list(answer_settings(engine, some, settings))
        ledger.add(name, rows)
        done += len(rows)
        advance(done, total)


def _todo(jobs: Mapping[str, Sequence[Job]], plan: SweepPlan, ledger: Ledger, share: Share) -> list[Todo]:
    """What of this process's share has no answer yet; what failed before this run has none."""
    todo: list[Todo] = []
    for name, settings, batch in _shared(jobs, plan, share):
        open_ = defaultdict[tuple[KnobConfig, ...], list[Job]](list)
        for job in batch:
            keys = {row_key(job, knobs): knobs for knobs in settings}
            open_[tuple(keys[key] for key in ledger.unanswered(name, keys))].append(job)
        todo += [(name, lacking, some) for lacking, some in open_.items() if lacking]
    return todo


def _shared(jobs: Mapping[str, Sequence[Job]], plan: SweepPlan, share: Share) -> Iterator[Todo]:
    """The batches of one process: every one in turn of each data set at each tier, known rows or not.

    So that processes which begin at different times agree on whose each batch is.
    """
    number = 0
    for name, some in jobs.items():
        for settings in _by_tier(plan.settings):
            for start in range(0, len(some), plan.batch_size):
                if number % share.world == share.rank:
                    yield name, settings, list(some[start : start + plan.batch_size])
                number += 1


def _by_tier(settings: Iterable[KnobConfig]) -> list[tuple[KnobConfig, ...]]:
    groups: dict[str, list[KnobConfig]] = defaultdict(list)
    for knobs in settings:
        groups[knobs.tier].append(knobs)
    return [tuple(group) for group in groups.values()]


def row_key(job: Job, knobs: KnobConfig) -> Key:
    """What makes the row of a question at a setting unique within its data set."""
    return str(job.sample.question_id), knobs.tier, knobs.top_k, knobs.num_blocks


def _check_whole(jobs: Mapping[str, Sequence[Job]], plan: SweepPlan, ledger: Ledger) -> None:
    """Raise a `UserError` where a row is missing though all processes are done."""
    for name, some in jobs.items():
        ledger.refresh(name)
        missing = ledger.unanswered(name, [row_key(job, knobs) for job in some for knobs in plan.settings])
        if missing:
            raise UserError(
                f"{ledger.folder}: {len(missing)} rows of {name} are missing, though all processes are done; were "
                "they given the same flags? Run the same command again"
            )


def run_latency(
    engine: Engine, jobs: Mapping[str, Sequence[Job]], plan: SweepPlan, ledger: Ledger, advance: Advance
) -> None:
    """Time what was not timed often enough; each turn of a question is one part."""
    turns = _turns(jobs, plan, ledger)
    if not turns:
        return
    done, total = 0, sum(turn.num_answers(plan.warmup) for turn in turns)
    with machine_lock(lambda: _log.warning("another process is measuring this machine; waiting for it to end")):
        busy = busy_cores()
        if busy is not None and busy >= BUSY_CORES:
            _log.warning("the machine is busy: others use %.1f cores; the latencies will be slow and wide", busy)
        engine.warmup(plan.settings)
        for turn in turns:
            warm_up(engine, turn.job, turn.cold, plan.warmup)
            known, failed = ledger.rows.get(turn.dataset, {}), ledger.failed_before(turn.dataset)
            rows = time_settings(engine, turn, plan.seed, known, failed)
            if rows:
                ledger.add(turn.dataset, rows)
            done += turn.num_answers(plan.warmup)
            advance(done, total)


@dataclass(frozen=True, slots=True)
class Turn:
    """A question in one of the passes.

    Attributes:
        number: of the pass, from 1. settings: those that lack this pass.
        cold: settings to warm up first.
    """

    dataset: str
    job: Job
    number: int
    settings: tuple[KnobConfig, ...]
    cold: tuple[KnobConfig, ...] = ()

    def num_answers(self, warmup: int) -> int:
        """Answers that the turn takes, those of the warm-up included."""
        return len(self.settings) + warmup * len(self.cold)


def _turns(jobs: Mapping[str, Sequence[Job]], plan: SweepPlan, ledger: Ledger) -> list[Turn]:
    """What the passes lack; each goes over the questions of all data sets in an order of its own.

    A question warms up at its first turn, at all settings that any of its turns will time.
    """
    turns: list[Turn] = []
    warm: set[tuple[str, str]] = set()
    for number in range(1, plan.repeats + 1):
        asked = [(name, job) for name, some in jobs.items() for job in some]
        Random(f"{plan.seed}/{number}").shuffle(asked)
        for name, job in asked:
            question = (name, job.sample.question_id)
            known, failed = ledger.rows.get(name, {}), ledger.failed_before(name)
            if settings := _lacking(job, plan.settings, known, failed, number):
                cold = () if question in warm else _lacking(job, plan.settings, known, failed, plan.repeats)
                turns.append(Turn(name, job, number, settings, cold))
                warm.add(question)
    return turns


def _lacking(
    job: Job,
    settings: Iterable[KnobConfig],
    known: Mapping[Key, SweepRow],
    failed: Container[Key],
    number: int,
) -> tuple[KnobConfig, ...]:
    """Settings at which the question has not failed in this run and has fewer repeats than that."""
    rows = ((knobs, known.get(row_key(job, knobs))) for knobs in settings)
    return tuple(
        knobs
        for knobs, row in rows
        if row is None or (row.num_repeats < number and (row.error is None or row.key in failed))
    )


def warm_up(engine: Engine, job: Job, settings: Sequence[KnobConfig], times: int) -> None:
    """Answer untimed, so that nothing is done for the first time later; what fails here fails again when timed."""
    for _ in range(times):
        for knobs in settings:
            with contextlib.suppress(*SAMPLE_ERRORS):
                engine.answer(job.request, Guard.fixed(knobs, engine.space))


def time_settings(
    engine: Engine, turn: Turn, seed: int, known: Mapping[Key, SweepRow], failed: Container[Key] = ()
) -> list[SweepRow]:
    """One answer at every setting of the turn, in a new order: the rows known so far with one repeat more.

    A row that fails keeps its repeats beside the error, and is not timed again but by a later run, whose `failed`
    holds it.
    """
    sample, rows = turn.job.sample, list[SweepRow]()
    order = Random(f"{seed}/{turn.number}/{sample.question_id}")
    for knobs in order.sample(turn.settings, len(turn.settings)):
        row = known.get(row_key(turn.job, knobs)) or blank_row(sample, knobs)
        if row.error and row.key not in failed:
            continue
        guard = Guard.fixed(knobs, engine.space)
        try:
            answer = engine.answer(turn.job.request, guard)
        except SAMPLE_ERRORS as error:
            rows.append(replace(row, error=error_line(error)))
            continue
        rows.append(with_repeat(replace(row, error=None), sample, answer))
    return rows


def with_repeat(row: SweepRow, sample: Sample, answer: Answer) -> SweepRow:
    """The row with one timed answer more; answers are greedy, so all are the first one."""
    if not row.repeats:
        row = replace(
            row,
            tiling=answer.tiling,
            vision_tokens=answer.num_vision_tokens,
            text_tokens=answer.num_text_tokens,
            output_tokens=answer.num_output_tokens,
            accuracy=score(sample, answer.text),
            prediction=answer.text,
        )
    before, stages = row.repeats or {}, {**STAGE_FIELDS, "control": CONTROL_FIELD}
    repeats = {
        field: (*before.get(field, ()), round(answer.timings_ms[stage], DIGITS)) for stage, field in stages.items()
    }
    medians: dict[str, Any] = {
        field: round(statistics.median(repeats[field]), DIGITS) for field in STAGE_FIELDS.values()
    }
    steps, decode_ms = (row.output_tokens or 1) - 1, medians["T_LLM_decode"]
    return replace(
        row,
        **medians,
        T_decode_per_token=round(decode_ms / steps, DIGITS) if steps else None,
        repeats={field: repeats[field] for field in REPEAT_FIELDS},
        step_ms=(*(row.step_ms or ()), tuple(round(lap_ms, DIGITS) for lap_ms in answer.step_ms)),
    )
