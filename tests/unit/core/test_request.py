"""What comes in through the door is plain inside, and what cannot be is told in one line that names it."""

from __future__ import annotations

import json
import operator
from collections.abc import Callable
from decimal import Decimal
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from tempovlm.api import TempoVLM, load
from tempovlm.core.checks import finite, integer, shown
from tempovlm.core.errors import UserError
from tempovlm.core.knobs import KnobConfig
from tempovlm.core.request import Request, check_budget_ms


def named(value: object) -> str:
    """A parameter's name in the test's: identifiers as they are, else the type."""
    return value if isinstance(value, str) and value.isidentifier() else type(value).__name__


SEVERAL = np.array([300.0, 400.0])


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        (np.float64(300), 300.0),
        (np.float32(0.5), 0.5),
        (np.longdouble(2.5), 2.5),
        (np.array(300.0), 300.0),
        (torch.tensor(0.25), 0.25),
        (torch.tensor(2.0, dtype=torch.bfloat16, requires_grad=True), 2.0),
        (np.int64(300), 300),
        (np.array(7, dtype=np.uint8), 7),
        (torch.tensor(300), 300),
        (Decimal("2.5"), 2.5),
        (Fraction(1, 4), 0.25),
        (300, 300),
        (2.5, 2.5),
    ],
    ids=named,
)
def test_numbers_of_other_libraries_are_plain_inside(given: object, kept: float) -> None:
    request = Request(images=(), question="what?", budget_ms=given)  # type: ignore[arg-type]
    assert type(request.budget_ms) is type(kept)
    assert request.budget_ms == pytest.approx(kept)
    assert type(check_budget_ms(given)) is type(kept)
    assert json.loads(json.dumps(request.budget_ms)) == pytest.approx(kept)


@pytest.mark.parametrize(
    ("field", "given", "kept"),
    [
        ("temperature", np.float32(0.5), 0.5),
        ("top_p", torch.tensor(0.5), 0.5),
        ("seed", np.uint64(1 << 63), 1 << 63),
        ("max_new_tokens", torch.tensor(3), 3),
        ("style", np.str_("vqa2"), "vqa2"),
        ("question", np.str_("why?"), "why?"),
        ("on_deadline", np.str_("stop"), "stop"),
        ("stop", (np.str_("\n"),), ("\n",)),
        ("stop", np.array(["a", "b"]), ("a", "b")),
        ("stop", (letter for letter in "ab"), ("a", "b")),
        ("stop", ["a"], ("a",)),
        ("images", [b"x"], (b"x",)),
    ],
)
def test_other_fields_are_plain_too(field: str, given: object, kept: object) -> None:
    found = getattr(Request(**{"images": (), "question": "what?", field: given}), field)
    assert (type(found), found) == (type(kept), kept)
    if isinstance(found, tuple):
        assert [type(one) for one in found] == [type(one) for one in kept]  # type: ignore[attr-defined]


def test_knobs_are_plain_inside() -> None:
    knobs = KnobConfig(tier=np.str_("low"), top_k=np.int64(8), num_blocks=torch.tensor(16))  # type: ignore[arg-type]
    assert [type(value) for value in (knobs.tier, knobs.top_k, knobs.num_blocks)] == [str, int, int]
    assert knobs == KnobConfig(tier="low", top_k=8, num_blocks=16)


@pytest.mark.parametrize(
    "budget_ms", [*np.linspace(1e4, 2e4, 2), np.float32(1e4), np.array(10_000), torch.tensor(1e4)]
)
def test_every_answer_is_json(model: TempoVLM, picture: Image.Image, budget_ms: Any) -> None:
    given = {"tier": np.str_("low"), "top_k": np.int64(4), "num_blocks": torch.tensor(3)}
    answer = model.answer(picture, "what?", budget_ms, temperature=np.float32(0.5), seed=np.int64(1), **given)
    (batched,) = model.answer_batch(
        [Request(images=(picture,), question="what?", budget_ms=budget_ms)], knobs=KnobConfig(**given)
    )
    for one in (answer, batched):
        record = json.loads(json.dumps(one.to_json()))
        assert record["budget_ms"] == pytest.approx(float(budget_ms))
        assert record["knobs"] == {"tier": "low", "top_k": 4, "num_blocks": 3}


NUMBERS = (
    None,
    "3",
    True,
    np.bool_(True),
    3 + 0j,
    [3],
    b"3",
    SEVERAL,
    np.array([3.0]),
    -1,
    float("nan"),
    float("inf"),
)
NO_NUMBERS = (*NUMBERS, torch.tensor(True), torch.ones(2), np.timedelta64(3), 10**400, 10**5000)
NO_INTEGERS = (*NO_NUMBERS[: len(NUMBERS)], 3.0, np.float64(3), Decimal(3), -(1 << 70))
NO_TEXTS = (None, 3, True, b"what?", ["what?"], np.array(["a", "b"]), "\udc80")
BAD: dict[str, tuple[object, ...]] = {
    "budget_ms": (*NO_NUMBERS[1:], 0),
    "temperature": NO_NUMBERS,
    "top_p": (*NO_NUMBERS, 0, 2),
    "max_new_tokens": (*NO_INTEGERS, 0),
    "seed": (*(value for value in NO_INTEGERS if value is not NUMBERS[9]), 1 << 64),
    "question": (*NO_TEXTS, "", "  "),
    "style": NO_TEXTS,
    "on_deadline": (*NO_TEXTS, "later"),
    "stop": (
        None,
        "a",
        np.str_("a"),
        b"a",
        3,
        True,
        [1],
        ("",),
        ("a", None),
        {"a": 1},
        np.array("a"),
        ("\udc80",),
    ),
    "images": (None, "a.png", b"a", 3, {}, np.zeros((2, 2, 3), np.uint8), (None,), (b"a", b"b"), (b"",) * 3),
}


