"""Features for predicting a stage's time: token and crop counts, knobs, the plan's operations and bytes.

All functions work on arrays over `n` requests, so that all settings of a knob space are computed at once.
Operations
and bytes come from `core.cost`. They are polynomials in the prompt's length, whose coefficients are computed once
for each setting, because 75 calls take longer than the whole prediction may.

Shapes: `n` requests, `F` features, `P` terms of a stage's linear model.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np
from numpy.typing import NDArray

from tempovlm.core.cost import Cost, plan_cost
from tempovlm.core.knobs import KnobConfig, KnobSpace
from tempovlm.core.plan import Plan, Ranking
from tempovlm.core.shape import COARSE, FINE, FINE_LIMIT, ModelShape

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

TARGETS = {
    "vision_encoder": "T_vision_encoder",
    "projector": "T_projector",
    "prefill": "T_LLM_prefill",
    "decode_per_token": "T_decode_per_token",
}
"""Stage that is predicted → the field of a results file that holds its time."""

STAGES = tuple(TARGETS)

FEATURES = (
    "log_vision_tokens",
    "log_text_tokens",
    "prompt_tokens",
    "log_crops",
    "log_distinct_crops",
    "tier",
    "log_top_k",
    "log_num_blocks",
    "log_prefill_flops",
    "log_prefill_bytes",
    "log_decode_flops",
    "log_decode_bytes",
    "inverse_steps",
    "log_padded_tokens",
)
"""Columns of `CostTable.features`. The vision side's operations are proportional to distinct crops and crops, its
bytes are constant, so those two columns stand for them. The first decode step of an answer takes longer than the
others, so that the time per token falls with the inverse of their number. A captured graph reads a prompt at its
padded length, so that its time is a staircase."""


@dataclass(frozen=True, slots=True)
class Workload:
    """The inputs of `n` requests to the estimator: arrays (n,).

    Attributes:
        setting: index in the knob space.
        vision_tokens: image features in the prompt. text_tokens: all its other tokens.
        crops: crops that are pooled and projected, the global one included; 0 without a picture.
        distinct_crops: crops that pass through the vision transformer.
        steps: decode steps (output tokens - 1) over which the decode time per token is averaged.
    """

    setting: Ints
    vision_tokens: Floats
    text_tokens: Floats
    crops: Floats
    distinct_crops: Floats
    steps: Floats

    @classmethod
    def of_request(
        cls,
        space: KnobSpace,
        vision_tokens: Sequence[int],
        text_tokens: int,
        tilings: Sequence[tuple[int, int] | None],
        steps: Floats | float = 1.0,
    ) -> Workload:
        """Describe one request at every setting, in index order.

        Args:
            space: the legal settings.
            vision_tokens: of the picture at each tier, in the space's order.
            text_tokens: of the prompt.
            tilings: rows and columns of the crops at each tier; None without a picture.
            steps: decode steps of the answer, one number or one for each setting. Default: one step, which is the
                slowest per token, for an unknown length.
        """
        per_tier = math.prod(space.shape[1:])
        crops = np.array([count_crops(tiling) for tiling in tilings], dtype=np.float64)
        every = np.repeat(crops, per_tier, axis=0)
        return cls(
            np.arange(len(space)),
            np.repeat(np.asarray(vision_tokens, dtype=np.float64), per_tier),
            np.full(len(space), float(text_tokens)),
            every[:, 0],
            every[:, 1],
            np.broadcast_to(np.asarray(steps, dtype=np.float64), len(space)),
        )

    def __len__(self) -> int:
        return len(self.setting)

    def take(self, rows: Ints | NDArray[np.bool_]) -> Workload:
        """Select some of the requests."""
        return Workload(*(getattr(self, field.name)[rows] for field in fields(self)))

    @property
    def first_share(self) -> Floats:
        """The share (n,) of the first step among the decode steps."""
        return 1.0 / np.maximum(self.steps, 1.0)

    @property
    def padded_tokens(self) -> Floats:
        """The prompts' padded lengths (n,), see `core.shape.padded_length`."""
        n = self.vision_tokens + self.text_tokens
        step = np.where(n <= FINE_LIMIT, FINE, COARSE)
        return np.ceil(n / step) * step


def count_crops(tiling: tuple[int, int] | None) -> tuple[int, int]:
    """Count crops and distinct crops of a tiling: the only tile of a 1 × 1 tiling equals the global crop."""
    if tiling is None:
        return 0, 0
    tiles = tiling[0] * tiling[1]
    return tiles + 1, 1 if tiles == 1 else tiles + 1


