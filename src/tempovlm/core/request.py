"""A request with its budget, and its answer with timings."""

from __future__ import annotations

import logging
import unicodedata
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from datetime import datetime
from typing import Any, Literal

from tempovlm.core.checks import (
    check_names,
    checked_integer,
    checked_number,
    checked_text,
    checked_texts,
    shown,
    text,
    wrong_argument,
)
from tempovlm.core.errors import UserError
from tempovlm.core.knobs import KnobConfig

STAGES = ("queue", "preprocess", "control", "vision_encoder", "projector", "prefill", "decode")
"""The stages of an answer, in order; their times add up to the total."""

SCHEMA = "tempovlm.answer/1"

ON_DEADLINE = ("finish", "stop", "reject")
"""Ways to treat an answer that does not fit its budget."""

MOST_PRICE_PER_MS = 1e3
"""All accuracy for a microsecond: at a higher price the quickest setting runs as well."""

_LONGEST_WAIT_MS = 1e12
"""About thirty years: a longer time is of another unit, or no duration."""

_log = logging.getLogger("tempovlm.answers")
# Late answers are the caller's business: nothing is printed where a program has not set up logging. The parent
# `tempovlm` has no such handler, so that its own warnings are seen.
_log.addHandler(logging.NullHandler())

_INVISIBLE = ("Cc", "Cf", "Zl", "Zp", "Zs")
"""Unicode categories that are invisible: control and format characters, line ends and spaces."""

