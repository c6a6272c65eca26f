"""Runs the core experiment: every question at every setting, for accuracy in batches, then alone for latency.

Accuracy is split over the processes of `torchrun` by batch. Batches do not depend on the number of processes or
on interruptions, because a row may depend, by rounding, on the others of its batch. Latency
is measured by the first process when all others have ended, one whole answer of the engine at a time, under the
machine's lock. The machine's speed drifts, so every pass times all questions once at every setting, in a new
order: slow periods affect all pictures alike. Finished work is kept by a `Ledger`, so any part can be interrupted
and resumed.
"""

from __future__ import annotations

import contextlib
import statistics
from collections import defaultdict
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random
from typing import Any

from tempovlm.control.guard import Guard
from tempovlm.core.errors import UserError
from tempovlm.core.knobs import KnobConfig
from tempovlm.core.machine import machine_lock, warn_if_busy
from tempovlm.core.progress import Advance, progress_bar
from tempovlm.core.records import CONTROL_FIELD, REPEAT_FIELDS, STAGE_FIELDS, Key, SweepRow
from tempovlm.core.request import Answer
from tempovlm.data.digest import question_digests
from tempovlm.data.sample import Sample, check_unique
from tempovlm.data.scoring import score
from tempovlm.engine.engine import Engine
from tempovlm.lab.core_exp.batched import SAMPLE_ERRORS, answer_settings, blank_row, error_line
from tempovlm.lab.core_exp.failures import AGAIN, tell_failures
from tempovlm.lab.core_exp.ledger import Ledger
from tempovlm.lab.core_exp.plan import Job, SweepPlan, row_key
from tempovlm.lab.core_exp.processes import Share

DIGITS = 4
"""Decimals of a millisecond; clocks are not finer, and files with rounded numbers are half as large."""

Todo = tuple[str, tuple[KnobConfig, ...], list[Job]]
"""A data set, the settings of a tier, and a batch of its questions that lack an answer at all of them."""


def conduct(
    engine: Engine, datasets: Mapping[str, Sequence[Sample]], plan: SweepPlan, ledger: Ledger, share: Share
) -> list[Path]:
    """Run or resume a sweep, and report failures; return the merged files, in the first process only.

    Raises:
        UserError: the output cannot be written, another process writes there, or its rows do not belong together
            with what is to come.
        AllFailedError: nothing was answered.
    """
    is_first = share.rank == 0
    digests = {name: question_digests(samples) for name, samples in datasets.items()} if is_first else {}
    with ledger.opened(datasets, digests):
        paths = run_sweep(engine, datasets, plan, ledger, share)
    if is_first:
        rows = _rows_of_run(datasets, plan, ledger)
        errors = [f"{row.dataset} {row.question_id} at {row.knobs}: {row.error}" for row in rows if row.error]
        tell_failures(errors, len(rows), "rows", AGAIN)
    return paths


def _rows_of_run(datasets: Mapping[str, Sequence[Sample]], plan: SweepPlan, ledger: Ledger) -> list[SweepRow]:
    """List the known rows of a plan's questions and settings."""
    keys = {
        name: [row_key(job, knobs) for job in plan.jobs(samples) for knobs in plan.settings]
        for name, samples in datasets.items()
    }
    return [ledger.rows[name][key] for name, some in keys.items() for key in some if key in ledger.rows[name]]


def run_sweep(
    engine: Engine, datasets: Mapping[str, Sequence[Sample]], plan: SweepPlan, ledger: Ledger, share: Share
) -> list[Path]:
    """Do the missing work of the plan; return the merged files, in the first process only.

    Raises:
        UserError: the output cannot be written.
    """
    for name, samples in datasets.items():
        check_unique([str(sample.question_id) for sample in samples], [f"data set {name}"] * len(samples))
    batch = plan.batch_on(engine.device.type)
    jobs = {name: plan.jobs(samples) for name, samples in datasets.items()} if batch else {}
    todo = _todo(jobs, plan.settings, batch, ledger, share)
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


