from __future__ import annotations

import contextlib
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from sweep_fakes import SPACE, STAMP, questions
from sweep_runs import PLAN, ledger_of, sweep, timings

from tempovlm.control.guard import Guard
from tempovlm.core.errors import UserError
from tempovlm.core.records import REPEAT_FIELDS, STAGE_FIELDS, SweepRow, better
from tempovlm.engine.engine import Engine
from tempovlm.lab.core_exp import batched, legacy, store
from tempovlm.lab.core_exp import ledger as ledgers
from tempovlm.lab.core_exp.batched import answer_settings
from tempovlm.lab.core_exp.ledger import Ledger
from tempovlm.lab.core_exp.plan import Job, choose_settings
from tempovlm.lab.core_exp.processes import Share
from tempovlm.lab.core_exp.sweep import Turn, run_sweep, time_settings
from timings import UNTOLD_MS, untold_ms


def plain(rows: list[SweepRow]) -> dict[tuple[str, str, int, int], tuple[object, ...]]:
    """What does not depend on the clock, by key; fails where a key is there twice."""
    keyed = {
        row.key: (row.prediction, row.output_tokens, row.accuracy, row.is_measured, row.num_repeats, row.error)
        for row in rows
    }
    assert len(keyed) == len(rows)
    return keyed


def test_batches_answer_as_the_engine_does(engine: Engine, tmp_path: Path) -> None:
    jobs = [Job(sample, 3 + i) for i, sample in enumerate(questions(tmp_path, 5))]
    for tier in SPACE.tiers:
        settings = choose_settings(SPACE, [tier], None, [3, 6])
        rows = {row.key: row for row in answer_settings(engine, jobs, settings)}
        assert len(rows) == len(jobs) * len(settings)
        for job in jobs:
            for knobs in settings[::3]:
                answer = engine.answer(job.request, Guard.fixed(knobs, SPACE))
                row = rows[job.sample.question_id, tier, knobs.top_k, knobs.num_blocks]
                assert row.prediction == answer.text
                assert row.output_tokens == answer.num_output_tokens
                assert (row.vision_tokens, row.text_tokens) == (answer.num_vision_tokens, answer.num_text_tokens)
                assert row.tiling == answer.tiling


