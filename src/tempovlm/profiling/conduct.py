"""A sweep in its output directory from beginning to end: its questions checked, and what failed told."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from tempovlm.core.records import SweepRow
from tempovlm.engine.engine import Engine
from tempovlm.profiling import sweep
from tempovlm.profiling.entry import Share
from tempovlm.profiling.failures import AGAIN, tell_failures
from tempovlm.profiling.parts import Ledger
from tempovlm.profiling.sweep import SweepPlan, row_key
from tempovlm.tasks.base import Sample
from tempovlm.tasks.digest import question_digests


def conduct(
    engine: Engine, datasets: Mapping[str, Sequence[Sample]], plan: SweepPlan, ledger: Ledger, share: Share
) -> list[Path]:
    """Do what is not done yet; returns the merged files (none but of the first process).

    Raises:
        UserError: the output cannot be written, another process writes there, or its rows do not belong together
            with what is to come.
        AllFailedError: nothing was answered.
    """
    is_first = share.rank == 0
    digests = {name: question_digests(samples) for name, samples in datasets.items()} if is_first else {}
    with ledger.opened(datasets, digests):
        paths = sweep.run_sweep(engine, datasets, plan, ledger, share)
    if is_first:
        rows = known_rows(datasets, plan, ledger)
        errors = [f"{row.dataset} {row.question_id} at {row.knobs}: {row.error}" for row in rows if row.error]
        tell_failures(errors, len(rows), "rows", AGAIN)
    return paths


def known_rows(datasets: Mapping[str, Sequence[Sample]], plan: SweepPlan, ledger: Ledger) -> list[SweepRow]:
    """The rows that are known of a plan's questions and settings."""
    keys = {
        name: [row_key(job, knobs) for job in plan.jobs(samples) for knobs in plan.settings]
        for name, samples in datasets.items()
    }
    return [ledger.rows[name][key] for name, some in keys.items() for key in some if key in ledger.rows[name]]