def _todo(
    jobs: Mapping[str, Sequence[Job]], settings: Sequence[KnobConfig], size: int, ledger: Ledger, share: Share
) -> list[Todo]:
    """List this process's questions without an answer; a failure of an earlier run counts as none."""
    todo: list[Todo] = []
    for name, some_settings, batch in _shared(jobs, settings, size, share):
        open_ = defaultdict[tuple[KnobConfig, ...], list[Job]](list)
        for job in batch:
            keys = {row_key(job, knobs): knobs for knobs in some_settings}
            open_[tuple(keys[key] for key in ledger.unanswered(name, keys))].append(job)
        todo += [(name, lacking, some) for lacking, some in open_.items() if lacking]
    return todo


def _shared(
    jobs: Mapping[str, Sequence[Job]], settings: Sequence[KnobConfig], size: int, share: Share
) -> Iterator[Todo]:
    """Deal the batches of each data set and tier to the processes in turn, and yield those of this one.

    Known rows count too, so that processes which begin at different times agree on whose each batch is.
    """
    number = 0
    for name, some in jobs.items():
        for group in _by_tier(settings):
            for start in range(0, len(some), size):
                if number % share.world == share.rank:
                    yield name, group, list(some[start : start + size])
                number += 1


def _by_tier(settings: Iterable[KnobConfig]) -> list[tuple[KnobConfig, ...]]:
    groups: dict[str, list[KnobConfig]] = defaultdict(list)
    for knobs in settings:
        groups[knobs.tier].append(knobs)
    return [tuple(group) for group in groups.values()]


def _check_whole(jobs: Mapping[str, Sequence[Job]], plan: SweepPlan, ledger: Ledger) -> None:
    """Raise a `UserError` if a row is missing though all processes are done."""
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
    """Time the questions that were not timed often enough; each turn of a question is one part."""
    turns = _turns(jobs, plan, ledger)
    if not turns:
        return
    done, total = 0, sum(turn.num_answers(plan.warmup) for turn in turns)
    with machine_lock():
        warn_if_busy("the latencies will be slow and wide")
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
        number: number of the pass, from 1. settings: settings that lack this pass.
        cold: settings to warm up first.
    """

    dataset: str
    job: Job
    number: int
    settings: tuple[KnobConfig, ...]
    cold: tuple[KnobConfig, ...] = ()

    def num_answers(self, warmup: int) -> int:
        """Count the answers of the turn, those of the warm-up included."""
        return len(self.settings) + warmup * len(self.cold)


def _turns(jobs: Mapping[str, Sequence[Job]], plan: SweepPlan, ledger: Ledger) -> list[Turn]:
    """List the missing turns of the passes; each pass has its own order of the questions of all data sets.

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
    """Select the settings at which the question has not failed in this run and has fewer repeats."""
    rows = ((knobs, known.get(row_key(job, knobs))) for knobs in settings)
    return tuple(
        knobs
        for knobs, row in rows
        if row is None or (row.num_repeats < number and (row.error is None or row.key in failed))
    )


def warm_up(engine: Engine, job: Job, settings: Sequence[KnobConfig], times: int) -> None:
    """Answer untimed, to warm up; a failure comes again when timed."""
    for _ in range(times):
        for knobs in settings:
            with contextlib.suppress(*SAMPLE_ERRORS):
                engine.answer(job.request, Guard.fixed(knobs, engine.space))


def time_settings(
    engine: Engine, turn: Turn, seed: int, known: Mapping[Key, SweepRow], failed: Container[Key] = ()
) -> list[SweepRow]:
    """Time one answer at every setting of the turn, in a new order, and add it to the known rows.

    A row that fails keeps its repeats beside the error, and is only timed again by a later run, whose `failed`
    contains it.
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
    """Add a timed answer to a row; answers are greedy, so all have the same text."""
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
    # A row has no column for waiting, which is none of the setting's.
    times_ms = {**answer.timings_ms, "total": answer.timings_ms["total"] - answer.timings_ms["queue"]}
    repeats = {field: (*before.get(field, ()), round(times_ms[stage], DIGITS)) for stage, field in stages.items()}
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
