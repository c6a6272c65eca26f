"""A decision problem of twelve settings and two kinds of questions, whose best choices are known."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray

from tempovlm.control.learned.networks import Knob1PredictorBudgetLanguage, Knob2Knob3Predictor, TwoStageController
from tempovlm.core.knobs import KnobSpace
from tempovlm.lab.grpo.actors import Shared, TwoStageActor
from tempovlm.lab.grpo.environment import Environment, Task
from tempovlm.lab.options import GrpoOptions
from tempovlm.lab.table import Table

SPACE = KnobSpace(("low", "medium", "high"), (1, 2), (2, 4), 2)
BUDGETS_MS = (21.0, 41.0)
NUM_QUESTIONS = 48


def kinds() -> NDArray[np.bool_]:
    """Which questions need the picture; the others need compute."""
    return np.arange(NUM_QUESTIONS) % 2 == 0


def table() -> Table:
    """Half of the questions are right by tier, half by top-k and depth."""
    tier = np.array([SPACE.tiers.index(k.tier) / 2 for k in SPACE])
    compute = np.array([(k.top_k == 2) * 0.5 + (k.num_blocks == 4) * 0.5 for k in SPACE])
    return Table.of(
        SPACE,
        np.where(kinds()[:, None], tier, compute),
        latency_ms(),
        split="train",
        look_ms=np.tile([5.0, 15.0, 25.0], (NUM_QUESTIONS, 1)),
    )


def latency_ms() -> NDArray[np.float64]:
    """10 ms for every tier, 5 for the larger top-k and 5 for the larger depth."""
    one = [
        10.0 * (SPACE.tiers.index(k.tier) + 1) + 5.0 * (k.top_k == 2) + 5.0 * (k.num_blocks == 4) for k in SPACE
    ]
    return np.tile(one, (NUM_QUESTIONS, 1))


def world() -> Environment:
    return Environment(table())


def actor(*, learn_tier: bool, seed: int = 0) -> TwoStageActor:
    """A small controller; its language feature says of which kind a question is."""
    torch.manual_seed(seed)
    language = torch.tensor(kinds(), dtype=torch.float32).unsqueeze(1)
    vision = torch.zeros(NUM_QUESTIONS, 3, 2)
    controller = TwoStageController(
        Knob1PredictorBudgetLanguage(1, 16), Knob2Knob3Predictor(2, 1, 16, num_top_ks=2, num_block_counts=2)
    )
    return TwoStageActor(controller.eval(), Shared(language, vision, vision[:, 0]), learn_tier=learn_tier)


def draw(rows: NDArray[np.int64], rng: np.random.Generator) -> NDArray[np.float64]:
    return rng.choice(BUDGETS_MS, size=len(rows))


def task(options: GrpoOptions | None = None, **loop: object) -> Task:
    rows = np.arange(NUM_QUESTIONS)
    here = world()
    budgets = torch.tensor(BUDGETS_MS, dtype=torch.float64).repeat(NUM_QUESTIONS // 2)
    both = (torch.as_tensor(rows).repeat(2), torch.cat((budgets, budgets.flip(0))))
    short = {"batch_size": 24, "num_epochs": 3, "lr": 1e-2, "warm_start": 0}
    return Task(
        env=here,
        rows=rows,
        validation=here.batch(*both, mask=True),
        draw=draw,
        options=replace(options or GrpoOptions(), **{**short, **loop}),  # type: ignore[arg-type]
    )
