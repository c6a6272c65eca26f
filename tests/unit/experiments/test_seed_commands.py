"""The eight commands of the seed document: taken as they are written there, with only paths and device changed."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import pytest
from scripts import ROOT, script

from tempovlm.core.errors import UserError
from tempovlm.lab.core_exp.questions import MANIFEST
from tempovlm.lab.exp6_importance.study import second_place
from tempovlm.testbed import EDITION
from tempovlm.testbed.bed import Bed

COMMANDS = {
    "Exp 1": """controller/train_latency_estimator --results_dir results/core_exp_pocket_cpu --dataset_names
        text_vqa coco_2014_vqa --output_dir OUT --batch_size 64 --num_epochs 50 --lr 1e-3 --train_split 0.8
        --device cpu --seed 42""",
    "Exp 2": """controller/train_supervised_controller --profiling_results
        results/profiling/exp3_importance_comparison/text_vqa/profiling_results.json --output_dir OUT
        --batch_size 64 --num_epochs 50 --lr 1e-4 --train_split 0.8 --device cpu --seed 42""",
    "Exp 3": """controller/train_two_stage_controller --results_dir results/core_exp_pocket_train
        results/core_exp_pocket_cpu --dataset_names text_vqa coco_2014_vqa --model_path pocket --output_dir
        OUT --stage stage1 --batch_size 64 --num_epochs_stage1 50 --lr 1e-4 --train_split 0.8 --device cpu
        --seed 42""",
    "Exp 4": """controller/train_two_stage_controller --results_dir results/core_exp_pocket_train --dataset_names
        text_vqa coco_2014_vqa --model_path pocket --latency_estimator_path
        checkpoints/latency_estimator/best_latency_estimator.pt --output_dir OUT --stage stage2 --batch_size
        32 --num_epochs_stage2 100 --lr 1e-4 --group_size 5 --train_split 0.8 --device cpu --seed 42""",
    "Exp 5": """controller/train_controller_v2 --results_dir results/core_exp_pocket_train --dataset_names text_vqa
        coco_2014_vqa --model_path pocket --output_dir OUT --batch_size 64 --num_epochs 100 --lr 1e-4
        --group_size 5 --train_split 0.8 --device cpu --seed 42""",
    "Exp 6": """controller/validate_importance_consistency --dataset_names text_vqa coco_2014_vqa okvqa
        science_qa_img --model_path pocket --num_samples 5000 --output_dir OUT --device cpu""",
    "Exp 7": """controller/profiling_with_importance --model_path pocket --importance_scores_file
        results/importance/merged_scores.json --datasets text_vqa coco_2014_vqa --output_dir OUT
        --num_samples 500 --batch_size 1""",
    "Exp 8": """controller/test_adaptive_inference --model_path pocket --controller_path
        checkpoints/two_stage_controller/stage2/best_stage2_checkpoint.pt --dataset text_vqa --num_samples
        100 --latency_budget 200.0 --device cpu""",
}


@pytest.mark.parametrize("name", COMMANDS)
def test_each_command_has_its_flags_and_finds_its_files(name: str) -> None:
    path, *words = shlex.split(COMMANDS[name])
    script(path).flags().parse_args(words)
    read = [word for word in words if word.startswith(("results/", "checkpoints/"))]
    assert not [word for word in read if not (ROOT / word).exists()]


def test_shipped_results_name_the_test_bed_they_are_about() -> None:
    folders = sorted((ROOT / "results").glob(f"core_exp_*/{MANIFEST}"))
    assert folders
    for path in folders:
        told = json.loads(path.read_text(encoding="utf-8"))
        bed = Bed.from_json(told["bed"], path)
        assert bed.edition == EDITION or told["stamp"]["weights"] == "random"


def test_another_output_folder_of_exp_6_leaves_the_scores_of_exp_7_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert second_place(Path("runs/exp6")) is None
    assert second_place(Path("results/importance_validation_2")) is None
    place = Path("results/importance/merged_scores.json")
    assert second_place(Path("results/importance_validation")) == place
    assert second_place(tmp_path / "results" / "importance_validation") == place


@pytest.mark.parametrize("name", [name for name, text in COMMANDS.items() if "--output_dir" in text])
def test_no_script_writes_over_shipped_files_unasked(name: str) -> None:
    path, *words = shlex.split(COMMANDS[name])
    place = words.index("--output_dir")
    with pytest.raises(UserError, match="required: --output_dir"):
        script(path).flags().parse_args(words[:place] + words[place + 2 :])
