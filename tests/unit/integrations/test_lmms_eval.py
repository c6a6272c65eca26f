"""The plug-in for lmms-eval, with stand-ins for the few names that it takes from there."""

from __future__ import annotations

import importlib
import sys
import tomllib
import types
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

import tiny_model
from tempovlm.core.errors import UserError
from tempovlm.engine import calibration

MODULE = "tempovlm.integrations.lmms_eval"
GROUP = "lmms_eval.models"


@dataclass
class Counts:
    """Tokens of a question."""

    input_tokens: int
    output_tokens: int


@dataclass
class Result:
    """A text with its tokens."""

    text: str
    token_counts: Counts


@dataclass
class Manifest:
    """A model's name and class."""

    model_id: str
    chat_class_path: str


@dataclass
class Base:
    """The part of lmms-eval's base class that is used."""

    task_dict: dict[str, Any] = field(default_factory=dict)


@pytest.fixture
def logged(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """Put the stand-ins in place; return the list of all that is logged."""
    calls: list[tuple[Any, ...]] = []
    names: dict[str, dict[str, Any]] = {
        "lmms_eval": {},
        "lmms_eval.api": {},
        "lmms_eval.api.instance": {"GenerationResult": Result, "TokenCounts": Counts},
        "lmms_eval.api.model": {"lmms": Base},
        "lmms_eval.models": {},
        "lmms_eval.models.model_utils": {},
        "lmms_eval.models.model_utils.gen_metrics": {"log_metrics": lambda *given: calls.append(given)},
        "lmms_eval.models.registry_v2": {"ModelManifest": Manifest},
    }
    for name, content in names.items():
        module = types.ModuleType(name)
        module.__dict__.update(content)
        monkeypatch.setitem(sys.modules, name, module)
    return calls


@pytest.fixture
def plugin(logged: list[Any]) -> Iterator[types.ModuleType]:
    """The plug-in as lmms-eval imports it."""
    assert not logged
    yield importlib.import_module(MODULE)
    sys.modules.pop(MODULE, None)


@pytest.fixture
def arguments(tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Model arguments of a tiny model, whose latencies are made up: from about 15 ms to 50."""
    monkeypatch.setenv("TEMPOVLM_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(calibration, "measure", lambda *_, **__: tiny_model.make_profile().measurements)
    return {"pretrained": str(tiny_folder), "device": "cpu", "warmup": False, "progress": False}


def turn(text: str, *images: Any, role: str = "user") -> dict[str, Any]:
    parts = [{"type": "image", "url": image} for image in images]
    return {"role": role, "content": [*parts, {"type": "text", "text": text}]}


def requests_of(model: Any, conversations: list[list[Any]], **options: Any) -> list[Any]:
    """Return one request a conversation, as tasks of lmms-eval make them."""
    model.task_dict = {"task": {"test": conversations}}
    given = {"max_new_tokens": 3, "until": ["\n\n"], **options}
    return [
        types.SimpleNamespace(args=("", lambda messages: messages, given, number, "task", "test"))
        for number in range(len(conversations))
    ]


@pytest.mark.usefixtures("plugin")
def test_the_entry_point_names_the_class(repo_root: Path) -> None:
    project = tomllib.loads((repo_root / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    module, _, name = project["entry-points"][GROUP]["tempovlm"].partition(":")
    manifest = getattr(importlib.import_module(module), name)
    module, _, name = manifest.chat_class_path.rpartition(".")
    found = getattr(importlib.import_module(module), name)
    assert manifest.model_id == "tempovlm"
    assert issubclass(found, Base)
    assert found.is_simple is False


def test_answers_and_their_columns(
    plugin: types.ModuleType, logged: list[Any], arguments: dict[str, Any], picture: Image.Image
) -> None:
    model = plugin.Model(budget_ms=60_000, **arguments)
    asked = requests_of(model, [[turn("what is it?", picture)], [turn("what color?", picture)], [turn("who?")]])
    results = model.generate_until(asked)
    assert len(results) == 3
    assert all(0 < result.token_counts.output_tokens <= 3 for result in results)
    assert results[0].token_counts.input_tokens > results[2].token_counts.input_tokens
    ((elapsed_s, num_tokens, _, columns),) = logged
    assert num_tokens == sum(result.token_counts.output_tokens for result in results)
    assert columns["total_requests"] == 3
    assert columns["budget_ms"] == pytest.approx(60_000)
    assert columns["budget_met"] == pytest.approx(1.0)
    assert columns["budget_used"] == pytest.approx(elapsed_s * 1e3 / 3 / 60_000)


def test_without_a_budget_there_are_no_columns_of_budgets(
    plugin: types.ModuleType, logged: list[Any], arguments: dict[str, Any]
) -> None:
    model = plugin.Model(**arguments)
    model.generate_until(requests_of(model, [[turn("who?")]]))
    assert not [name for name in logged[0][3] if name.startswith(("budget", "cut"))]
    assert model.generate_until([]) == []
    assert len(logged) == 1


def test_earlier_turns_are_part_of_the_question(plugin: types.ModuleType) -> None:
    turns = [turn("Be short.", role="system"), turn("who?", "a.jpg"), turn("Ann", role="assistant"), turn("why?")]
    image, question = plugin.asked(turns, "task")
    assert image == "a.jpg"
    assert question == "Be short.\nwho? Assistant: Ann User: why?"


@pytest.mark.parametrize(
    ("options", "fields"),
    [
        ({"until": "\n", "temperature": 0.5, "top_p": None}, {"stop": ("\n",), "temperature": 0.5}),
        ({"until": ["a", ""], "temperature": 0.5, "do_sample": False}, {"stop": ("a",), "temperature": 0.0}),
        ({"max_new_tokens": 7, "num_beams": 1}, {"stop": (), "max_new_tokens": 7}),
    ],
)
def test_options_of_a_task(plugin: types.ModuleType, options: dict[str, Any], fields: dict[str, Any]) -> None:
    assert plugin.fields_of(options) == fields


def test_tasks_that_cannot_be_asked_are_named(plugin: types.ModuleType, arguments: dict[str, Any]) -> None:
    model = plugin.Model(**arguments)
    with pytest.raises(UserError, match="task, question 0 has 2 pictures"):
        model.generate_until(requests_of(model, [[turn("who?", "a.jpg", "b.jpg")]]))
    film = {"role": "user", "content": [{"type": "video", "url": "a.mp4"}]}
    with pytest.raises(UserError, match="has video"):
        model.generate_until(requests_of(model, [[film]]))
    for name in ("loglikelihood", "generate_until_multi_round"):
        with pytest.raises(UserError, match="--tasks"):
            getattr(model, name)([])


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"budget_mss": 3}, "unknown budget_mss; did you mean budget_ms"),
        ({"batch_size": "8"}, "batch_size=8"),
        ({"on_deadline": "wait"}, "on_deadline"),
        ({"style": "prose"}, "style"),
    ],
)
def test_wrong_arguments_are_named(
    plugin: types.ModuleType, arguments: dict[str, Any], given: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        plugin.Model(**(arguments | given))
