"""The budget's way in: which of several limits counts, in which unit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from asgi import NEEDS

pytest.importorskip("fastapi", reason=NEEDS)

from tempovlm.serving.errors import ApiError
from tempovlm.serving.intake.budget import BODY_FIELD, CAP, HEADER, PLACES, find_budget, split_alias

ALL = {
    HEADER: "20",
    "x-envoy-expected-rq-timeout-ms": "30",
    "x-request-timeout-seconds": "0.04",
    "grpc-timeout": "50m",
    "x-llm-d-slo-ttft-ms": "40",
    "x-llm-d-slo-tpot-ms": "10",
    "x-slo-ttft-ms": "60",
    "x-slo-tpot-ms": "5",
}
"""A budget at every place, for an answer of three tokens."""


def find(field: Any = None, headers: dict[str, str] | None = None, **given: Any) -> tuple[float | None, str]:
    options = {"alias_ms": 80.0, "max_new_tokens": 3, "default_ms": 90.0, **given}
    found = find_budget(field, headers or {}, *options.values())
    return found.budget_ms, found.source


def test_the_first_place_counts() -> None:
    order = [find(10, ALL)]
    rest = dict(ALL)
    while rest:
        order.append(find(None, rest))
        source = order[-1][1]
        for name in [one for one in rest if one in (source, source.replace("ttft", "tpot"))]:
            del rest[name]
    order += [find(), find(alias_ms=None), find(alias_ms=None, default_ms=None)]
    expected = [10.0, 20.0, 30.0, 40.0, 50.0, 60.0, 70.0, 80.0, 90.0, None]
    assert [budget_ms for budget_ms, _ in order] == pytest.approx(expected)
    assert [source for _, source in order] == [
        BODY_FIELD, HEADER, *(place.name.partition(",")[0] for place in PLACES), "model", "default", "",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("headers", "expected_ms"),
    [
        ({"grpc-timeout": "2S"}, 2000.0),
        ({"grpc-timeout": "1500u"}, 1.5),
        ({"grpc-timeout": "1H"}, 3.6e6),
        ({"grpc-timeout": "5 seconds"}, 80.0),
        ({"x-request-timeout-seconds": "-1"}, 80.0),
        ({"x-envoy-expected-rq-timeout-ms": "inf"}, 80.0),
        ({"x-llm-d-slo-ttft-ms": "40"}, 80.0),
        ({"x-llm-d-slo-ttft-ms": "1e308", "x-llm-d-slo-tpot-ms": "1e308"}, 80.0),
        ({"x-request-timeout-seconds": "1_0"}, 80.0),
        ({CAP: "600"}, 80.0),
        ({CAP: "0.05"}, 50.0),
    ],
)
def test_units_and_limits_of_others(headers: dict[str, str], expected_ms: float) -> None:
    assert find(None, headers)[0] == pytest.approx(expected_ms)


def test_a_cap_is_no_budget() -> None:
    assert find(None, {CAP: "0.05"}, alias_ms=None, default_ms=None) == (None, "")
    assert find(None, {CAP: "0.05"})[1] == CAP


def test_one_token_needs_no_time_for_later_ones() -> None:
    assert find(None, {"x-slo-ttft-ms": "60"}, max_new_tokens=1)[0] == pytest.approx(60.0)


@pytest.mark.parametrize("value", ["0", "-5", "1e999"])
def test_a_number_in_our_header_is_not_called_text(value: str) -> None:
    with pytest.raises(ApiError, match=r"must be a positive, finite number of milliseconds$"):
        find(None, {HEADER: value})


@pytest.mark.parametrize("value", [0, -5, "soon", True, "1_000"])
def test_a_wrong_budget_of_ours_is_an_error(value: Any) -> None:
    for field, headers in ((value, {}), (None, {HEADER: str(value)})):
        with pytest.raises(ApiError, match="milliseconds") as caught:
            find(field, headers)
        assert (caught.value.status, caught.value.code) == (400, "invalid_budget")


def test_aliases() -> None:
    assert split_alias("pocket@150ms") == ("pocket", pytest.approx(150.0))
    assert split_alias("pocket@0.5ms")[1] == pytest.approx(0.5)
    for name in (
        "pocket",
        "pocket@150",
        "pocket@fastms",
        "@5ms",
        "pocket@0ms",
        f"pocket@{'9' * 400}ms",
        "pocket@5ms\n",
    ):
        assert split_alias(name) == (name, None)


def test_the_documentation_lists_every_place() -> None:
    text = (Path(__file__).parents[3] / "docs" / "serving.md").read_text(encoding="utf-8")
    names = [BODY_FIELD, HEADER, CAP, *(name for place in PLACES for name in place.name.split(", "))]
    assert not [name for name in names if f"`{name}`" not in text]
