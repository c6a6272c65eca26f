"""Data sets that `tempovlm bench` takes, and captions, which are scored all together by CIDEr."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any
from xml.etree import ElementTree

import pytest
from bench_fakes import SPACE, FakeModel, sample
from PIL import Image

from tempovlm.cli import bench as command
from tempovlm.cli import evaluate
from tempovlm.core.errors import UserError
from tempovlm.data.metrics.captions import cider
from tempovlm.data.registry import DATASETS, SCORED_TOGETHER, check_datasets
from tempovlm.data.scoring import check_scorable
from tempovlm.lab import charts
from tempovlm.lab import exp8_adaptive as adaptive
from tempovlm.lab.bench import bench, summary

CAPTIONS = (
    ("The shop is open.", "An open shop"),
    ("Two dogs' bones", "Dogs run"),
    ("A red bus", "open top bus"),
    ("open", "Open!"),
)


class WordOverlap:
    """In place of CIDEr: ten times the share of a picture's reference words that were said."""

    def compute_score(
        self, references: dict[int, list[str]], said: dict[int, list[str]]
    ) -> tuple[float, list[float]]:
        scores = []
        for i, texts in references.items():
            words = {word for text in texts for word in text.split()}
            scores.append(10.0 * len(words & set(said[i][0].split())) / len(words))
        return sum(scores) / len(scores), scores


@pytest.fixture
def overlap(monkeypatch: pytest.MonkeyPatch) -> None:
    """A package in the place of pycocoevalcap, so that these tests need no extra."""
    for name in ("pycocoevalcap", "pycocoevalcap.cider", "pycocoevalcap.cider.cider"):
        module = ModuleType(name)
        module.__spec__ = ModuleSpec(name, None)
        module.__dict__["Cider"] = WordOverlap
        monkeypatch.setitem(sys.modules, name, module)


@pytest.fixture
def model(monkeypatch: pytest.MonkeyPatch) -> FakeModel:
    """What the command loads."""
    fake = FakeModel()
    monkeypatch.setattr(command, "load_model", lambda *_, **__: fake)
    return fake


def picture(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 8)).save(path)


