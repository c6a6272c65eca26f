"""Results of the core experiment on the tiny model and a small test bed, drawn and not run."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

import stamps
import sweep_rows
import tiny_model
from tempovlm.control.checkpoint import save_controller
from tempovlm.control.learned.networks import Knob1PredictorBudgetLanguage
from tempovlm.data.catalog import load_samples
from tempovlm.engine.engine import Engine
from tempovlm.lab.core_exp.store import write_rows
from tempovlm.lab.options import GrpoOptions
from tempovlm.latency.cores import RooflineCore
from tempovlm.latency.estimator import Estimator
from tempovlm.latency.features import CostTable

SPACE = tiny_model.SPACE
WEIGHTS = stamps.STAMP.weights
DATASET = "okvqa"
FEW = {"options": GrpoOptions(num_generations=3, num_epochs=2, batch_size=8, lr=1e-3)}


def write_results(folder: Path, bed: Path) -> Path:
    """Every setting of every question: more compute is right more often, and takes longer; half are timed."""
    rng = np.random.default_rng(0)
    rows = []
    for i, sample in enumerate(load_samples(DATASET, "train", data_dir=bed)):
        luck = rng.random()
        for knobs in SPACE:
            tier, timed = SPACE.tiers.index(knobs.tier), i % 2 == 0
            total = tiny_model.nominal_ms(SPACE, SPACE.index(knobs)) * (1 + 0.05 * luck)
            times = {
                "T_preprocess": 1.0, "T_vision_encoder": 5.0 * (1 + tier), "T_projector": 1.0,
                "T_LLM_prefill": total / 4, "T_LLM_decode": 1.0, "T_decode_per_token": 1.0, "T_total": total,
            }  # fmt: skip
            strength = (tier + knobs.num_blocks / 6 + knobs.top_k / 6) / 4
            rows.append(
                sweep_rows.answered(
                    sample,
                    knobs,
                    float(luck < strength),
                    tiling=(1, 1 + tier),
                    vision_tokens=100 * (1 + tier),
                    **(times if timed else {}),
                )
            )
    write_rows(folder, DATASET, rows, replace(stamps.STAMP, knob_space=SPACE.fingerprint))
    return folder


def job_fields(bed: Path, results: Path, output_dir: Path) -> dict[str, Any]:
    """Fields of a small job on what `write_results` wrote."""
    return {
        "weights_hash": WEIGHTS,
        "results_dirs": [results],
        "datasets": [DATASET],
        "output_dir": output_dir,
        "data_dir": bed,
        "train_split": 0.6,
        "hidden_dim": 16,
        **FEW,
    }


def write_stage1(path: Path, language_width: int = tiny_model.CONFIG.width) -> Path:
    """An untrained first stage."""
    torch.manual_seed(0)
    knob1 = Knob1PredictorBudgetLanguage(language_width, 16)
    save_controller(path, kind="two_stage_stage1", networks={"knob1": knob1}, space=SPACE, weights_hash=WEIGHTS)
    return path


def write_estimator(path: Path, engine: Engine) -> Path:
    """A roofline that nobody measured."""
    rates = {
        "vision_encoder": np.array([2.0, 1.5]),
        "projector": np.array([0.4, 0.1, 0.05]),
        "prefill": np.array([1.0, 0.002, 0.3, 0.001, 0.0004, 0.000002, 0.0, 0.0]),
        "decode_per_token": np.array([0.5, 0.2, 0.01, 0.0001, 0.0, 0.0]),
    }
    stamp = replace(stamps.STAMP, hardware="the estimator's machine").to_json()
    Estimator(CostTable(SPACE, engine.runner.model.config.shape), RooflineCore(rates), stamp=stamp).save(path)
    return path
