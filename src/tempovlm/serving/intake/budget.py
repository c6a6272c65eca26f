"""The budget's way in: of the places where clients and proxies put a time limit, the first one that has one.

The clock starts when a request's headers have come, so the time to read its body counts.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from tempovlm.core.errors import UserError
from tempovlm.core.request import check_budget_ms
from tempovlm.serving.errors import invalid

BODY_FIELD, HEADER = "latency_budget_ms", "x-tempovlm-budget-ms"
"""The two places of our own; a wrong value there is an error, while one in a header of others is left out."""

CAP = "x-stainless-read-timeout"
"""Seconds after which OpenAI's clients give up reading; 600 by default, so it is no budget but an upper limit."""

_DEFAULT = "default"
"""The source of a server's own budget."""

ALIAS = re.compile(r"(?P<model>.+)@(?P<budget>[0-9]+(?:\.[0-9]+)?)ms")
"""A model's name with a budget, for clients that can send nothing else: `pocket@150ms`."""

_MS_OF_GRPC = {"H": 3.6e6, "M": 6e4, "S": 1e3, "m": 1.0, "u": 1e-3, "n": 1e-6}
_GRPC = re.compile(r"([0-9]{1,8})([HMSmun])")
_NUMBER = re.compile(r"[+-]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][+-]?[0-9]+)?")
"""A number as JSON and HTTP's headers write it; Python's own reading takes underscores and names as well."""

_MS_OF_S = 1e3


@dataclass(frozen=True, slots=True)
class Budget:
    """A request's budget, None for none, and the place where it was found, empty for none."""

    budget_ms: float | None
    source: str

    @property
    def place(self) -> str | None:
        """The field or header that the client sent; None for the server's own budget."""
        return self.source if self.source not in ("", _DEFAULT) else None


@dataclass(frozen=True, slots=True)
class Place:
    """A header of others that holds a budget.

    Attributes:
        name: of the header, in small letters, or of the two that it takes.
        sender: who writes it, for the documentation.
        read: from the headers and the most tokens of the answer to milliseconds; None where there are none.
    """

    name: str
    sender: str
    read: Callable[[Mapping[str, str], int], float | None]


def _positive(text: str | None, factor: float = 1.0) -> float | None:
    """Return a positive, finite number times a factor; None for anything else."""
    if text is None or _NUMBER.fullmatch(text) is None:
        return None
    return _limited(float(text) * factor)


def _limited(number: float) -> float | None:
    """Return a number that is positive and finite, and so can limit a time; None for another one."""
    return number if math.isfinite(number) and number > 0 else None


def _number(name: str, factor: float, sender: str) -> Place:
    return Place(name, sender, lambda headers, _: _positive(headers.get(name), factor))


def _grpc(headers: Mapping[str, str], _: int) -> float | None:
    found = _GRPC.fullmatch(headers.get("grpc-timeout", ""))
    return None if found is None else _positive(found[1], _MS_OF_GRPC[found[2]])


def _tokens(prefix: str) -> Callable[[Mapping[str, str], int], float | None]:
    """Read a limit for the first token and one for each later one; for several tokens both are needed."""

    def read(headers: Mapping[str, str], max_new_tokens: int) -> float | None:
        first_ms = _positive(headers.get(f"{prefix}-ttft-ms"))
        step_ms = 0.0 if max_new_tokens == 1 else _positive(headers.get(f"{prefix}-tpot-ms"))
        if first_ms is None or step_ms is None:
            return None
        return _limited(first_ms + (max_new_tokens - 1) * step_ms)

    return read


PLACES = (
    _number("x-envoy-expected-rq-timeout-ms", 1.0, "Envoy, for the server behind it"),
    _number("x-request-timeout-seconds", _MS_OF_S, "clients of Ray Serve"),
    Place("grpc-timeout", "gRPC gateways", _grpc),
    Place("x-llm-d-slo-ttft-ms, x-llm-d-slo-tpot-ms", "clients of llm-d; it strips them", _tokens("x-llm-d-slo")),
    Place("x-slo-ttft-ms, x-slo-tpot-ms", "older clients of llm-d", _tokens("x-slo")),
)
"""Headers of others in the order in which they are looked at: after our own two, before the model's alias."""


def split_alias(model: str) -> tuple[str, float | None]:
    """Return a model's name and the budget after it; the whole name and None where there is none."""
    found = ALIAS.fullmatch(model)
    budget_ms = None if found is None else _positive(found["budget"])
    return (model, None) if found is None or budget_ms is None else (found["model"], budget_ms)


def find_budget(
    field: Any, headers: Mapping[str, str], alias_ms: float | None, max_new_tokens: int, default_ms: float | None
) -> Budget:
    """Return the budget of a request.

    Args:
        field: the body's `latency_budget_ms`; None if it has none.
        headers: by their names in small letters.
        alias_ms: of the model's name.
        max_new_tokens: the most tokens of the answer.
        default_ms: the server's.

    Raises:
        ApiError: the body's field or our own header is no positive number of milliseconds.
    """
    found = _first(field, headers, alias_ms, max_new_tokens, default_ms)
    most_ms = _positive(headers.get(CAP), _MS_OF_S)
    if found.budget_ms is None or most_ms is None or most_ms >= found.budget_ms:
        return found
    return Budget(most_ms, CAP)


def _first(
    field: Any, headers: Mapping[str, str], alias_ms: float | None, max_new_tokens: int, default_ms: float | None
) -> Budget:
    if field is not None:
        return Budget(_own(field, BODY_FIELD), BODY_FIELD)
    if HEADER in headers:
        text = headers[HEADER]
        return Budget(_own(text if _NUMBER.fullmatch(text) is None else float(text), HEADER), HEADER)
    for place in PLACES:
        found_ms = place.read(headers, max_new_tokens)
        if found_ms is not None:
            return Budget(found_ms, place.name.partition(",")[0])
    if alias_ms is not None:
        return Budget(alias_ms, "model")
    return Budget(default_ms, "" if default_ms is None else _DEFAULT)


def _own(value: Any, name: str) -> float:
    try:
        return check_budget_ms(value, name)
    except UserError as error:
        raise invalid(str(error), name, "invalid_budget") from None
