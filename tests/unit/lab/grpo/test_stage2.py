from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import grpo_results
import pytest
import torch
from grpo_results import SPACE, WEIGHTS

from tempovlm.control.checkpoint import load_controller, save_controller
from tempovlm.control.learned.networks import SupervisedController
from tempovlm.core.errors import UserError
from tempovlm.engine.engine import Engine
from tempovlm.lab.exp4_second_stage import CHECKPOINT, STAGE1, Stage2Job, render, run_job
from tempovlm.lab.options import GrpoOptions
from tempovlm.testbed.make import make_testbed


@pytest.fixture(scope="module")
def bed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder, few = tmp_path_factory.mktemp("beds") / "bed", (grpo_results.DATASET,)
    return make_testbed(folder, 5, 1, seed=1, progress=False, datasets=few)


@pytest.fixture(scope="module")
def results(bed: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return grpo_results.write_results(tmp_path_factory.mktemp("results"), bed)


@pytest.fixture
def job(engine: Engine, bed: Path, results: Path, tmp_path: Path) -> Stage2Job:
    """A small job, with its first stage in place."""
    grpo_results.write_stage1(tmp_path / STAGE1)
    return Stage2Job(engine=engine, **grpo_results.job_fields(bed, results, tmp_path))


def test_train_and_report(job: Stage2Job) -> None:
    report = run_job(job)
    saved = load_controller(job.output_dir / CHECKPOINT, SPACE, WEIGHTS)
    assert saved.kind == "two_stage"
    assert saved.options["policy"] == "two_stage"
    assert saved.stamp["hardware"] == "a machine"
    first = load_controller(job.output_dir / STAGE1, SPACE, WEIGHTS).networks["knob1"].state_dict()
    for name, value in saved.networks["knob1"].state_dict().items():
        assert torch.equal(value, first[name]), "the first stage is carried as it was"
    written = json.loads((job.output_dir / "stage2" / "report.json").read_text())
    assert written == json.loads(json.dumps(report))
    assert sum(report["questions"].values()) > 0
    assert report["latency"] == "measured"
    assert set(report["policies"]) == {"policy", "policy, nothing masked", "table", "fixed", "oracle"}
    assert f"end {report['reward']['end']:.4f}" in render(report)
    assert "targets" not in report
    lines = (job.output_dir / "stage2" / "training_log.jsonl").read_text().splitlines()
    assert len(lines) == 2
    for name in ("training", "knobs", "trade_off"):
        assert (job.output_dir / "stage2" / f"{name}.png").read_bytes()[:4] == b"\x89PNG"
    assert list((job.results_dirs[0] / ".features").iterdir()), "features are kept for the next training"


def test_latencies_of_the_estimator_and_accuracies_of_the_model(job: Stage2Job, engine: Engine) -> None:
    path = grpo_results.write_estimator(job.output_dir / "estimator.pt", engine)
    online = replace(job.options, accuracy_source="online", num_epochs=1)
    report = run_job(replace(job, latency_estimator_path=path, options=online, max_new_tokens=2))
    assert report["latency"] == "estimator"
    assert report["stamp"]["hardware"] == "the estimator's machine"
    assert report["options"]["accuracy_source"] == "online"
    # The tiny model's weights are noise: unlike the table's, none of its answers is right.
    assert report["policies"]["policy"]["accuracy"] == pytest.approx(0)
    assert report["policies"]["table"]["accuracy"] > 0


def test_without_a_first_stage(job: Stage2Job) -> None:
    (job.output_dir / STAGE1).unlink()
    with pytest.raises(UserError, match="run with --stage stage1 first"):
        run_job(job)
    other = job.output_dir / "other.pt"
    net = SupervisedController(8, len(SPACE.tiers), len(SPACE.top_ks), len(SPACE.block_counts))
    save_controller(other, kind="supervised", networks={"controller": net}, space=SPACE)
    with pytest.raises(UserError, match="field kind is supervised, which has no first stage"):
        run_job(replace(job, stage1_checkpoint=other))


def test_another_model(job: Stage2Job) -> None:
    with pytest.raises(UserError, match="field weights is 0123456789ab"):
        run_job(replace(job, weights_hash="another"))
    none = grpo_results.write_stage1(job.output_dir / "stage1" / "none.pt")
    with pytest.raises(UserError, match=r"no such (results )?directory|nowhere"):
        run_job(replace(job, stage1_checkpoint=none, results_dirs=[Path("nowhere")]))


def test_options_are_checked_before_anything_is_read(job: Stage2Job) -> None:
    wrong = replace(job, options=GrpoOptions(num_generations=1), results_dirs=[Path("nowhere")])
    with pytest.raises(UserError, match="--group_size 1"):
        run_job(wrong)