@pytest.mark.parametrize(("field", "value"), [(f, v) for f, values in BAD.items() for v in values], ids=named)
def test_what_a_field_cannot_be_is_told_in_one_line(field: str, value: object) -> None:
    with pytest.raises(UserError) as raised:
        Request(**{"images": (), "question": "what?", field: value})
    message = str(raised.value)
    assert field in message
    assert "\n" not in message


ARGUMENTS: dict[str, tuple[object, ...]] = {
    "tier": (3, True, ["low"], b"low", "none", np.array(["low", "low"])),
    "top_k": ("4", 4.0, True, [4], np.array([4]), -1, 1 << 70),
    "num_blocks": ("3", 3.0, True, [3], 0),
    "knobs": ("native", 3, ("low", 4, 3)),
    "cancel": (True, "x", 3),
}


@pytest.mark.parametrize(("name", "value"), [(n, v) for n, values in ARGUMENTS.items() for v in values], ids=named)
def test_what_an_argument_of_an_answer_cannot_be_is_told(model: TempoVLM, name: str, value: object) -> None:
    asked: list[Callable[..., object]] = [lambda **given: list(model.stream(None, "what?", **given))]
    if name != "cancel":
        asked.append(lambda **given: model.answer(None, "what?", 1e5, **given))
    if name == "knobs":
        asked.append(lambda **given: model.answer_batch([(None, "what?")], **given))
    for ask in asked:
        with pytest.raises(UserError, match=name) as raised:
            ask(**{name: value})
        assert "\n" not in str(raised.value)


@pytest.mark.parametrize("given", [None, 3, "ab", b"ab", [None], [(None,)], [(None, "a", 3)], ["ab"]], ids=named)
def test_what_a_batch_cannot_be_is_told(model: TempoVLM, given: Any) -> None:
    with pytest.raises(UserError, match="requests: "):
        model.answer_batch(given)


def test_a_batch_may_be_made_as_it_is_read(model: TempoVLM) -> None:
    answers = model.answer_batch((pair for pair in [(None, "what?"), [None, "why?"]]), max_new_tokens=1)  # type: ignore[arg-type]
    assert [answer.num_output_tokens for answer in answers] == [1, 1]


LOADING: dict[str, tuple[object, ...]] = {
    "model": (None, 3, b"pocket", ["pocket"], True, "a" * 300, "no/such\0one"),
    "device": (None, 0, ["cpu"], torch.device("cpu"), "gpu", "cuda:²"),
    "dtype": ("float32", 3, torch.int8, torch.float8_e4m3fn),
    "weights": (None, 8, "fp4", ["bf16"]),
    "policy": (None, 3, "best", "a" * 300, ["auto"]),
    "threads": ("2", 2.0, True, [2], 0, -1, 1 << 40),
    "exact": ("no", 1, [True]),
    "calibrate": (None, "no", 0),
    "warmup": (None, "no", 0),
    "progress": (None, "no", 0),
    "feature_cache_mb": (None, "8", True, -1, float("inf"), [8]),
}


@pytest.mark.parametrize(("name", "value"), [(n, v) for n, values in LOADING.items() for v in values], ids=named)
def test_what_an_argument_of_loading_cannot_be_is_told(tiny_folder: object, name: str, value: object) -> None:
    with pytest.raises(UserError, match=name) as raised:
        load(**{"model": str(tiny_folder), "device": "cpu", "warmup": False, "progress": False, name: value})  # type: ignore[arg-type]
    assert "\n" not in str(raised.value)


def test_a_wrong_value_is_shown_in_a_few_words_of_one_line() -> None:
    assert shown("a\n\n b") == "a b"
    assert len(shown(np.zeros(100))) < 70
    assert shown(10**5000) == "(a int)"


@pytest.mark.parametrize("value", [np.float64(3), np.array(3.0), Decimal(3), np.timedelta64(3), True, "3", None])
def test_an_integer_is_no_float(value: object) -> None:
    assert integer(value) is None


def test_a_tensor_without_data_is_no_number() -> None:
    assert finite(torch.tensor(3.0, device="meta")) is None
    assert integer(operator.index(3)) == 3


@pytest.mark.parametrize("waited_ms", [1e13, 1e308])
def test_a_wait_that_no_date_can_hold_is_refused(waited_ms: float) -> None:
    with pytest.raises(UserError, match="waited_ms"):
        Request(images=(), question="what is it?", waited_ms=waited_ms)