def test_a_batch_that_is_too_much_is_halved(
    engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    jobs, settings = [Job(sample, 3) for sample in questions(tmp_path, 4)], PLAN.settings[:1]
    whole = list(answer_settings(engine, jobs, settings))
    decode, encode = batched.decode_group, batched.encode_all

    def small_decode(engine_, prompts, plan):
        if len(prompts.seen) > 1:
            raise RuntimeError("out of memory")
        return decode(engine_, prompts, plan)

    def small_encode(run, crops):
        if len(crops) > 2:
            raise RuntimeError("out of memory")
        return encode(run, crops)

    monkeypatch.setattr(batched, "decode_group", small_decode)
    monkeypatch.setattr(batched, "encode_all", small_encode)
    assert list(answer_settings(engine, jobs, settings)) == whole


def test_a_question_is_answered_the_same_in_any_batch(engine: Engine, tmp_path: Path) -> None:
    jobs = [Job(sample, 4) for sample in questions(tmp_path, 6)]
    settings = choose_settings(SPACE, ["low"], None, [3, 6])
    whole = {row.key: row for row in answer_settings(engine, jobs, settings)}
    apart = [row for job in jobs for row in answer_settings(engine, [job], settings)]
    assert {row.key: row for row in apart} == whole


def test_prompts_of_a_part_are_those_of_the_whole(engine: Engine, tmp_path: Path) -> None:
    jobs = [Job(replace(one, question=one.question * (1 + i)), 4) for i, one in enumerate(questions(tmp_path, 3))]
    ready, failed = batched.prepare_all(engine, jobs, "low")
    assert not failed
    seen = batched.see_all(engine.runner, ready)
    whole, first = (batched.Prompts.of(engine.runner, some) for some in (seen, seen[:2]))
    part = whole.part(slice(0, 2))
    assert whole.x.shape[1] > first.x.shape[1]
    torch.testing.assert_close((part.x, part.lengths), (first.x, first.lengths))


def test_a_gpu_answers_more_questions_together() -> None:
    assert PLAN.batch_on("cuda") == PLAN.batch_on("cpu") == PLAN.batch_size
    free = replace(PLAN, batch_size=None)
    assert free.batch_on("cuda") > free.batch_on("cpu") > 1
    assert replace(PLAN, batch_size=0).batch_on("cuda") == 0


@pytest.mark.usefixtures("ticks")
def test_rows_are_complete_and_stages_add_up(engine: Engine, tmp_path: Path) -> None:
    rows = sweep(engine, tmp_path / "out", tmp_path)
    assert len(plain(rows)) == 4 * len(PLAN.settings)
    timed = [row for row in rows if row.is_measured]
    assert {row.question_id for row in timed} == {"q0", "q2"}, "two pictures, not two questions about one"
    untold: list[float] = []
    for row in timed:
        assert row.repeats is not None
        assert row.step_ms is not None
        assert set(row.repeats) == set(REPEAT_FIELDS)
        laps_ms = [
            dict(zip(row.repeats, repeat, strict=True)) for repeat in zip(*row.repeats.values(), strict=True)
        ]
        untold.extend(untold_ms(repeat, "T_total") for repeat in laps_ms)
        assert [len(laps) for laps in row.step_ms] == [row.output_tokens - 1] * PLAN.repeats
        assert (row.T_decode_per_token is None) == (row.output_tokens == 1)
    assert untold == pytest.approx([UNTOLD_MS] * len(untold))
    for row in rows:
        assert row.error is None
        if not row.is_measured:
            assert [getattr(row, name) for name in STAGE_FIELDS.values()] == [None] * len(STAGE_FIELDS)
    assert not (tmp_path / "out" / store.PARTS).exists()


@pytest.fixture(scope="module")
def uninterrupted(
    engine: Engine, tmp_path_factory: pytest.TempPathFactory
) -> dict[tuple[str, str, int, int], tuple[object, ...]]:
    folder = tmp_path_factory.mktemp("whole")
    return plain(sweep(engine, folder / "out", folder, COLD))


COLD = replace(PLAN, settings=PLAN.settings[:3], warmup=0)
"""Two depths of one tier and one of another. Discarded answers change times alone."""


def stored(folder: Path) -> list[SweepRow]:
    """All rows in the merged file and in the parts, those of one key too."""
    lines = [line for path in (folder / store.PARTS).glob("*/*.jsonl") for line in path.read_text().splitlines()]
    merged = folder / "text_vqa.parquet"
    rows = store.read_rows(merged)[0] if merged.exists() else []
    return rows + [SweepRow.from_json(json.loads(line)) for line in lines]


class Killed(BaseException):
    """Nothing below catches it, as nothing catches a kill."""


@pytest.mark.parametrize(
    ("method", "point"), [*(("add", n) for n in range(1, 9)), ("rmtree", 1), ("rmtree", 2), ("answer", 8)]
)
def test_a_kill_loses_and_doubles_nothing(
    engine: Engine,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    method: str,
    point: int,
    uninterrupted: dict[tuple[str, str, int, int], tuple[object, ...]],
) -> None:
    """Killed after each part, while a merged file is there and its parts are too, and between two answers."""
    owner = {"add": Ledger, "rmtree": ledgers.shutil, "answer": Engine}[method]
    original, count = getattr(owner, method), 0

    def dying(*args, **options):
        nonlocal count
        count += 1
        if count == point and method != "add":
            raise Killed
        result = original(*args, **options)
        if count == point:
            raise Killed
        return result

    with monkeypatch.context() as patch:
        patch.setattr(owner, method, dying)
        with contextlib.suppress(Killed):
            sweep(engine, tmp_path / "out", tmp_path, COLD)
            pytest.fail("nothing was interrupted")
    before = timings(sorted(stored(tmp_path / "out"), key=lambda row: row.num_repeats))
    rows = sweep(engine, tmp_path / "out", tmp_path, COLD)
    assert plain(rows) == uninterrupted
    after = timings(rows)
    assert all(after[key][: len(laps)] == laps for key, laps in before.items()), "what was timed is kept"
    assert not (tmp_path / "out" / store.PARTS).exists()


def test_a_finished_sweep_is_not_run_again_and_can_grow(
    engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = sweep(engine, tmp_path / "out", tmp_path, COLD)
    with monkeypatch.context() as patch:
        patch.setattr(Ledger, "add", lambda *_args: pytest.fail("ran again"))
        assert sweep(engine, tmp_path / "out", tmp_path, COLD) == first
    more = sweep(engine, tmp_path / "out", tmp_path, replace(COLD, latency_samples=3), count=6)
    assert len(plain(more)) == 6 * len(COLD.settings)
    kept = {row.key: row for row in more}
    assert all(kept[row.key] == row for row in first), "what was measured is kept as it was"


def test_the_older_layout_grows_too(engine: Engine, tmp_path: Path) -> None:
    seen: list[dict[str, SweepRow]] = []
    for count in (1, 4):
        ledger = replace(ledger_of(engine, tmp_path / "out"), form="json")
        with ledger.opened(["text_vqa"]):
            paths = run_sweep(engine, {"text_vqa": questions(tmp_path, count)}, COLD, ledger, Share())
        assert len(list((tmp_path / "out" / "text-vqa").iterdir())) == len(paths) == len(COLD.settings)
        rows = [row for path in paths for row in legacy.read_file(path, "text_vqa").rows]
        assert len(plain(rows)) == count * len(COLD.settings)
        seen.append({str(row.key): row for row in rows})
    assert seen[0].items() <= seen[1].items()


def test_damaged_parts_are_named(engine: Engine, tmp_path: Path) -> None:
    part = tmp_path / store.PARTS / "text_vqa" / "0.jsonl"
    part.parent.mkdir(parents=True)
    for data in (b"\xff\n", b"{\n", b"3\n"):
        part.write_bytes(data)
        with (
            pytest.raises(UserError, match=r"0\.jsonl: damaged"),
            ledger_of(engine, tmp_path).opened(["text_vqa"]),
        ):
            pass


def test_one_layout_takes_the_place_of_the_other(engine: Engine, tmp_path: Path) -> None:
    for count, form in ((1, "parquet"), (2, "json"), (3, "parquet")):
        ledger = replace(ledger_of(engine, tmp_path / "out"), form=form)
        with ledger.opened(["text_vqa"]):
            run_sweep(engine, {"text_vqa": questions(tmp_path, count)}, COLD, ledger, Share())
        assert len(store.read_results([tmp_path / "out"])) == count * len(COLD.settings), form


def test_only_the_timed_questions_without_batches(engine: Engine, tmp_path: Path) -> None:
    plan = replace(COLD, batch_size=0, max_new_tokens=(1, 3))
    rows = sweep(engine, tmp_path / "out", tmp_path, plan)
    assert len(rows) == 2 * len(plan.settings)
    assert all(row.is_measured and row.accuracy is not None for row in rows)


def test_processes_share_the_questions(
    engine: Engine, tmp_path: Path, uninterrupted: dict[tuple[str, str, int, int], tuple[object, ...]]
) -> None:
    samples, folder = {"text_vqa": questions(tmp_path)}, tmp_path / "out"
    with (
        ledger_of(engine, folder, COLD, rank=1).opened(["text_vqa"]) as second,
        ledger_of(engine, folder, COLD).opened(["text_vqa"]) as first,
    ):
        assert run_sweep(engine, samples, COLD, second, Share(1, 2)) == []
        assert {key[0] for key in second.rows["text_vqa"]} == {"q3"}, "the second batch of two at each tier"
        assert len(second.rows["text_vqa"]) == len(COLD.settings)
        run_sweep(engine, samples, COLD, first, Share(0, 2))
    assert plain(store.read_rows(folder / "text_vqa.parquet")[0]) == uninterrupted


def test_a_failed_sample_has_rows_that_say_so(engine: Engine, tmp_path: Path) -> None:
    samples = questions(tmp_path)
    samples[1] = replace(samples[1], image_id="gone", image_path=tmp_path / "gone.png")
    plan = replace(COLD, latency_samples=3)
    with ledger_of(engine, tmp_path / "out").opened(["text_vqa"]) as ledger:
        run_sweep(engine, {"text_vqa": samples}, plan, ledger, Share())
        rows = list(ledger.rows["text_vqa"].values())
    failed = [row for row in rows if row.error]
    assert len(failed) == len(COLD.settings)
    assert {row.question_id for row in failed} == {"q1"}
    assert "gone.png" in str(failed[0].error)
    assert len(rows) == 4 * len(COLD.settings)
    read = store.read_results([tmp_path / "out"])
    assert read["error"].notna().sum() == len(COLD.settings)


def test_a_failure_while_timing_keeps_the_answer(engine: Engine, tmp_path: Path) -> None:
    sample = questions(tmp_path, 1)[0]
    (row,) = answer_settings(engine, [Job(sample, 4)], PLAN.settings[:1])
    broken = Job(replace(sample, image_path=tmp_path / "gone.png"), 4)
    (failed,) = time_settings(engine, Turn("text_vqa", broken, 1, PLAN.settings[:1]), 0, {row.key: row})
    assert (failed.prediction, failed.is_measured) == (row.prediction, False)
    assert "gone.png" in str(failed.error)
    assert better(row, failed) == better(failed, row) == failed
    (timed,) = time_settings(engine, Turn("text_vqa", Job(sample, 4), 1, PLAN.settings[:1]), 0, {row.key: row})
    assert better(row, timed) is timed
    assert better(timed, row) is timed


def test_one_process_at_a_time(engine: Engine, tmp_path: Path) -> None:
    with (
        ledger_of(engine, tmp_path).opened(["text_vqa"]),
        pytest.raises(UserError, match="another process is writing"),
        ledger_of(engine, tmp_path).opened(["text_vqa"]),
    ):
        pass
    with ledger_of(engine, tmp_path).opened(["text_vqa"]):
        pass


@pytest.mark.parametrize(
    ("field", "change"),
    [
        ("stamp.weights", {"stamp": replace(STAMP, weights="others")}),
        ("stamp.knob_space", {"stamp": replace(STAMP, knob_space="others")}),
        ("stamp.hardware", {"stamp": replace(STAMP, hardware="others")}),
        ("seed", {"conditions": PLAN.conditions("val") | {"seed": 1}}),
        ("split", {"conditions": PLAN.conditions("train")}),
    ],
)
def test_other_conditions_are_not_mixed_in(engine: Engine, tmp_path: Path, field: str, change: dict) -> None:
    with ledger_of(engine, tmp_path).opened([]):
        pass
    with (
        pytest.raises(UserError, match=rf"sweep\.json: field {field} is "),
        replace(ledger_of(engine, tmp_path), **change).opened([]),
    ):
        pass


def test_strange_directories_are_left_alone(engine: Engine, tmp_path: Path) -> None:
    (tmp_path / "text_vqa.parquet").write_bytes(b"somebody's")
    with pytest.raises(UserError, match="results without"), ledger_of(engine, tmp_path).opened([]):
        pass
    (tmp_path / "text_vqa.parquet").unlink()
    (tmp_path / ledgers.MANIFEST).write_text("{")
    with pytest.raises(UserError, match=r"sweep\.json: half-written"), ledger_of(engine, tmp_path).opened([]):
        pass
    (tmp_path / ledgers.MANIFEST).write_text(json.dumps({"stamp": STAMP.to_json()}))
    with pytest.raises(UserError, match="ranking"), ledger_of(engine, tmp_path).opened([]):
        pass


def test_settings_are_checked() -> None:
    assert choose_settings(SPACE) == SPACE.settings
    assert len(choose_settings(SPACE, ["low"], None, [6])) == len(SPACE.top_ks)
    for wrong in ((["huge"], None, None), (None, [99], None), (None, None, [99])):
        with pytest.raises(UserError, match="not in the knob space"):
            choose_settings(SPACE, *wrong)


def test_caps_and_pictures_do_not_move_when_more_questions_come(tmp_path: Path) -> None:
    plan = replace(PLAN, max_new_tokens=(1, 8, 32))
    few, many = questions(tmp_path, 3), questions(tmp_path, 6)
    assert plan.jobs(many)[:3] == plan.jobs(few)
    assert [job.sample.question_id for job in plan.latency_jobs(many)] == ["q0", "q2"]
    wide = replace(plan, latency_samples=5)
    assert [job.sample.question_id for job in wide.latency_jobs(many)] == ["q0", "q2", "q4", "q1", "q3"]
