"""A sweep's rows are about the questions that it was begun with, and what failed is asked again."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image
from sweep_fakes import STAMP, questions, rows
from sweep_runs import PLAN, ledger_of

import tiny_model
from tempovlm.core.errors import AllFailedError, UserError
from tempovlm.core.records import SweepRow
from tempovlm.data.digest import MISSING, difference, merged, question_digests
from tempovlm.data.sample import Sample
from tempovlm.engine.engine import Engine
from tempovlm.lab.core_exp import ledger, store
from tempovlm.lab.core_exp.plan import SweepPlan
from tempovlm.lab.core_exp.processes import Share
from tempovlm.lab.core_exp.questions import MANIFEST, check_samples, keep_questions
from tempovlm.lab.core_exp.sweep import conduct
from tempovlm.lab.script import run

FAST = replace(PLAN, settings=PLAN.settings[:2], latency_samples=1, repeats=1, warmup=0)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "one").mkdir()
    return tmp_path / "one"


def go(engine: Engine, out: Path, samples: list[Sample], plan: SweepPlan = FAST) -> list[SweepRow]:
    (path,) = conduct(engine, {"text_vqa": samples}, plan, ledger_of(engine, out, plan), Share())
    return store.read_rows(path)[0]


def other_pictures(samples: list[Sample], folder: Path) -> list[Sample]:
    folder.mkdir()
    made = []
    for sample in samples:
        path = folder / sample.image_path.name
        Image.fromarray(tiny_model.picture(99, 90, 90)).save(path)
        made.append(replace(sample, image_path=path))
    return made


Edit = Callable[[list[Sample], Path], list[Sample]]


@pytest.mark.parametrize(
    ("edit", "named"),
    [
        (lambda some, path: other_pictures(some, path / "two"), "the picture of question q0 has changed"),
        (lambda some, _: [replace(s, question=s.question + "?") for s in some], "the text of question q0"),
        (lambda some, _: [*some[:3], replace(some[3], answers=("go",))], r"question q3 .* \(1 of 4 questions"),
        (lambda some, _: [*some[:3], replace(some[3], question_id="q9")], "1 of its 4 questions, such as q3,"),
    ],
)
def test_questions_of_other_data_are_not_mixed_in(engine: Engine, folder: Path, edit: Edit, named: str) -> None:
    out, samples = folder / "out", questions(folder)
    first = go(engine, out, samples)
    manifest = (out / MANIFEST).read_text()
    with pytest.raises(UserError, match=named) as caught:
        go(engine, out, edit(samples, folder))
    assert str(caught.value).startswith(f"{out / MANIFEST}: text_vqa: ")
    assert (out / MANIFEST).read_text() == manifest
    assert go(engine, out, samples) == first, "the questions that it was begun with go on"


def test_a_larger_and_a_smaller_draw_go_on(engine: Engine, folder: Path) -> None:
    samples = questions(folder)
    go(engine, folder / "out", samples[:2])
    assert len(go(engine, folder / "out", samples)) == len(go(engine, folder / "out", samples[:1])) == 8
    kept = json.loads((folder / "out" / MANIFEST).read_text())["questions"]["text_vqa"]
    assert kept == question_digests(samples)


def test_pictures_that_are_back_are_asked_about(
    engine: Engine, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    samples, out = questions(folder), folder / "out"
    one, two = folder / "0.png", folder / "1.png"
    for path in (one, two):
        path.rename(path.with_suffix(".away"))
    with pytest.raises(
        AllFailedError, match=r"all 8 rows failed, the first with: text_vqa q0 at .*0\.png"
    ) as all_:
        go(engine, out, samples)
    assert "\n" not in str(all_.value)
    assert all(row.error for row in store.read_rows(out / "text_vqa.parquet")[0])
    one.with_suffix(".away").rename(one)
    found = go(engine, out, samples)
    assert [row.error is None for row in found] == [row.image_id == "i0" for row in found]
    assert "4 of 8 rows failed" in caplog.text
    Image.fromarray(tiny_model.picture(5, 90, 90)).save(two)
    caplog.clear()
    found = go(engine, out, samples, replace(FAST, latency_samples=2))
    assert [row.error for row in found] == [None] * 8
    assert {row.image_id for row in found if row.is_measured} == {"i0", "i1"}
    assert "failed" not in caplog.text
    fresh = {row.key: row.prediction for row in go(engine, folder / "fresh", samples)}
    assert {row.key: row.prediction for row in found} == fresh


def test_a_picture_that_could_not_be_read_may_be_repaired(engine: Engine, folder: Path) -> None:
    samples, out = questions(folder), folder / "out"
    whole = (folder / "1.png").read_bytes()
    (folder / "1.png").write_bytes(whole[:40])
    assert {row.image_id for row in go(engine, out, samples) if row.error} == {"i1"}
    (folder / "1.png").write_bytes(whole)
    assert not [row for row in go(engine, out, samples) if row.error]
    (folder / "1.png").unlink()
    assert not [row for row in go(engine, out, samples) if row.error], "what is answered needs no picture"
    kept = json.loads((out / MANIFEST).read_text())["questions"]["text_vqa"]
    assert not [digest for digest in kept.values() if digest.endswith(MISSING)]


def test_failures_while_timing_alone_are_timed_again(engine: Engine, folder: Path) -> None:
    plan, samples, out = replace(FAST, batch_size=0), questions(folder, 1), folder / "out"
    path = samples[0].image_path
    path.rename(folder / "away")
    with pytest.raises(AllFailedError, match="all 2 rows failed"):
        go(engine, out, samples, plan)
    (folder / "away").rename(path)
    found = go(engine, out, samples, plan)
    assert [(row.error, row.num_repeats) for row in found] == [(None, 1)] * 2


def test_all_failed_is_code_one(capsys: pytest.CaptureFixture[str]) -> None:
    def main(_argv: list[str]) -> None:
        raise AllFailedError("all 2 rows failed")

    with pytest.raises(SystemExit) as caught:
        run(main)
    assert caught.value.code == 1
    assert capsys.readouterr().err == "error: all 2 rows failed\n"


def test_a_directory_of_an_earlier_version_goes_on_with_a_word(
    engine: Engine, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    samples, out = questions(folder), folder / "out"
    first = go(engine, out, samples)
    record = json.loads((out / MANIFEST).read_text())
    record.pop("questions")
    (out / MANIFEST).write_text(json.dumps(record))
    assert len(store.read_results([out])) == len(first)
    check_samples([out], "val", other_pictures(samples, folder / "two"))
    with pytest.raises(UserError, match="of its 4 questions, such as q0, are not among this run's 1"):
        go(engine, out, [replace(samples[0], question_id="new")])
    caplog.clear()
    assert go(engine, out, samples) == first
    assert caplog.text.count("did not record the questions of text_vqa") == 1
    caplog.clear()
    go(engine, out, samples)
    assert "does not tell" not in caplog.text


def test_a_process_of_torchrun_asks_its_failures_again(
    engine: Engine, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ledger, "POLL_S", 0.01)
    samples, out, plan = questions(folder), folder / "out", replace(FAST, latency_samples=0)
    broken = [*samples[:1], replace(samples[1], image_path=folder / "gone.png"), *samples[2:]]
    assert {row.question_id for row in go(engine, out, broken, plan) if row.error} == {"q1"}
    second = threading.Thread(
        target=lambda: conduct(engine, {"text_vqa": samples}, plan, ledger_of(engine, out, plan, 1), Share(1, 2)),
        daemon=True,
    )
    second.start()
    (path,) = conduct(engine, {"text_vqa": samples}, plan, ledger_of(engine, out, plan), Share(0, 2))
    second.join()
    found = store.read_rows(path)[0]
    assert len({row.key for row in found}) == len(found) == 8
    assert not [row for row in found if row.error]
    assert not (out / store.PARTS).exists()


def test_other_processes_write_nothing_before_the_first_has_checked(
    engine: Engine, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class WaitedError(Exception):
        pass

    def waited(_: float) -> None:
        raise WaitedError

    samples = {"text_vqa": questions(folder)}
    monkeypatch.setattr(ledger.time, "sleep", waited)
    with pytest.raises(WaitedError):
        conduct(engine, samples, FAST, ledger_of(engine, folder / "out", rank=1), Share(1, 2))
    assert not [path for path in (folder / "out").rglob("*") if path.suffix in (".jsonl", ".parquet")]


def test_questions_that_share_an_id_are_refused(engine: Engine, folder: Path) -> None:
    same = [replace(sample, question_id="q0") for sample in questions(folder)]
    with pytest.raises(UserError, match="data set text_vqa: question id q0 is there 4 times"):
        go(engine, folder / "out", same)


def written(folder: Path, samples: list[Sample], **conditions: object) -> Path:
    """A results directory about these questions."""
    store.write_rows(folder, "text_vqa", rows(range(len(samples))), STAMP)
    record = {"conditions": {"split": "val", **conditions}, "stamp": STAMP.to_json()}
    (folder / MANIFEST).write_text(json.dumps(record))
    keep_questions(folder, {}, {"text_vqa": question_digests(samples)})
    return folder


def test_results_read_together_are_about_the_same_questions(folder: Path) -> None:
    samples = questions(folder)
    one = written(folder / "a", samples)
    assert len(store.read_results([one, written(folder / "b", samples)])) == 2 * len(store.read_results([one]))
    others = written(folder / "c", other_pictures(samples, folder / "others"))
    with pytest.raises(
        UserError, match=r"c/sweep\.json beside .*a/sweep\.json: text_vqa: the picture of question"
    ):
        store.read_results([one, others])


def test_results_and_data_belong_together(folder: Path) -> None:
    samples = questions(folder)
    others = other_pictures(samples, folder / "others")
    own, twins = written(folder / "a", samples), written(folder / "b", samples, twins=True)
    check_samples([own, twins], "val", samples)
    with pytest.raises(UserError, match=r"a/sweep\.json: text_vqa: the picture of question q0 has changed"):
        check_samples([own], "val", others)
    check_samples([twins], "val", others)
    check_samples([own], "train", others)
    with pytest.raises(UserError, match=r"b/sweep\.json: text_vqa: the text of question q2 has changed"):
        check_samples([twins], "val", [replace(samples[2], question="who?")])
    (own / MANIFEST).write_text('{"questions": {"text_vqa": {"q0": 7}}}')
    with pytest.raises(UserError, match=r"sweep\.json: half-written or damaged"):
        store.read_results([own])


def test_digests(folder: Path) -> None:
    first, second, third, _ = questions(folder)
    known = question_digests([first, second, third])
    assert known["q0"].split("/")[1] == known["q1"].split("/")[1] != known["q2"].split("/")[1]
    gone = question_digests([replace(first, image_path=folder / "gone.png")])["q0"]
    assert difference(known["q0"], gone) is None
    assert merged(known, {"q0": gone})["q0"] == known["q0"]
    assert merged({"q0": gone}, known) == known
    size = (folder / "0.png").stat().st_size
    (folder / "0.png").write_bytes(bytes(size))
    assert difference(known["q0"], question_digests([first])["q0"]) == "picture", "equal size, other bytes"
