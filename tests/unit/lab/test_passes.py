from __future__ import annotations

import shutil
import statistics
from dataclasses import replace
from pathlib import Path

import pytest
from sweep_fakes import questions
from sweep_runs import PLAN, ledger_of, sweep, timings

from tempovlm.core.knobs import KnobConfig
from tempovlm.core.records import STAGE_FIELDS
from tempovlm.engine.engine import Engine
from tempovlm.lab.core_exp import store
from tempovlm.lab.core_exp.processes import Share
from tempovlm.lab.core_exp.sweep import run_latency, run_sweep


def watched(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, KnobConfig]]:
    """The picture and setting of each single answer from now on, in order."""
    seen: list[tuple[str, KnobConfig]] = []
    answer = Engine.answer

    def noted(self, request, guard=None):
        result = answer(self, request, guard)
        seen.append((request.images[0].name, result.knobs))
        return result

    monkeypatch.setattr(Engine, "answer", noted)
    return seen


@pytest.mark.parametrize("form", ["parquet", "json"])
def test_parts_read_beside_their_merged_file_count_once(engine: Engine, tmp_path: Path, form: str) -> None:
    out, samples = tmp_path / "out", {"text_vqa": questions(tmp_path)}
    ledger = replace(ledger_of(engine, out), form=form)
    with ledger.opened(["text_vqa"]):
        jobs = {"text_vqa": PLAN.latency_jobs(samples["text_vqa"])}
        run_latency(engine, jobs, PLAN, ledger, lambda *_: None)
        shutil.copytree(out / store.PARTS, tmp_path / "kept")
        ledger.merge("text_vqa")
    whole = timings(ledger.rows["text_vqa"].values())
    shutil.copytree(tmp_path / "kept", out / store.PARTS)
    more = replace(ledger_of(engine, out), form=form)
    with more.opened(["text_vqa"]):
        assert timings(more.rows["text_vqa"].values()) == whole
        run_sweep(engine, samples, replace(PLAN, repeats=3), more, Share())
    grown = timings(more.rows["text_vqa"].values())
    assert {key: laps[:2] for key, laps in grown.items()} == whole
    assert {len(laps) for laps in grown.values()} == {3}


def test_a_pass_times_every_picture_before_any_is_timed_again(
    engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = replace(PLAN, batch_size=0, latency_samples=4, repeats=3)
    some = questions(tmp_path, 8)
    samples = {
        "text_vqa": some[:4],
        "okvqa": [replace(one, dataset="okvqa", question_id=f"other {one.question_id}") for one in some[4:]],
    }
    jobs = {name: plan.latency_jobs(them) for name, them in samples.items()}
    seen, progress, width = watched(monkeypatch), list[tuple[int, int]](), len(plan.settings)
    with ledger_of(engine, tmp_path / "out", plan).opened(samples) as ledger:
        run_latency(engine, jobs, plan, ledger, lambda *done: progress.append(done))
    turns = [seen[i : i + width] for i in range(0, len(seen), width)]
    assert all({knobs for _, knobs in turn} == set(plan.settings) for turn in turns)
    assert all(len({picture for picture, _ in turn}) == 1 for turn in turns)
    pictures = [turn[0][0] for turn in turns]
    assert pictures[:16:2] == pictures[1:16:2], "the warm-up of a question is just before its first turn"
    passes = [pictures[1:16:2], *(pictures[i : i + 8] for i in range(16, len(pictures), 8))]
    assert len(passes) == plan.repeats
    assert all(sorted(one) == sorted(passes[0]) for one in passes)
    assert len(set(map(tuple, passes))) > 1, "each pass has an order of its own"
    assert len({tuple(knobs for _, knobs in turn) for turn in turns[16:]}) > plan.repeats
    assert progress[-1] == (len(seen), len(seen))
    assert progress == sorted(progress)
    rows = [row for them in ledger.rows.values() for row in them.values()]
    assert len(rows) == 8 * width
    assert {row.num_repeats for row in rows} == {plan.repeats}


def test_more_repeats_are_added_to_those_there(
    engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = sweep(engine, tmp_path / "out", tmp_path)
    seen = watched(monkeypatch)
    plan = replace(PLAN, repeats=4)
    more = sweep(engine, tmp_path / "out", tmp_path, plan)
    assert len(seen) == 2 * len(plan.settings) * (plan.warmup + 2), "warmed up once, then the passes that lack"
    before, after = timings(first), timings(more)
    assert {key: laps[:2] for key, laps in after.items()} == before
    for row in more:
        if row.repeats:
            assert row.num_repeats == len(row.step_ms or ()) == 4
            for name in STAGE_FIELDS.values():
                assert getattr(row, name) == pytest.approx(statistics.median(row.repeats[name]), abs=1e-4)
            steps = row.output_tokens - 1
            assert row.T_decode_per_token == (pytest.approx(row.T_LLM_decode / steps, abs=1e-4) if steps else None)
    assert sweep(engine, tmp_path / "out", tmp_path) == more, "fewer repeats take none away"


def test_settings_that_lack_passes_are_timed_alone(
    engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    few = replace(PLAN, settings=PLAN.settings[:2])
    before = timings(sweep(engine, tmp_path / "out", tmp_path, few))
    seen = watched(monkeypatch)
    rows = sweep(engine, tmp_path / "out", tmp_path)
    assert {knobs for _, knobs in seen} == set(PLAN.settings[2:])
    after = timings(rows)
    assert before.items() <= after.items()
    assert {len(laps) for laps in after.values()} == {PLAN.repeats}


def test_graphs_are_captured_before_anything_is_timed(
    engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen, captured = watched(monkeypatch), list[tuple[int, object]]()
    monkeypatch.setattr(Engine, "warmup", lambda _self, knobs: captured.append((len(seen), knobs)))
    sweep(engine, tmp_path / "out", tmp_path)
    assert captured == [(0, PLAN.settings)]


def test_a_failure_in_a_later_pass_keeps_the_repeats(
    engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan, answer, count = replace(PLAN, batch_size=0, latency_samples=1, repeats=3, warmup=0), Engine.answer, 0
    width = len(plan.settings)

    def failing(self, request, guard=None):
        nonlocal count
        count += 1
        if count == width + 1:
            raise RuntimeError("out of memory")
        return answer(self, request, guard)

    with monkeypatch.context() as patch:
        patch.setattr(Engine, "answer", failing)
        rows = sweep(engine, tmp_path / "out", tmp_path, plan)
    assert count == 3 * width - 1, "what has failed is not timed again"
    (failed,) = [row for row in rows if row.error]
    assert (failed.num_repeats, failed.error) == (1, "RuntimeError: out of memory")
    assert {row.num_repeats for row in rows if row is not failed} == {3}
    again = sweep(engine, tmp_path / "out", tmp_path, plan)
    kept, before = timings(again), timings(rows)
    assert {len(laps) for laps in kept.values()} == {3}, "a later run asks again"
    assert kept[failed.key][:1] == before.pop(failed.key)
    assert before.items() <= kept.items()
    assert not [row for row in again if row.error]
