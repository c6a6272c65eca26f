from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from experiments.scoreboard.report import JSON_FILE, MARKDOWN_FILE, PAGES, build
from experiments.scoreboard.result_files import read_result, sweep_content
from experiments.scoreboard.targets import TARGETS, sources
from result_fakes import SHIPPED, put, stamp

from stamps import STAMP
from tempovlm.cli import main, report
from tempovlm.core.errors import UserError

ROOT = Path(__file__).resolve().parents[3]
NAMES = [target.name for target in TARGETS]
FIELDS = {
    "name",
    "experiment",
    "seed_target",
    "our_target",
    "measured",
    "unit",
    "met",
    "reason",
    "source_file",
    "data_source",
    "hardware",
}


def accuracy_file(weights_hash: str = SHIPPED, **low: float) -> dict[str, Any]:
    names = ("text_vqa", "coco_2014_vqa", "okvqa", "science_qa_img")
    corners = [("high", 8, 16, 0.9), ("low", 8, 16, 0.6), ("high", 4, 16, 0.7), ("high", 8, 8, 0.45)]
    settings = [
        {"tier": tier, "top_k": k, "num_blocks": n, "accuracy": a, "by_dataset": dict.fromkeys(names, a)}
        for tier, k, n, a in corners
    ]
    settings[0]["by_dataset"].update(low)  # type: ignore[attr-defined]
    about = {"hardware": "a machine", "weights": weights_hash, "knob_space": "x", "data_source": "synthetic"}
    return about | {"settings": settings}


def bench_file() -> dict[str, Any]:
    row = {"adherence_wilson": [0.9, 0.98], "utilisation": 0.7, "p50_ms": 44.0, "knobs": {"low/k4/b8": 1.0}}
    return {
        "budgets": [{"budget_ms": float(b)} | row for b in (60, 100, 150, 200, 300)],
        "fixed": {"knobs": "high/k8/b16", "p50_ms": 350.0},
        "stamp": stamp(),
    }


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """A repository with the experiments, a pocket, its bench, and nothing else."""
    (tmp_path / "docs").mkdir()
    (tmp_path / "experiments" / "controller").mkdir(parents=True)
    put(tmp_path, "src/tempovlm/pocket/accuracy.json", accuracy_file())
    put(tmp_path, "benchmarks/results/pocket_cpu.json", bench_file())
    return tmp_path


def rows_of(repository: Path) -> dict[str, dict[str, Any]]:
    return {row["name"]: row for row in json.loads(build(repository)[JSON_FILE])["targets"]}


def test_this_repository_is_up_to_date(capsys: pytest.CaptureFixture[str]) -> None:
    report.main(["--repository", str(ROOT), "--check"])
    assert "up to date" in capsys.readouterr().out


def test_no_name_is_left_out() -> None:
    written = json.loads((ROOT / JSON_FILE).read_text(encoding="utf-8"))["targets"]
    assert [row["name"] for row in written] == NAMES
    page = (ROOT / MARKDOWN_FILE).read_text(encoding="utf-8")
    assert [name for name in NAMES if f"`{name}`" not in page] == []


def test_every_row_is_whole() -> None:
    for row in json.loads((ROOT / JSON_FILE).read_text(encoding="utf-8"))["targets"]:
        assert set(row) == FIELDS
        assert row["met"] in (True, False, None)
        if row["met"] is None:
            assert row["reason"].startswith("not measured yet")
        else:
            assert isinstance(row["measured"], int | float)
            assert row["hardware"]


def test_every_result_file_has_a_place_in_the_documentation() -> None:
    text = (ROOT / "docs" / "measuring.md").read_text(encoding="utf-8")
    folders = dict.fromkeys(("text_vqa", "coco_2014_vqa", "okvqa", "science_qa_img"), "{dataset}")
    for source in sources():
        path = "/".join(folders.get(part, part) for part in source.path.split("/"))
        assert f"`{path}`" in text or f"`{re.sub('h[12]00', '{gpu}', path)}`" in text, source.path


def test_an_absent_file_is_not_measured_yet(repository: Path) -> None:
    row = rows_of(repository)["exp1_prefill_mae_h200"]
    assert (row["measured"], row["met"], row["hardware"], row["data_source"]) == (None, None, None, None)
    first, *_, last = row["reason"].removeprefix("not measured yet: ").split(" && ")
    assert first.startswith("python experiments/core_exp/run_core_experiment.py")
    assert last.startswith("python experiments/controller/train_latency_estimator.py")
    assert row["source_file"] == "checkpoints/latency_estimator_molmoe_h200/report.json"


