"""The responses API says the same as chat completions, in its own form."""

from __future__ import annotations

from typing import Any

import pytest

from asgi import NEEDS, chat, post

pytest.importorskip("fastapi", reason=NEEDS)

PATH = "/v1/responses"


def asked(part: dict[str, Any] | None = None, **more: Any) -> dict[str, Any]:
    content: list[dict[str, Any]] = [{"type": "input_text", "text": "what does the sign say?"}]
    if part is not None:
        content.append({"type": "input_image", "image_url": part["image_url"]["url"], "detail": "low"})
    return {"input": [{"role": "user", "content": content}], "max_output_tokens": 3, **more}


def test_a_response_says_what_a_completion_says(app: Any, part: dict[str, Any]) -> None:
    part["image_url"]["detail"] = "low"
    completion = chat(app, part, latency_budget_ms=60_000).json
    body = post(app, PATH, asked(part, latency_budget_ms=60_000)).json
    (message,) = body["output"]
    assert (body["object"], message["type"], message["role"]) == ("response", "message", "assistant")
    assert message["content"][0]["text"] == completion["choices"][0]["message"]["content"]
    assert body["tempovlm"]["knobs"] == completion["tempovlm"]["knobs"]
    assert body["usage"]["total_tokens"] == completion["usage"]["total_tokens"]
    is_cut = completion["choices"][0]["finish_reason"] == "length"
    assert body["status"] == ("incomplete" if is_cut else "completed")
    assert body["incomplete_details"] == ({"reason": "max_output_tokens"} if is_cut else None)


def test_a_response_as_a_stream(app: Any, part: dict[str, Any]) -> None:
    whole = post(app, PATH, asked(part)).json
    events = post(app, PATH, asked(part, stream=True)).events
    assert [one["sequence_number"] for one in events] == list(range(len(events)))
    kinds = list(dict.fromkeys(one["type"] for one in events))
    assert kinds[:2] == ["response.created", "response.in_progress"]
    assert kinds[-1] == f"response.{whole['status']}"
    text = "".join(one["delta"] for one in events if one["type"] == "response.output_text.delta")
    assert text == whole["output"][0]["content"][0]["text"]
    assert events[-1]["response"]["usage"] == whole["usage"]
    assert len({one["response"]["id"] for one in events if "response" in one}) == 1


def test_texts_and_instructions(app: Any) -> None:
    assert post(app, PATH, {"input": "what?", "instructions": "Be brief."}).status == 200
    turns = [{"role": "assistant", "content": "a dog"}, {"role": "user", "content": "what color?"}]
    assert post(app, PATH, {"input": turns}).status == 200


@pytest.mark.parametrize(
    ("body", "param"),
    [
        (asked(previous_response_id="resp_1"), "previous_response_id"),
        ({"input": [{"role": "user", "content": "what?"}] * 300}, "input"),
        ({"input": [{"role": "user", "content": [{"type": "input_file"}]}]}, "input.0.content.0"),
        (asked({"image_url": {"url": "file:///a.png"}}), "input.0.content.1.image_url"),
        ({"input": [{"role": "user", "content": [{"type": "input_text", "text": 5}]}]}, "input.0.content.0.text"),
        ({"input": 5}, "input"),
    ],
    ids=["stored", "turns", "file", "path", "text", "number"],
)
def test_errors_name_the_field(app: Any, body: dict[str, Any], param: str) -> None:
    reply = post(app, PATH, body)
    assert (reply.status, reply.json["error"]["param"]) == (400, param)
