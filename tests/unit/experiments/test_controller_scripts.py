"""Two-epoch runs of the scripts of Exp 2 and 3 on the tiny model, and what they say to wrong input."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from scripts import ROOT, script

import stamps
import sweep_rows
import tiny_model
from preloaded import Preloaded
from tempovlm.api import TempoVLM
from tempovlm.control.checkpoint import load_controller
from tempovlm.control.learned.policies import policy_from_checkpoint
from tempovlm.core.errors import UserError
from tempovlm.core.files import writing_to
from tempovlm.data import catalog
from tempovlm.data.catalog import load_samples
from tempovlm.lab.core_exp.questions import MANIFEST
from tempovlm.lab.core_exp.store import write_rows
from tempovlm.model.weights import weights_hash
from tempovlm.testbed.bed import Bed
from tempovlm.testbed.make import make_testbed

SPACE = tiny_model.SPACE
SUPERVISED = "controller/train_supervised_controller"
TWO_STAGE = "controller/train_two_stage_controller"
FEW = ["--hidden_dim", "8", "--device", "cpu", "--batch_size", "16"]


def write_results(folder: Path, bed: Path, weights_hash: str, split: str = "train", hardware: str = "cpu") -> Path:
    """What a core experiment on the tiny model might have found."""
    rng = np.random.default_rng(0)
    stamp = replace(stamps.STAMP, weights=weights_hash, knob_space=SPACE.fingerprint, hardware=hardware)
    for dataset in ("text_vqa", "okvqa"):
        rows = []
        for sample in load_samples(dataset, split, data_dir=bed):
            for i, knobs in enumerate(SPACE):
                total = tiny_model.nominal_ms(SPACE, i)
                times = dict.fromkeys(("T_preprocess", "T_vision_encoder", "T_projector", "T_LLM_decode"), 0.0)
                rows.append(
                    sweep_rows.answered(
                        sample,
                        knobs,
                        float(rng.random() < 0.3 + 0.02 * i),
                        output_tokens=1,
                        **times,
                        T_LLM_prefill=total,
                        T_total=total,
                    )
                )
        write_rows(folder, dataset, rows, stamp)
    return folder


@pytest.fixture
def results(tiny_folder: Path, small_bed: Path, tmp_path: Path) -> Path:
    """Of the tiny model."""
    return write_results(tmp_path / "results", small_bed, weights_hash(tiny_folder))


def two_stage(folder: Path, bed: Path, results: Path, out: Path, *more: str) -> list[str]:
    base = ["--results_dir", str(results), "--dataset_names", "text_vqa", "okvqa", "--model_path", str(folder)]
    base += ["--output_dir", str(out), "--stage", "stage1", "--data_dir", str(bed), "--num_epochs_stage1", "2"]
    return [*base, "--budgets_per_question", "2", "--train_split", "0.5", *FEW, *more]


def profile(folder: Path) -> Path:
    stamp = replace(stamps.STAMP, knob_space=SPACE.fingerprint).to_json()
    rows = [
        {"tier": k.tier, "top_k": k.top_k, "num_blocks": k.num_blocks, "accuracy": i / 100, "stamp": stamp}
        | {"T_total": tiny_model.nominal_ms(SPACE, i)}
        for i, k in enumerate(SPACE)
    ]
    path = folder / "profiling_results.json"
    path.write_text(json.dumps(rows))
    return path


def test_exp_2(tmp_path: Path, model: TempoVLM, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    words = ["--profiling_results", str(profile(tmp_path)), "--output_dir", str(out), "--num_epochs", "2"]
    script(SUPERVISED).main([*words, "--num_budgets", "100", "--grad_accum", "2", *FEW])
    path = out / "best_supervised_controller.pt"
    assert load_controller(path, SPACE).kind == "supervised"
    assert len((out / "training_log.jsonl").read_text().splitlines()) == 2
    report = json.loads((out / "report.json").read_text())
    said = capsys.readouterr().out
    assert f"{report['validation']['overall']:.1%}" in said
    assert str(path) in said
    runner = model.engine.runner
    assert policy_from_checkpoint(path, SPACE, runner.model, runner.tokenizer).name == "supervised"


@pytest.mark.parametrize("variant", ["budget", "language", "glance"])
def test_exp_3(
    variant: str,
    tiny_folder: Path,
    small_bed: Path,
    results: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = two_stage(tiny_folder, small_bed, results, tmp_path / "out", "--knob1_variant", variant)
    script(TWO_STAGE).main(words)
    folder = tmp_path / "out" / "stage1"
    path = folder / "best_stage1_checkpoint.pt"
    assert load_controller(path, SPACE, weights_hash(tiny_folder)).kind == "two_stage_stage1"
    report = json.loads((folder / "report.json").read_text())
    assert report["variant"] == variant
    assert report["questions"]["train"] > 0
    assert f"accuracy {report['accuracy']:.1%} [" in capsys.readouterr().out
    stored = list((results / ".features").iterdir())
    assert len(stored) == 1
    # A second run takes up where the first ended: at the end.
    before = (folder / "training_log.jsonl").read_text()
    script(TWO_STAGE).main(words)
    assert (folder / "training_log.jsonl").read_text() == before
    assert list((results / ".features").iterdir()) == stored


def test_exp_3_on_more_test_questions(tiny_folder: Path, small_bed: Path, results: Path, tmp_path: Path) -> None:
    more = write_results(tmp_path / "more", small_bed, weights_hash(tiny_folder), "val")
    reports, weights = [], []
    for name, words in (("few", []), ("many", ["--test_results_dir", str(more)])):
        script(TWO_STAGE).main(two_stage(tiny_folder, small_bed, results, tmp_path / name, *words))
        folder = tmp_path / name / "stage1"
        reports.append(json.loads((folder / "report.json").read_text()))
        weights.append(load_controller(folder / "best_stage1_checkpoint.pt", SPACE).networks["knob1"].state_dict())
    added = sum(len(load_samples(name, "val", data_dir=small_bed)) for name in ("text_vqa", "okvqa"))
    few, many = (report["questions"] for report in reports)
    assert many == few | {"test": few["test"] + added}
    assert reports[1]["test_results"] == [str(more)]
    assert reports[1]["best_validation_score"] == reports[0]["best_validation_score"]
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())
    words = two_stage(tiny_folder, small_bed, results, tmp_path / "same", "--test_results_dir", str(results))
    with pytest.raises(UserError, match=r"--test_results_dir: picture .* is in --results_dir too"):
        script(TWO_STAGE).main(words)


def test_the_second_stage_takes_up_the_first(
    tiny_folder: Path, small_bed: Path, results: Path, tmp_path: Path
) -> None:
    words = two_stage(tiny_folder, small_bed, results, tmp_path / "one", "--knob1_loss", "value")
    script(TWO_STAGE).main(words)
    first = tmp_path / "one" / "stage1" / "best_stage1_checkpoint.pt"
    words = two_stage(tiny_folder, small_bed, results, tmp_path / "two", "--num_epochs_stage2", "2")
    script(TWO_STAGE).main([*words, "--stage", "stage2", "--stage1_checkpoint", str(first)])
    saved = load_controller(tmp_path / "two" / "stage2" / "best_stage2_checkpoint.pt", SPACE)
    assert saved.kind == "two_stage"
    want = load_controller(first, SPACE).networks["knob1"].state_dict()
    assert all(torch.equal(value, want[name]) for name, value in saved.networks["knob1"].state_dict().items())
    with pytest.raises(UserError, match="stage1"):
        script(TWO_STAGE).main([*words, "--stage", "stage2"])


def test_a_training_draws_the_test_bed_that_its_results_name(
    tiny_folder: Path, small_bed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(catalog.DATA_DIR_VARIABLE, str(tmp_path / "data"))
    monkeypatch.setattr(catalog, "_SMALL", (1, 1))
    bed = Bed(num_train=6, num_val=1)
    made = make_testbed(tmp_path / "bed", bed.num_train, bed.num_val, progress=False)
    results = write_results(tmp_path / "results", made, weights_hash(tiny_folder))
    manifest = {"conditions": {"split": "train"}, "bed": bed.to_json()}
    (results / MANIFEST).write_text(json.dumps(manifest | {"ranking": list(range(6))}))
    words = ["--results_dir", str(results), "--dataset_names", "text_vqa", "okvqa"]
    words += ["--model_path", str(tiny_folder), "--output_dir", str(tmp_path / "out")]
    words += ["--stage", "stage1", "--num_epochs_stage1", "1", *FEW]
    with pytest.raises(UserError, match=r"are missing\).*, or leave it out to draw it \(or draw it by `tempovlm "):
        script(TWO_STAGE).main([*words, "--data_dir", str(small_bed)])
    script(TWO_STAGE).main(words)
    assert json.loads((tmp_path / "out" / "stage1" / "report.json").read_text())["questions"]["train"] > 0
    drawn = tmp_path / "data" / "beds" / bed.name
    assert Bed.read(drawn / "text_vqa") == bed
    changed = drawn.stat().st_mtime_ns
    script(TWO_STAGE).main([*words, "--num_epochs_stage1", "2"])
    assert drawn.stat().st_mtime_ns == changed


def test_flags_of_the_seed_document() -> None:
    base = ["--results_dir", "r", "--dataset_names", "okvqa", "--model_path", "m", "--stage", "stage1"]
    base += ["--output_dir", "o"]
    args = script(TWO_STAGE).flags().parse_args(base)
    assert (args.num_epochs_stage1, args.num_epochs_stage2, args.lr, args.num_generations) == pytest.approx(
        (50, 100, 1e-4, 5)
    )
    assert (args.train_split, args.seed, args.knob1_variant, args.batch_size) == (
        pytest.approx(0.8),
        42,
        "language",
        None,
    )
    args = script(SUPERVISED).flags().parse_args(["--profiling_results", "p", "--output_dir", "o"])
    assert (args.batch_size, args.num_epochs, args.lr, args.train_split, args.seed) == pytest.approx(
        (64, 50, 1e-4, 0.8, 42)
    )


def test_results_of_another_model(tiny_folder: Path, small_bed: Path, tmp_path: Path) -> None:
    other = write_results(tmp_path / "results", small_bed, "another")
    with pytest.raises(UserError, match=r"field weights is another, those of --model_path are"):
        script(TWO_STAGE).main(two_stage(tiny_folder, small_bed, other, tmp_path / "out"))


def test_times_of_two_machines(tiny_folder: Path, small_bed: Path, results: Path, tmp_path: Path) -> None:
    hashed = weights_hash(tiny_folder)
    other = write_results(tmp_path / "more", small_bed, hashed, hardware="another")
    words = two_stage(tiny_folder, small_bed, results, tmp_path / "out")
    with pytest.raises(UserError, match="field hardware of the timed results differs"):
        script(TWO_STAGE).main([*words, "--results_dir", str(results), str(other)])


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--results_dir", "nowhere"], "nowhere: no such results directory"),
        (["--dataset_names", "vqa9"], "--dataset_names vqa9"),
        (["--latency_estimator_path", "absent.pt"], "absent.pt: no such file"),
        (["--batch_size", "0"], "--batch_size 0"),
        (["--knob1_variant", "x"], "--knob1_variant x"),
        (["--train_split", "1.5"], "--train_split 1.5"),
        (["--stage", "stage3"], "stage3"),
        (["--num_epochs_stage1", "0"], "--num_epochs_stage1 0"),
        (["--seed", "-1"], "--seed: -1: must be from 0"),
    ],
)
def test_wrong_input_is_named(
    more: list[str], message: str, tiny_folder: Path, small_bed: Path, results: Path, tmp_path: Path
) -> None:
    with pytest.raises(UserError) as caught:
        script(TWO_STAGE).main([*two_stage(tiny_folder, small_bed, results, tmp_path / "out"), *more])
    assert message in str(caught.value)


def test_a_failure_is_one_line_and_code_two(tmp_path: Path, preloaded: Preloaded) -> None:
    path = ROOT / "experiments" / f"{SUPERVISED}.py"
    words = ("--profiling_results", "absent.json", "--output_dir", tmp_path / "out")
    done = preloaded.run(path, *words, cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "absent.json: missing; profiling_with_importance.py" in done.stderr


def test_two_trainings_in_one_folder_are_not_mixed(
    tiny_folder: Path, small_bed: Path, results: Path, tmp_path: Path
) -> None:
    refused = pytest.raises(UserError, match="another process is writing results there")
    supervised = ["--profiling_results", str(profile(tmp_path)), "--output_dir", str(tmp_path / "two"), *FEW]
    first = two_stage(tiny_folder, small_bed, results, tmp_path / "three")
    for main, words, folder in (
        (script(SUPERVISED).main, supervised, tmp_path / "two"),
        (script(TWO_STAGE).main, first, tmp_path / "three" / "stage1"),
    ):
        with writing_to(folder), refused:
            main(words)
        assert not list(folder.iterdir())
    script(TWO_STAGE).main(first)
    with writing_to(tmp_path / "three" / "stage2"), refused:
        script(TWO_STAGE).main([*first, "--stage", "stage2", "--num_epochs_stage2", "1"])
    assert not list((tmp_path / "three" / "stage2").iterdir())
