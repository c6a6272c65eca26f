"""A model of a few thousand weights, drawn by numpy so that every torch draws the same, and a profile for it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from tempovlm.core.knobs import KnobSpace
from tempovlm.latency.profile import LatencyProfile, Measurement, OutputLength, SharedMeasurement
from tempovlm.model.config import POCKET, ModelConfig
from tempovlm.model.vlm import Molmo
from tempovlm.model.weights import empty_model, save_model
from tempovlm.training.tokenizer import build_tokenizer

CONFIG: ModelConfig = replace(
    POCKET,
    width=48,
    num_heads=4,
    num_blocks=6,
    num_experts=8,
    top_k=4,
    expert_width=16,
    embedding_size=160,
    max_sequence_length=512,
    vision=replace(POCKET.vision, width=32, num_blocks=3, num_heads=2, mlp_width=64, feature_layers=(-1, -3)),
)

TRAINED = replace(
    POCKET,
    width=32,
    num_heads=2,
    num_blocks=4,
    num_experts=8,
    top_k=4,
    expert_width=8,
    vision=replace(POCKET.vision, width=16, num_blocks=2, num_heads=2, mlp_width=32, feature_layers=(-1, -2)),
)
"""Sizes of a model that is trained for some steps."""

SPACE = KnobSpace.for_model(CONFIG.shape)

WORDS = (
    "what",
    "does",
    "the",
    "sign",
    "say",
    "is",
    "how",
    "many",
    "are",
    "there",
    "color",
    "dog",
    "stop",
    "user",
    "vqa2",
)


def build_model(seed: int = 0, config: ModelConfig = CONFIG) -> Molmo:
    model = empty_model(config, "cpu", torch.float32)
    rng = np.random.default_rng(seed)
    for name, parameter in model.named_parameters():
        scale = parameter.shape[-1] ** -0.5
        values = rng.standard_normal(tuple(parameter.shape)) * scale
        if "norm" in name and name.endswith("weight"):
            values = 1 + 0.1 * values
        if name == "decoder.embedding":
            values = values * 8
        parameter.copy_(torch.from_numpy(values))
    return model


def rounded_pair(config: ModelConfig, device: str) -> tuple[Molmo, Molmo]:
    """Make random weights of usual sizes in bfloat16, and the same ones in float32."""
    torch.manual_seed(0)
    model, exact = (empty_model(config, device, dtype) for dtype in (torch.bfloat16, torch.float32))
    for name, parameter in model.named_parameters():
        if "norm" in name and name.endswith("weight"):
            parameter.uniform_(0.7, 1.3)
        else:
            parameter.normal_(std=0.02)
    exact.load_state_dict(model.state_dict())
    return model, exact


def save_folder(folder: Path, config: ModelConfig = CONFIG) -> Path:
    save_model(build_model(config=config), folder, torch.float32)
    alphabet = "abcdefghijklmnopqrstuvwxyz0123456789?:()."
    build_tokenizer(WORDS, alphabet, CONFIG.embedding_size).save(str(folder / "tokenizer.json"))
    return folder


def picture(seed: int = 0, height: int = 84, width: int = 112) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def nominal_ms(space: KnobSpace, index: int) -> float:
    """A made-up total: 10 ms for looking at each tier, 1 ms for each block and 0.5 for each expert."""
    knobs = space.settings[index]
    return 10.0 * (space.tiers.index(knobs.tier) + 1) + knobs.num_blocks + 0.5 * knobs.top_k


def make_profile(
    space: KnobSpace = SPACE, output: OutputLength | None = None, spread: float = 0.1, repeats: int = 4
) -> LatencyProfile:
    """A profile whose totals lie evenly within `spread` around the nominal; half of a total is prefix."""
    factors = np.linspace(1 - spread, 1 + spread, repeats)
    measurements = tuple(
        Measurement(
            setting=i,
            total_ms=nominal_ms(space, i) * float(factor),
            prefix_ms=nominal_ms(space, i) * float(factor) / 2,
            open_ms=1.0,
            step_ms=(0.5, 0.5, 0.5),
            num_output_tokens=4,
        )
        for i in range(len(space))
        for factor in factors
    )
    return LatencyProfile("test", space, output or OutputLength.exactly(4), measurements, 0.0, {})


def shared_profile(
    space: KnobSpace, output: OutputLength, scale: float, readings: Sequence[float], step: float = 1.0
) -> LatencyProfile:
    """The profile without a spread, `scale` times as slow, with answers of 2, 4 and 8 in flight.

    A reading takes as many times as long as alone as each of `readings` says, and a step `step` times as long.
    """
    plain = make_profile(space, output, spread=0.0)
    measurements = tuple(
        replace(
            m,
            total_ms=scale * m.total_ms,
            prefix_ms=scale * m.prefix_ms,
            open_ms=scale * m.open_ms,
            step_ms=tuple(scale * one for one in m.step_ms),
        )
        for m in plain.measurements
    )
    alone = replace(plain, measurements=measurements)
    shared = [
        SharedMeasurement(
            setting=i, in_flight=n, first_ms=share * alone.p50_reading_ms(i), step_ms=step * alone.step_ms(i)
        )
        for i in range(len(space))
        for n in (2, 4, 8)
        for share in readings
    ]
    return replace(alone, shared=tuple(shared))
