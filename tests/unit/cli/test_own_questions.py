"""Your own questions through every command: bench, the core experiment, Exp 6 to 8 and evaluate."""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from PIL import Image

import tiny_model
from sweep_rows import write_results
from tempovlm.cli import bench, evaluate
from tempovlm.cli import main as cli
from tempovlm.core.errors import UserError
from tempovlm.data import registry
from tempovlm.lab.core_exp import store
from tempovlm.lab.judge import figures
from tempovlm.model.weights import weights_hash
from timings import Ticks

QUESTIONS = (
    ("train", "what does the sign say?", "open"),
    ("train", "how many dogs?", "two"),
    ("train", "what color?", "red"),
    ("val", "what is there?", "dog"),
    ("val", "is the dog there?", "stop"),
    ("val", "what say?", "stop"),
)


@pytest.fixture(autouse=True)
def _any_machine(ticks: Ticks, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    del ticks
    monkeypatch.setattr("tempovlm.lab.drawing.can_draw", lambda: False)
    monkeypatch.setattr("tempovlm.engine.calibration.stored_profile", lambda *_: tiny_model.make_profile())
    registry._own.clear()
    yield
    registry._own.clear()


@pytest.fixture
def signs(tmp_path: Path) -> Path:
    """Six questions about as many pictures."""
    rows = ["id,split,image,question,answer"]
    for number, (split, question, answer) in enumerate(QUESTIONS):
        Image.fromarray(tiny_model.picture(number)).save(tmp_path / f"{number}.png")
        rows.append(f"q{number},{split},{number}.png,{question},{answer}")
    path = tmp_path / "signs.csv"
    path.write_text("\n".join(rows))
    return path


def script(name: str) -> ModuleType:
    path = Path(__file__).resolve().parents[3] / "experiments" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(f"script_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    sys.modules[spec.name] = module = importlib.util.module_from_spec(spec)  # dataclasses look there
    spec.loader.exec_module(module)
    return module


def run_bench(signs: Path, model: Path, out: Path, *more: str) -> dict[str, Any]:
    flags = ["--model", str(model), "--device", "cpu", "--max_new_tokens", "2", "--budgets", "25", "60"]
    bench.main([str(signs), *flags, "--output_dir", str(out), *more])
    found: dict[str, Any] = json.loads((out / "bench.json").read_text())
    return found


def test_bench_takes_a_file(
    signs: Path, tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    result = run_bench(signs, tiny_folder, tmp_path / "out")
    rule = "one reference a question: scored by exact match after VQA normalisation"
    out, err = capsys.readouterr()
    assert rule in " ".join(out.split())
    assert f"signs.csv: 6 questions; {rule}" in err
    assert (result["dataset"], result["scored_by"], result["num_samples"]) == (["signs"], rule, 3)
    assert result["stamp"]["data_source"].startswith("signs.csv ")
    records = [json.loads(line) for line in (tmp_path / "out" / "records.jsonl").read_text().splitlines()]
    assert len(records) == 9
    for record in records:
        number = int(record["question_id"].removeprefix("q"))
        assert (record["question"], record["references"]) == (QUESTIONS[number][1], [QUESTIONS[number][2]])
        assert record["picture"] == str(tmp_path / f"{number}.png")
        assert record["score"] == pytest.approx(float(record["prediction"] == QUESTIONS[number][2]))
        assert 0 < record["predicted_p50_ms"] <= record["predicted_upper_ms"]
        assert record["timings_ms"]["total"] > 0
    assert run_bench(signs, tiny_folder, tmp_path / "out", "--score", "anls")["scored_by"].endswith("by ANLS")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["none.csv"], "none.csv: missing"),
        (["bad.csv"], "bad.csv: row 3, column image: none.png is missing"),
        (["bad.csv", "--dataset", "okvqa"], "--dataset okvqa: beside bad.csv"),
        (["--score", "exact"], "--score exact: text_vqa has a rule of its own"),
    ],
)
def test_wrong_files_are_told_before_a_model_is_loaded(
    words: list[str],
    message: str,
    signs: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(signs.parent)
    monkeypatch.setattr(bench, "load_model", lambda *_: pytest.fail("loaded"))
    (signs.parent / "bad.csv").write_text("image,question,answer\n0.png,what?,x\nnone.png,what?,x\n")
    assert cli.main(["bench", *words]) == 2
    err = capsys.readouterr().err
    assert err.startswith("tempovlm: error: ")
    assert err.count("\n") == 1
    assert message in err


def test_data_check_of_a_file(signs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["data", "check", str(signs)]) == 0
    out = capsys.readouterr().out
    for part in (
        f"{signs}: complete",
        "6 questions about 6 pictures: train 3, val 3",
        "style vqa2",
        "exact match",
    ):
        assert part in out


@pytest.fixture
def swept(signs: Path, tiny_folder: Path, tmp_path: Path) -> list[str]:
    """The flags of `evaluate` that name made-up results of the file's training and validation questions."""
    hashed = weights_hash(tiny_folder)
    dirs = {one: write_results(tmp_path / one, None, one, hashed, dataset=str(signs)) for one in ("train", "val")}
    return ["--results_dir", str(dirs["val"]), "--train_results_dir", str(dirs["train"])]


def test_evaluate_judges_on_a_file(
    signs: Path,
    swept: list[str],
    tiny_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for name in ("frontier", "gaps"):
        monkeypatch.setattr(figures, name, lambda *_, **__: "<svg></svg>")
    judging = [*swept, "--model", str(tiny_folder), "--draws", "5", "--shuffles", "0", "--policies", "knn"]
    judging += ["--output_dir", str(tmp_path / "judge")]
    evaluate.main([*judging, "--dataset_names", str(signs)])
    judged = json.loads((tmp_path / "judge" / "judge.json").read_text())
    assert (judged["datasets"], judged["num_questions"]) == (["signs"], 3)
    registry._own.clear()
    assert cli.main(["evaluate", *judging]) == 2
    assert "unknown data set 'signs'" in capsys.readouterr().err


def test_exp_7_and_8_on_a_file(
    signs: Path, swept: list[str], tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempovlm.lab.exp7_profiles.plots.save_plots", lambda *_: ())
    model, out = ["--model_path", str(tiny_folder), "--device", "cpu"], tmp_path / "exp8.json"
    scores = tmp_path / "scores.json"
    scores.write_text(json.dumps({"ranking": list(range(tiny_model.CONFIG.num_blocks))}))
    exp7 = ["--datasets", str(signs), *swept[:2], "--importance_scores_file", str(scores)]
    exp7 += ["--output_dir", str(tmp_path / "exp7")]
    script("controller/profiling_with_importance").main([*model, *exp7])
    profile = json.loads((tmp_path / "exp7" / "signs" / "profiling_results.json").read_text())
    assert len(profile) == len(tiny_model.SPACE)
    exp8 = ["--dataset", str(signs), "--controller_path", "fixed", "--latency_budget", "40"]
    exp8 += ["--num_samples", "3", "--max_new_tokens", "2", "--output_path", str(out)]
    script("controller/test_adaptive_inference").main([*model, *exp8])
    assert json.loads(out.read_text())["dataset"] == ["signs"]


def test_importance_of_a_file(signs: Path, tiny_folder: Path, tmp_path: Path) -> None:
    few = ["--num_samples", "1", "--num_joint_samples", "1", "--max_new_tokens", "2", "--tier", "low"]
    flags = ["--model_path", str(tiny_folder), "--device", "cpu", "--dataset_names", str(signs)]
    out = ["--output_dir", str(tmp_path / "out"), "--merged_file", str(tmp_path / "merged.json")]
    script("controller/validate_importance_consistency").main([*flags, *few, *out])
    assert json.loads((tmp_path / "merged.json").read_text())["data_source"].startswith("signs.csv ")
    assert (tmp_path / "out" / "importance_comparison_signs.json").is_file()


def test_the_core_experiment_on_a_file(signs: Path, tiny_folder: Path, tmp_path: Path) -> None:
    sweep, out = script("core_exp/run_core_experiment").main, tmp_path / "out"
    flags = ["--model_path", str(tiny_folder), "--device", "cpu", "--num_samples", "2", "--max_new_tokens", "2"]
    flags += ["--dataset_names", str(signs), "--output_dir", str(out), "--latency_samples", "0"]
    flags += ["--tiers", "low", "--top_k", "4", "--num_blocks", "6"]
    sweep(flags)
    rows, stamp = store.read_rows(out / "signs.parquet")
    assert {row.question_id for row in rows} < {"q3", "q4", "q5"}
    assert str(stamp.data_source).startswith("signs.csv ")
    # Another process reads the results without the file: the folder says whose they are.
    registry._own.clear()
    assert len(store.read_results([out])) == len(rows)
    signs.write_text(signs.read_text().replace("stop", "shut"))
    with pytest.raises(UserError, match=r"field stamp\.data_source is 'signs\.csv \w+', this run's is"):
        sweep(flags)
