"""`tempovlm evaluate` from results directories to the report's files, on a small test bed."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from torch import nn

import tiny_model
from sweep_rows import DATASET, SPACE, write_results
from tempovlm.cli import evaluate
from tempovlm.cli.main import COMMANDS, help_text
from tempovlm.control.checkpoint import save_controller
from tempovlm.control.learned.llm_based import LLMBasedController
from tempovlm.control.learned.networks import (
    Knob1PredictorBudgetLanguage,
    Knob2Knob3Predictor,
    SupervisedController,
)
from tempovlm.control.policies import save_tuned
from tempovlm.core.errors import UserError
from tempovlm.core.files import writing_to
from tempovlm.core.knobs import KNOBS
from tempovlm.data.catalog import load_samples
from tempovlm.data.digest import question_digests
from tempovlm.lab.core_exp.questions import MANIFEST, keep_questions
from tempovlm.model.weights import weights_hash
from tempovlm.testbed.make import make_testbed


@pytest.fixture(scope="module")
def bed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data set of a few pictures."""
    return make_testbed(tmp_path_factory.mktemp("bed") / "bed", 6, 8, seed=1, progress=False)


@pytest.fixture(scope="module")
def results(tiny_folder: Path, bed: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Training, judged and twin results of the tiny model."""
    root, hashed = tmp_path_factory.mktemp("results"), weights_hash(tiny_folder)
    return {
        "train": write_results(root / "train", bed, "train", hashed),
        "val": write_results(root / "val", bed, "val", hashed, seed=1),
        "twin": write_results(root / "twin", bed, "val", hashed, measured=False, seed=2),
    }


def words(folder: Path, results: dict[str, Path], out: Path, *more: str) -> list[str]:
    base = ["--results_dir", str(results["val"]), "--train_results_dir", str(results["train"])]
    return [*base, "--model", str(folder), "--output_dir", str(out), "--draws", "50", *more]


EXPORT = ("--export", "csv", "latex", "pdf")


def judged(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "judge.json").read_text())
    return found


@pytest.mark.usefixtures("no_figures")
def test_a_table_of_own_questions_is_judged(
    tiny_folder: Path, results: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TEMPOVLM_CACHE_DIR", str(tmp_path / "cache"))
    flags = words(tiny_folder, results, tmp_path / "out", "--policies", "table:my", "fixed", "--budgets", "30")
    with pytest.raises(UserError, match="policy='table:my': this model was not tuned on such questions"):
        evaluate.main(flags)
    space = tiny_model.SPACE
    settings = [{**{name: getattr(one, name) for name in KNOBS}, "accuracy": 0.5} for one in space]
    about = {"weights": weights_hash(tiny_folder), "knob_space": space.fingerprint}
    save_tuned({"name": "my", "digest": "0" * 12, **about, "settings": settings})
    evaluate.main(flags)
    assert list(judged(tmp_path / "out")["policies"]) == ["table:my", "fixed"]


def test_all_baselines_are_judged_and_every_file_is_written(
    tiny_folder: Path, bed: Path, results: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    twin = ["--twin_results_dir", str(results["twin"]), "--data_dir", str(bed), "--budgets", "40", "20", "30"]
    evaluate.main(
        words(tiny_folder, results, tmp_path, *twin, "--policies", *evaluate.BASELINE_DEFAULTS, "oracle", *EXPORT)
    )
    report = judged(tmp_path)
    assert report["budgets_ms"] == pytest.approx([20.0, 30.0, 40.0])
    assert list(report["policies"]) == [*evaluate.BASELINE_DEFAULTS, "oracle"]
    assert report["reference"]["name"] == "twin pick"
    assert report["data_source"] == "synthetic"
    assert report["stamp"]["weights"] == report["weights"] == weights_hash(tiny_folder)
    assert list(report["shuffled"]) == ["knn", "linucb"]
    assert set(report["ablation"]) == {report["subject"], "table"}
    assert report["latency"]["scored_by"].startswith("measured")
    assert set(report["provenance"]["stamps"]) == {"judged", "train", "twin"}
    questions = report["num_questions"]
    rows = pd.read_parquet(tmp_path / "judge.parquet")
    assert len(rows) == len(report["policies"]) * 3 * questions
    part = rows[(rows["policy"] == "oracle") & np.isclose(rows["budget_ms"], 40.0)]
    oracle = report["policies"]["oracle"]["by_budget"][-1]
    assert part["accuracy"].mean() == pytest.approx(oracle["accuracy"]["value"])
    assert part["latency_ms"].mean() == pytest.approx(oracle["mean_latency_ms"])
    assert part["measured_ms"].max() <= 40.0
    page = (tmp_path / "judge.html").read_text()
    assert "http" not in page.replace("http://www.w3.org/2000/svg", "")
    best = max(
        set(report["policies"]) - {"oracle"}, key=lambda one: report["policies"][one]["against_mixture"]["value"]
    )
    assert report["subject"] == best
    assert report["names"]["knn"] == "k nearest neighbours"
    assert {"frontier.svg", "gain.svg"} <= {path.name for path in tmp_path.iterdir()}
    assert list(report["by_dataset"]) == [DATASET]
    assert len(report["by_dataset"][DATASET]["policies"]["knn"]) == 3
    gains = [row["against_mixture"] for row in report["policies"]["knn"]["by_budget"]]
    assert all(0 < gain["p_value"] <= gain["holm_p_value"] <= 1 for gain in gains)
    exported = pd.read_csv(tmp_path / "judge_by_budget.csv")
    whole = exported[(exported["policy"] == "k nearest neighbours") & (exported["dataset"] == "all")]
    assert whole["gain"].tolist() == pytest.approx([gain["value"] for gain in gains], abs=1e-6)
    assert whole["gain_low"].tolist() == pytest.approx([gain["interval"][0] for gain in gains], abs=1e-6)
    assert len(exported) == 3 * (2 * len(report["policies"]) + 1)
    overall = pd.read_csv(tmp_path / "judge_overall.csv")
    assert len(overall) == len(report["policies"]) + 2
    for name in ("judge_by_budget", "judge_overall"):
        rows = (tmp_path / f"{name}.tex").read_text().partition("\\midrule\n")[2].partition("\n\\bottomrule")[0]
        assert "k nearest neighbours" in rows
        assert len({line.count("&") for line in rows.splitlines()}) == 1
    for name in ("frontier", "gain"):
        assert (tmp_path / f"{name}.pdf").read_bytes().startswith(b"%PDF")
    captured = capsys.readouterr()
    assert "judge_overall.tex" in "".join(captured.err.split())
    printed = captured.out
    assert "best static mixture" in printed
    assert "above at, ms" in printed


def networks(kind: str) -> dict[str, nn.Module]:
    """Untrained networks of a kind, for the tiny model."""
    width, heads = tiny_model.CONFIG.width, (len(SPACE.top_ks), len(SPACE.block_counts))
    if kind == "supervised":
        return {"controller": SupervisedController(16, len(SPACE.tiers), *heads)}
    if kind == "llm_based":
        sizes = {"num_top_ks": heads[0], "num_block_counts": heads[1]}
        return {"controller": LLMBasedController(width, 16, num_blocks=1, num_tiers=len(SPACE.tiers), **sizes)}
    return {
        "knob1": Knob1PredictorBudgetLanguage(width, 16, len(SPACE.tiers)),
        "knob2knob3": Knob2Knob3Predictor(2 * width, width, 16, *heads, len(SPACE.tiers)),
    }


@pytest.mark.parametrize("kind", ["supervised", "two_stage", "llm_based"])
@pytest.mark.usefixtures("no_ink")
def test_a_checkpoint_is_judged_and_is_what_the_headline_is_about(
    kind: str,
    tiny_folder: Path,
    bed: Path,
    results: dict[str, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = tmp_path / "kept" / "best.pt"
    save_controller(path, kind=kind, networks=networks(kind), space=SPACE)
    more = [
        "--policies",
        "table",
        str(path),
        "--data_dir",
        str(bed),
        "--subject",
        str(path),
        "--shuffles",
        "1",
        "--json",
        "--device",
        "cpu",
    ]
    evaluate.main(words(tiny_folder, results, tmp_path / "out", *more))
    printed = capsys.readouterr()
    report = json.loads(printed.out)
    assert report["subject"] == str(path)
    assert len(report["budgets_ms"]) == 6
    rows = report["policies"][str(path)]["by_budget"]
    assert all(row["adherence"] == pytest.approx(1.0) for row in rows if row["fallback_rate"] < 1e-9)
    own_ms = report["policies"][str(path)]["control_ms"]
    assert own_ms > 0
    assert report["policies"]["table"]["control_ms"] == pytest.approx(0)
    assert list(report["ablation"]) == [str(path), "table"]
    assert list(report["shuffled"]) == [str(path)]
    assert report["reference"]["name"] == "hindsight oracle"
    name = {"supervised": "supervised", "two_stage": "two-stage", "llm_based": "LLM-based"}[kind]
    assert report["names"] == {"table": "table", str(path): name}
    assert name in printed.err
    assert "best.pt" not in printed.err


@pytest.mark.usefixtures("no_figures")
def test_a_controllers_own_time_is_part_of_its_latency(
    tiny_folder: Path, bed: Path, results: dict[str, Path], tmp_path: Path
) -> None:
    path = tmp_path / "best.pt"
    save_controller(path, kind="supervised", networks=networks("supervised"), space=SPACE)
    more = ["--policies", str(path), "--data_dir", str(bed), "--shuffles", "0", "--budgets", "60", "16"]
    taken = []
    for control_ms in ("0", "4"):
        evaluate.main(words(tiny_folder, results, tmp_path / "out", *more, "--control_ms", control_ms))
        taken.append(judged(tmp_path / "out")["policies"][str(path)]["by_budget"])
    (tight, loose), (tight_charged, loose_charged) = taken
    assert loose_charged["mean_latency_ms"] == pytest.approx(loose["mean_latency_ms"] + 4)
    assert (tight["fallback_rate"], tight_charged["fallback_rate"]) == pytest.approx((0.0, 1.0))


@pytest.mark.usefixtures("no_figures")
def test_a_table_needs_no_data(tiny_folder: Path, results: dict[str, Path], tmp_path: Path) -> None:
    evaluate.main(
        words(tiny_folder, results, tmp_path, "--policies", "table", "--data_dir", str(tmp_path / "none"))
    )
    assert judged(tmp_path)["shuffled"] == {}


@pytest.mark.parametrize(
    ("more", "named"),
    [
        (["--policies", "magic"], "--policies magic"),
        (["--policies", "absent.pt"], "absent.pt: no such file"),
        (["--policies", "table", "--budgets", "0"], "--budgets 0.0"),
        (["--policies", "table", "--budgets", "soon"], "--budgets soon"),
        (["--policies", "table", "--level", "1"], "--level 1"),
        (["--policies", "table", "--control_ms", "-1"], "--control_ms -1"),
        (["--policies", "table", "--shuffles", "-1"], "--shuffles -1"),
        (["--policies", "table", "--seed", "-1"], "--seed -1"),
        (["--policies", "table", "--output_dir", "/proc"], "--output_dir /proc: cannot be written to"),
        (["--policies", "table", "--time_price", "-1"], "--time_price -1"),
        (["--policies", "table", "--ablate", "knn"], "--ablate knn"),
        (["--policies", "table", "--subject", "knn"], "--subject knn: is not among --policies"),
        (["--policies", "table", "--dataset_names", "imagenet"], "imagenet: unknown data set"),
        (["--policies", "table", "--latency_estimator_path", "absent.pt"], "absent.pt: no such file"),
        (["--policies", "table", "--results_dir", "absent"], "absent: no such results directory"),
        (["--policies", "table", "--model", "absent"], "--model absent"),
    ],
)
def test_bad_input_is_one_line_that_names_it(
    tiny_folder: Path, results: dict[str, Path], tmp_path: Path, more: Sequence[str], named: str
) -> None:
    with pytest.raises(UserError) as refused:
        evaluate.main(words(tiny_folder, results, tmp_path, *more))
    assert named in refused.value.flagged


def test_without_training_questions_it_says_which_flag_is_missing(
    tiny_folder: Path, results: dict[str, Path], tmp_path: Path
) -> None:
    base = ["--results_dir", str(results["val"]), "--model", str(tiny_folder), "--output_dir", str(tmp_path)]
    with pytest.raises(UserError, match="--train_results_dir: needed"):
        evaluate.main([*base, "--policies", "table"])


def test_other_data_than_that_of_the_results_is_named(
    tiny_folder: Path, results: dict[str, Path], tmp_path: Path
) -> None:
    other = make_testbed(tmp_path / "other", 1, 1, seed=9, progress=False, datasets=(DATASET,))
    with pytest.raises(UserError, match=r"--data_dir: question .* data make --output_dir DIR"):
        evaluate.main(words(tiny_folder, results, tmp_path, "--policies", "knn", "--data_dir", str(other)))


@pytest.mark.usefixtures("no_figures")
def test_results_of_another_model_are_refused(
    tiny_folder: Path, bed: Path, results: dict[str, Path], tmp_path: Path
) -> None:
    other = {name: write_results(tmp_path / name, bed, name) for name in ("train", "val")}
    mixed = {**results, "train": other["train"]}
    with pytest.raises(UserError, match="field weights of the stamps differs"):
        evaluate.main(words(tiny_folder, mixed, tmp_path / "out", "--policies", "table"))
    path = tmp_path / "best.pt"
    save_controller(path, kind="supervised", networks=networks("supervised"), space=SPACE)
    with pytest.raises(UserError, match="name the model that was measured"):
        evaluate.main(words(tiny_folder, other, tmp_path / "out", "--policies", str(path), "--data_dir", str(bed)))
    evaluate.main(words(tiny_folder, other, tmp_path / "out", "--policies", "table"))


FEW = SPACE.subset({"tier": ["low", "high"], "top_k": [3, 4], "num_blocks": [4, 6]})
AXES = {"tier": ["low", "high"], "top_k": [3, 4], "num_blocks": [4, 6]}


def only(axes: dict[str, Any]) -> dict[str, Any]:
    return {name: values for name, values in axes.items() if name != "fingerprint"}


@pytest.mark.filterwarnings("error:The given NumPy array is not writable")
@pytest.mark.usefixtures("no_figures")
def test_results_of_a_subset_are_judged_on_it(
    tiny_folder: Path, bed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hashed = weights_hash(tiny_folder)
    few = {
        name: write_results(tmp_path / name, bed, name, hashed, seed=seed, space=FEW)
        for seed, name in enumerate(("train", "val"))
    }
    path = tmp_path / "best.pt"
    save_controller(path, kind="two_stage", networks=networks("two_stage"), space=SPACE)
    more = ["--policies", "table", "only_tier", "knn", str(path), "--data_dir", str(bed), "--device", "cpu"]
    more += ["--shuffles", "0"]
    evaluate.main(words(tiny_folder, few, tmp_path / "out", *more, "--save_policies", str(tmp_path / "kept")))
    report = judged(tmp_path / "out")
    assert only(report["knob_space"]) == AXES
    printed = capsys.readouterr()
    assert "judged on 8 of the model's 60 settings: tier low, high; " in printed.err
    assert not re.search(r"[+-]0\.0( |$)", printed.out, re.MULTILINE), "a zero has no sign"
    legal = {str(knobs) for knobs in FEW}
    chosen = {name for one in report["policies"].values() for row in one["by_budget"] for name in row["knobs"]}
    assert chosen <= legal
    assert len(report["static"]["settings"]) == 8
    more = [*more[5:], "--policies", str(tmp_path / "kept" / "knn.pt"), "--control_ms", "0"]
    evaluate.main(words(tiny_folder, few, tmp_path / "again", *more))
    again = judged(tmp_path / "again")["policies"].popitem()[1]["area"]["value"]
    assert again == pytest.approx(report["policies"]["knn"]["area"]["value"]), "fitted on the subset"
    with pytest.raises(UserError, match="tier='medium': not in all of the results; choose from low, high"):
        evaluate.main(words(tiny_folder, few, tmp_path / "out", "--tiers", "low", "medium", "high"))
    with pytest.raises(UserError, match="tier='huge': not in the knob space"):
        evaluate.main(words(tiny_folder, few, tmp_path / "out", "--tiers", "huge"))


@pytest.mark.usefixtures("no_figures")
def test_flags_judge_whole_results_on_a_subset(
    tiny_folder: Path, bed: Path, results: dict[str, Path], tmp_path: Path
) -> None:
    flags = ["--tiers", "low", "high", "--top_k", "3", "4", "--num_blocks", "4", "6"]
    more = ["--policies", "table", "best_static", "fixed", "--budgets", "20", "40", *flags]
    evaluate.main(words(tiny_folder, results, tmp_path / "flags", *more))
    report = judged(tmp_path / "flags")
    assert only(report["knob_space"]) == AXES
    hashed = weights_hash(tiny_folder)
    few = dict(results)
    for name, seed in (("train", 0), ("val", 1)):
        few[name] = tmp_path / name
        frame = pd.read_parquet(results[name] / f"{DATASET}.parquet")
        assert len(frame) % len(SPACE) == 0
        write_results(few[name], bed, name, hashed, seed=seed, space=FEW)
    evaluate.main(words(tiny_folder, few, tmp_path / "few", *more[: -len(flags)]))
    same = ("num_questions", "budgets_ms", "knob_space")
    assert {name: report[name] for name in same} == {name: judged(tmp_path / "few")[name] for name in same}


@pytest.mark.usefixtures("no_figures")
def test_a_ranking_must_be_that_of_the_results(
    tiny_folder: Path, results: dict[str, Path], tmp_path: Path
) -> None:
    own, other = tmp_path / "own.json", tmp_path / "other.json"
    own.write_text("[0, 5, 2, 3, 1, 4]")
    other.write_text("[0, 5, 4, 3, 2, 1]")
    marked = {}
    for name in ("train", "val"):
        marked[name] = Path(shutil.copytree(results[name], tmp_path / name))
        (marked[name] / MANIFEST).write_text(json.dumps({"ranking": json.loads(own.read_text())}))
    more = ["--policies", "table", "--ranking"]
    evaluate.main(words(tiny_folder, marked, tmp_path / "out", *more, str(own)))
    with pytest.raises(UserError, match=rf"{MANIFEST}: field ranking is not that of .*other\.json"):
        evaluate.main(words(tiny_folder, marked, tmp_path / "out", *more, str(other)))


POLICY = """
import numpy as np
from tempovlm.control.policy import Policy

class FewBlocks(Policy):
    name = "few_blocks"

    def __init__(self, space):
        self.scores = np.array([-knobs.num_blocks for knobs in space])

    def look(self, question, left_ms):
        return self.scores

class Wrong(FewBlocks):
    def look(self, question, left_ms):
        return self.scores[:3]

class Nan(FewBlocks):
    def look(self, question, left_ms):
        return self.scores * np.nan
"""


@pytest.mark.usefixtures("no_figures")
def test_a_policy_of_ones_own_is_judged(
    tiny_folder: Path, bed: Path, results: dict[str, Path], tmp_path: Path
) -> None:
    path = tmp_path / "mine.py"
    path.write_text(POLICY)
    name = f"{path}:FewBlocks"
    more = ["--data_dir", str(bed), "--shuffles", "1", "--tiers", "low", "high"]
    evaluate.main(words(tiny_folder, results, tmp_path / "out", *more, "--policies", "table", name))
    report = judged(tmp_path / "out")
    assert list(report["shuffled"]) == [name]
    rows = report["policies"][name]["by_budget"]
    assert {knobs.rpartition("/")[2] for row in rows for knobs in row["knobs"]} == {"b3"}
    for wrong, named in (
        ("Wrong", r"policy Wrong: scored an array of shape \(3,\); expected numbers of shape \(40,\)"),
        ("Nan", r"policy Nan: scored NaN for low/k2/b3; expected numbers of shape \(40,\)"),
        ("Absent", r"--policy .*mine\.py:Absent: there is no such class"),
        ("np", r"--policy .*mine\.py:np: not a subclass of tempovlm\.control\.policy\.Policy"),
    ):
        with pytest.raises(UserError, match=named):
            evaluate.main(words(tiny_folder, results, tmp_path, *more, "--policies", f"{path}:{wrong}"))


def test_the_command_is_listed() -> None:
    assert "evaluate" in COMMANDS
    assert "evaluate" in help_text()


def test_two_runs_in_one_folder_are_not_mixed(tiny_folder: Path, results: dict[str, Path], tmp_path: Path) -> None:
    with writing_to(tmp_path), pytest.raises(UserError, match="another process is writing results there"):
        evaluate.main(words(tiny_folder, results, tmp_path))
    assert not list(tmp_path.iterdir())


@pytest.mark.usefixtures("no_figures")
def test_data_that_is_other_under_the_same_ids_is_named(
    tiny_folder: Path, bed: Path, results: dict[str, Path], tmp_path: Path
) -> None:
    own = dict(results, val=tmp_path / "val")
    shutil.copytree(results["val"], own["val"])
    (own["val"] / MANIFEST).write_text(json.dumps({"conditions": {"split": "val"}}))
    datasets = sorted(path.stem for path in own["val"].glob("*.parquet"))
    digests = {name: question_digests(load_samples(name, data_dir=bed)) for name in datasets}
    keep_questions(own["val"], {}, digests)
    given = words(tiny_folder, own, tmp_path / "out", "--policies", "knn", "--shuffles", "0")
    evaluate.main([*given, "--data_dir", str(bed)])
    other = shutil.copytree(bed, tmp_path / "other")
    for path in (other / datasets[0]).rglob("*"):
        if path.suffix in (".jpg", ".png"):
            path.write_bytes(path.read_bytes() + b"another")
    with pytest.raises(UserError, match=rf"sweep\.json: {datasets[0]}: the picture of question .* has changed"):
        evaluate.main([*given, "--data_dir", str(other)])
