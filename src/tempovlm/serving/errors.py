"""Refusals in the shape of OpenAI's API, without paths and addresses of this machine."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

from tempovlm.core.errors import UserError
from tempovlm.core.units import s_from_ms

_KINDS = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}

_LEAST_RETRY_MS = 50.0

_PRIVATE = re.compile(r"0x[0-9a-fA-F]{4,}|(?<![\w.])(?:[A-Za-z]:)?(?:[/\\][\w.@+~-]+){2,}")
"""An address in memory, or a path of two parts or more."""


_FIELD = re.compile(r"\w+(?=[=:])")


class ApiError(Exception):
    """A request is answered with an error; `code` is stable and for programs, the message for people."""

    def __init__(
        self,
        status: int,
        code: str,
        message: str,
        param: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.code, self.param, self.headers = status, code, param, dict(headers or {})
        self.message = scrubbed(message)

    def body(self) -> dict[str, Any]:
        """Return the JSON object that OpenAI's clients read."""
        kind = _KINDS.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


def invalid(message: str, param: str | None = None, code: str = "invalid_value") -> ApiError:
    """Return the error that a field has a wrong value."""
    return ApiError(400, code, message, param)


def invalid_field(error: UserError) -> ApiError:
    """Return the error of a field that the library calls as the API does; its name begins the message."""
    found = _FIELD.match(str(error))
    return invalid(str(error), None if found is None else found[0])


def infeasible(message: str, param: str | None) -> ApiError:
    """Return the refusal of a budget that came by `param` and no setting can ever keep; clients ask no more."""
    return ApiError(429, "budget_infeasible", message, param, {"x-should-retry": "false"})


def later(status: int, code: str, message: str, drain_ms: float, *, closes: bool = False) -> ApiError:
    """Return a refusal that holds for `drain_ms`; clients ask again then, elsewhere if the connection closes."""
    wait_ms = max(drain_ms, _LEAST_RETRY_MS)
    headers = {"Retry-After": str(math.ceil(s_from_ms(wait_ms))), "retry-after-ms": f"{wait_ms:.0f}"}
    return ApiError(status, code, message, None, headers | ({"connection": "close"} if closes else {}))


def scrubbed(message: str) -> str:
    """Return a message on one line, without addresses in memory and paths."""
    return _PRIVATE.sub("…", " ".join(message.split()))
