"""Decision tables whose right answers are known by construction."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from tempovlm.core.knobs import KnobSpace
from tempovlm.lab.table import Table

SPACE = KnobSpace(("low", "medium", "high"), (4, 8), (8, 16), 8)
"""Twelve settings; the native one has index 11."""

K = len(SPACE)
COST_MS = np.array([10.0 * (SPACE.tiers.index(k.tier) + 1) + k.top_k / 4 + k.num_blocks / 4 for k in SPACE])
"""(K,) from 13 to 36 ms, rising with every knob."""


def table(accuracy: np.ndarray, latency_ms: np.ndarray | None = None, **changes: Any) -> Table:
    """Questions q0, q1, … of one picture each; question i has `i % 2` as its crops' shape, which content shows."""
    count = len(accuracy)
    vision_tokens = np.tile([100.0, 200.0, 300.0], (count, 1))
    images = np.array([f"i{i:04d}" for i in range(count)])
    made = Table.of(
        SPACE,
        accuracy,
        COST_MS if latency_ms is None else latency_ms,
        image_id=images,
        vision_tokens=vision_tokens,
    )
    return replace(made, **changes)


def content_world(count: int = 200) -> Table:
    """Even questions need the low tier's cheapest setting, odd ones the dearest; each is wrong everywhere else."""
    accuracy = np.zeros((count, K))
    accuracy[::2, 0] = 1.0
    accuracy[1::2, K - 1] = 1.0
    return table(accuracy)


def budget_world(count: int = 400, seed: int = 0) -> Table:
    """Dearer settings are right more often, by a coin that no content tells."""
    chance = 0.3 + 0.5 * (COST_MS - COST_MS[0]) / (COST_MS[-1] - COST_MS[0])
    draws = np.random.default_rng(seed).random((count, K))
    return table((draws < chance).astype(float))


def parity(part: Table) -> np.ndarray:
    """(N, 1) the feature that tells a question of the content world: whether its number is odd."""
    return np.array([[float(name[1:]) % 2] for name in part.question_id.tolist()])