class CostTable:
    """Operations, bytes and features of any request at any setting of a model."""

    def __init__(self, space: KnobSpace, shape: ModelShape) -> None:
        self.space, self.shape = space, shape
        ranking = Ranking.evenly_spaced(shape.num_blocks)
        rows = [_coefficients(knobs, ranking, shape) for knobs in space]
        self._flops, self._bytes, self._step_flops, self._step_bytes = (
            np.array([row[i] for row in rows]) for i in range(4)
        )
        self._tier = np.array([space.tiers.index(knobs.tier) for knobs in space], dtype=np.float64)
        self._top_k = np.array([knobs.top_k for knobs in space], dtype=np.float64)
        self._blocks = np.array([knobs.num_blocks for knobs in space], dtype=np.float64)
        self._log_top_k, self._log_blocks = np.log(self._top_k), np.log(self._blocks)

    def prefill(self, workload: Workload) -> tuple[Floats, Floats]:
        """Compute operations and bytes (n,) of reading the prompt; bytes for 2-byte weights."""
        s, n = workload.setting, workload.vision_tokens + workload.text_tokens
        const, linear, pairs = self._flops[s].T
        fixed, expert = self._bytes[s].T
        visited = np.minimum(self.shape.num_experts, n * self._top_k[s])
        return const + linear * n + pairs * (n * (n + 1) / 2), fixed + expert * visited

    def decode_step(self, workload: Workload) -> tuple[Floats, Floats]:
        """Compute operations and bytes (n,) of the first step after the prompt."""
        s, context = workload.setting, workload.vision_tokens + workload.text_tokens + 1
        flops, moved = self._step_flops[s].T, self._step_bytes[s].T
        return flops[0] + flops[1] * context, moved[0] + moved[1] * context

    def features(self, workload: Workload) -> Floats:
        """Compute features (n, F), not standardised; columns as in `FEATURES`."""
        s = workload.setting
        result = np.empty((len(workload), len(FEATURES)))
        counts = (workload.vision_tokens, workload.text_tokens, workload.crops, workload.distinct_crops)
        result[:, 0], result[:, 1], result[:, 3], result[:, 4] = np.log1p(np.array(counts))
        result[:, 2] = workload.vision_tokens + workload.text_tokens
        result[:, 5], result[:, 6], result[:, 7] = self._tier[s], self._log_top_k[s], self._log_blocks[s]
        result[:, 8:12] = np.log(np.array((*self.prefill(workload), *self.decode_step(workload)))).T
        result[:, 12] = workload.first_share
        result[:, 13] = np.log1p(workload.padded_tokens)
        return result

    def terms(self, workload: Workload) -> dict[str, Floats]:
        """Compute each stage's terms (n, P): operations and bytes that can each have their own rate.

        They are the terms of `core.cost`'s sums (dense products, experts and attention of a block, and bytes,
        which are proportional to the number of blocks), unscaled, plus a constant for everything else. The first
        decode step has its own constant, and one for each block. Prompts count at their own length, as a CPU reads
        them, and at the padded length, as a captured graph does.
        """
        s, n = workload.setting, workload.vision_tokens + workload.text_tokens
        blocks, top_k, one = self._blocks[s], self._top_k[s], np.ones(len(workload))
        each, first, padded = blocks * n, workload.first_share, blocks * workload.padded_tokens
        context = n + (np.maximum(workload.steps, 1.0) + 1) / 2
        return {
            "vision_encoder": np.stack((one, workload.distinct_crops), axis=1),
            "projector": np.stack((one, workload.crops, workload.distinct_crops), axis=1),
            "prefill": np.stack(
                (one, n, blocks, each, each * top_k, each * (n + 1) / 2, padded, padded * top_k), axis=1
            ),
            "decode_per_token": np.stack(
                (one, blocks, blocks * top_k, blocks * context, first, blocks * first), axis=1
            ),
        }


def _coefficients(
    knobs: KnobConfig, ranking: Ranking, shape: ModelShape
) -> tuple[tuple[float, float, float], tuple[float, float], tuple[float, float], tuple[float, float]]:
    """Prefill operations over (1, n, n (n + 1) / 2) and bytes over (1, expert visits); steps over (1, context)."""
    plan = Plan.build(knobs, ranking, shape)

    def cost(prompt: int, output_tokens: int = 1) -> Cost:
        return plan_cost(plan, shape, 0, 0, prompt, output_tokens)

    zero, one, two = (cost(n).flops["prefill"] for n in range(3))
    pairs = two - 2 * one + zero
    fixed = cost(0).bytes["prefill"]
    # This many tokens visit every expert, whatever the top-k.
    expert = (cost(shape.num_experts).bytes["prefill"] - fixed) / shape.num_experts
    first, second = cost(0, 2), cost(1, 2)
    steps = []
    for at_one, at_two in ((first.flops, second.flops), (first.bytes, second.bytes)):
        slope = at_two["decode"] - at_one["decode"]
        steps.append((at_one["decode"] - slope, slope))
    return (zero, one - zero - pairs, pairs), (fixed, expert), steps[0], steps[1]
