"""The body of a request: read within limits of size and time, then parsed within limits of depth and number."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Awaitable, Callable, Mapping, MutableMapping, Sequence
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from tempovlm.core.units import s_from_ms
from tempovlm.serving.errors import ApiError, invalid
from tempovlm.serving.intake.budget import BODY_FIELD

MOST_DEPTH = 32
"""Lists and objects within one another."""

MOST_ITEMS = 20_000
"""Lists, objects and commas: a body of empty lists would take a hundred times its size in memory."""

_MARK, _LETTERS = re.compile(rb'["\[\]{}]'), re.compile(rb'(?:[^"\\]++|\\.)*+', re.DOTALL)
"""The beginning of a string or one end of a list or an object; letters within a string."""

_PIECE_BYTES = 1 << 16
"""Letters are read by such pieces: no other thread runs while one is."""

_QUOTE = ord('"')
_STEPS = {b"[": 1, b"{": 1, b"]": -1, b"}": -1}

_DISCARD_MS = 2_000.0

Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Body = TypeVar("Body", bound=BaseModel)


class Gone(Exception):  # noqa: N818 - nobody is left to be told
    """The client went away before its request was whole."""


def _too_large(most_bytes: int) -> ApiError:
    message = f"the body has more than {most_bytes} bytes; send a smaller picture"
    return ApiError(413, "request_too_large", message, None, {"connection": "close"})


async def read_body(receive: Receive, headers: Mapping[str, str], most_bytes: int, timeout_ms: float) -> bytearray:
    """Read a body.

    Raises:
        ApiError: it is too large, which its header says or its bytes do, or comes too slowly.
        Gone: the client went away.
    """
    length = headers.get("content-length", "")
    if length.isdecimal() and (len(length) > len(str(most_bytes)) or int(length) > most_bytes):
        raise _too_large(most_bytes)
    data = bytearray()
    try:
        async with asyncio.timeout(s_from_ms(timeout_ms)):
            while True:
                message = await receive()
                if message["type"] != "http.request":
                    raise Gone
                data += message.get("body", b"")
                if len(data) > most_bytes:
                    raise _too_large(most_bytes)
                if not message.get("more_body", False):
                    return data
    except TimeoutError:
        raise ApiError(408, "request_timeout", "the body came too slowly", None, {"connection": "close"}) from None


async def discard(receive: Receive) -> None:
    """Read on for a moment and forget it: a client that still sends would not see an early refusal."""
    try:
        async with asyncio.timeout(s_from_ms(_DISCARD_MS)):
            while True:
                message = await receive()
                if message["type"] != "http.request" or not message.get("more_body", False):
                    return
    except TimeoutError:
        return


def parse(data: bytes | bytearray, kind: type[Body]) -> Body:
    """Return the object that a body is.

    Raises:
        ApiError: it is no JSON, too deep or of too many items, or a field is invalid; names the field.
    """
    _check_shape(data)
    try:
        value = json.loads(data.decode("utf-8"), parse_constant=_no_number)
    except ValueError:
        raise invalid("the body is not valid JSON in UTF-8", code="invalid_json") from None
    try:
        return kind.model_validate(value)
    except ValidationError as error:
        found = error.errors(include_url=False, include_input=False, include_context=False)
        # Of the alternatives for a value the one of its type says what is wrong, else the last one is the richest.
        worst = next((one for one in found if not one["type"].endswith("_type")), found[-1])
        param = _param(worst["loc"], value)
        message = "Input should be an object" if worst["type"] == "model_type" else worst["msg"]
        code = "invalid_budget" if param == BODY_FIELD else "invalid_value"
        raise invalid(f"{param or 'the body'}: {message}", param, code) from None


def _param(place: Sequence[int | str], value: Any) -> str | None:
    """Return the name of a field in a body, without the names of the alternatives that its place has as well."""
    names, inside, is_in_list = list[str](), value, False
    for part in place[:-1]:
        if isinstance(inside, list) and isinstance(part, int):
            inside, is_in_list = inside[part], True
        elif isinstance(inside, dict) and part in inside and not (is_in_list and part == inside.get("type")):
            inside, is_in_list = inside[part], False
        else:  # a type's name, which for an item of a list is the value of its field `type`
            is_in_list = False
            continue
        names.append(str(part))
    for part in place[-1:]:
        if isinstance(inside, list if isinstance(part, int) else dict) and "[" not in str(part):
            names.append(str(part))
    return ".".join(names) or None


def _no_number(name: str) -> None:
    raise ValueError(name)


def _check_shape(data: bytes | bytearray) -> None:
    """Raise an error for a body that is too deep or has too many items, before a parser recurses into it."""
    begins = data.count(b"[") + data.count(b"{")
    if begins <= MOST_DEPTH and begins + data.count(b",") <= MOST_ITEMS:
        return  # few of them, wherever they are
    depth = items = marks = at = 0
    while (mark := _MARK.search(data, at)) is not None:
        step = _STEPS.get(mark[0], 0)
        items += data.count(b",", at, mark.start()) + (step > 0)
        depth, marks = depth + step, marks + 1
        if marks > 4 * MOST_ITEMS:  # more strings and ends than that many items can have
            raise _too_many()
        if depth > MOST_DEPTH:
            raise invalid(f"the body is nested deeper than {MOST_DEPTH}", code="invalid_json")
        at = mark.end() if step else _end_of_string(data, mark.start())
    if items + data.count(b",", at) > MOST_ITEMS:
        raise _too_many()


def _end_of_string(data: bytes | bytearray, begin: int) -> int:
    """Return the place behind a string; one in which nothing is escaped, as a picture, is not read by letters."""
    end = data.find(b'"', begin + 1)
    if end >= 0 and data.find(b"\\", begin + 1, end) < 0:
        return end + 1
    at = begin + 1
    while at < len(data) and data[at] != _QUOTE:
        letters = _LETTERS.match(data, at, at + _PIECE_BYTES)
        if letters is None or letters.end() == at:
            return len(data)  # a backslash is the last of all
        at = letters.end()
    return min(at + 1, len(data))


def _too_many() -> ApiError:
    return invalid(f"the body has more than {MOST_ITEMS} items", code="invalid_json")
