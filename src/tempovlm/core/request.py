"""What goes in and what comes out: a request with its budget, an answer with its timings."""

from __future__ import annotations

import math
import unicodedata
from dataclasses import dataclass, field
from typing import Any, Literal

from tempovlm.core.errors import UserError
from tempovlm.core.knobs import KnobConfig

STAGES = ("preprocess", "control", "vision_encoder", "projector", "prefill", "decode")
"""The stages of an answer, in order; their times add up to the total."""

SCHEMA = "tempovlm.answer/1"

_INVISIBLE = ("Cc", "Cf", "Zl", "Zp", "Zs")
"""Unicode's categories of what is not seen: control and format characters, line ends and spaces."""

FinishReason = Literal["stop", "length", "deadline", "cancelled"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """One question about at most one picture.

    Attributes:
        images: zero or one picture: a path, encoded bytes, a PIL image, or its RGB pixels (H, W, 3) uint8.
        question: the user's text, not empty.
        budget_ms: milliseconds from acceptance to the last token; None runs the native setting.
        style: the prompt's style prefix; the default asks for a short answer.
        max_new_tokens: cap on generated tokens, the end token included.
        temperature: 0 is greedy.
        top_p: nucleus mass when sampling.
        seed: for sampling.
        stop: texts that end the answer when they appear after its first character, line ends and spaces too; an
            answer says nothing of them.
        on_deadline: `finish` lets an answer run over its budget, `stop` cuts it there.
    """

    images: tuple[Any, ...]
    question: str
    budget_ms: float | None = None
    style: str = "vqa2"
    max_new_tokens: int = 16
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    stop: tuple[str, ...] = ()
    on_deadline: Literal["finish", "stop"] = "finish"

    def __post_init__(self) -> None:
        if len(self.images) > 1:
            raise UserError(f"{len(self.images)} images: a request takes one image or none")
        _check_text("question", self.question)
        _check_text("style", self.style)
        if all(unicodedata.category(character) in _INVISIBLE for character in self.question):
            raise UserError("the question is empty; ask something about the picture")
        if self.budget_ms is not None:
            check_budget_ms(self.budget_ms)
        if self.max_new_tokens < 1:
            raise UserError(f"--max_new_tokens {self.max_new_tokens}: must be at least 1")
        if not (_is_finite(self.temperature) and self.temperature >= 0):
            raise UserError(f"--temperature {self.temperature}: must be zero or a positive number")
        if not 0 < self.top_p <= 1:
            raise UserError(f"--top_p {self.top_p}: must be above 0 and at most 1")
        if isinstance(self.stop, str) or not all(isinstance(text, str) and text for text in self.stop):
            raise UserError(f"--stop {self.stop!r}: must be a tuple of texts that are not empty")
        if self.on_deadline not in ("finish", "stop"):
            raise UserError(f"--on_deadline {self.on_deadline}: choose from finish, stop")
        if not -(1 << 63) <= self.seed < 1 << 64:
            raise UserError(f"--seed {self.seed}: must fit 64 bits")


def _check_text(name: str, text: object) -> None:
    """Raise a `UserError` unless it is text that can be encoded."""
    if not isinstance(text, str):
        raise UserError(f"the {name}: must be text, not {type(text).__name__}")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise UserError(f"the {name}: {text!r} holds bytes that are no UTF-8; write it in UTF-8") from None


def check_budget_ms(budget_ms: float, flag: str = "budget_ms") -> None:
    """Raise a `UserError` that names the flag unless the budget is a positive, finite number of milliseconds."""
    if not (_is_finite(budget_ms) and budget_ms > 0):
        raise UserError(f"--{flag} {budget_ms}: must be a positive, finite number of milliseconds")


def _is_finite(value: float) -> bool:
    """Whether it is a number at all, and finite."""
    try:
        return math.isfinite(value)
    except (TypeError, OverflowError):
        return False


@dataclass(frozen=True, slots=True, kw_only=True)
class Prediction:
    """What the choice expected a request to take: its median and its calibrated upper bound."""

    p50_ms: float
    upper_ms: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """The answer with the setting that was chosen and where the time went.

    Attributes:
        timings_ms: a time for each of `STAGES`, and `total` by a clock of its own.
        ttft_ms: acceptance to first token. tpot_ms: time per token after the first; None for one token.
        step_ms: the single decode steps.
        budget_met: None when there was no budget.
        budget_feasible: False when even the cheapest setting was not expected to fit.
    """

    text: str
    knobs: KnobConfig
    timings_ms: dict[str, float]
    ttft_ms: float
    tpot_ms: float | None
    budget_ms: float | None
    budget_met: bool | None
    budget_feasible: bool | None
    predicted: Prediction | None
    finish_reason: FinishReason
    policy: str
    num_vision_tokens: int
    num_text_tokens: int
    num_output_tokens: int
    model: str
    device: str
    tiling: tuple[int, int] | None
    tokens: tuple[int, ...] = ()
    step_ms: tuple[float, ...] = field(default=(), repr=False)
    schema: str = SCHEMA

    def to_json(self) -> dict[str, Any]:
        """The public JSON object of an answer; times in milliseconds, rounded to a microsecond."""
        predicted = self.predicted
        return {
            "answer": self.text,
            "knobs": {
                "tier": self.knobs.tier,
                "top_k": self.knobs.top_k,
                "num_blocks": self.knobs.num_blocks,
            },
            "budget_ms": self.budget_ms,
            "budget_met": self.budget_met,
            "budget_feasible": self.budget_feasible,
            "timings_ms": {name: round(value, 3) for name, value in self.timings_ms.items()},
            "ttft_ms": round(self.ttft_ms, 3),
            "tpot_ms": None if self.tpot_ms is None else round(self.tpot_ms, 3),
            "predicted_ms": predicted
            and {"p50": round(predicted.p50_ms, 3), "upper": round(predicted.upper_ms, 3)},
            "finish_reason": self.finish_reason,
            "policy": self.policy,
            "num_vision_tokens": self.num_vision_tokens,
            "num_text_tokens": self.num_text_tokens,
            "num_output_tokens": self.num_output_tokens,
            "model": self.model,
            "device": self.device,
            "schema": self.schema,
        }
