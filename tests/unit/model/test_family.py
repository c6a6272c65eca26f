"""A family is added by the module that docs/adding.md shows and one row, and by nothing else."""

from __future__ import annotations

import re
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import tiny_model
from tempovlm.api import TempoVLM, load
from tempovlm.control.checkpoint import save_controller
from tempovlm.control.learned.llm_based import LLMBasedController
from tempovlm.core.errors import UserError
from tempovlm.core.request import Answer, Request
from tempovlm.engine import calibration
from tempovlm.model.config import POCKET
from tempovlm.model.family import FAMILIES, VisionLanguageModel, class_of
from tempovlm.model.weights import empty_model, read_config, save_model
from tempovlm.training.tokenizer import build_tokenizer

ROOT = Path(__file__).resolve().parents[3]
CODE = re.search(
    r"^`src/\S+/plain/model\.py`:\n\n```python\n(.*?)^```$",
    (ROOT / "docs" / "adding.md").read_text(encoding="utf-8"),
    re.MULTILINE | re.DOTALL,
)
SIZES = ("width", "num_blocks", "num_heads", "num_experts", "top_k", "expert_width", "embedding_size")


@pytest.fixture
def folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A drawn model of the family, published in a folder."""
    assert CODE is not None
    (tmp_path / "plain_family.py").write_text(CODE[1], encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setitem(FAMILIES, "plain", "plain_family:Plain")
    kind = class_of("plain").config_class
    config = kind(**{name: asdict(tiny_model.CONFIG)[name] for name in SIZES}, vision=POCKET.vision)
    model, rng = empty_model(config, "cpu", torch.float32), np.random.default_rng(0)
    for name, parameter in model.named_parameters():
        values = rng.standard_normal(tuple(parameter.shape)) * parameter.shape[-1] ** -0.5
        parameter.copy_(torch.from_numpy(1 + 0.1 * values if name.endswith("norm.weight") else values))
    made = tmp_path / "plain"
    save_model(model, made, torch.float32)
    alphabet = "abcdefghijklmnopqrstuvwxyz0123456789?:()."
    build_tokenizer(tiny_model.WORDS, alphabet, config.embedding_size).save(str(made / "tokenizer.json"))
    return made


@pytest.fixture
def plain(folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> TempoVLM:
    """The family through the public door, on a machine whose times are made up."""
    monkeypatch.setenv("TEMPOVLM_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(calibration, "measure", lambda *_, **__: tiny_model.make_profile().measurements)
    return load(folder, device="cpu", warmup=False, progress=False)


def test_it_is_loaded_as_its_own_class(plain: TempoVLM, folder: Path) -> None:
    model = plain.engine.runner.model
    assert type(model).__name__ == "Plain"
    assert read_config(folder) == model.config
    assert plain.space == tiny_model.SPACE
    assert plain.engine.runner.narrow is None, "the NumPy decoder computes Molmo's blocks"


@pytest.mark.usefixtures("ticks")
def test_the_guard_chooses_its_setting_by_the_budget(plain: TempoVLM, picture: Image.Image) -> None:
    rich, poor = (plain.answer(picture, "what is the sign?", budget_ms=ms) for ms in (1e5, 0.1))
    assert (rich.policy, rich.knobs, rich.budget_feasible) == ("table (assumed)", plain.space.native, True)
    assert (poor.knobs, poor.budget_feasible) == (plain.space.cheapest, False)
    between = plain.answer(picture, "what is the sign?", budget_ms=48)
    assert between.knobs not in (plain.space.native, plain.space.cheapest)
    assert between.predicted is not None


def test_every_knob_reaches_it(plain: TempoVLM, picture: Image.Image) -> None:
    ran: list[tuple[int, int]] = []
    blocks = plain.engine.runner.model.decoder.blocks  # type: ignore[attr-defined]
    for i, block in enumerate(blocks):
        block.register_forward_pre_hook(lambda _, given, i=i: ran.append((i, given[-1])))
    knobs = plain.space.cheapest
    answer = plain.answer(picture, "what is the sign?", knobs=knobs, max_new_tokens=1)
    assert ran == list(plain.engine.plan(knobs).steps)
    assert answer.num_vision_tokens == 2 * POCKET.vision.pooled**2, "the whole view and one tile, without overlap"
    native = plain.answer(picture, "what is the sign?", max_new_tokens=1)
    assert native.num_vision_tokens > answer.num_vision_tokens


def test_its_own_prompt_is_read(plain: TempoVLM, picture: Image.Image) -> None:
    run, asked = plain.engine.runner, Request(images=(picture,), question="what is the sign?", style="vqa2")
    tokens = run.prepare(run.open(asked), "low", asked).prompt.tokens
    assert run.tokenizer.decode(tokens.tolist()) == "question: what is the sign? answer:"


def test_streamed_and_batched_answers_are_the_single_ones(plain: TempoVLM, picture: Image.Image) -> None:
    pairs = [(picture, "what is the sign?"), (None, "stop"), (picture, "how many dogs are there there?")]
    alone = [plain.answer(*pair, max_new_tokens=6) for pair in pairs]
    assert len({answer.tokens for answer in alone}) > 1
    together = plain.answer_batch(pairs, max_new_tokens=6)
    assert [answer.tokens for answer in together] == [answer.tokens for answer in alone]
    *_, streamed = plain.stream(*pairs[0], max_new_tokens=6)
    assert isinstance(streamed, Answer)
    assert streamed.tokens == alone[0].tokens


def test_what_needs_molmos_blocks_is_refused_in_a_line(folder: Path, tmp_path: Path) -> None:
    controller = LLMBasedController(
        tiny_model.CONFIG.width, 16, num_block_counts=len(tiny_model.SPACE.block_counts)
    )
    path = tmp_path / "llm.pt"
    save_controller(path, kind="llm_based", networks={"controller": controller}, space=tiny_model.SPACE)
    with pytest.raises(UserError, match=r"llm\.pt: an LLM-based controller reads with .* choose another policy"):
        load(folder, policy=path, device="cpu", warmup=False, progress=False)


def test_an_unknown_family_is_named(folder: Path) -> None:
    config = folder / "config.json"
    config.write_text(config.read_text().replace('"plain"', '"fancy"'))
    with pytest.raises(UserError, match=r"field model_type is 'fancy', only 'molmo', 'plain' is supported"):
        load(folder, device="cpu", warmup=False, progress=False)


def test_every_family_is_a_class_of_its_model_type() -> None:
    for name in FAMILIES:
        kind = class_of(name)
        assert issubclass(kind, VisionLanguageModel)
        assert kind.config_class.model_type == name