def test_verdicts_follow_the_file(repository: Path) -> None:
    rows = rows_of(repository)
    for name in ("pocket_latency_native", "pocket_adherence_60ms"):
        assert rows[name]["met"] is True
    record = bench_file()
    record["fixed"]["p50_ms"] = 350.0001
    record["budgets"][0] |= {"adherence_wilson": [0.9, 0.9699]}
    put(repository, "benchmarks/results/pocket_cpu.json", record)
    rows = rows_of(repository)
    for name in ("pocket_latency_native", "pocket_adherence_60ms"):
        assert rows[name]["met"] is False
    assert rows["pocket_latency_native"]["measured"] == pytest.approx(350.0001, rel=1e-12)
    assert "350.0001 ms | **missed**" in build(repository)[MARKDOWN_FILE]
    assert rows["pocket_utilisation_60ms"]["met"] is True


def test_pocket_accuracy_is_compared_knob_by_knob(repository: Path) -> None:
    put(repository, "src/tempovlm/pocket/accuracy.json", accuracy_file(text_vqa=0.85))
    rows = rows_of(repository)
    assert rows["pocket_accuracy_native"]["measured"] == pytest.approx(90)
    assert rows["pocket_reading_gap"]["measured"] == pytest.approx(25)
    assert rows["pocket_lost_at_lowest_num_blocks"]["measured"] == pytest.approx(45)
    assert rows["pocket_lost_at_lowest_top_k"]["measured"] == pytest.approx(20)


def test_figures_of_other_weights_have_no_verdict(repository: Path) -> None:
    put(repository, "src/tempovlm/pocket/accuracy.json", accuracy_file(weights_hash="another00000"))
    row = rows_of(repository)["pocket_latency_native"]
    assert (row["measured"], row["met"]) == (pytest.approx(350), None)
    assert "another00000" in row["reason"]
    assert SHIPPED in row["reason"]
    assert "350 ms | of other weights" in build(repository)[MARKDOWN_FILE]


def test_a_field_that_is_missing_or_empty_is_named(repository: Path) -> None:
    record = bench_file()
    del record["fixed"]
    record["budgets"][0]["utilisation"] = None
    put(repository, "benchmarks/results/pocket_cpu.json", record)
    rows = rows_of(repository)
    assert "there is no field fixed" in rows["pocket_latency_native"]["reason"]
    assert "utilisation is empty" in rows["pocket_utilisation_60ms"]["reason"]
    assert rows["pocket_adherence_60ms"]["met"] is True


UNSTAMPED = {name: value for name, value in bench_file().items() if name != "stamp"}


