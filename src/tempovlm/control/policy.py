"""The protocol of policies: a policy scores the settings, and the guard picks one.

The picture is encoded between the two scorings: the first decides the vision tier; the second decides top-k and
depth, can use the picture, and knows how much of the budget is left. A policy may ask for a glance before the
first: the global crop, which every tier needs and which is encoded once.

Shapes: `K` settings of the knob space, `C` crops, `G` tokens of a crop, `D` decoder width.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, Literal

from tempovlm.control.select import Floats


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """The request before its picture is encoded.

    Attributes:
        text: the user's question.
        image_size: height and width of the picture in pixels; None without a picture.
        left_ms: budget left when the tier is chosen; None without a budget.
        style: the prompt's style prefix.
        glance: projected tokens (1, G, D) of the global crop, for a policy with `sees_glance`; None without a
            picture.
    """

    text: str
    image_size: tuple[int, int] | None = None
    left_ms: float | None = None
    style: str = "vqa2"
    glance: Any = None


@dataclass(frozen=True, slots=True)
class Sight:
    """The encoded picture.

    Attributes:
        tier: the tier at which it was encoded.
        vision: projected tokens (C, G, D) on the model's device; None without a picture, and where a choice is
            only foreseen.
        num_vision_tokens: image features in the prompt. num_text_tokens: all other tokens of the prompt.
        pooled: (2 * D,) the picture's `vision_feature` as a tensor on the host, whose copy was queued when the
            picture was projected; None if nobody asked for it.
    """

    tier: str
    vision: Any
    num_vision_tokens: int
    num_text_tokens: int
    pooled: Any = None


class Policy(ABC):
    """Base class of policies: `look` is the one method that a policy must define.

    A policy may be slow, but pays for it: the guard subtracts its measured time from the budget.

    Attributes:
        name: reported in the answer.
        scale: meaning of the scores: expected accuracies in [0, 1], or logits or log-probabilities, which have no
            price in accuracy.
        tie: scores that differ by at most this count as equal; the cheaper setting is chosen.
        sees_picture: `settle` uses the encoded picture; otherwise the guard keeps the scores of `look`.
    """

    name: str
    scale: Literal["accuracy", "logit"] = "logit"
    tie: float = 0.0
    sees_picture: bool = False

    @property
    def sees_glance(self) -> bool:
        """Whether `look` needs the question's glance."""
        return False

    @property
    def usual(self) -> Floats | None:
        """(K,) mean scores over questions, by which the guard prices the time of those who wait.

        None has the guard ask for the scores of an ordinary question.
        """
        return None

    @abstractmethod
    def look(self, question: Question, left_ms: float) -> Floats:
        """Return scores (K,) of all settings before the picture is encoded.

        Args:
            question: the request.
            left_ms: rest of the budget.
        """

    def settle(self, question: Question, sight: Sight, left_ms: float) -> Floats:  # noqa: ARG002 - for those who see
        """Return scores (K,) once the picture is encoded; only those of its tier count.

        Args:
            question: the request.
            sight: the encoded picture.
            left_ms: rest of the budget.
        """
        return self.look(question, left_ms if question.left_ms is None else question.left_ms)
