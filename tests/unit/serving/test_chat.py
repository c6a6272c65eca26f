"""Chat completions: answers whole and streamed, and what of a request reaches the model."""

from __future__ import annotations

from typing import Any

import pytest

from asgi import CHAT, NEEDS, chat, get, post, question

pytest.importorskip("fastapi", reason=NEEDS)

from tempovlm.api import TempoVLM
from tempovlm.serving import desk, gate
from tempovlm.serving.intake.asks import question_of
from timings import stages_add_up

VIDEO = {"type": "video_url", "video_url": {"url": "data:video/mp4;base64,AA=="}}


def test_a_whole_answer(app: Any, served: TempoVLM, part: dict[str, Any]) -> None:
    reply = chat(app, part, latency_budget_ms=60_000)
    body = reply.json
    (choice,) = body["choices"]
    assert (reply.status, body["object"], body["model"]) == (200, "chat.completion", "tiny")
    assert choice["message"]["role"] == "assistant"
    assert isinstance(choice["message"]["content"], str)
    assert choice["finish_reason"] in ("stop", "length")
    usage = body["usage"]
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]
    assert usage["completion_tokens"] <= 3
    told = body["tempovlm"]
    assert told["knobs"] == served.space.native.as_dict(), "everything fits a minute"
    assert (told["budget_ms"], told["budget_met"], told["deadline"]) == (60_000, True, "met")
    assert told["budget_source"] == "latency_budget_ms"
    assert stages_add_up(told["timings_ms"])
    assert told["timings_ms"]["queue"] > 0, "the clock started with the headers"
    assert body["metrics"]["queue_time_ms"] == pytest.approx(told["timings_ms"]["queue"])


def test_a_stream_says_the_same(app: Any, part: dict[str, Any]) -> None:
    whole = chat(app, part, latency_budget_ms=60_000).json
    reply = chat(app, part, latency_budget_ms=60_000, stream=True, stream_options={"include_usage": True})
    assert reply.headers["content-type"].startswith("text/event-stream")
    assert "content-length" not in reply.headers
    assert reply.body.endswith(b"data: [DONE]\n\n")
    *chunks, usage = reply.events
    assert {one["object"] for one in reply.events} == {"chat.completion.chunk"}
    assert len({one["id"] for one in reply.events}) == 1
    deltas = [one["choices"][0]["delta"] for one in chunks]
    assert deltas[0]["role"] == "assistant"
    assert "".join(one.get("content", "") for one in deltas) == whole["choices"][0]["message"]["content"]
    last = chunks[-1]
    assert last["choices"][0]["finish_reason"] == whole["choices"][0]["finish_reason"]
    assert last["tempovlm"]["knobs"] == whole["tempovlm"]["knobs"]
    assert (usage["choices"], usage["usage"]) == ([], whole["usage"])
    assert all(one["usage"] is None for one in chunks)


def test_usage_comes_if_asked_for(app: Any) -> None:
    events = chat(app, stream=True).events
    assert all(one["choices"] and "usage" not in one for one in events)


def test_an_answer_that_was_cut_says_so(app: Any, served: TempoVLM, monkeypatch: pytest.MonkeyPatch) -> None:
    real = served.answer
    monkeypatch.setattr(served, "answer", lambda *given, **options: real(*given, **options | {"waited_ms": 1e6}))
    body = chat(app, latency_budget_ms=1000).json
    assert body["choices"][0]["finish_reason"] == "length"
    assert (body["tempovlm"]["deadline"], body["tempovlm"]["budget_met"]) == ("cut", False)


@pytest.mark.parametrize(
    ("detail", "tier"), [("low", "low"), ("high", "high"), ("original", "high"), ("auto", "high")]
)
def test_detail_bounds_the_tier(app: Any, part: dict[str, Any], detail: str, tier: str) -> None:
    part["image_url"]["detail"] = detail
    assert chat(app, part, latency_budget_ms=60_000).json["tempovlm"]["knobs"]["tier"] == tier


