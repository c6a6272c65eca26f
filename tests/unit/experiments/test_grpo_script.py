from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from scripts import ROOT, script

import stamps
import sweep_rows
import tempovlm
from preloaded import Preloaded
from tempovlm.control.checkpoint import load_controller
from tempovlm.core.errors import UserError
from tempovlm.core.files import writing_to
from tempovlm.core.knobs import KnobSpace
from tempovlm.data.catalog import load_samples
from tempovlm.lab.core_exp.store import write_rows
from tempovlm.lab.options import GrpoOptions
from tempovlm.lab.script import options_from
from tempovlm.model.config import POCKET
from tempovlm.testbed.make import make_testbed

SCRIPT = "controller/train_controller_v2"
SPACE = KnobSpace.for_model(POCKET.shape)
TIMES_MS = {
    "T_preprocess": 1.0, "T_vision_encoder": 2.0, "T_projector": 1.0,
    "T_LLM_prefill": 5.0, "T_LLM_decode": 1.0, "T_decode_per_token": 1.0,
}  # fmt: skip
FEW = ["--num_epochs", "2", "--hidden_dim", "8", "--device", "cpu", "--latency_source", "measured"]


@pytest.fixture(scope="module")
def bed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_testbed(
        tmp_path_factory.mktemp("beds") / "bed", 4, 1, seed=1, progress=False, datasets=("okvqa",), workers=1
    )


@pytest.fixture(scope="module")
def results(bed: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Made-up answers of the pocket."""
    weights_hash = tempovlm.load("pocket", device="cpu", calibrate=False, warmup=False).weights_hash
    rng, rows = np.random.default_rng(0), []
    for sample in load_samples("okvqa", "train", data_dir=bed):
        for i, knobs in enumerate(SPACE):
            rows.append(
                sweep_rows.answered(sample, knobs, float(rng.random() < i / 75), **TIMES_MS, T_total=10.0 + i)
            )
    folder = tmp_path_factory.mktemp("results")
    stamp = replace(stamps.STAMP, model="pocket", weights=weights_hash, knob_space=SPACE.fingerprint)
    write_rows(folder, "okvqa", rows, stamp)
    return folder


def words(bed: Path, results: Path, out: Path, *more: str) -> list[str]:
    base = ["--results_dir", str(results), "--dataset_names", "okvqa", "--model_path", "pocket"]
    return [*base, "--data_dir", str(bed), "--output_dir", str(out), *FEW, *more]


def test_two_stages_and_two_seeds(
    bed: Path, results: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    script(SCRIPT).main(words(bed, results, tmp_path, "--seeds", "1", "2", "--group_size", "3"))
    printed = capsys.readouterr().out
    assert "seed" in printed
    assert "validation reward: untrained" in printed
    assert printed.endswith(f"{tmp_path / 'best_controller.pt'}\n")
    assert load_controller(tmp_path / "best_controller.pt", SPACE).kind == "two_stage"
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["options"]["num_generations"] == 3
    assert [row["seed"] for row in report["seeds"]["runs"]] == [1, 2]


def test_the_llm_based_one(bed: Path, results: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    script(SCRIPT).main(words(bed, results, tmp_path, "--architecture", "llm_based", "--num_llm_blocks", "1"))
    assert "own time" in capsys.readouterr().out
    assert load_controller(tmp_path / "best_controller.pt", SPACE).kind == "llm_based"


def test_the_seed_documents_defaults() -> None:
    given = ["--results_dir", "r", "--dataset_names", "d", "--model_path", "m", "--output_dir", "o"]
    args = script(SCRIPT).flags().parse_args(given)
    grpo = options_from(GrpoOptions, {**vars(args), "device": "cpu"})
    assert grpo == GrpoOptions(batch_size=64)
    assert (grpo.num_generations, grpo.alpha, grpo.penalty) == pytest.approx((5, 1.0, 0.5))
    assert (grpo.num_epochs, grpo.lr, grpo.seed) == pytest.approx((100, 1e-4, 42))
    assert args.train_split == pytest.approx(0.8)
    assert (grpo.regression_epochs, grpo.warm_start_values) == (30, "smoothed")
    assert not grpo.time_price
    assert args.latency_estimator_path == Path("checkpoints/latency_estimator/best_latency_estimator.pt")


def test_help_says_that_the_loss_type_does_not_scale(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        script(SCRIPT).flags().parse_args(["--help"])
    told = " ".join(capsys.readouterr().out.split())
    assert "both divide rewards as --scale_rewards says" in told
    assert "weight of KL(policy || start)" in told


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--group_size", "1"], "--group_size 1"),
        (["--scale_rewards", "std"], "--scale_rewards std: choose from group, batch, none"),
        (["--loss_type", "cispo"], "--loss_type cispo: choose from grpo, dr_grpo"),
        (["--architecture", "mlp"], "--architecture mlp"),
        (["--estimator_only"], "--estimator_only"),
        (["--environment", "queue"], "--arrivals: the queue needs a trace"),
        (
            ["--environment", "queue", "--arrivals", "poisson", "--warm_start", "0"],
            "--warm_start 0: a queue's policy",
        ),
        (["--dataset_names", "vqa9"], "--dataset_names vqa9"),
        (["--latency_source", "estimator", "--latency_estimator_path", "none.pt"], "none.pt: no such file"),
        (["--results_dir", "nowhere"], "nowhere: no such results directory"),
        (["--seeds", "1", "-1"], "--seeds: -1: must be from 0"),
    ],
)
def test_wrong_flags_are_named(bed: Path, results: Path, tmp_path: Path, flags: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        script(SCRIPT).main(words(bed, results, tmp_path, *flags))


@pytest.mark.usefixtures("results")  # which load the pocket: nothing is left to say of its kernels
def test_a_failure_is_one_line_and_code_two(tmp_path: Path, preloaded: Preloaded) -> None:
    path = ROOT / "experiments" / f"{SCRIPT}.py"
    done = preloaded.run(path, *words(tmp_path, tmp_path / "nowhere", tmp_path), cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "no such results directory" in done.stderr


def test_two_trainings_in_one_folder_are_not_mixed(bed: Path, results: Path, tmp_path: Path) -> None:
    with writing_to(tmp_path), pytest.raises(UserError, match="another process is writing results there"):
        script(SCRIPT).main(words(bed, results, tmp_path))
    assert not list(tmp_path.iterdir())
