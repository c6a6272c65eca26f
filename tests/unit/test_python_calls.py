"""The Python interface as people call it: default budgets, wrong names, short forms, records and the log."""

from __future__ import annotations

import asyncio
import json
import logging
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import tempovlm
import tiny_model
from tempovlm.api import TempoVLM, load
from tempovlm.core.errors import UserError
from tempovlm.core.request import Answer, Request, log_answer
from tempovlm.engine import calibration

AMPLE_MS = 1e5


@pytest.fixture(autouse=True)
def _calibrated(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Calibrations are made up, and kept for each test alone."""
    monkeypatch.setenv("TEMPOVLM_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(calibration, "measure", lambda *_, **__: tiny_model.make_profile().measurements)


@pytest.fixture
def default(model: TempoVLM) -> TempoVLM:
    """The model with a default budget."""
    return TempoVLM(model.engine, model.card, policy="fixed", budget_ms=AMPLE_MS)


def test_a_default_budget_is_that_of_every_request_without_one(default: TempoVLM, picture: Image.Image) -> None:
    (*_, streamed) = default.stream(picture, "what?")
    batched = default.answer_batch([(picture, "what?"), Request(images=(), question="what?")])
    answers = [
        default.answer(picture, "what?"),
        asyncio.run(default.answer_async(picture, "what?")),
        streamed,
        *batched,
    ]
    assert [one.budget_ms for one in answers if isinstance(one, Answer)] == [pytest.approx(AMPLE_MS)] * 5
    assert default.answer(picture, "what?", 2 * AMPLE_MS).budget_ms == pytest.approx(2 * AMPLE_MS)


@pytest.mark.parametrize("wrong", [0, -1, "150", float("inf"), True])
def test_a_wrong_default_budget_is_told_before_anything_is_loaded(wrong: Any) -> None:
    with pytest.raises(UserError, match=r"^budget_ms=.*: must be a positive, finite number of milliseconds"):
        load("no such model", budget_ms=wrong)


def test_an_unknown_argument_of_load_is_told() -> None:
    with pytest.raises(UserError, match=r"^bugdet_ms: no such argument; did you mean budget_ms"):
        tempovlm.load("pocket", bugdet_ms=150)


def test_pairs_of_a_batch_take_the_fields_of_a_request(model: TempoVLM, picture: Image.Image) -> None:
    requests = [(picture, "what?"), Request(images=(), question="what?", budget_ms=2 * AMPLE_MS)]
    pair, own = model.answer_batch(requests, budget_ms=AMPLE_MS, max_new_tokens=2, request_id="one", tier="low")
    assert (pair.budget_ms, own.budget_ms) == (pytest.approx(AMPLE_MS), pytest.approx(2 * AMPLE_MS))
    assert pair.num_output_tokens <= 2
    assert (pair.request_id, pair.knobs.tier, own.knobs.tier) == ("one", "low", "low")


CALLS: list[Callable[..., Any]] = [
    lambda model, **given: model.answer(None, "what?", **given),
    lambda model, **given: list(model.stream(None, "what?", **given)),
    lambda model, **given: model.answer_batch([(None, "what?")], **given),
    lambda model, **given: asyncio.run(model.answer_async(None, "what?", **given)),
]


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize(
    ("given", "named"),
    [
        ({"max_tokens": 3}, "max_tokens: no such argument; did you mean max_new_tokens?"),
        ({"on_dead_line": "stop"}, "on_dead_line: no such argument; did you mean on_deadline?"),
        ({"xyz": 3}, "xyz: no such argument; choose from style, max_new_tokens"),
        ({"images": ()}, "images: no such argument; choose from"),
        ({"waited_ms": "5"}, "waited_ms='5': must be zero or a positive number of milliseconds, at most"),
        ({"budget_ms": "150"}, "budget_ms='150': must be a positive, finite number of milliseconds, not text"),
        ({"tier": "ultra"}, "tier='ultra': not in the knob space of this model; choose from low, medium, high"),
        ({"budget_ms": np.float32("nan")}, "budget_ms=nan: must be a positive, finite number"),
        ({"knobs": {"tier": "low"}}, "knobs {'tier': 'low'}: must be a KnobConfig"),
        ({"top_k": "2"}, "top_k='2': must be an integer, not text"),
        ({"request_id": 5}, "request_id: must be text, not int"),
    ],
)
def test_wrong_arguments_are_told_in_one_line(
    call: Callable[..., Any], given: dict[str, Any], named: str, model: TempoVLM
) -> None:
    with pytest.raises(UserError, match=f"^{re.escape(named)}") as refused:
        call(model, **given)
    assert "\n" not in str(refused.value)


def test_an_answer_is_shown_on_one_short_line(model: TempoVLM, picture: Image.Image) -> None:
    answer = model.answer(picture, "what?", AMPLE_MS)
    told = replace(answer, text="a\nb", timings_ms={"total": 93.24}, budget_ms=150.0)
    shown = repr(told)
    assert shown.startswith(r"Answer('a\nb', 93.2 of 150 ms, on time, ")
    assert str(answer.knobs) in shown
    assert "\n" not in shown
    assert len(repr(replace(answer, text="long " * 100))) < 200
    assert "93.2 ms, no budget" in repr(replace(told, budget_ms=None))
    assert "150 ms, late" not in shown
    assert "93.2 of 90 ms, late" in repr(replace(told, budget_ms=90.0))
    assert "on time, cut" in repr(replace(told, finish_reason="deadline"))
    nothing = replace(told, finish_reason="deadline", num_output_tokens=0, budget_met=False)
    assert "ms, stopped before the answer, " in repr(nothing)
    assert "rejected" in repr(replace(told, finish_reason="rejected"))


def test_a_model_is_shown_on_one_short_line(model: TempoVLM, default: TempoVLM) -> None:
    assert repr(model).startswith(
        f"TempoVLM({model.engine.name}, cpu, float32, backend torch, {len(model.space)} settings, "
    )
    assert repr(model).endswith("no budget)")
    assert repr(default).endswith("policy fixed, budget 100000 ms)")


def test_a_record_says_when_who_and_by_what(model: TempoVLM, picture: Image.Image) -> None:
    before = datetime.now(UTC)
    answer = model.answer(picture, "what?", AMPLE_MS, request_id="page 7", waited_ms=1000.0)
    record = json.loads(json.dumps(answer.to_json()))
    accepted = datetime.fromisoformat(record["time"])
    assert accepted.utcoffset() == timedelta(0)
    assert timedelta(0) <= accepted - (before - timedelta(seconds=1)) < timedelta(seconds=30)
    assert record["request_id"] == "page 7"
    assert record["weights_hash"] == model.weights_hash
    assert record["backend"] == "torch"
    assert record["margin"] == pytest.approx(answer.margin, abs=1e-4)
    rows, columns = answer.tiling or (0, 0)
    assert record["tiling"] == {"rows": rows, "columns": columns}
    blind = [model.answer(None, "what?"), *model.answer_batch([(None, "what?"), (None, "what?")])]
    assert len({one.request_id for one in blind}) == 3
    assert [one.to_json()["tiling"] for one in blind] == [None] * 3
    assert all(one.accepted_at for one in blind)


def test_the_margin_of_the_record_is_that_of_the_choice(model: TempoVLM, picture: Image.Image) -> None:
    model.answer(picture, "what?", AMPLE_MS)
    margin = model._policy_guard().margin
    assert margin is not None
    before = margin.factor
    margin.factor = 1.5
    try:
        assert model.answer(picture, "what?", AMPLE_MS).margin == pytest.approx(1.5)
    finally:
        margin.factor = before


def test_each_answer_is_a_line_of_the_log(
    model: TempoVLM, picture: Image.Image, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, "tempovlm"):
        answer = model.answer(picture, "what?", AMPLE_MS, request_id="page 7")
        (*_, streamed) = model.stream(picture, "what?")
        batched = model.answer_batch([(None, "what?")])
    told = [record for record in caplog.records if record.name == "tempovlm.answers"]
    assert [record.answer for record in told] == [answer, streamed, *batched]  # type: ignore[attr-defined]
    assert {record.levelname for record in told} == {"INFO"}
    took = re.escape(f"{answer.timings_ms['total']:.1f} ms of 100000, on time")
    assert re.match(
        rf"page 7: {answer.knobs} by .*, predicted .* \(at most .*\) ms, took {took}$", told[0].message
    )
    assert told[1].message.endswith("no budget")


@pytest.mark.parametrize(
    ("changes", "level", "outcome"),
    [
        ({"budget_ms": 1e-3}, "WARNING", "late"),
        ({"finish_reason": "rejected", "budget_met": False}, "WARNING", "rejected"),
        ({"finish_reason": "cancelled", "budget_met": False}, "INFO", "cancelled"),
        ({"predicted": None}, "INFO", "on time"),
    ],
)
def test_what_is_late_or_refused_is_a_warning(
    changes: dict[str, Any],
    level: str,
    outcome: str,
    model: TempoVLM,
    picture: Image.Image,
    caplog: pytest.LogCaptureFixture,
) -> None:
    answer = replace(model.answer(picture, "what?", AMPLE_MS), **changes)
    with caplog.at_level(logging.INFO, "tempovlm"):
        log_answer(answer)
    record = caplog.records[-1]
    assert (record.levelname, record.message.rpartition(", ")[2]) == (level, outcome)


def test_nothing_is_printed_where_logging_is_not_set_up() -> None:
    code = (
        "import logging\n"
        "import tempovlm.core.request\n"
        "logging.getLogger('tempovlm.answers').warning('late')\n"
        "logging.getLogger('tempovlm').warning('accuracies are assumed')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr == "accuracies are assumed\n"
