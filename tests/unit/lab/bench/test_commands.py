from __future__ import annotations

import csv
import errno
import json
import tempfile
from pathlib import Path
from types import ModuleType
from typing import Any
from xml.etree import ElementTree

import pytest
from bench_fakes import SPACE, FakeModel, sample

from tempovlm.cli import bench, demo
from tempovlm.core.errors import UserError
from tempovlm.core.files import writing_to
from tempovlm.data import catalog


@pytest.fixture
def model(monkeypatch: pytest.MonkeyPatch) -> FakeModel:
    """What both commands load, with a few questions as data."""
    fake = FakeModel()
    monkeypatch.setattr(bench, "load_model", lambda *_args, **_more: fake)
    monkeypatch.setattr(catalog, "load_mixed", lambda _, count, **_more: [sample(i) for i in range(count)])
    return fake


def test_bench_prints_one_line_of_json(
    model: FakeModel, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bench.main(
        ["--budgets", "120", "50", "120", "--num-samples", "5", "--output-dir", str(tmp_path / "out"), "--json"]
    )
    printed = capsys.readouterr()
    assert printed.out.count("\n") == 1
    result = json.loads(printed.out)
    assert [row["budget_ms"] for row in result["budgets"]] == pytest.approx([50.0, 120.0])
    assert (result["model"], result["device"], result["data_source"]) == ("fake", "cpu/float32", "synthetic")
    assert result["complete"]
    assert (result["policy"], result["chosen_by"]) == ("auto", ["fake"])
    assert result["stamp"]["weights"] == "0123456789ab"
    assert "on time" in printed.err
    assert json.loads((tmp_path / "out" / "bench.json").read_text()) == result
    assert len((tmp_path / "out" / "records.jsonl").read_text().splitlines()) == 5 * 3
    ElementTree.parse(tmp_path / "out" / "trade_off.svg")
    assert len(model.asked) == 15


@pytest.mark.usefixtures("model")
def test_files_for_papers_are_written_and_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--budgets", "50", "120", "--num_samples", "6", "--output_dir", str(tmp_path)]
    bench.main([*words, "--export", "csv", "latex", "pdf"])
    made = {"bench.csv", "bench.tex", "trade_off.pdf"}
    assert made <= {path.name for path in tmp_path.iterdir()}
    printed = "".join(capsys.readouterr().err.split())
    assert all(name in printed for name in made)
    rows = list(csv.DictReader((tmp_path / "bench.csv").open()))
    assert [(row["policy"], row["budget_ms"]) for row in rows] == [
        ("fake", "50.0"),
        ("fake", "120.0"),
        ("fixed setting", ""),
    ]
    result = json.loads((tmp_path / "bench.json").read_text())
    for row, known in zip(rows, result["budgets"], strict=False):
        assert float(row["accuracy"]) == pytest.approx(known["accuracy"])
        assert float(row["on_time_low"]) == pytest.approx(known["adherence_wilson"][0])
        gain = known["accuracy"] - result["fixed"]["accuracy"]
        assert float(row["gain_over_fixed"]) == pytest.approx(gain)
        assert float(row["gain_over_fixed_low"]) <= gain <= float(row["gain_over_fixed_high"])
    tabular = (tmp_path / "bench.tex").read_text()
    assert "\\toprule" in tabular
    assert "50 ms & " in tabular
    assert (tmp_path / "trade_off.pdf").read_bytes().startswith(b"%PDF")


@pytest.mark.usefixtures("model", "no_ink")
def test_without_a_fixed_setting_nothing_is_gained_over_it(tmp_path: Path) -> None:
    words = ["--budgets", "120", "--num_samples", "2", "--fixed", "none", "--output_dir", str(tmp_path)]
    bench.main([*words, "--export", "latex", "csv"])
    assert "gain over fixed" not in (tmp_path / "bench.tex").read_text().partition("toprule")[2]
    (row,) = csv.DictReader((tmp_path / "bench.csv").open())
    assert row["gain_over_fixed"] == ""


def test_ctrl_c_prints_what_is_done_and_writes_nothing(
    model: FakeModel, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def answer(*args: Any, **options: Any) -> Any:
        if len(model.asked) == 4:
            raise KeyboardInterrupt
        return FakeModel.answer(model, *args, **options)

    monkeypatch.setattr(model, "answer", answer)
    with pytest.raises(KeyboardInterrupt):
        bench.main(["--budgets", "120", "--num_samples", "5", "--output_dir", str(tmp_path / "out"), "--json"])
    result = json.loads(capsys.readouterr().out)
    assert not result["complete"]
    assert result["budgets"][0]["num_samples"] + result["fixed"]["num_samples"] == 4
    assert not list((tmp_path / "out").iterdir())


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["--budgets", "0"], "--budgets 0.0"),
        (["--budgets", "60", "nan"], "nan"),
        (["--budgets", "inf"], "inf"),
        (["--budgets", "soon"], "--budgets soon"),
        (["--num_samples", "0"], "--num_samples 0"),
        (["--fresh_processes", "-1"], "--fresh_processes -1"),
        (["--dataset", "imagenet"], "--dataset imagenet"),
    ],
)
def test_bad_flags_are_named(words: list[str], named: str) -> None:
    with pytest.raises(UserError) as refused:
        bench.main(words)
    assert named in refused.value.flagged


