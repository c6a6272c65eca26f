"""The description of the API at `/openapi.json`: bodies, which are read and checked by hand, and errors."""

from __future__ import annotations

from http import HTTPStatus
from typing import Any

from fastapi import FastAPI
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

_SCHEMAS = "#/components/schemas/"
_REFUSALS = (400, 401, 404, 408, 413, 429, 500, 503)

_ERROR = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": "string"},
            },
        }
    },
}


def errors(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """Return the responses of errors, by their status."""
    content = {"application/json": {"schema": {"$ref": f"{_SCHEMAS}Error"}}}
    return {status: {"description": HTTPStatus(status).phrase, "content": content} for status in statuses}


def asking(kind: type[BaseModel], *, stream: bool) -> dict[str, Any]:
    """Return how a route that takes a question in a body is described."""
    body = {"required": True, "content": {"application/json": {"schema": {"$ref": _SCHEMAS + kind.__name__}}}}
    answers: dict[int | str, dict[str, Any]] = {200: {"description": "the answer"}}
    if stream:
        answers[200]["content"] = {"application/json": {}, "text/event-stream": {}}
    return {"openapi_extra": {"requestBody": body}, "responses": answers | errors(*_REFUSALS)}


def described(app: FastAPI, *bodies: type[BaseModel]) -> dict[str, Any]:
    """Return the description of an app, with the schemas of bodies and errors."""
    whole = app.openapi()
    _, found = models_json_schema([(one, "validation") for one in bodies], ref_template=_SCHEMAS + "{model}")
    schemas = whole.setdefault("components", {}).setdefault("schemas", {})
    schemas.update(found["$defs"] | {"Error": _ERROR})
    return whole
