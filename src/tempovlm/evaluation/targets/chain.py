"""The commands that train a device's controllers on the device's own times, and the files that they leave.

A controller of the CPU lies under `checkpoints`, one of a GPU at the same place under `checkpoints/gpu_DEVICE`.
"""

from __future__ import annotations

from tempovlm.data.registry import GENERATED
from tempovlm.evaluation.targets.devices import time_price
from tempovlm.evaluation.targets.measuring import PROFILES, estimator_command

ESTIMATOR_FILE = "checkpoints/latency_estimator/best_latency_estimator.pt"
SUPERVISED_FILE = "checkpoints/controller/supervised/best_supervised_controller.pt"
VALUE_STAGE_FILE = "checkpoints/two_stage_value/stage1/best_stage1_checkpoint.pt"
STAGE2_FILE = "checkpoints/two_stage_controller/stage2/best_stage2_checkpoint.pt"
END_TO_END_FILE = "checkpoints/controller/grpo/best_controller.pt"
LLM_BASED_FILE = "checkpoints/controller/grpo_llm_based/best_controller.pt"

LABEL_STAGE = (
    *("--knob1_variant", "glance", "--lr", "3e-4"),
    *("--batch_size", "512", "--budgets_per_question", "4"),
)
"""Flags of Exp 3, chosen by cross-validation on its training and validation questions."""

LABEL_EPOCHS = 16

GRPO_RECIPE = (
    *("--scale_rewards", "none", "--group_size", "16", "--lr", "2e-5"),
    *("--beta", "0.02", "--entropy_coef", "0.001"),
)
"""Flags of Exp 4 and 5 beside the price of time."""

WARM_START, GRPO_EPOCHS = 30, 20
"""Epochs of regression, then of GRPO."""

LLM_WARM_START, LLM_EPOCHS = 8, 3
"""The same of the LLM-based controller, which runs blocks of the model in each."""


def checkpoint(device: str, path: str) -> str:
    """Where a device has a checkpoint that the CPU has at `path`."""
    return path if device == "cpu" else path.replace("checkpoints/", f"checkpoints/gpu_{device}/", 1)


def value_stage(device: str) -> tuple[str, ...]:
    """Flags of the first stage that Exp 4 builds on."""
    return ("--knob1_loss", "value", *time_price(device), "--lr", "1e-3")


def results(device: str, part: str) -> str:
    """Folders of the core experiment's answers to a part of the questions, for a device's chain.

    A GPU's come with its timed sweep: an estimator does not know how long a picture takes to be prepared, which is
    most of an answer there and little on the CPU.
    """
    answers = f"results/core_exp_pocket_{part}"
    return answers if device == "cpu" else f"{answers} results/core_exp_pocket_{device}"


def estimator(device: str) -> str:
    """Exp 1 on the device's own sweep of the pocket."""
    return estimator_command(_folder(device, ESTIMATOR_FILE), f"core_exp_pocket_{device}")


def supervised(device: str) -> str:
    """Exp 2 on Exp 7's table of one data set, which a GPU has of its own times."""
    profiles = PROFILES if device == "cpu" else f"results/profiling/gpu_{device}"
    train = (
        "python experiments/controller/train_supervised_controller.py --profiling_results "
        f"{profiles}/{GENERATED[0]}/profiling_results.json --output_dir {_folder(device, SUPERVISED_FILE)}"
    )
    if device == "cpu":
        return train
    return (
        f"python experiments/controller/profiling_with_importance.py --model_path pocket "
        f"--datasets {GENERATED[0]} --results_dir {results(device, 'val')} --output_dir {profiles} && "
        f"{train}"
    )


def first_stage(device: str) -> str:
    """Exp 3."""
    more = ("--test_results_dir", "results/core_exp_pocket_val", *LABEL_STAGE)
    return _two_stage(device, STAGE2_FILE, "stage1", *more, "--num_epochs_stage1", str(LABEL_EPOCHS))


def two_stage(device: str) -> str:
    """The first stage by value, then Exp 4."""
    first = _two_stage(device, VALUE_STAGE_FILE, "stage1", *value_stage(device))
    before = ("--stage1_checkpoint", checkpoint(device, VALUE_STAGE_FILE), "--num_epochs_stage2", str(GRPO_EPOCHS))
    return f"{first} && {_two_stage(device, STAGE2_FILE, 'stage2', *before, *_grpo(device, WARM_START))}"


def end_to_end(device: str) -> str:
    """Exp 5 over five seeds, beside Exp 4's checkpoint."""
    return _joint(
        device,
        END_TO_END_FILE,
        *("--seeds", "0", "1", "2", "3", "4", "--compare_with", checkpoint(device, STAGE2_FILE)),
        *("--num_epochs", str(GRPO_EPOCHS), *_grpo(device, WARM_START)),
    )


def llm_based(device: str) -> str:
    """Exp 5 with the LLM-based architecture."""
    epochs = ("--seeds", "0", "--num_epochs", str(LLM_EPOCHS))
    return _joint(device, LLM_BASED_FILE, "--architecture", "llm_based", *epochs, *_grpo(device, LLM_WARM_START))


def _folder(device: str, file: str, levels: int = 1) -> str:
    return checkpoint(device, file).rsplit("/", levels)[0]


def _learned(device: str) -> str:
    return (
        f"--results_dir {results(device, 'train')} --dataset_names {' '.join(GENERATED)} --model_path pocket "
        f"--latency_estimator_path {checkpoint(device, ESTIMATOR_FILE)}"
    )


def _two_stage(device: str, file: str, stage: str, *more: str) -> str:
    words = ("--output_dir", _folder(device, file, levels=2), "--stage", stage, *more)
    return f"python experiments/controller/train_two_stage_controller.py {_learned(device)} {' '.join(words)}"


def _joint(device: str, file: str, *more: str) -> str:
    words = ("--output_dir", _folder(device, file), *more)
    return f"python experiments/controller/train_controller_v2.py {_learned(device)} {' '.join(words)}"


def _grpo(device: str, warm_start: int) -> tuple[str, ...]:
    return (*time_price(device), *GRPO_RECIPE, "--warm_start", str(warm_start))
