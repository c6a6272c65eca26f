"""A small sweep of the tiny model, for the tests of what it does and of the order in which it times."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from sweep_fakes import SPACE, STAMP, questions

from tempovlm.core.records import Key, SweepRow
from tempovlm.engine.engine import Engine
from tempovlm.lab.core_exp import store
from tempovlm.lab.core_exp.ledger import Ledger
from tempovlm.lab.core_exp.plan import SweepPlan, choose_settings
from tempovlm.lab.core_exp.processes import Share
from tempovlm.lab.core_exp.sweep import run_sweep

PLAN = SweepPlan(
    settings=choose_settings(SPACE, ["low", "high"], [SPACE.native_top_k], [3, 6]),
    batch_size=3,
    latency_samples=2,
    repeats=2,
    max_new_tokens=(4,),
)


def ledger_of(engine: Engine, folder: Path, plan: SweepPlan = PLAN, rank: int = 0) -> Ledger:
    return Ledger(folder, STAMP, engine.ranking, plan.conditions("val"), "parquet", rank)


def sweep(engine: Engine, folder: Path, pictures: Path, plan: SweepPlan = PLAN, count: int = 4) -> list[SweepRow]:
    samples = questions(pictures, count)
    with ledger_of(engine, folder, plan).opened(["text_vqa"]) as ledger:
        paths = run_sweep(engine, {"text_vqa": samples}, plan, ledger, Share())
    assert paths == [folder / "text_vqa.parquet"]
    return store.read_rows(paths[0])[0]


def timings(rows: Iterable[SweepRow]) -> dict[Key, tuple[float, ...]]:
    """The total times of the timed rows."""
    return {row.key: row.repeats["T_total"] for row in rows if row.repeats}
