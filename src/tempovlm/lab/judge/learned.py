"""Checkpoints as the judge's rules, asked through their policy as the guard does, and the time of their choices.

Shapes: `T` tiers.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from tempovlm.control.guard import no_price
from tempovlm.control.learned import policy_from_checkpoint
from tempovlm.core.knobs import KnobSpace
from tempovlm.core.units import now_ms
from tempovlm.lab.judge.inputs import Sights
from tempovlm.lab.judge.offline import Floats, PolicyRule, Rule
from tempovlm.lab.table import DecisionTable

if TYPE_CHECKING:
    from tempovlm.engine.runner import Runner

_TIMED = 24
"""Questions on which a controller's own time is measured."""


def learned_rule(
    path: Path,
    space: KnobSpace,
    runner: Runner,
    weights: str,
    sights: Sights,
    looking_ms: Floats,
    price_per_ms: float = 0.0,
) -> Rule:
    """The rule of a checkpoint.

    Args:
        path: of the checkpoint.
        space: the model's settings.
        runner: of the model whose features the controller reads.
        weights: hash of that model's weights.
        sights: encoded pictures.
        looking_ms: (T,) what has passed when a picture is encoded at each tier.
        price_per_ms: accuracy that a millisecond costs.

    Raises:
        UserError: the file cannot be used with this model, or its scores have no price.
    """
    policy = policy_from_checkpoint(path, space, runner.model, runner.tokenizer, weights)
    if price_per_ms and policy.scale != "accuracy":
        raise no_price(policy.name, price_per_ms)
    return PolicyRule(policy, space, sights.content.question_of, sights, looking_ms, price_per_ms)


def measure_ms(rule: Rule, table: DecisionTable, latency_ms: Floats) -> float:
    """Median time of one question's choices at a budget that everything fits, pictures encoded before."""
    times_ms = []
    for i in range(min(_TIMED, len(table))):
        one, row_ms = table.take(np.array([i])), latency_ms[i : i + 1]
        budgets_ms = (float(row_ms.max()),)
        rule(one, row_ms, budgets_ms)
        start_ms = now_ms()
        rule(one, row_ms, budgets_ms)
        times_ms.append(now_ms() - start_ms)
    return float(np.median(times_ms))
