"""Tells schemathesis what a schema cannot say: which texts are pictures, and two rules about whole questions.

Loaded by schemathesis itself, which need not be installed where the tests run.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator
from typing import Any

import schemathesis
from hypothesis import strategies
from schemathesis.openapi.checks import RejectedPositiveData

PIXELS = (
    "data:image/gif;base64,R0lGODlhAQABAIAAAAAAAP///yH5BAEAAAAALAAAAAABAAEAAAIBRAA7",
    "data:image/png;base64,iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNkYPhfDwAChwGA60e6kgAAAABJRU5ErkJggg==",
)

schemathesis.openapi.format("uri", strategies.sampled_from(PIXELS))


@schemathesis.hook
def filter_body(_context: Any, body: Any) -> bool:
    """Ask whole questions where bodies are made at random."""
    return _is_whole(body)


@schemathesis.hook
def filter_failure(_context: Any, failure: Any, case: Any, _response: Any) -> bool:
    """Let the server refuse others, which are made field by field too."""
    return not isinstance(failure, RejectedPositiveData) or _is_whole(case.body)


def _is_whole(body: Any) -> bool:
    """Whether a question shows something and is about one picture at most; other values are not looked at."""
    if not isinstance(body, dict):
        return True
    parts = [part for key in ("instructions", "input", "messages") for part in _parts(body.get(key))]
    texts = [part for part in parts if isinstance(part, str)]
    has_question = any(unicodedata.category(letter)[0] not in "CZ" for text in texts for letter in text)
    return has_question and len(parts) - len(texts) < 2


def _parts(turns: Any) -> Iterator[Any]:
    """Yield the texts of turns, and what else they hold."""
    if isinstance(turns, str):
        yield turns
    for turn in turns if isinstance(turns, list) else ():
        content = turn.get("content") if isinstance(turn, dict) else None
        if isinstance(content, str):
            yield content
        for part in content if isinstance(content, list) else ():
            yield part.get("text", part) if isinstance(part, dict) else part
