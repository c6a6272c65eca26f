"""The one protocol of everything that chooses a setting: first the tier, then top-k and depth.

Between the two choices the picture is encoded, so the second one can look at it and knows exactly how much of the
budget is left.
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
    """

    text: str
    choices: tuple[KnobConfig, ...]
    image_size: tuple[int, int] | None = None
    budget_ms: float | None = None


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
