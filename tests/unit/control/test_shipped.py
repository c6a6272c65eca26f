"""The controller in a model's folder: used where it fits, the table where it does not, by all commands alike."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from experiments.recipes import ACCURACY
from PIL import Image

import tiny_model
from tempovlm.api import TempoVLM, load, model_folder
from tempovlm.control.checkpoint import fingerprint, save_controller
from tempovlm.control.learned.networks import (
    Knob1PredictorBudgetLanguage,
    Knob1PredictorBudgetLanguageGlance,
    Knob2Knob3Predictor,
    SupervisedController,
)
from tempovlm.control.learned.observation import vision_width
from tempovlm.control.shipped import FILE
from tempovlm.core.errors import UserError
from tempovlm.core.knobs import KnobSpace
from tempovlm.engine import calibration
from tempovlm.model.weights import read_config, weights_hash

ROOT = Path(__file__).resolve().parents[3]
SPACE = tiny_model.SPACE
WIDTH = tiny_model.CONFIG.width
MAX_BYTES = 2_000_000


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TEMPOVLM_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(
        calibration, "measure", lambda engine, *_, **__: tiny_model.make_profile(engine.space).measurements
    )


@pytest.fixture
def folder(tiny_folder: Path, tmp_path: Path) -> Path:
    """A model of its own, without a controller."""
    return Path(shutil.copytree(tiny_folder, tmp_path / "model"))


def write(path: Path, weights_hash: str | None, *, device: str = "cpu/float32", space: KnobSpace = SPACE) -> Path:
    """An untrained two-stage controller."""
    torch.manual_seed(0)
    first = Knob1PredictorBudgetLanguage(WIDTH, 8)
    second = Knob2Knob3Predictor(vision_width(WIDTH), WIDTH, 8, len(space.top_ks), len(space.block_counts))
    networks = {"knob1": first, "knob2knob3": second}
    stamp = {"device": device}
    save_controller(path, kind="two_stage", networks=networks, space=space, weights_hash=weights_hash, stamp=stamp)
    return path


def quick(folder: Path, policy: str | Path = "auto") -> TempoVLM:
    return load(str(folder), device="cpu", policy=policy, warmup=False, progress=False)


def test_auto_takes_the_controller_that_fits(folder: Path, picture: Image.Image) -> None:
    write(folder / FILE, weights_hash(folder))
    answer = quick(folder).answer(picture, "what?", budget_ms=1e5)
    assert answer.policy == "two_stage"
    assert answer.budget_feasible is True
    assert quick(folder, "table").answer(picture, "what?", budget_ms=1e5).policy == "table (assumed)"
    assert quick(folder).answer(picture, "what?").policy == "fixed"
    tight = quick(folder).answer(picture, "what?", budget_ms=20)
    assert tight.knobs.tier == "low"


def test_without_a_file_the_table_decides(folder: Path, picture: Image.Image) -> None:
    assert quick(folder).answer(picture, "what?", budget_ms=1e5).policy == "table (assumed)"


@pytest.mark.parametrize("differs", ["weights", "no weights", "device", "knob_space"])
def test_what_does_not_fit_is_left_alone(folder: Path, picture: Image.Image, differs: str) -> None:
    own = weights_hash(folder)
    other = replace(SPACE, top_ks=SPACE.top_ks[:-1])
    write(
        folder / FILE,
        {"weights": "0" * 12, "no weights": None}.get(differs, own),
        device="cuda/bfloat16" if differs == "device" else "cpu/float32",
        space=other if differs == "knob_space" else SPACE,
    )
    assert quick(folder).answer(picture, "what?", budget_ms=1e5).policy == "table (assumed)"


def test_a_controller_without_features_is_known_by_what_was_measured(folder: Path, tmp_path: Path) -> None:
    sizes = {"num_top_ks": len(SPACE.top_ks), "num_block_counts": len(SPACE.block_counts)}
    networks = {"controller": SupervisedController(8, **sizes)}
    stamp = {"device": "cpu/float32", "weights": weights_hash(folder)}
    path = tmp_path / "best.pt"
    save_controller(path, kind="supervised", networks=networks, space=SPACE, stamp=stamp)
    assert (fingerprint(path).weights_hash, fingerprint(path).device) == (weights_hash(folder), "cpu")


def test_a_checkpoint_is_named_by_its_path(folder: Path, tmp_path: Path, picture: Image.Image) -> None:
    path = write(tmp_path / "mine.pt", weights_hash(folder), device="cuda/bfloat16")
    assert quick(folder, path).answer(picture, "what?", budget_ms=1e5).policy == "two_stage"
    with pytest.raises(UserError, match="trained on another model's features"):
        quick(folder, write(tmp_path / "theirs.pt", "0" * 12))
    with pytest.raises(UserError, match="no such policy and no such file"):
        quick(folder, tmp_path / "absent.pt")


@pytest.mark.parametrize("tiers", [("medium", "high"), ("low", "high"), ("high",)])
def test_a_controller_that_glances_chooses_among_fewer_tiers(
    folder: Path, tmp_path: Path, picture: Image.Image, tiers: tuple[str, ...]
) -> None:
    path, seen = tmp_path / "glance.pt", set()
    for seed in range(6):
        torch.manual_seed(seed)
        networks = {"knob1": Knob1PredictorBudgetLanguageGlance(WIDTH, vision_width(WIDTH), 8)}
        save_controller(path, kind="two_stage_stage1", networks=networks, space=SPACE)
        model = load(str(folder), device="cpu", policy=path, space={"tier": tiers}, warmup=False, progress=False)
        answer = model.answer(picture, "what?", budget_ms=1e5)
        assert answer.policy == "two_stage_stage1"
        assert answer.tokens == model.answer(picture, "what?", knobs=answer.knobs).tokens
        seen.add(answer.knobs.tier)
    assert seen == set(tiers)


def test_a_damaged_file_is_named(folder: Path) -> None:
    (folder / FILE).write_bytes(b"PK")
    with pytest.raises(UserError, match=rf"{FILE}: damaged"):
        quick(folder)


def test_what_the_package_ships_fits_its_model() -> None:
    folder = model_folder("pocket")
    path = folder / FILE
    own = fingerprint(path)
    assert own.weights_hash == weights_hash(folder)
    assert own.knob_space == KnobSpace.for_model(read_config(folder).shape).fingerprint
    assert own.device == "cpu"
    assert path.stat().st_size <= MAX_BYTES


def test_what_the_package_ships_is_the_checkpoint_of_the_experiment() -> None:
    assert (ROOT / ACCURACY).resolve() == model_folder("pocket").resolve() / FILE