def test_the_budget_chooses_the_setting(
    app: Any, served: TempoVLM, part: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (gate, desk):
        monkeypatch.setattr(module, "now_ms", lambda: 0.0)  # no time for the body, whatever the machine does
    told = chat(app, part, model="tiny@33ms", on_deadline="finish").json["tempovlm"]
    assert (told["budget_ms"], told["budget_source"]) == (33, "model")
    assert told["knobs"] != served.space.native.as_dict()


def test_what_reaches_the_model(app: Any, served: TempoVLM, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = dict[str, Any]()
    real = served.answer

    def answer(image: Any, text: str, **options: Any) -> Any:
        seen.update(options, image=image, text=text)
        return real(image, text, **options)

    monkeypatch.setattr(served, "answer", answer)
    more = {"temperature": 0.5, "top_p": 0.9, "stop": ["x"], "seed": 7, "style": "okvqa", "n": 1}
    ignored = {"service_tier": "fast", "verbosity": "low", "logit_bias": {}, "user": "me", "metadata": {"a": "b"}}
    assert chat(app, **more, **ignored, max_completion_tokens=2).status == 200
    assert (seen["temperature"], seen["top_p"], seen["stop"]) == (pytest.approx(0.5), pytest.approx(0.9), ("x",))
    assert (seen["seed"], seen["style"], seen["max_new_tokens"], seen["on_deadline"]) == (7, "okvqa", 2, "stop")
    assert (seen["image"], seen["budget_ms"]) == (None, None)
    assert chat(app, max_tokens=3.0).status == 200, "JSON has one kind of numbers"
    assert seen["max_new_tokens"] == 3
    chat(app, max_tokens=100_000)
    assert 16 < seen["max_new_tokens"] < 512, "as many as the context holds"


def test_time_for_the_reply_is_kept_free(app: Any, served: TempoVLM, monkeypatch: pytest.MonkeyPatch) -> None:
    real, seen, out = served.answer, list[float](), app.state.desk.out

    def answer(*given: Any, budget_ms: float, **options: Any) -> Any:
        seen.append(budget_ms)
        return real(*given, budget_ms=budget_ms, **options)

    monkeypatch.setattr(served, "answer", answer)
    for took_ms in (1.0, 5.0):
        for _ in range(99):
            out.observe(took_ms)
        out.observe(1e3 * took_ms)  # one of a hundred may take longer
        told = chat(app, latency_budget_ms=60_000).json["tempovlm"]
        assert (told["budget_ms"], told["budget_met"]) == (60_000, True)
    assert seen == [pytest.approx(59_999.0), pytest.approx(59_995.0)]


def test_conversations_are_one_question() -> None:
    turns = [("system", "Be brief."), ("user", "What is it?"), ("assistant", "A dog."), ("user", "Its color?")]
    assert question_of(turns) == "Be brief.\nWhat is it? Assistant: A dog. User: Its color?"


@pytest.mark.parametrize(
    ("more", "param", "code"),
    [
        ({"messages": []}, "messages", "invalid_value"),
        ({"messages": "hello"}, "messages", "invalid_value"),
        ({"messages": [{"role": "user", "content": [VIDEO]}]}, "messages.0.content.0", "invalid_value"),
        ({"messages": [{"role": "user", "content": ""}]}, "messages", "invalid_value"),
        ({"max_tokens": 0}, "max_tokens", "invalid_value"),
        ({"max_tokens": "5"}, "max_tokens", "invalid_value"),
        ({"temperature": -1}, "temperature", "invalid_value"),
        ({"n": 2}, "n", "invalid_value"),
        ({"latency_budget_ms": 0}, "latency_budget_ms", "invalid_budget"),
        ({"latency_budget_ms": "150"}, "latency_budget_ms", "invalid_budget"),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": 5}]}]},
         "messages.0.content.0.text", "invalid_value"),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]},
         "messages.0.content.0.text", "invalid_value"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": 5}}]}]},
         "messages.0.content.0.image_url.url", "invalid_value"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
         "messages.0.content.0.image_url", "invalid_value"),
        ({"messages": [{"role": "clown", "content": "hi"}]}, "messages.0.role", "invalid_value"),
        ({"price_per_ms": 1e300}, "price_per_ms", "invalid_value"),
        ({"style": "poem"}, "style", "invalid_value"),
        ({"seed": 1 << 70}, "seed", "invalid_value"),
        ({"stop": ["a"] * 17}, "stop", "invalid_value"),
        ({"stop": ["a", ""]}, "stop.1", "invalid_value"),
        ({"messages": [{"role": "user", "content": "is it? " * 5000}]}, "messages", "context_length_exceeded"),
    ],
)  # fmt: skip
def test_errors_name_the_field(app: Any, more: dict[str, Any], param: str | None, code: str) -> None:
    reply = post(app, CHAT, question() | more)
    assert reply.status == 400
    error = reply.json["error"]
    assert (error["param"], error["code"], error["type"]) == (param, code, "invalid_request_error")
    assert "\n" not in error["message"]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"stop": ""}, "stop: String should have at least 1 character"),
        ({"messages": ["hello"]}, "messages.0: Input should be an object"),
    ],
)
def test_errors_say_what_is_wrong_in_words_of_json(app: Any, more: dict[str, Any], message: str) -> None:
    assert post(app, CHAT, question() | more).json["error"]["message"] == message


def test_models(app_of: Any) -> None:
    app = app_of(aliases_ms=(50.0, 150.0))
    assert [one["id"] for one in get(app, "/v1/models").json["data"]] == ["tiny", "tiny@50ms", "tiny@150ms"]
    assert get(app, "/v1/models/tiny@77ms").json["root"] == "tiny"
    assert get(app, "/v1/models/other").code == "model_not_found"
    assert (chat(app, model="gpt").status, chat(app, model="gpt").code) == (404, "model_not_found")
    assert get(app, "/v1/nothing").code == "not_found"
    assert get(app, CHAT).code == "method_not_allowed"
