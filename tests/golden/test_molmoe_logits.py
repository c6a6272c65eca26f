"""Logits and greedy tokens of a reduced MolmoE, against numbers that the published implementation gave.

The weights are drawn by name from a frozen generator, so that both implementations hold the same ones. The numbers
in `molmoe_logits.json` come from the published code, one row at a time; nothing here writes them.
"""

from __future__ import annotations

import json
import zlib
from dataclasses import replace
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tempovlm.core.knobs import KnobConfig
from tempovlm.core.plan import Plan, Ranking
from tempovlm.engine.batching import Ragged
from tempovlm.engine.runner import Prepared, Runner
from tempovlm.model.cache import KVCache
from tempovlm.model.config import MOLMOE_1B, ModelConfig
from tempovlm.model.prompt import (
    IMAGE_COLUMN,
    IMAGE_END,
    IMAGE_PATCH,
    IMAGE_START,
    Prompt,
    feature_slots,
    image_tokens,
)
from tempovlm.model.vision.tiling import Crops, Grid, cut_batch, live_crops
from tempovlm.model.vlm import Molmo
from tempovlm.model.weights import empty_model

CONFIG: ModelConfig = replace(
    MOLMOE_1B,
    width=96,
    num_heads=4,
    num_blocks=2,
    num_experts=8,
    expert_width=64,
    embedding_size=256,
    additional_vocab_size=16,
    max_sequence_length=2048,
    vision=replace(MOLMOE_1B.vision, width=64, num_blocks=4, num_heads=4, mlp_width=128, feature_layers=(-2, -4)),
)
"""The published vision geometry; everything else small. Expert and projector width are one number there."""

BEGIN = 249
IMAGE_IDS = {IMAGE_START: 250, IMAGE_END: 251, IMAGE_PATCH: 252, IMAGE_COLUMN: 253}
STEPS = 32
POSITIONS = (0, 1, 60, 157, 158, 159, 250)
"""Places of the stream whose logits are stored in part; further ones where the stream is long enough."""

STORE = json.loads(Path(__file__).with_name("molmoe_logits.json").read_text())
CASES: dict[str, dict[str, Any]] = {case["name"]: case for case in STORE["cases"]}

RTOL = 1e-4
"""Error allowed, relative to the largest logit of the row."""


