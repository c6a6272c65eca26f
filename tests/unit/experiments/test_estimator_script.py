from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from estimator_fakes import GPU, RATES, SPACE, make_rows
from scripts import ROOT, script

import stamps
from preloaded import Preloaded
from tempovlm.core.errors import UserError
from tempovlm.core.files import writing_to
from tempovlm.core.records import SweepRow
from tempovlm.core.stamp import Stamp
from tempovlm.lab.core_exp.store import write_rows
from tempovlm.latency.cores import RooflineCore
from tempovlm.latency.estimator import load_estimator

SCRIPT = "controller/train_latency_estimator"
FEW = ["--num_epochs", "2", "--batch_size", "256", "--hidden_dim", "8", "--device", "cpu"]

STAMP = replace(stamps.STAMP, model="pocket", knob_space=SPACE.fingerprint)


def write_results(folder: Path, rates: RooflineCore = RATES, stamp: Stamp = STAMP, pictures: int = 5) -> Path:
    """Results of the core experiment, as if a roofline had been measured."""
    rows = make_rows(pictures, rates, repeats=3)
    some = []
    for i in range(len(rows)):
        knobs, load, steps = SPACE.settings[int(rows.workload.setting[i])], rows.workload, int(rows.steps[i])
        tiles = int(load.crops[i]) - 1
        vision, projector, prefill, step = rows.ms[i].tolist()
        laps = rows.repeats[i]
        some.append(
            SweepRow(
                dataset="text_vqa",
                split="val",
                question_id=str(rows.images[i]),
                image_id=str(rows.images[i]),
                template="",
                tier=knobs.tier,
                top_k=knobs.top_k,
                num_blocks=knobs.num_blocks,
                tiling=(1, tiles),
                vision_tokens=int(load.vision_tokens[i]),
                text_tokens=int(load.text_tokens[i]),
                output_tokens=steps + 1,
                accuracy=1.0,
                prediction="x",
                T_preprocess=1.0,
                T_vision_encoder=vision,
                T_projector=projector,
                T_LLM_prefill=prefill,
                T_LLM_decode=steps * step,
                T_decode_per_token=step,
                T_total=1 + vision + projector + prefill + steps * step,
                repeats={
                    "T_preprocess": (1.0,) * 3,
                    "T_vision_encoder": tuple(laps[:, 0].tolist()),
                    "T_projector": tuple(laps[:, 1].tolist()),
                    "T_LLM_prefill": tuple(laps[:, 2].tolist()),
                    "T_LLM_decode": tuple((steps * laps[:, 3]).tolist()),
                    "T_total": tuple((1 + laps[:, :3].sum(axis=1) + steps * laps[:, 3]).tolist()),
                },
            )
        )
    write_rows(folder, "text_vqa", some, stamp)
    return folder


@pytest.fixture(autouse=True)
def _equally_fast(monkeypatch: pytest.MonkeyPatch) -> None:
    """The winner hangs on errors, not on how fast this machine predicts; few trees are soon grown."""
    monkeypatch.setattr("tempovlm.lab.exp1_estimator.baselines.benchmark_ms", lambda *_: 0.1)
    monkeypatch.setattr("tempovlm.lab.exp1_estimator.baselines.TREES", 5)