FinishReason = Literal["stop", "length", "deadline", "cancelled", "rejected"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """One question about at most one picture.

    Numbers and texts of NumPy and torch are converted to plain ones. None is only allowed for the budget, where it
    means no budget.

    Attributes:
        images: zero or one picture: a path, encoded bytes, a PIL image, or its RGB pixels (H, W, 3) uint8.
        question: the user's text, not empty.
        budget_ms: milliseconds from acceptance to the last token; None runs the native setting.
        style: the prompt's style prefix, empty for none; the default asks for a short answer.
        max_new_tokens: cap on generated tokens, the end token included.
        temperature: 0 is greedy.
        top_p: probability mass for nucleus sampling.
        seed: seed for sampling.
        stop: texts that end the answer when they appear after its first character, line ends and spaces too; they
            are not part of the answer.
        on_deadline: `finish` lets an answer run over its budget, `stop` ends it at the deadline wherever it is,
            `reject` refuses it before the picture is encoded if it is not expected to fit.
        price_per_ms: expected accuracy, as a share of 1, that a millisecond must gain: of the settings that fit,
            the one with the highest accuracy - price * latency runs. 0 may spend the whole budget.
        weight: how much a right answer counts beside those of others that wait: with 2 the time of others costs it
            half as much accuracy.
        waited_ms: time that the request has waited already; it counts for the budget.
        request_id: your name for the request, which the answer and its line in the log bear; made if None.

    Raises:
        UserError: a value is invalid; names the field.
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
    on_deadline: Literal["finish", "stop", "reject"] = "finish"
    price_per_ms: float = 0.0
    weight: float = 1.0
    waited_ms: float = 0.0
    request_id: str | None = None

    def __post_init__(self) -> None:
        for name, check in _CHECKS.items():
            object.__setattr__(self, name, check(getattr(self, name)))
        if self.price_per_ms and self.budget_ms is None:
            raise wrong_argument("price_per_ms", self.price_per_ms, "needs a budget; give budget_ms too")


_OPTIONAL = tuple(one.name for one in fields(Request))[len(("images", "question", "budget_ms")) :]


def _images(value: object) -> tuple[Any, ...]:
    if not isinstance(value, Sequence) or isinstance(value, str | bytes | bytearray | memoryview):
        raise UserError(f"images: must be a tuple of one picture or none, not {type(value).__name__}")
    images = tuple(value)
    if len(images) > 1:
        raise UserError(f"{len(images)} images: a request takes one image or none")
    if images and images[0] is None:
        raise UserError("images: None is no picture; leave the tuple empty to ask without one")
    return images


def check_question(value: object) -> str:
    """Return a question as plain text.

    Raises:
        UserError: it is no text, cannot be encoded, or shows nothing.
    """
    question = checked_text("the question", value)
    if all(unicodedata.category(character) in _INVISIBLE for character in question):
        raise UserError("the question is empty; ask something about the picture")
    return question


def check_price_per_ms(value: object) -> float:
    """Return the price as a plain number.

    Raises:
        UserError: it is negative, or so large that its product with a time may be infinite.
    """
    meaning = f"a number from 0 to {MOST_PRICE_PER_MS:g}, such as 0.0005"
    return checked_number("price_per_ms", value, meaning, lambda number: 0 <= number <= MOST_PRICE_PER_MS)


def check_weight(value: object, name: str = "weight") -> float:
    """Return the weight of a request, or the argument of a `name`, as a plain number.

    Raises:
        UserError: it is not positive and finite.
    """
    return checked_number(name, value, "a positive number, such as 2", lambda number: number > 0)


def check_waited_ms(value: object) -> float:
    """Return the time that a request has waited as a plain number.

    Raises:
        UserError: it is negative, or longer than any request has waited.
    """
    meaning = "zero or a positive number of milliseconds, at most 1e12"
    return checked_number("waited_ms", value, meaning, lambda number: 0 <= number <= _LONGEST_WAIT_MS)


def _top_p(value: object) -> float:
    return checked_number("top_p", value, "a number above 0 and at most 1", lambda number: 0 < number <= 1)


def _seed(value: object) -> int:
    number = checked_integer("seed", value)
    if not -(1 << 63) <= number < 1 << 64:
        raise wrong_argument("seed", number, "must fit 64 bits")
    return number


def _on_deadline(value: object) -> str:
    name = text(value)
    if name not in ON_DEADLINE:
        raise wrong_argument("on_deadline", value, f"choose from {', '.join(ON_DEADLINE)}")
    return name


def request_of(image: Any, question: str, budget_ms: float | None, options: Mapping[str, Any]) -> Request:
    """Return a request about a picture, or without one if `image` is None.

    Raises:
        UserError: an option is no field of a request; suggests the nearest one.
    """
    check_names(options, _OPTIONAL)
    images = () if image is None else (image,)
    return Request(images=images, question=question, budget_ms=budget_ms, **options)


def requests_of(given: object, budget_ms: float | None, options: Mapping[str, Any]) -> list[Request]:
    """Return the requests of a batch; pairs of image and question use budget and options.

    Raises:
        UserError: an item is invalid; names its position.
    """
    if not isinstance(given, Iterable) or isinstance(given, str | bytes):
        raise UserError(f"requests: must be a list of Request or (image, question), not {type(given).__name__}")
    ready: list[Request] = []
    for place, one in enumerate(given):
        if isinstance(one, Request):
            ready.append(one)
        elif isinstance(one, tuple | list) and len(one) == 2:
            ready.append(request_of(one[0], one[1], budget_ms, options))
        else:
            raise UserError(
                f"requests: number {place}, a {type(one).__name__}, is no Request or (image, question)"
            )
    return ready


def check_budget_ms(budget_ms: object, flag: str = "budget_ms") -> float:
    """Return the budget as a plain number.

    Raises:
        UserError: it is not a positive, finite number of milliseconds; names the flag.
    """
    meaning = "a positive, finite number of milliseconds"
    return checked_number(flag, budget_ms, meaning, lambda number: number > 0)


_CHECKS: dict[str, Callable[[Any], object]] = {
    "images": _images,
    "question": check_question,
    "budget_ms": lambda value: None if value is None else check_budget_ms(value),
    "style": lambda value: checked_text("the style", value),
    "max_new_tokens": lambda value: checked_integer("max_new_tokens", value, 1),
    "temperature": lambda value: checked_number("temperature", value, "zero or a positive number"),
    "top_p": _top_p,
    "seed": _seed,
    "stop": lambda value: checked_texts("stop", value),
    "on_deadline": _on_deadline,
    "price_per_ms": check_price_per_ms,
    "weight": check_weight,
    "waited_ms": check_waited_ms,
    "request_id": lambda value: None if value is None else checked_text("request_id", value),
}
"""For each field, the function that converts and checks it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Prediction:
    """Predicted time of a request at the choice: median and calibrated upper bound."""

    p50_ms: float
    upper_ms: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """The answer with the chosen setting and the time of each stage.

    Attributes:
        timings_ms: the time of each of `STAGES`, and `total`, which is measured separately.
        ttft_ms: acceptance to first token. tpot_ms: time per token after the first; None for one token.
        step_ms: the single decode steps.
        budget_met: whether there was an answer, a cut one too, within the budget; None without a budget.
        budget_feasible: False if not even the cheapest setting was expected to fit.
        tiling: rows and columns of detail crops; None without a picture.
        accepted_at: date and time of acceptance. request_id: the request's, or a made one.
        margin: the factor on calibrated bounds when the setting was chosen.
        weights_hash: of the model; None where it is not known.
        backend: that ran it on a CPU, `torch` or `kernels (TYPE-INSTRUCTIONS)`; None elsewhere.
    """

    text: str
    knobs: KnobConfig
    timings_ms: dict[str, float]
    ttft_ms: float | None
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
    stopped_at: str | None = None
    tokens: tuple[int, ...] = ()
    step_ms: tuple[float, ...] = ()
    accepted_at: datetime | None = None
    request_id: str = ""
    margin: float = 1.0
    weights_hash: str | None = None
    backend: str | None = None
    schema: str = SCHEMA

    def __repr__(self) -> str:
        budget = "" if self.budget_ms is None else f" of {self.budget_ms:g}"
        took = f"{self.timings_ms['total']:.1f}{budget} ms"
        return f"Answer({shown(repr(self.text))}, {took}, {self.outcome}, {self.knobs}, policy {self.policy})"

    @property
    def outcome(self) -> str:
        """Return in a word or two how the answer stands to its budget."""
        if self.finish_reason in ("rejected", "cancelled"):
            return self.finish_reason
        if self.budget_ms is None:
            return "no budget"
        if self.finish_reason == "deadline" and not self.num_output_tokens:
            return "stopped before the answer"
        is_late = self.timings_ms["total"] > self.budget_ms
        return ("late" if is_late else "on time") + (", cut" if self.finish_reason == "deadline" else "")

    def to_json(self) -> dict[str, Any]:
        """Return the public JSON object of an answer; times in milliseconds, rounded to a microsecond."""
        predicted, tiling = self.predicted, self.tiling
        return {
            "time": None if self.accepted_at is None else self.accepted_at.isoformat(timespec="milliseconds"),
            "request_id": self.request_id,
            "answer": self.text,
            "knobs": self.knobs.as_dict(),
            "budget_ms": self.budget_ms,
            "budget_met": self.budget_met,
            "budget_feasible": self.budget_feasible,
            "timings_ms": {name: round(value, 3) for name, value in self.timings_ms.items()},
            "ttft_ms": None if self.ttft_ms is None else round(self.ttft_ms, 3),
            "tpot_ms": None if self.tpot_ms is None else round(self.tpot_ms, 3),
            "predicted_ms": predicted
            and {"p50": round(predicted.p50_ms, 3), "upper": round(predicted.upper_ms, 3)},
            "finish_reason": self.finish_reason,
            "stopped_at": self.stopped_at,
            "policy": self.policy,
            "margin": round(self.margin, 4),
            "tiling": None if tiling is None else {"rows": tiling[0], "columns": tiling[1]},
            "num_vision_tokens": self.num_vision_tokens,
            "num_text_tokens": self.num_text_tokens,
            "num_output_tokens": self.num_output_tokens,
            "model": self.model,
            "weights_hash": self.weights_hash,
            "device": self.device,
            "backend": self.backend,
            "schema": self.schema,
        }


def log_answer(answer: Answer) -> None:
    """Log an answer, which the record holds as `answer`: a warning if it was late or refused, else information."""
    total_ms, budget_ms, predicted = answer.timings_ms["total"], answer.budget_ms, answer.predicted
    is_refused = answer.finish_reason == "rejected"
    is_late = budget_ms is not None and total_ms > budget_ms
    level = logging.WARNING if is_refused or is_late else logging.INFO
    if not _log.isEnabledFor(level):
        return
    _log.log(
        level,
        "%s: %s by %s, predicted %s, took %.1f ms%s, %s",
        shown(answer.request_id),
        answer.knobs,
        answer.policy,
        "nothing" if predicted is None else f"{predicted.p50_ms:.1f} (at most {predicted.upper_ms:.1f}) ms",
        total_ms,
        "" if budget_ms is None else f" of {budget_ms:g}",
        answer.outcome,
        extra={"answer": answer},
    )