def dump(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


def make_captions(root: Path, texts: Sequence[Sequence[str]] = CAPTIONS) -> Path:
    """COCO's captions as its owners publish them."""
    folder = root / "coco_caption"
    names = [f"COCO_val2014_{i:012d}.jpg" for i in range(len(texts))]
    for name in names:
        picture(folder / "val2014" / name)
    content = {
        "images": [{"id": i, "file_name": name} for i, name in enumerate(names)],
        "annotations": [{"image_id": i, "caption": text} for i, some in enumerate(texts) for text in some],
    }
    dump(folder / "annotations" / "captions_val2014.json", content)
    return root


def make_doc_qa(root: Path) -> None:
    entry = {"questionId": 1, "image": "documents/a.png", "question": "what is it?", "answers": ["open"]}
    dump(root / "doc_qa" / "val_v1.0.json", {"data": [entry]})
    picture(root / "doc_qa" / "documents" / "a.png")


def make_tally_qa(root: Path) -> None:
    entry = {"question_id": 1, "image_id": 1, "image": "VG_100K/a.jpg", "question": "how many?", "answer": 3}
    dump(root / "tally_qa" / "test.json", [entry])
    picture(root / "tally_qa" / "VG_100K" / "a.jpg")


def make_st_qa(root: Path) -> None:
    entry = {"question_id": 1, "file_path": "icdar/a.jpg", "question": "what does it say?", "answers": ["open"]}
    dump(root / "st_qa" / "train_task_3.json", {"data": [entry]})
    picture(root / "st_qa" / "icdar" / "a.jpg")


def run(root: Path, out: Path, *datasets: str, count: int = 4) -> dict[str, Any]:
    """The result of a bench of these data sets at two budgets."""
    flags = ["--data_dir", str(root), "--num_samples", str(count), "--output_dir", str(out)]
    command.main(["--dataset", *datasets, "--budgets", "60", "1000", *flags])
    found: dict[str, Any] = json.loads((out / "bench.json").read_text())
    return found


@pytest.mark.usefixtures("model")
@pytest.mark.parametrize(
    ("name", "make", "accuracy"),
    [("doc_qa", make_doc_qa, 1.0), ("st_qa", make_st_qa, 1.0), ("tally_qa", make_tally_qa, 0.0)],
)
def test_bench_takes_every_data_set(name: str, make: Any, accuracy: float, tmp_path: Path) -> None:
    make(tmp_path)
    result = run(tmp_path, tmp_path / "out", name, name, count=1)
    assert (result["dataset"], result["data_source"]) == ([name], "official")
    assert result["budgets"][1]["accuracy"] == pytest.approx(accuracy)
    assert "cider" not in result["budgets"][1]


def test_the_commands_know_the_same_data_sets(model: FakeModel) -> None:
    del model
    names = list(DATASETS)
    assert check_datasets([*names, names[0]], "dataset", together=True) == names
    command.BenchArgs(dataset=tuple(names)).check()
    with pytest.raises(
        UserError, match=r"--dataset imagenet: unknown data set; choose from text_vqa, .*coco_caption"
    ):
        command.BenchArgs(dataset=("imagenet",)).check()


@pytest.mark.usefixtures("model", "overlap")
def test_bench_scores_captions_together(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    result = run(make_captions(tmp_path), out, "coco_caption")
    tight, loose = result["budgets"]
    # At 60 ms the model says `wrong`, at 1,000 `open`.
    expected = cider(["open"] * 4, CAPTIONS)
    assert (tight["cider"], tight["accuracy"]) == (pytest.approx(0.0), None)
    assert loose["cider"] == pytest.approx(sum(expected) / 4, abs=1e-3)
    low, high = loose["cider_interval"]
    assert low < loose["cider"] < high
    assert (loose["accuracy"], loose["accuracy_by_dataset"]) == (None, {})
    assert result["fixed"]["cider"] == pytest.approx(loose["cider"])
    rows = [json.loads(line) for line in (out / "records.jsonl").read_text().splitlines()]
    shares = {row["question_id"]: row["score"] for row in rows if row["budget_ms"] == pytest.approx(1000.0)}
    assert [shares[str(i)] for i in range(4)] == pytest.approx(expected, abs=1e-3)
    printed = capsys.readouterr().out
    assert "CIDEr" in printed
    assert "right" not in printed
    assert f"{100 * loose['cider']:.1f}" in printed
    assert "CIDEr" in (out / "trade_off.svg").read_text()
    ElementTree.parse(out / "trade_off.svg")


@pytest.mark.usefixtures("model", "overlap")
def test_captions_do_not_mix_with_accuracy(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_doc_qa(make_captions(tmp_path))
    row = run(tmp_path, tmp_path / "out", "doc_qa", "coco_caption", count=4)["budgets"][1]
    assert row["accuracy"] == pytest.approx(1.0)
    assert row["accuracy_by_dataset"] == {"doc_qa": pytest.approx(1.0)}
    assert 0 < row["cider"] < 10
    assert row["num_samples"] == 3
    printed = capsys.readouterr().out
    assert "CIDEr" in printed
    assert "right" in printed
    assert "Accuracy against" in (tmp_path / "out" / "trade_off.svg").read_text()


@pytest.mark.usefixtures("overlap")
def test_experiment_8_scores_captions_together(tmp_path: Path) -> None:
    plan = adaptive.Plan(
        datasets=("coco_caption",),
        budgets_ms=(60.0, 1000.0),
        num_samples=4,
        controller="fixed",
        data_dir=make_captions(tmp_path),
    )

    class Stopping(FakeModel):
        def answer(self, *args: Any, on_deadline: str = "finish", **options: Any) -> Any:
            assert on_deadline == "finish"
            return super().answer(*args, **options)

    result = adaptive.run(Stopping(), plan, tmp_path / "exp8.json")
    loose = json.loads((tmp_path / "exp8.json").read_text())["budgets"][1]
    assert loose["cider"] == pytest.approx(sum(cider(["open"] * 4, CAPTIONS)) / 4, abs=1e-3)
    assert loose["accuracy"] is None
    lines = adaptive.render(result).splitlines()
    assert "CIDEr" in lines[2]
    assert f"{100 * loose['cider']:.1f}" in lines[4].split()


@pytest.mark.usefixtures("overlap")
@pytest.mark.parametrize("count", [1, 3])
def test_an_interrupted_bench_scores_what_is_done(count: int) -> None:
    samples = [
        sample(i, dataset="coco_caption", answers=texts, image_id=f"i{i}") for i, texts in enumerate(CAPTIONS)
    ]
    plan = bench.BenchPlan(budgets_ms=(1000.0,), max_new_tokens=16, fixed=None, slower_existed=lambda _: True)
    done = list(bench.measure(FakeModel(), samples, plan))[:count]
    assert {record.score for record in done} == {None}
    row = summary.summarise(bench.score_together(done, samples))["budgets"][0]
    if count == 1:
        # CIDEr weighs words by how few pictures have them: one picture has none.
        assert (row["cider"], row["cider_interval"]) == (None, None)
        assert "no request" in charts.trade_off({"budgets": [row]})
    else:
        assert row["cider"] == pytest.approx(sum(cider(["open"] * 3, CAPTIONS[:3])) / 3)


@pytest.mark.usefixtures("overlap")
def test_a_failed_caption_is_one_without_a_word() -> None:
    texts = [(i, "broken.jpg" if i == 3 else "a.jpg", some) for i, some in enumerate(CAPTIONS)]
    samples = [sample(i, name, dataset="coco_caption", answers=some) for i, name, some in texts]
    plan = bench.BenchPlan(
        budgets_ms=(1000.0,), max_new_tokens=4, fixed=SPACE.native, slower_existed=lambda _: True
    )
    records = list(bench.measure(FakeModel(), samples, plan))
    fresh = replace(records[0], run="fresh", budget_ms=1000.0)
    scored = bench.score_together([*records, fresh], samples)
    assert scored[-1].score is None
    assert [r.score for r in scored if r.question_id == "q3"] == pytest.approx([0.0, 0.0])
    row = summary.summarise(scored)["budgets"][0]
    assert row["cider"] == pytest.approx(sum(cider(["open"] * 3 + [""], CAPTIONS)) / 4)
    assert (row["num_failed"], row["num_adherence"]) == (1, 5)


def test_captions_that_cannot_be_scored_are_not_answered(
    model: FakeModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_captions(tmp_path)
    monkeypatch.setitem(sys.modules, "pycocoevalcap", None)
    with pytest.raises(UserError, match=r"pip install 'tempovlm\[captions\]'"):
        run(tmp_path, tmp_path / "out", "coco_caption")
    plan = adaptive.Plan(
        datasets=("coco_caption",), budgets_ms=(60.0,), num_samples=4, controller="fixed", data_dir=tmp_path
    )
    with pytest.raises(UserError, match=r"tempovlm\[captions\]"):
        adaptive.run(model, plan, tmp_path / "exp8.json")
    assert not model.asked


@pytest.mark.usefixtures("overlap")
def test_one_caption_is_not_answered(model: FakeModel, tmp_path: Path) -> None:
    make_captions(tmp_path)
    with pytest.raises(UserError, match="at least two pictures; ask for more with --num_samples"):
        run(tmp_path, tmp_path / "out", "coco_caption", count=1)
    assert not model.asked
    check_scorable([sample(0)])


@pytest.mark.usefixtures("overlap")
def test_references_without_a_word() -> None:
    with pytest.raises(UserError, match="none of these pictures' has a word"):
        cider(["a dog", "a cat"], [["."], ["!", ""]])


def test_what_judges_answer_by_answer_refuses_captions(tmp_path: Path) -> None:
    named = r"--dataset_names coco_caption: captions are scored many at once.*tempovlm bench .*score"
    with pytest.raises(UserError, match=named):
        evaluate.main(
            [
                "--results_dir",
                str(tmp_path),
                "--dataset_names",
                "coco_caption",
                "--output_dir",
                str(tmp_path / "o"),
            ]
        )
    for name in SCORED_TOGETHER:
        with pytest.raises(UserError, match=f"--datasets {name}: captions"):
            check_datasets(["okvqa", name], "datasets")


def test_captions_by_the_official_program(model: FakeModel, tmp_path: Path) -> None:
    pytest.importorskip("pycocoevalcap", reason="needs pycocoevalcap: pip install 'tempovlm[captions]'")
    del model
    row = run(make_captions(tmp_path), tmp_path / "out", "coco_caption")["budgets"][1]
    assert row["cider"] == pytest.approx(sum(cider(["open"] * 4, CAPTIONS)) / 4, abs=1e-3)
    assert row["cider"] > 0
