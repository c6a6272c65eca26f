"""Policies that learn nothing: a fixed setting, and a table of measured accuracies."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

from tempovlm.control.policy import Features, Question
from tempovlm.core.knobs import KnobConfig, KnobSpace
from tempovlm.latency.profile import LatencyProfile

FIXED = "fixed"
"""The name of the policy that never chooses."""

TIE = 0.0025
"""Settings whose accuracies (shares of 1) differ by at most this are taken as equal; the cheaper one is chosen."""


@dataclass(frozen=True, slots=True)
class FixedPolicy:
    """Always the same setting."""

    knobs: KnobConfig
    name: str = FIXED

    def choose_tier(self, question: Question, budget_ms: float) -> str:  # noqa: ARG002 - the protocol's
        """The setting's tier."""
        return self.knobs.tier

    def choose_compute(self, features: Features | None, tier: str, budget_ms: float) -> tuple[int, int]:  # noqa: ARG002
        """The setting's top-k and depth."""
        return self.knobs.top_k, self.knobs.num_blocks


class Row(NamedTuple):
    """What the table holds of a setting."""

    knobs: KnobConfig
    accuracy: float
    p50_ms: float


@dataclass(frozen=True)
class TablePolicy:
    """The most accurate of the settings that the guard lets through, by accuracies measured in advance.

    It looks at the budget only: neither at the question nor at the picture. Accuracies are those of the model
    card, or `prior_accuracy` where there is none.
    """

    profile: LatencyProfile
    accuracy: Mapping[KnobConfig, float]
    name: str = "table"

    def choose_tier(self, question: Question, budget_ms: float) -> str:  # noqa: ARG002 - the guard masked by it
        """The tier of the best choice."""
        return _best([self._rows[knobs] for knobs in question.choices]).tier

    def choose_compute(self, features: Features | None, tier: str, budget_ms: float) -> tuple[int, int]:  # noqa: ARG002
        """Top-k and depth of the tier's best choice; without features, of its best setting."""
        choices = features.choices if features else self.profile.space.settings
        best = _best([self._rows[knobs] for knobs in choices if knobs.tier == tier])
        return best.top_k, best.num_blocks

    @cached_property
    def _rows(self) -> dict[KnobConfig, Row]:
        profile, accuracy = self.profile, self.accuracy
        return {
            knobs: Row(knobs, accuracy[knobs], profile.p50_total_ms(i)) for i, knobs in enumerate(profile.space)
        }


def _best(rows: list[Row]) -> KnobConfig:
    """The cheapest of the settings whose accuracy is within a tie of the best."""
    floor = max([row.accuracy for row in rows]) - TIE
    return min([row for row in rows if row.accuracy >= floor], key=lambda row: row.p50_ms).knobs


def prior_accuracy(space: KnobSpace) -> dict[KnobConfig, float]:
    """Ranks for a model of unknown accuracies: more compute is better, up to the trained top-k.

    The tier weighs most, because what the model does not see no depth makes up for. These are no measured values.
    """
    tiers, blocks = space.tiers, space.block_counts
    return {
        knobs: 0.5 * (tiers.index(knobs.tier) + 1) / len(tiers)
        + 0.3 * knobs.num_blocks / blocks[-1]
        + 0.2 * min(knobs.top_k / space.native_top_k, 1.0)
        for knobs in space
    }
