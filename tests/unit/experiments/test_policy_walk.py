"""Every policy that can be judged can be served: each kind through `answer`, `bench`, `evaluate` and Exp 8."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scripts import script

import tiny_model
from sweep_rows import DATASET, SPACE, write_results
from tempovlm.cli import answer, bench, evaluate
from tempovlm.cli.main import main
from tempovlm.control.baselines import NUM_FEATURES, LinUCB, NearestNeighbours
from tempovlm.control.checkpoint import PARTS, save_controller
from tempovlm.control.learned.llm_based import LLMBasedController
from tempovlm.control.learned.networks import (
    AccuracyNetwork,
    Knob1PredictorBudgetLanguage,
    Knob2Knob3Predictor,
    SeenAccuracyNetwork,
    SupervisedController,
)
from tempovlm.core.errors import PolicyError, UserError
from tempovlm.core.knobs import KnobConfig
from tempovlm.model.weights import weights_hash
from timings import Ticks

NAMES = ("table", "fixed")
OWN = """
import numpy as np
from tempovlm.control.policy import Policy

class Cheap(Policy):
    name = "own"

    def __init__(self, space):
        self.space = space

    def look(self, question, left_ms):
        return -np.arange(len(self.space))

class Short(Cheap):
    def look(self, question, left_ms):
        return [1.0]
"""
PREDICTING = ("nearest_neighbours", "linucb", "value", "seen_value")


@pytest.fixture(autouse=True)
def _any_machine(ticks: Ticks, monkeypatch: pytest.MonkeyPatch) -> None:
    del ticks
    monkeypatch.setattr("tempovlm.engine.calibration.stored_profile", lambda *_: tiny_model.make_profile())


@pytest.fixture(scope="module")
def results(tiny_folder: Path, small_bed: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The flags of `evaluate` that name training and judged results of the tiny model."""
    root, hashed = tmp_path_factory.mktemp("results"), weights_hash(tiny_folder)
    train, val = (write_results(root / split, small_bed, split, hashed) for split in ("train", "val"))
    return ["--results_dir", str(val), "--train_results_dir", str(train), "--data_dir", str(small_bed)]


def parts(kind: str) -> dict[str, Any]:
    torch.manual_seed(0)
    width, heads = tiny_model.CONFIG.width, (len(SPACE.top_ks), len(SPACE.block_counts))
    sizes = {"num_top_ks": heads[0], "num_block_counts": heads[1]}
    rng = np.random.default_rng(0)
    features, accuracy = rng.random((40, NUM_FEATURES)), rng.random((40, len(SPACE)))
    cost_ms = np.array([tiny_model.nominal_ms(SPACE, i) for i in range(len(SPACE))])
    made: dict[str, Any] = {
        "controller": LLMBasedController(width, 16, num_blocks=1, **sizes)
        if kind == "llm_based"
        else SupervisedController(16, **sizes),
        "accuracy": AccuracyNetwork(width, 16, num_settings=len(SPACE)),
        "seen": SeenAccuracyNetwork(width, 2 * width, 16, **sizes),
        "knob1": Knob1PredictorBudgetLanguage(width, 16),
        "knob2knob3": Knob2Knob3Predictor(2 * width, width, 16, **sizes),
        "scorer": NearestNeighbours.fit(features, accuracy, [f"p{i}" for i in range(40)])
        if kind == "nearest_neighbours"
        else LinUCB.fit(SPACE, features, accuracy, np.tile(cost_ms, (40, 1)), rounds=1),
    }
    return {name: made[name] for name in PARTS[kind]}


def policy(kind: str, folder: Path) -> str:
    """What `--policy` takes."""
    if kind in NAMES:
        return kind
    if kind == "own":
        (folder / "mine.py").write_text(OWN)
        return f"{folder / 'mine.py'}:Cheap"
    path = folder / f"{kind}.pt"
    save_controller(path, kind=kind, networks=parts(kind), space=SPACE)
    return str(path)