@pytest.fixture(scope="module")
def few(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Results of three pictures."""
    return write_results(tmp_path_factory.mktemp("few"), pictures=3)


def words(out: Path, *results: Path) -> list[str]:
    folders = [str(folder) for folder in results]
    return ["--results_dir", *folders, "--dataset_names", "text_vqa", "--output_dir", str(out), *FEW]


@pytest.mark.usefixtures("no_ink")
def test_train_choose_move_and_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    here = write_results(tmp_path / "cpu")
    there = write_results(tmp_path / "gpu", GPU, replace(STAMP, hardware="another", device="cuda/bfloat16"))
    out = tmp_path / "out"
    script(SCRIPT).main([*words(out, here), "--transfer_results_dir", str(there)])
    printed = capsys.readouterr().out
    assert "test MAE, R²" in printed
    estimator = load_estimator(out / "best_latency_estimator.pt", SPACE)
    report = json.loads((out / "report.json").read_text())
    assert report["winner"] == estimator.name
    assert f"{report['candidates'][estimator.name]['test']['prefill']['mae_ms']:.4f} ms" in printed
    assert estimator.stamp["hardware"] == STAMP.hardware
    assert set(report["candidates"]) == {"mlp", "roofline", "boosting", "nearest"}
    assert report["candidates"][report["winner"]]["test"]["prefill"]["median_ape"] < 0.05
    assert set(report["error_by_setting"]) == {str(knobs) for knobs in SPACE}
    assert [row["measurements"] for row in report["transfer"]["curve"]] == [0, 5, 10, 25, 50]
    rows = make_rows(2, GPU, noise=0.0)
    moved = load_estimator(out / "recalibrated_latency_estimator.pt", SPACE).predict(rows.workload)
    assert np.median(np.abs(moved.stage_ms("prefill") / rows.ms[:, 2] - 1)) < 0.05
    epochs = [json.loads(line) for line in (out / "training_log.jsonl").read_text().splitlines()]
    assert [record["epoch"] for record in epochs] == [1, 2]
    assert {"mae_ms", "rmse_ms", "r2"} <= set(epochs[0]["stages"]["prefill"])
    assert list((out / "tensorboard").iterdir())
    for name in ("predicted_vs_measured", "reliability", "error_by_setting", "transfer"):
        assert (out / f"{name}.png").read_bytes()[:4] == b"\x89PNG"


def test_two_devices_are_not_one(few: Path, tmp_path: Path) -> None:
    other = write_results(tmp_path / "b", pictures=3, stamp=replace(STAMP, hardware="another"))
    with pytest.raises(UserError, match="field hardware of the stamps differs"):
        script(SCRIPT).main(words(tmp_path / "out", few, other))


def test_a_model_of_unknown_sizes(tmp_path: Path) -> None:
    folder = write_results(tmp_path / "a", pictures=3, stamp=replace(STAMP, model="mine"))
    with pytest.raises(UserError, match="give --model_path"):
        script(SCRIPT).main(words(tmp_path / "out", folder))
    script(SCRIPT).main([*words(tmp_path / "out", folder), "--model_path", "pocket", "--max_samples", "200"])
    assert (tmp_path / "out" / "best_latency_estimator.pt").is_file()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--lr", "0"], "--lr 0.0"),
        (["--loss", "l1"], "--loss l1"),
        (["--max_samples", "0"], "--max_samples 0"),
        (["--train_split", "2"], "--train_split 2.0"),
        (["--dataset_names", "vqa9"], "--dataset_names vqa9"),
        (["--dataset_names", "okvqa"], "no results of okvqa"),
        (["--results_dir", "nowhere"], "nowhere: no such results directory"),
        (["--transfer_results_dir", "nowhere"], "nowhere: no such results directory"),
        (["--seed", "-1"], "--seed: -1: must be from 0"),
    ],
)
def test_wrong_flags_are_named(few: Path, tmp_path: Path, flags: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        script(SCRIPT).main([*words(tmp_path / "out", few), *flags])
    assert not (tmp_path / "out").exists(), "told before the training"


def test_a_failure_is_one_line_and_code_two(tmp_path: Path, preloaded: Preloaded) -> None:
    path = ROOT / "experiments" / f"{SCRIPT}.py"
    done = preloaded.run(path, *words(tmp_path, tmp_path / "nowhere"), cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "no such results directory" in done.stderr


def test_two_trainings_in_one_folder_are_not_mixed(few: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with writing_to(out), pytest.raises(UserError, match="another process is writing results there"):
        script(SCRIPT).main(words(out, few))
    assert not list(out.iterdir())