@pytest.mark.parametrize(
    ("record", "words"),
    [
        ("{", "broken, not JSON"),
        ("", "broken, not JSON"),
        (UNSTAMPED, "has no stamp"),
        (UNSTAMPED | {"stamp": None}, "has no stamp"),
        (UNSTAMPED | {"stamp": {"hardware": "a machine"}}, "the stamp has no field"),
        ([], "has no stamp"),
        (bench_file() | {"stamp": stamp(device="cuda", hardware="NVIDIA H200")}, "this path is for cpu"),
        (bench_file() | {"stamp": stamp(model="molmoe-1b", weights="x")}, "this path is for pocket"),
        (bench_file() | {"fixed": {"knobs": "high/k8/b16", "p50_ms": "fast"}}, "not a finite number"),
        (bench_file() | {"budgets": ["60"]}, "not the layout"),
    ],
)
def test_a_bad_file_is_one_line_that_names_it(
    repository: Path, record: Any, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    put(repository, "benchmarks/results/pocket_cpu.json", record)
    assert main.main(["report", "--repository", str(repository)]) == 2
    printed = capsys.readouterr().err
    assert printed.count("\n") == 1
    assert "benchmarks/results/pocket_cpu.json" in printed
    assert words in printed
    assert not (repository / JSON_FILE).exists()


def test_figures_of_one_gpu_are_not_taken_for_anothers(repository: Path) -> None:
    record = {"rows": [{"name": "vision_c1", "ms_median": 1.3}]}
    of_h200 = stamp(hardware="NVIDIA H200", device="cuda/bfloat16", model="molmoe-1b, random weights")
    put(repository, "benchmarks/results/engine_h200.json", record | {"stamp": of_h200})
    row = rows_of(repository)["vision_c1_first"]
    assert (row["measured"], row["met"], row["hardware"]) == (pytest.approx(1.3), True, "NVIDIA H200")
    of_h100 = of_h200 | {"hardware": "NVIDIA H100 80GB HBM3"}
    put(repository, "benchmarks/results/engine_h200.json", record | {"stamp": of_h100})
    with pytest.raises(
        UserError, match=r"engine_h200\.json: stamped with NVIDIA H100.* this path is for NVIDIA H200"
    ):
        build(repository)


def test_a_pocket_is_known_by_its_weights(repository: Path) -> None:
    put(repository, "benchmarks/results/pocket_cpu.json", bench_file() | {"stamp": stamp(model="elsewhere")})
    assert rows_of(repository)["pocket_latency_native"]["met"] is True


def test_check_says_what_is_out_of_date(repository: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["report", "--repository", str(repository)]
    assert main.main(flags) == 0
    first = [(repository / path).read_bytes() for path in (JSON_FILE, MARKDOWN_FILE)]
    assert main.main(flags) == 0
    assert first == [(repository / path).read_bytes() for path in (JSON_FILE, MARKDOWN_FILE)]
    assert main.main([*flags, "--check"]) == 0
    page = repository / MARKDOWN_FILE
    page.write_text(page.read_text(encoding="utf-8").replace("missed", "met"), encoding="utf-8")
    changed = page.read_bytes()
    with pytest.raises(SystemExit) as ended:
        main.main([*flags, "--check"])
    assert ended.value.code == 1
    assert "docs/results.md: out of date" in capsys.readouterr().err
    assert page.read_bytes() == changed


def test_outside_a_checkout_the_remedy_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main.main(["report", "--repository", str(tmp_path)]) == 2
    said = capsys.readouterr().err
    assert "no folder experiments/controller there" in said
    assert "run this in a checkout" in said
    assert said.count("\n") == 1


@pytest.mark.parametrize("page", PAGES)
def test_the_pages_of_the_experiments_have_the_figures(page: str, repository: Path) -> None:
    """Both languages name the same rows and files, and a figure follows the result file."""
    text, other = ((ROOT / one).read_text(encoding="utf-8") for one in (page, PAGES[1 - PAGES.index(page)]))
    links = re.findall(r"\]\(([^)]+)\)", text)
    assert not [link for link in links if not (ROOT / "experiments" / link).exists()]
    assert re.findall(r"<!--\w+-->.*?<!--/-->", text) == re.findall(r"<!--\w+-->.*?<!--/-->", other)
    assert [f"Exp {n}" in text for n in range(1, 9)] == [True] * 8
    (repository / page).write_text("| <!--pocket_latency_native-->old<!--/--> |", encoding="utf-8")
    assert build(repository)[page] == "| <!--pocket_latency_native-->350 ms ✓<!--/--> |"
    (repository / page).write_text("<!--nothing--><!--/-->", encoding="utf-8")
    with pytest.raises(UserError, match=f"{page}: names the figure nothing"):
        build(repository)


def test_a_sweep_is_summed_up_from_its_rows() -> None:
    pd = pytest.importorskip("pandas")
    stages = ("T_preprocess", "T_vision_encoder", "T_projector", "T_LLM_prefill", "T_LLM_decode", "T_control")
    laps: dict[str, tuple[float, ...]] = dict.fromkeys(stages, (1.0, 1.0)) | {"T_total": (6.0, 6.12)}
    row = {"dataset": "okvqa", "tier": "low", "top_k": 4, "num_blocks": 8, "image_id": "a", "output_tokens": 2}
    timed = row | {"question_id": "1", "accuracy": 1.0, "T_total": 6.0, "T_LLM_decode": 0.0, "repeats": laps}
    plain = row | {"question_id": "2", "accuracy": 0.0, "T_total": None, "T_LLM_decode": None, "repeats": None}
    slower = timed | {"question_id": "3", "T_total": 9.0, "top_k": 6}
    found = sweep_content(pd.DataFrame([timed, slower, plain, plain | {"num_blocks": 16}]))
    assert found["stage_gap"] == pytest.approx(0.12 / 6.12)
    assert (found["settings"], found["questions"], found["timed_settings"]) == (3, 1, 2)
    assert (found["timed_images"], found["repeats"], found["zero_decodes"]) == (1, 2, 2)
    assert found["fastest_ms"] == pytest.approx(6.0)
    empty = sweep_content(pd.DataFrame([plain]))
    assert [empty[name] for name in ("stage_gap", "fastest_ms", "repeats", "zero_decodes")] == [None] * 4


def test_sweeps_of_the_repository_are_read_from_their_folder(tmp_path: Path) -> None:
    pytest.importorskip("pyarrow")
    from tempovlm.lab.core_exp.store import write_rows

    folder = tmp_path / "results" / "core_exp_pocket_cpu"
    write_rows(folder, "okvqa", [], STAMP)
    source = next(t.source for t in TARGETS if t.name == "core_repeats_pocket_cpu")
    with pytest.raises(UserError, match=r"okvqa\.parquet"):
        read_result(tmp_path, source, SHIPPED)
    sweep = ROOT / "results" / "core_exp_pocket_cpu"
    shutil.copy(sweep / "okvqa.parquet", folder)
    with pytest.raises(UserError, match="core_exp_pocket_cpu: no results of text_vqa"):
        read_result(tmp_path, source, SHIPPED)
    shutil.rmtree(folder)
    assert read_result(tmp_path, source, SHIPPED) is None