@pytest.mark.usefixtures("no_figures")
@pytest.mark.parametrize("kind", [*NAMES, "own", *PARTS])
def test_every_policy_is_served_and_judged(
    kind: str,
    tiny_folder: Path,
    small_bed: Path,
    results: list[str],
    picture_file: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    name, out = policy(kind, tmp_path), tmp_path / "out"
    model = ["--model", str(tiny_folder), "--device", "cpu"]

    answer.main([str(picture_file), "what?", "--budget_ms", "40", "--policy", name, *model, "--json"])
    served = json.loads(capsys.readouterr().out)
    assert served["policy"] == ("table (assumed)" if kind == "table" else kind), "the tiny model has no card"
    assert served["knobs"]["tier"] in SPACE.tiers

    few = ["--num_samples", "2", "--max_new_tokens", "2", "--budgets", "40", "--data_dir", str(small_bed)]
    bench.main(
        [*few, "--dataset", DATASET, "--policy", name, *model, "--fixed", "none", "--output_dir", str(out / "b")]
    )
    assert json.loads((out / "b" / "bench.json").read_text())["chosen_by"] == [served["policy"]]

    flags = ["--model_path", str(tiny_folder), "--controller_path", name, "--dataset", DATASET, "--device", "cpu"]
    flags += ["--num_samples", "2", "--max_new_tokens", "2", "--latency_budget", "40"]
    script("controller/test_adaptive_inference").main(
        [*flags, "--data_dir", str(small_bed), "--output_path", str(out / "exp8.json")]
    )
    assert json.loads((out / "exp8.json").read_text())["records"] == {"file": "exp8.parquet", "count": 2}

    judging = ["--policies", name, "--draws", "5", "--shuffles", "0", "--ablate", "--output_dir", str(out / "e")]
    evaluate.main([*results, *model, *judging])
    assert list(json.loads((out / "e" / "judge.json").read_text())["policies"]) == [name]


@pytest.mark.usefixtures("no_figures")
def test_wrong_scores_end_a_run_at_once(
    tiny_folder: Path, small_bed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name = policy("own", tmp_path).replace("Cheap", "Short")
    told = rf"^policy Short: scored an array of shape \(1,\); expected numbers of shape \({len(SPACE)},\), one for"
    few = ["--num_samples", "2", "--data_dir", str(small_bed), "--dataset", DATASET, "--device", "cpu"]
    with pytest.raises(PolicyError, match=told):
        bench.main([*few, "--policy", name, "--model", str(tiny_folder), "--output_dir", str(tmp_path / "b")])
    more = ["--model_path", str(tiny_folder), "--output_path", str(tmp_path / "exp8.json")]
    with pytest.raises(PolicyError, match=told):
        script("controller/test_adaptive_inference").main([*few, *more, "--policy", name])
    words = ["bench", *few, "--policy", name, "--model", str(tiny_folder), "--output_dir", str(tmp_path / "b")]
    capsys.readouterr()
    assert main(words) == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith("tempovlm: error: policy Short: scored")


@pytest.mark.usefixtures("no_figures")
def test_bench_takes_fewer_settings(
    tiny_folder: Path, small_bed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    profile_of = "tempovlm.engine.calibration.stored_profile"
    monkeypatch.setattr(profile_of, lambda engine, *_: tiny_model.make_profile(engine.space))
    fresh: list[list[str]] = []
    monkeypatch.setattr("tempovlm.lab.bench.bench.measure_fresh", lambda *given: fresh.append(given[-1]) or [])
    few = ["--num_samples", "2", "--max_new_tokens", "2", "--data_dir", str(small_bed), "--dataset", DATASET]
    more = ["--tiers", "low", "medium", "--num_blocks", "4", "--budgets", "20", "1000", "--fresh_processes", "1"]
    model = ["--model", str(tiny_folder), "--device", "cpu", "--output_dir", str(tmp_path / "out")]
    bench.main([*few, *more, *model, "--policy", policy("supervised", tmp_path)])
    result = json.loads((tmp_path / "out" / "bench.json").read_text())
    assert result["knob_space"] == {"tier": ["low", "medium"], "top_k": [*SPACE.top_ks], "num_blocks": [4]}
    chosen = {name for row in result["budgets"] for name in row["knobs"]}
    assert all(name.startswith(("low/", "medium/")) and name.endswith("/b4") for name in chosen)
    assert result["chosen_by"] == ["supervised"], "a controller of all settings"
    assert fresh[0][-5:] == ["--tier", "low", "medium", "--num_blocks", "4"]


@pytest.mark.usefixtures("no_figures")
def test_what_evaluate_fitted_is_what_it_judges_from_its_file(
    tiny_folder: Path, results: list[str], tmp_path: Path
) -> None:
    few = [*results, "--model", str(tiny_folder), "--device", "cpu", "--draws", "5", "--shuffles", "0", "--ablate"]
    kept = tmp_path / "kept"
    fitting = ["--policies", "knn", "linucb", "--save_policies", str(kept), "--output_dir", str(tmp_path / "a")]
    evaluate.main([*few, *fitting])
    files = [str(kept / f"{name}.pt") for name in ("knn", "linucb")]
    evaluate.main([*few, "--control_ms", "0", "--policies", *files, "--output_dir", str(tmp_path / "b")])
    fitted, read = (json.loads((tmp_path / one / "judge.json").read_text())["policies"] for one in "ab")
    for name, path in zip(("knn", "linucb"), files, strict=True):
        for mine, theirs in zip(fitted[name]["by_budget"], read[path]["by_budget"], strict=True):
            assert mine["accuracy"]["value"] == pytest.approx(theirs["accuracy"]["value"])
            assert mine["mean_latency_ms"] == pytest.approx(theirs["mean_latency_ms"])


@pytest.mark.parametrize("kind", ["table", *PREDICTING])
def test_a_price_buys_cheaper_settings(
    kind: str, tiny_folder: Path, picture_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [str(picture_file), "what?", "--budget_ms", "1000", "--model", str(tiny_folder), "--json"]
    words += ["--policy", policy(kind, tmp_path), "--device", "cpu", "--price_per_ms"]
    totals_ms = []
    for price in ("0", "1"):
        answer.main([*words, price])
        knobs = json.loads(capsys.readouterr().out)["knobs"]
        totals_ms.append(tiny_model.nominal_ms(SPACE, SPACE.index(KnobConfig(**knobs))))
    assert totals_ms[1] < totals_ms[0]


@pytest.mark.parametrize("kind", ["supervised", "two_stage", "llm_based"])
def test_logits_have_no_price(
    kind: str, tiny_folder: Path, picture_file: Path, small_bed: Path, tmp_path: Path
) -> None:
    name = policy(kind, tmp_path)
    model = ["--model", str(tiny_folder), "--device", "cpu", "--policy", name, "--price_per_ms", "0.001"]
    with pytest.raises(UserError, match=f"price_per_ms=0.001: policy {kind} scores settings by logits"):
        answer.main([str(picture_file), "what?", "--budget_ms", "1000", *model])
    with pytest.raises(UserError, match=r"price_per_ms=0.001"):
        bench.main(
            ["--num_samples", "2", "--data_dir", str(small_bed), *model, "--output_dir", str(tmp_path / "b")]
        )


def test_a_price_needs_a_budget(picture_file: Path) -> None:
    with pytest.raises(UserError, match=r"--price_per_ms 0.001: needs a budget; give --budget_ms too"):
        answer.main([str(picture_file), "what?", "--price_per_ms", "0.001"])
    with pytest.raises(UserError, match=r"price_per_ms=-1.0: must be a number from 0 to 1000"):
        answer.main([str(picture_file), "what?", "--budget_ms", "9", "--price_per_ms", "-1"])