@pytest.mark.usefixtures("no_ink")
def test_results_are_kept_when_they_cannot_be_shown(
    model: FakeModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def gone(*_: object) -> None:
        raise BrokenPipeError

    monkeypatch.setattr(bench, "table", gone)
    with pytest.raises(BrokenPipeError):
        bench.main(["--budgets", "120", "--num_samples", "5", "--output_dir", str(tmp_path / "out")])
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {"bench.json", "records.jsonl", "trade_off.svg"}
    assert len(model.asked) == 10


@pytest.mark.usefixtures("no_ink")
def test_results_that_cannot_be_kept_are_shown(
    model: FakeModel, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "bench.json").mkdir()
    with pytest.raises(UserError, match=r"bench\.json: cannot be written"):
        bench.main(["--budgets", "120", "--num_samples", "5", "--output_dir", str(tmp_path), "--json"])
    assert json.loads(capsys.readouterr().out)["complete"]
    assert len(model.asked) == 10


@pytest.mark.usefixtures("no_ink")
def test_nothing_but_failures_is_an_error(
    model: FakeModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise UserError("too long")

    monkeypatch.setattr(model, "answer", fail)
    with pytest.raises(UserError, match=r"all 4 answers failed, .*: too long; correct that"):
        bench.main(["--budgets", "120", "--num_samples", "2", "--output_dir", str(tmp_path)])
    assert json.loads((tmp_path / "bench.json").read_text())["num_failed"] == 4


@pytest.mark.parametrize("command", [bench, demo])
def test_a_folder_that_cannot_be_written_is_told_before_anything_is_measured(
    command: ModuleType, model: FakeModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def read_only(**_: object) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(tempfile, "TemporaryFile", read_only)
    with pytest.raises(UserError, match=f"--output_dir {tmp_path}: cannot be written"):
        command.main(["--output_dir", str(tmp_path)])
    assert not model.asked


@pytest.mark.usefixtures("model")
def test_a_file_in_the_place_of_the_pictures(tmp_path: Path) -> None:
    (tmp_path / "images").touch()
    with pytest.raises(UserError, match="images: cannot be made"):
        demo.main(["--output_dir", str(tmp_path)])


@pytest.mark.usefixtures("model")
def test_folders_may_begin_with_a_tilde(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    bench.main(["--budgets", "120", "--num_samples", "1", "--output_dir", "~/out"])
    demo.main(["--figure", "~/answer.svg"])
    assert {path.name for path in tmp_path.iterdir()} == {"out", "answer.svg"}


@pytest.mark.usefixtures("model")
def test_a_figure_is_a_file(tmp_path: Path) -> None:
    for path in ("", str(tmp_path)):
        with pytest.raises(UserError, match=r"--figure .*: is a folder; name an SVG file"):
            demo.main(["--figure", path])
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"--figure .*file: cannot be made"):
        demo.main(["--figure", str(tmp_path / "file" / "a.svg")])


def test_fixed_setting() -> None:
    assert bench.fixed_setting("native", SPACE) == SPACE.native
    assert bench.fixed_setting("none", SPACE) is None
    assert str(bench.fixed_setting("medium/k8/b12", SPACE)) == "medium/k8/b12"
    with pytest.raises(UserError, match="--fixed huge"):
        bench.fixed_setting("huge", SPACE)


def test_demo_leaves_a_report(model: FakeModel, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    demo.main(["--output_dir", str(tmp_path / "demo"), "--num_samples", "4"])
    shown = capsys.readouterr().out
    assert "report.html" in shown
    assert "low" in shown
    assert "high" in shown
    names = {path.name for path in (tmp_path / "demo").iterdir()}
    assert names == {"report.html", "images", "bench.json", "records.jsonl", "trade_off.svg"}
    assert (tmp_path / "demo" / "images" / "score.jpg").is_file()
    page = (tmp_path / "demo" / "report.html").read_text()
    assert "a &lt;fake&gt; machine" in page
    assert {71.0, 130.0, 230.0} <= {budget_ms for _, budget_ms in model.asked}


def test_demo_draws_a_figure_only(model: FakeModel, tmp_path: Path) -> None:
    demo.main(["--figure", str(tmp_path / "answer.svg")])
    assert [path.name for path in tmp_path.iterdir()] == ["answer.svg"]
    words = "".join(ElementTree.parse(tmp_path / "answer.svg").getroot().itertext())
    assert "synthetic picture" in words
    assert "chosen because" not in words
    assert len(model.asked) == 3 * 24


@pytest.mark.parametrize("command", [bench, demo])
def test_two_runs_in_one_folder_are_not_mixed(command: ModuleType, model: FakeModel, tmp_path: Path) -> None:
    with (
        writing_to(tmp_path),
        pytest.raises(UserError, match=f"--output_dir {tmp_path}: another process is writing"),
    ):
        command.main(["--output_dir", str(tmp_path)])
    assert not model.asked
    assert not list(tmp_path.iterdir())
