"""Controllers that glance, on CUDA: the same answer as at the same setting, one look, stages that add up."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import nn

import tiny_model
from tempovlm.api import load
from tempovlm.control.checkpoint import save_controller
from tempovlm.control.learned.llm_based import LLMBasedController
from tempovlm.control.learned.networks import Knob1PredictorBudgetLanguageGlance
from tempovlm.control.learned.observation import vision_width
from tempovlm.engine import calibration
from timings import stages_add_up

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]

SPACE = tiny_model.SPACE


def saved(folder: Path, kind: str) -> Path:
    """An untrained checkpoint."""
    torch.manual_seed(0)
    width, count = tiny_model.CONFIG.width, len(SPACE.block_counts)
    networks: dict[str, nn.Module] = {"knob1": Knob1PredictorBudgetLanguageGlance(width, vision_width(width), 16)}
    if kind == "llm_based":
        networks = {"controller": LLMBasedController(width, 16, num_block_counts=count)}
    save_controller(folder / f"{kind}.pt", kind=kind, networks=networks, space=SPACE)
    return folder / f"{kind}.pt"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", ["llm_based", "two_stage_stage1"])
def test_checkpoints_that_glance(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, dtype: torch.dtype
) -> None:
    monkeypatch.setenv("TEMPOVLM_CACHE_DIR", str(tmp_path / "cache"))
    made_up = tiny_model.make_profile().measurements
    monkeypatch.setattr(calibration, "measure", lambda *_, **__: made_up)
    picture, folder = Image.fromarray(tiny_model.picture()), tiny_model.save_folder(tmp_path / "tiny")
    model = load(str(folder), device="cuda", dtype=dtype, policy=saved(tmp_path, kind), progress=False)
    answer = model.answer(picture, "what is the sign?", budget_ms=1e5)
    assert (answer.policy, answer.budget_feasible, answer.budget_met) == (kind, True, True)
    for tier in SPACE.tiers if kind == "llm_based" else (answer.knobs.tier,):
        answer = model.answer(picture, "what is the sign?", budget_ms=1e5, tier=tier)
        assert stages_add_up(answer.timings_ms)
        if dtype == torch.float32:  # random weights in bfloat16 flip tokens by rounding
            plain = model.answer(picture, "what is the sign?", knobs=answer.knobs)
            assert answer.tokens == plain.tokens