def draw(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """The float32 values of a published tensor: a function of its name, sized to keep activations near 1."""
    values = np.random.RandomState(zlib.crc32(name.encode())).standard_normal(shape)
    if "norm" in name or "ln" in name.split(".")[-2]:
        values = 1 + 0.1 * values if name.endswith("weight") else 0.1 * values
    elif name.endswith("bias"):
        values = 0.1 * values
    elif name.endswith(("embedding", "new_embedding", "pad_embed")) and "patch" not in name:
        values = 0.7 * values
    elif name.endswith("gate.weight"):
        values = 2 * values * shape[-1] ** -0.5
    else:
        values = values * shape[-1] ** -0.5
    return values.astype(np.float32)


@cache
def build_model() -> Molmo:
    model = empty_model(CONFIG, "cpu", torch.float32)
    for name, view in model.hub_views().items():
        view.copy_(torch.from_numpy(draw(name, tuple(view.shape))))
    return model


def picture(height: int, width: int) -> np.ndarray:
    """A picture by integer arithmetic: gradients with fine structure, no two regions alike."""
    y, x, c = np.ogrid[:height, :width, :3]
    return ((7 * x + 13 * y + 85 * c + x * y // 64 + (x // 50 * 31) ^ (y // 40 * 17)) % 256).astype(np.uint8)


def text_ids(count: int) -> list[int]:
    return [3 + (37 * i * i + 11 * i) % 240 for i in range(count)]


def crops_of(case: dict[str, Any]) -> Crops:
    image = torch.from_numpy(picture(*case["size"])).unsqueeze(0)
    crops = cut_batch(image, Grid(*case["grid"]), CONFIG.vision, exact=True)
    patches = crops.patches[0]
    # None of the stored cases has such a value by itself; another processor's rounding must not add one.
    patches[patches == -1] = -1.000001
    for crop in case["dead_crops"]:
        patches[crop, 5, 7] = -1.0
    return Crops(patches, crops.index, crops.masks, crops.grid, live_crops(patches))


def prompt_of(case: dict[str, Any]) -> Prompt:
    text = text_ids(case["num_text"])
    if case["grid"] is None:
        return Prompt(torch.tensor([BEGIN, *text]), None, 0)
    grid = Grid(*case["grid"])
    image = image_tokens(grid, CONFIG.vision, SimpleNamespace(ids=IMAGE_IDS))  # type: ignore[arg-type]
    slots = feature_slots(grid, CONFIG.vision)
    slots = torch.where(slots >= 0, slots + 1, slots)
    return Prompt(torch.tensor([BEGIN, *image, *text]), slots, grid.num_tokens(CONFIG.vision))


def plan_of(top_k: int) -> Plan:
    knobs = KnobConfig(tier="high", top_k=top_k, num_blocks=CONFIG.num_blocks)
    return Plan.build(knobs, Ranking.evenly_spaced(CONFIG.num_blocks), CONFIG.shape)


@torch.inference_mode()
def features_of(case: dict[str, Any]) -> Tensor | None:
    if case["grid"] is None:
        return None
    model, crops = build_model(), crops_of(case)
    return model.projector(model.vision(crops.patches, crops.live)[crops.index], crops.masks)


@torch.inference_mode()
def embedded(case: dict[str, Any]) -> Tensor:
    prompt = prompt_of(case)
    return build_model().embed(prompt.tokens[None], features_of(case), prompt.slots)


def assert_logits(ours: Tensor, stored: list[float], largest: float) -> None:
    error = (ours.double() - torch.tensor(stored, dtype=torch.float64)).abs().max().item()
    assert error <= RTOL * largest, f"error {error / largest:.1e} of the largest logit"


def largest_logit(case: dict[str, Any]) -> float:
    return max(abs(value) for value in case["last"])


def test_config_is_the_stored_one() -> None:
    assert ModelConfig.from_hub(STORE["config"]) == CONFIG


@pytest.mark.parametrize("name", CASES)
@torch.inference_mode()
def test_logits_are_the_published_ones(name: str) -> None:
    case, model = CASES[name], build_model()
    x = embedded(case)
    assert x.shape[1] == case["length"]
    last = model.prefill(x, plan_of(case["top_k"]), None)[0]
    assert_logits(last, case["last"], largest_logit(case))
    hidden = model.decoder(x, torch.arange(x.shape[1])[None], plan_of(case["top_k"]))[0]
    for place, stored in zip(case["positions"], case["inner"], strict=True):
        assert_logits(model.decoder.logits(hidden[place])[: len(stored)], stored, largest_logit(case))


@pytest.mark.parametrize("name", CASES)
@torch.inference_mode()
def test_greedy_tokens_with_the_cache_are_the_published_ones(name: str) -> None:
    """The published tokens were made with its cache and without, and were equal."""
    case, model = CASES[name], build_model()
    x, plan = embedded(case), plan_of(case["top_k"])
    length = x.shape[1]
    store = KVCache.allocate(CONFIG, len(plan.steps), 1, length + STEPS, x)
    logits, tokens = model.prefill(x, plan, store), []
    for step in range(STEPS):
        tokens.append(int(logits.argmax()))
        logits = model.decode(torch.tensor(tokens[-1:]), plan, store, length + step)
    assert tokens == case["tokens"]


@torch.inference_mode()
def test_greedy_tokens_without_the_cache() -> None:
    case, model = CASES["4 crops"], build_model()
    x, plan, tokens = embedded(case), plan_of(case["top_k"]), []
    for _ in range(STEPS):
        tokens.append(int(model.prefill(x, plan, None).argmax()))
        x = torch.cat((x, model.decoder.embed(torch.tensor([tokens[-1:]]))), dim=1)
    assert tokens == case["tokens"]


@pytest.mark.parametrize("names", STORE["batches"], ids=", ".join)
@torch.inference_mode()
def test_ragged_rows_are_the_published_single_ones(names: list[str]) -> None:
    """Positions go on after each row's own end, and no row's features reach its neighbour."""
    cases = [CASES[name] for name in names]
    run = Runner(build_model(), SimpleNamespace())  # type: ignore[arg-type]
    ready = [Prepared(None if case["grid"] is None else crops_of(case), prompt_of(case)) for case in cases]
    assert len({len(one.prompt.tokens) for one in ready}) == len(cases)
    state = Ragged.prefill(run, ready, [features_of(case) for case in cases], plan_of(cases[0]["top_k"]), STEPS)
    logits, rows = state.logits, []
    for row, case in zip(logits, cases, strict=True):
        assert_logits(row, case["last"], largest_logit(case))
    for step in range(STEPS):
        rows.append(logits.argmax(-1))
        logits = state.decode(run, rows[-1], step)
    assert torch.stack(rows, 1).tolist() == [case["tokens"] for case in cases]


def test_the_cases_cover_what_they_should() -> None:
    grids = [case["grid"] for case in CASES.values()]
    assert {g[0] * g[1] for g in grids if g} >= {1, 4, 6, 9, 12}
    assert None in grids
    assert any(case["dead_crops"] for case in CASES.values())
    assert {case["top_k"] for case in CASES.values()} == {4, CONFIG.num_experts}


@torch.inference_mode()
def test_each_peculiarity_shows_in_the_logits() -> None:
    """Without any one of the peculiarities the stored logits are missed by far: the numbers test them."""
    model = build_model()

    def error(
        name: str, masks: Tensor | None = None, top_k: int = 4, *, replaced: bool = False, checked: bool = True
    ) -> float:
        case = CASES[name]
        crops, prompt = crops_of(case), prompt_of(case)
        assert prompt.slots is not None
        patches = model.vision(crops.patches, crops.live if checked else None)
        features = model.projector(patches[crops.index], crops.masks if masks is None else masks)
        x = model.embed(prompt.tokens[None], features, prompt.slots)
        if replaced:
            places = prompt.slots[prompt.slots >= 0]
            x[0, places] -= model.decoder.embed(prompt.tokens[places])
        missed = model.prefill(x, plan_of(top_k), None)[0] - torch.tensor(case["last"])
        return float(missed.abs().max()) / largest_logit(case)

    name, dead = "6 crops, k4", "1 crop, dead"
    masks = crops_of(CASES[name]).masks
    assert max(error(name), error(dead)) < RTOL
    worse = {
        "masks not shifted": error(name, torch.cat((masks[-1:], masks[:-1]))),
        "no padding embedding": error(name, torch.ones_like(masks)),
        "one expert less": error(name, top_k=3),
        "features replace the embedding": error(name, replaced=True),
        "crops of -1 kept": error(dead, checked=False),
    }
    assert min(worse.values()) > 20 * RTOL, worse
