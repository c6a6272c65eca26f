"""What operators see: metrics, the access log, names of requests, probes, and measuring while serving."""

from __future__ import annotations

import asyncio
import json
import logging
import re
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from asgi import CHAT, NEEDS, ask, chat, get, post, question

pytest.importorskip("fastapi", reason=NEEDS)

from prometheus_client.parser import text_string_to_metric_families as families

from tempovlm import __version__
from tempovlm.api import TempoVLM
from tempovlm.core.errors import UserError
from tempovlm.serving import errors
from tempovlm.serving.intake.asks import Ask
from tempovlm.serving.options import Options


def samples(app: Any) -> dict[str, float]:
    """Values by name, and by name and the label that tells them apart."""
    found = dict[str, float]()
    for family in families(get(app, "/metrics").body.decode()):
        for one in family.samples:
            labels = [value for name, value in one.labels.items() if name not in ("model_name", "le")]
            found[" ".join([one.name, *labels])] = one.value
    return found


def test_metrics(app: Any, part: dict[str, Any]) -> None:
    chat(app, part, latency_budget_ms=60_000)
    chat(app, part)
    chat(app, latency_budget_ms=1)
    found = samples(app)
    assert found["vllm:e2e_request_latency_seconds_count"] == 2
    assert 0 < found["vllm:request_prefill_time_seconds_sum"] < found["vllm:e2e_request_latency_seconds_sum"]
    assert (found["vllm:num_requests_running"], found["vllm:num_requests_waiting"]) == (0, 0)
    assert found["vllm:generation_tokens_total"] >= 2
    assert found["tempovlm:deadlines_total met"] == 1
    assert found["tempovlm:lane_price_per_ms"] == 0
    assert found["tempovlm:requests_refused_total budget_infeasible"] == 1
    assert found["tempovlm:request_budget_seconds_sum"] == pytest.approx(60.0)
    assert sum(value for name, value in found.items() if name.startswith("tempovlm:settings_total")) == 2
    assert not [name for name, value in found.items() if value != value], "one NaN spoils a sum for good"


def test_every_question_is_counted_once(
    app: Any, served: TempoVLM, monkeypatch: pytest.MonkeyPatch, part: dict[str, Any]
) -> None:
    """Those that were answered are answers; the others, the client that left amid its body too, are refused."""
    chat(app, latency_budget_ms=60_000)
    chat(app, temperature=3)
    left = asyncio.Event()
    left.set()
    assert asyncio.run(ask(app, CHAT, [b'{"messages": ['], leave=left, stall=True)).status == 499
    real = served.answer
    monkeypatch.setattr(served, "answer", lambda *given, **more: real(*given, **more | {"waited_ms": 1e6}))
    assert chat(app, part, latency_budget_ms=1000, on_deadline="reject").code == "queue_full"
    found = samples(app)
    refused = {name: value for name, value in found.items() if name.startswith("tempovlm:requests_refused_total")}
    codes = ("invalid_value", "client_left", "queue_full")
    assert refused == {f"tempovlm:requests_refused_total {code}": 1 for code in codes}
    for prefix in ("vllm:request_success_total", "tempovlm:deadlines_total", "tempovlm:settings_total"):
        assert sum(value for name, value in found.items() if name.startswith(prefix)) == 1, prefix


def test_a_huge_budget_does_not_drown_the_others(app: Any) -> None:
    chat(app, latency_budget_ms=1e308)
    chat(app, latency_budget_ms=60_000)
    day_s = 86_400.0
    assert samples(app)["tempovlm:request_budget_seconds_sum"] == pytest.approx(day_s + 60.0)


