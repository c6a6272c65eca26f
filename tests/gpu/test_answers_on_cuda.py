"""Logits that are not numbers, and what is not said to open questions: on graphs, kernel by kernel, in batches."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

import tiny_model
from open_questions import CHOICE, OPEN, PICTURES, says_something
from tempovlm.api import TempoVLM, load
from tempovlm.core.errors import UserError
from tempovlm.core.request import Request
from tempovlm.engine.open_answers import OpenAnswers
from tempovlm.engine.sampling import candidates, greedy
from tempovlm.model.decoder import BROKEN

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> TempoVLM:
    folder: Path = tiny_model.save_folder(tmp_path_factory.mktemp("model") / "tiny")
    return load(str(folder), device="cuda", progress=False, warmup=False, calibrate=False)


@pytest.fixture(scope="module")
def pocket() -> TempoVLM:
    return load("pocket", device="cuda", progress=False, warmup=False, calibrate=False)


@contextmanager
def no_waiting() -> Iterator[None]:
    """Every wait for the device is an error."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("is_captured", [False, True])
@pytest.mark.parametrize("temperature", [0.0, 1e-3])
def test_logits_that_are_not_numbers(tiny: TempoVLM, is_captured: bool, temperature: float) -> None:
    embedding, knobs = tiny.engine.runner.model.decoder.embedding, tiny.space.native
    options = {"knobs": knobs, "max_new_tokens": 5, "temperature": temperature}
    if is_captured:
        tiny.engine.warmup([knobs])
    expected = [tiny.answer(None, "what is the sign?", **options).tokens for _ in range(2)][1]  # type: ignore[arg-type]
    asked = Request(images=(), question="what is the sign?", max_new_tokens=5, temperature=temperature)
    kept, message = embedding[expected[0]].clone(), r"logits are not numbers .* at token 2 of the answer"
    for wrong in (torch.nan, torch.inf):
        with torch.no_grad():
            embedding[expected[0]] = wrong
        for _ in range(2):
            with pytest.raises(UserError, match=message):
                tiny.answer(None, "what is the sign?", **options)  # type: ignore[arg-type]
        with pytest.raises(UserError, match=message):
            tiny.answer_batch([asked, asked], knobs=knobs)
        with torch.no_grad():
            embedding[expected[0]] = kept
    assert tiny.answer(None, "what is the sign?", **options).tokens == expected  # type: ignore[arg-type]


@pytest.mark.parametrize("temperature", [0.0, 3.0])
def test_open_answers_of_the_pocket(pocket: TempoVLM, temperature: float) -> None:
    knobs = pocket.space.cheapest
    asked = [
        Request(images=(picture,), question=text, temperature=temperature, max_new_tokens=6)
        for picture in PICTURES
        for text in OPEN
    ]
    for round_ in range(2):  # kernel by kernel, then by graphs
        for one in asked:
            text = pocket.engine.answer(one, pocket.guard_for(one, knobs)).text
            assert says_something(text), (round_, one.question, text)
    for answer in pocket.answer_batch(asked, knobs=knobs):
        assert says_something(answer.text), answer.text
    lettered = pocket.answer(PICTURES[0], CHOICE, style="science_qa", knobs=knobs)
    assert lettered.text in ("a", "b")


def test_nobody_waits_for_the_device(pocket: TempoVLM) -> None:
    run = pocket.engine.runner
    assert isinstance(run.open_answers, OpenAnswers)
    asked = [Request(images=(), question=text) for text in (*OPEN, CHOICE)]
    logits = torch.randn(len(asked), run.model.config.embedding_size, device="cuda", dtype=torch.bfloat16)
    logits[2, 5] = torch.nan
    with no_waiting():
        limits = run.limits(asked)
        first = greedy(limits(logits))
        second = greedy(limits(logits, first, 1))
        is_sound, kept = candidates(limits(logits), 0.7, 0.9)
    assert (first == BROKEN).tolist() == (second == BROKEN).tolist() == [False, False, True, False, False]
    assert is_sound.tolist() == [True, True, False, True, True]
    assert kept.isfinite().all()
