"""Learned controllers as the judge's rules, whatever the kind in the file, and what their choices take.

Controllers that serve are asked through their policy, as the guard asks them. The LLM-based one is asked directly:
it reads glance and question with the model's first blocks and scores every setting at once. Trains nothing.

Shapes: `N` questions, `K` settings, `B` budgets, `T` tiers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from tempovlm.control.baselines import choose_best
from tempovlm.control.checkpoint import load_controller
from tempovlm.control.learned import Reader, policy_of
from tempovlm.control.llm_based import LLMBasedController, glance_tokens
from tempovlm.core.knobs import KnobSpace
from tempovlm.core.units import now_ms
from tempovlm.evaluation.judge_inputs import Sights
from tempovlm.evaluation.offline import Floats, Ints, PolicyRule, Rule
from tempovlm.lab.table import DecisionTable

if TYPE_CHECKING:
    from tempovlm.engine.runner import Runner

_TIMED = 24
"""Questions on which a controller's own time is measured."""


@dataclass(frozen=True, slots=True)
class LlmRule:
    """Asks an LLM-based controller, question by question, for all budgets at once."""

    controller: LLMBasedController
    runner: Runner
    space: KnobSpace
    sights: Sights

    @torch.inference_mode()
    def __call__(self, table: DecisionTable, latency_ms: Floats, budgets_ms: Sequence[float]) -> Ints:
        """(N, B) the highest joint logit among the settings that fit."""
        model, device = self.runner.model, self.runner.device
        budgets = torch.tensor(list(budgets_ms), dtype=torch.float32, device=device)
        rows = []
        for i in range(len(table)):
            sample = self.sights.content.of(table, i)
            stream = glance_tokens(sample.question, sample.style, model.config, self.runner.tokenizer).to(device)
            vision = self.sights(table, i, self.space.tiers[0]).vision
            glance = None if vision is None else vision[:1]
            lengths = torch.tensor([len(stream)], device=device)
            reading = self.controller.read(model, glance, stream[None], lengths)
            every = reading.take(torch.zeros(len(budgets), dtype=torch.int64, device=device))
            tier, top_k, blocks = (one.float() for one in self.controller.decide(model, every, budgets))
            joint = tier[:, :, None, None] + top_k[:, None, :, None] + blocks[:, None, None, :]
            scores = joint.flatten(1).cpu().numpy().astype(np.float64)
            cost_ms = np.broadcast_to(latency_ms[i], scores.shape)
            rows.append(choose_best(scores, cost_ms <= np.asarray(budgets_ms)[:, None], cost_ms, 0.0))
        return np.array(rows, dtype=np.int64).reshape(len(table), len(budgets_ms))


def learned_rule(
    path: Path, space: KnobSpace, runner: Runner, weights: str, sights: Sights, looking_ms: Floats
) -> Rule:
    """The rule of a checkpoint.

    Args:
        path: of the checkpoint.
        space: the model's settings.
        runner: of the model whose features the controller reads.
        weights: hash of that model's weights.
        sights: encoded pictures.
        looking_ms: (T,) what has passed when a picture is encoded at each tier.

    Raises:
        UserError: the file cannot be used with this model.
    """
    saved = load_controller(path, space, weights)
    if saved.kind == "llm_based":
        controller = saved.networks["controller"]
        assert isinstance(controller, LLMBasedController)
        return LlmRule(controller.to(runner.device), runner, space, sights)
    policy = policy_of(saved, space, Reader(runner.model, runner.tokenizer), path)
    return PolicyRule(
        policy, space, sights.content.question_of, sights, lambda table: np.tile(looking_ms, (len(table), 1))
    )


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