def test_a_failure_beside_the_model_is_told_counted_and_logged(
    app: Any, served: TempoVLM, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("secret at /srv/models/tiny")

    caplog.set_level(logging.INFO, "tempovlm.access")
    with monkeypatch.context() as broken:
        broken.setattr(served, "guard_for", fail)
        reply = chat(app, headers={"x-request-id": "page-17"})
    assert (reply.status, reply.code, reply.headers["x-request-id"]) == (500, "internal_error", "page-17")
    assert b"secret" not in reply.body
    assert "secret" in caplog.text
    (line,) = [record.getMessage() for record in caplog.records if record.name == "tempovlm.access"]
    assert "status=500 code=internal_error" in line
    assert samples(app)["tempovlm:requests_refused_total internal_error"] == 1


@pytest.mark.parametrize("log_json", [False, True])
def test_the_access_log(
    app_of: Callable[..., Any], caplog: pytest.LogCaptureFixture, part: dict[str, Any], log_json: bool
) -> None:
    app = app_of(log_json=log_json)
    caplog.set_level(logging.INFO, "tempovlm.access")
    chat(app, part, model="tiny@60000ms", headers={"x-request-id": "page-17"})
    chat(app, latency_budget_ms=1)
    first, second = (record.getMessage() for record in caplog.records if record.name == "tempovlm.access")
    if log_json:
        record, refused = json.loads(first), json.loads(second)
        assert (record["request_id"], record["status"], record["budget_ms"]) == ("page-17", 200, 60_000)
        assert (record["verdict"], record["budget_from"]) == ("on time", "model")
        assert record["stages_ms"]["prefill"] > 0
        assert (refused["status"], refused["code"]) == (429, "budget_infeasible")
    else:
        assert first.startswith("request_id=page-17 method=POST path=/v1/chat/completions status=200 took_ms=")
        assert 'verdict="on time"' in first
        assert "code=budget_infeasible" in second
    assert "sign" not in first + second, "texts of users are not logged"


def test_what_a_connection_keeps_of_a_request_has_no_picture(app: Any, part: dict[str, Any]) -> None:
    scopes = list[dict[str, Any]]()

    async def kept(scope: dict[str, Any], receive: Any, send: Any) -> None:
        scopes.append(scope)
        await app(scope, receive, send)

    for more in ({}, {"latency_budget_ms": 1}, {"stream": True}):
        post(kept, CHAT, question(part, **more))
    assert len(scopes) == 3
    assert not [value for one in scopes for value in one["state"].values() if isinstance(value, Ask | bytes)]


def test_requests_have_names(app: Any) -> None:
    reply = chat(app, headers={"x-request-id": "page-17"})
    assert (reply.headers["x-request-id"], reply.json["tempovlm"]["request_id"]) == ("page-17", "page-17")
    for name in ("two words", "a\tb", "x" * 129):
        assert chat(app, headers={"x-request-id": name}).headers["x-request-id"] != name
    assert len(get(app, "/v1/nothing").headers["x-request-id"]) == 32


def test_probes(app: Any) -> None:
    assert [get(app, path).status for path in ("/health", "/ready", "/version")] == [200] * 3
    for path in ("/health", "/ready", "/version", "/metrics", "/"):
        assert asyncio.run(ask(app, path, method="HEAD")).status == 200
    assert get(app, "/version").json == {"version": __version__}


def test_the_description_is_whole(app: Any) -> None:
    text = get(app, "/openapi.json").body.decode()
    found = json.loads(text)
    schemas = found["components"]["schemas"]
    assert {"messages", "latency_budget_ms", "stream"} <= set(schemas["ChatRequest"]["properties"])
    used = set(re.findall(r'"#/components/schemas/(\w+)"', text))
    assert {"ChatRequest", "ResponsesRequest", "Error"} <= used <= set(schemas)
    assert "429" in found["paths"]["/v1/chat/completions"]["post"]["responses"]
    assert "/calibrate" not in found["paths"]


def test_pages_of_other_origins_are_kept_out_unless_named(app_of: Callable[..., Any]) -> None:
    origin = {"origin": "https://app.example.com"}
    assert "access-control-allow-origin" not in get(app_of(), "/health", **origin).headers
    named = app_of(allow_origins=(origin["origin"],))
    assert get(named, "/health", **origin).headers["access-control-allow-origin"] == origin["origin"]
    assert "access-control-allow-origin" not in get(named, "/health", origin="https://evil.example").headers
    exposed = get(named, "/health", **origin).headers["access-control-expose-headers"].lower()
    full = errors.later(429, "queue_full", "wait", 100.0).headers | errors.infeasible("never", None).headers
    assert not [name for name in full if name.lower() not in exposed], "clients in a page could not obey them"


def test_the_machine_is_measured_anew_where_that_is_allowed(
    app_of: Callable[..., Any], served: TempoVLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert post(app_of(), "/calibrate", {}).status == 404
    app, codes = app_of(allow_calibrate=True), []

    def calibrate(*, force: bool) -> None:
        assert force
        codes.append(chat(app).code)

    monkeypatch.setattr(served, "calibrate", calibrate)
    reply = post(app, "/calibrate", {})
    assert reply.status == 200
    assert reply.json["feasible_from_ms"] < reply.json["everything_fits_from_ms"]
    assert codes == ["calibrating"]
    assert chat(app).status == 200


def test_measuring_is_due_where_an_idle_server_has_drifted(
    app: Any, served: TempoVLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    now_ms, margin = 1e15, SimpleNamespace(factor=1.0)
    monkeypatch.setattr(served, "guard_for", lambda *_, **__: SimpleNamespace(margin=margin))
    found = app.state.desk
    assert not found.is_due(now_ms)
    for margin.factor in (1.5, 0.7):
        assert found.is_due(now_ms)
    assert not found.is_due(0.0), "somebody has asked just now"
    found.is_draining = True
    assert not found.is_due(now_ms)


@pytest.mark.parametrize(
    ("options", "flag"),
    [
        ({"default_budget_ms": 0}, "--default_budget_ms"),
        ({"max_queue": 0}, "--max_queue"),
        ({"max_body_mb": -1}, "--max_body_mb"),
        ({"api_keys": ("",)}, "--api_key"),
        ({"price": "cheap"}, "--price cheap: must be derived, 0, or accuracy per ms"),
        ({"price": 1e300}, "--price 1e+300: must be derived, 0, or accuracy per ms up to 1000"),
        ({"allow_remote_images": ("https://a.example",)}, "--allow_remote_images https://a.example"),
        ({"allow_origins": ("a.example",)}, "--allow_origins a.example"),
        ({"discipline": "lifo"}, "--discipline lifo: choose from edf, fcfs, slack"),
        ({"api_keys": ("a",), "key_weights": (0.0,)}, "--key_weights 0.0"),
        ({"api_keys": ("a",), "key_weights": (1.0, 2.0)}, "--key_weights"),
    ],
)
def test_options_are_checked(options: dict[str, Any], flag: str) -> None:
    with pytest.raises(UserError) as caught:
        Options(**options)
    assert caught.value.flagged.startswith(flag)


def test_a_price_needs_accuracies(served: TempoVLM, monkeypatch: pytest.MonkeyPatch) -> None:
    from tempovlm.serving.app import create_app

    monkeypatch.setattr(served, "_wanted", SimpleNamespace(name="greedy", scale="logit"))
    monkeypatch.setattr("tempovlm.control.policy.Policy", SimpleNamespace)
    with pytest.raises(UserError, match="policy greedy scores settings by logits") as caught:
        create_app(served, Options(price="0.001"))
    assert caught.value.flagged.startswith("--price 0.001")


def test_a_default_budget_counts_where_none_came(app_of: Callable[..., Any]) -> None:
    told = chat(app_of(default_budget_ms=60_000.0)).json["tempovlm"]
    assert (told["budget_ms"], told["budget_source"]) == (60_000, "default")


def test_no_redirect_names_a_host(app: Any) -> None:
    for path in ("/static", "/health/", "/v1/models/"):
        reply = get(app, path, host="evil.example")
        assert reply.status == 404
        assert "location" not in reply.headers


@pytest.mark.parametrize("log_json", [True, False])
def test_control_characters_do_not_reach_the_log(
    app_of: Callable[..., Any], caplog: pytest.LogCaptureFixture, log_json: bool
) -> None:
    with caplog.at_level(logging.INFO, "tempovlm.access"):
        get(app_of(log_json=log_json), "/a\0b\x1b[1mc\x7f", **{"x-request-id": "a\x1bb"})
    (line,) = [one.getMessage() for one in caplog.records if one.name == "tempovlm.access"]
    assert line.isprintable()
    assert r"\x00" in line
