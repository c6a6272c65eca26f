"""Requests whose times follow a known roofline, so that an estimator can be held to it."""

from __future__ import annotations

import numpy as np

from tempovlm.core.knobs import KnobSpace
from tempovlm.lab.exp1_estimator.data import Rows
from tempovlm.latency.cores import RooflineCore
from tempovlm.latency.features import CostTable, Workload
from tempovlm.model.config import POCKET

SPACE = KnobSpace.for_model(POCKET.shape)
TABLE = CostTable(SPACE, POCKET.shape)
TILINGS = (((1, 1), (2, 2), (3, 3)), ((1, 1), (1, 4), (2, 5)), ((1, 1), (3, 2), (3, 4)), ((1, 1), (2, 3), (4, 3)))

RATES = RooflineCore(
    {
        "vision_encoder": np.array([2.0, 1.5]),
        "projector": np.array([0.4, 0.1, 0.05]),
        "prefill": np.array([1.0, 0.002, 0.3, 0.001, 0.0004, 0.000002, 0.0, 0.0]),
        "decode_per_token": np.array([0.5, 0.2, 0.01, 0.0001, 0.3, 0.02]),
    }
)
"""A processor that counts."""

GPU = RooflineCore(
    {
        "vision_encoder": np.array([3.0, 0.02]),
        "projector": np.array([0.3, 0.001, 0.0]),
        "prefill": np.array([0.5, 0.0, 0.25, 0.0, 0.0, 0.0, 0.00001, 0.000002]),
        "decode_per_token": np.array([0.3, 0.11, 0.004, 0.0, 0.4, 0.0]),
    }
)
"""Another one, which waits for its host most of the time and reads prompts at their padded length."""


def request(picture: int, rng: np.random.Generator) -> Workload:
    tilings = TILINGS[picture % len(TILINGS)]
    tokens = [(4 * r + 2) * (4 * c + 2) + 36 for r, c in tilings]
    steps = rng.integers(1, 9, len(SPACE)).astype(np.float64)
    return Workload.of_request(SPACE, tokens, int(rng.integers(12, 60)), tilings, steps)


def make_rows(
    pictures: int, rates: RooflineCore = RATES, noise: float = 0.02, repeats: int = 5, seed: int = 0
) -> Rows:
    """Every setting for every picture; a repeat is the roofline's time and lognormal noise."""
    rng = np.random.default_rng(seed)
    loads = [request(i, rng) for i in range(pictures)]
    columns = ("setting", "vision_tokens", "text_tokens", "crops", "distinct_crops", "steps")
    load = Workload(*(np.concatenate([getattr(one, name) for one in loads]) for name in columns))
    exact = np.exp(rates.log_ms(TABLE, load)[..., 0])
    single = exact[:, None] * np.exp(noise * rng.standard_normal((len(load), repeats, exact.shape[1])))
    images = np.repeat([f"picture{i}" for i in range(pictures)], len(SPACE))
    return Rows(load, np.median(single, axis=1), load.steps, single, images)
