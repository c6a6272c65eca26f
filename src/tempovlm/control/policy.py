"""The one protocol of everything that chooses a setting: first the tier, then top-k and depth.

Between the two choices the picture is encoded, so the second one can look at it and knows exactly how much of the
budget is left. A policy may ask for a glance before the first choice: the global crop, which every tier needs and
which is encoded then and not again. And it may choose the whole setting at once.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from tempovlm.core.knobs import KnobConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """What is known before the picture is looked at.

    Attributes:
        text: the user's question.
        choices: the settings still allowed, cheapest index first; a choice outside is corrected by the guard.
        image_size: height and width of the picture in pixels; None without a picture.
        budget_ms: what was left of the budget at the first choice; None where there is no budget.
        style: the prompt's style prefix.
        glance: projected tokens (1, G, D) of the global crop, for a policy that glances; None without a picture.
    """

    text: str
    choices: tuple[KnobConfig, ...]
    image_size: tuple[int, int] | None = None
    budget_ms: float | None = None
    style: str = "vqa2"
    glance: Any = None


@dataclass(frozen=True, slots=True)
class Sight:
    """The encoded picture.

    Attributes:
        vision: projected tokens (C, G, D) on the model's device; None without a picture.
        num_vision_tokens: image features that the decoder will read. num_text_tokens: the rest of its prompt.
    """

    vision: Any
    num_vision_tokens: int
    num_text_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Features:
    """What is known once the picture is encoded.

    Attributes:
        question: the first choice's view. choices: the settings still allowed, all of the chosen tier.
        sight: the encoded picture.
    """

    question: Question
    choices: tuple[KnobConfig, ...]
    sight: Sight


@runtime_checkable
class Policy(Protocol):
    """Chooses settings; may be slow, but pays for it: the guard subtracts its measured time."""

    @property
    def name(self) -> str:
        """Reported in the answer."""

    def choose_tier(self, question: Question, budget_ms: float) -> str:
        """The tier, given the budget that is left."""

    def choose_compute(self, features: Features | None, tier: str, budget_ms: float) -> tuple[int, int]:
        """Top-k and number of blocks, given the budget that is left."""


@runtime_checkable
class Glances(Protocol):
    """What a policy has beside its choices if it may look at the picture before the first one."""

    @property
    def glances(self) -> bool:
        """Whether its questions need a glance."""


@runtime_checkable
class ChoosesAtOnce(Protocol):
    """A policy that chooses the whole setting first; it is not asked a second time."""

    def choose_setting(self, question: Question, budget_ms: float) -> KnobConfig:
        """All three knobs, given the budget that is left."""


def needs_glance(policy: Policy) -> bool:
    """Whether a policy has to see the global crop before its first choice."""
    return isinstance(policy, Glances) and policy.glances
