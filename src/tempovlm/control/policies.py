"""Policies without training: a fixed setting, and a table of measured accuracies."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from tempovlm.control.policy import Policy, Question
from tempovlm.control.select import TIE, Floats
from tempovlm.core.knobs import KnobConfig, KnobSpace

FIXED = "fixed"
"""Name of the policy that always runs one setting."""


@dataclass(frozen=True)
class FixedPolicy(Policy):
    """Always chooses one setting."""

    knobs: KnobConfig
    space: KnobSpace
    name: str = FIXED

    def look(self, question: Question, left_ms: float) -> Floats:  # noqa: ARG002 - the protocol's
        """Return 1 for the setting and 0 for all others: (K,)."""
        return np.eye(len(self.space))[self.space.index(self.knobs)]


@dataclass(frozen=True)
class TablePolicy(Policy):
    """Scores each setting by its mean accuracy, measured in advance.

    It sees neither the question nor the picture. Accuracies come from the model card, or from `prior_accuracy` if
    there is no card.
    """

    space: KnobSpace
    accuracy: Mapping[KnobConfig, float]
    name: str = "table"
    scale = "accuracy"
    tie = TIE

    def look(self, question: Question, left_ms: float) -> Floats:  # noqa: ARG002 - the protocol's
        """Return the accuracies (K,)."""
        return self._scores

    @cached_property
    def _scores(self) -> Floats:
        return np.array([self.accuracy[knobs] for knobs in self.space])


def prior_accuracy(space: KnobSpace) -> dict[KnobConfig, float]:
    """Return assumed accuracies for a model without measured ones: more compute is better.

    The tier weighs most, because depth cannot make up for details that the model never sees. These are not
    measured values.
    """
    accuracy = {}
    for knobs in space:
        accuracy[knobs] = 0.5 * (space.tiers.index(knobs.tier) + 1) / len(space.tiers)
        accuracy[knobs] += 0.3 * knobs.num_blocks / space.block_counts[-1]
        accuracy[knobs] += 0.2 * min(knobs.top_k / space.native_top_k, 1.0)
    return accuracy
