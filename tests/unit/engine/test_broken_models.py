"""A model whose logits are not numbers: one line, on every way to decode, at the first token or a later one."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import tiny_model
from tempovlm.api import load
from tempovlm.control.guard import Guard
from tempovlm.core.errors import UserError
from tempovlm.core.request import Answer, Request
from tempovlm.data.sample import Sample
from tempovlm.engine.batching import answer_batch
from tempovlm.engine.engine import Engine
from tempovlm.lab.core_exp.batched import answer_settings
from tempovlm.lab.core_exp.plan import Job
from tempovlm.model.weights import save_model

MESSAGE = r"logits are not numbers .* at token {} of the answer"
DECODERS = ("narrow", "modules")


def request(**fields: object) -> Request:
    return Request(**{"images": (), "question": "what is the sign?", "max_new_tokens": 4, **fields})  # type: ignore[arg-type]


def broken(engine: Engine, decoder: str, wrong: float, *, later: bool) -> Engine:
    """An engine whose head, or the embedding of whose first token alone, is not a number."""
    first = engine.answer(request()).tokens[0]
    model = deepcopy(engine.runner.model)
    with torch.no_grad():
        if later:
            model.decoder.embedding[first] = wrong
        else:
            model.decoder.head.weight[3] = wrong
    other = Engine(model, engine.runner.tokenizer)
    if decoder == "modules":
        other.runner = replace(other.runner, narrow=None)
    assert (other.runner.narrow is None) == (decoder == "modules")
    return other


@pytest.mark.parametrize("decoder", DECODERS)
@pytest.mark.parametrize("wrong", [torch.nan, torch.inf])
@pytest.mark.parametrize("later", [False, True])
@pytest.mark.parametrize("temperature", [0.0, 1e-3])
def test_one_line(engine: Engine, decoder: str, wrong: float, later: bool, temperature: float) -> None:
    other = broken(engine, decoder, wrong, later=later)
    message, asked = MESSAGE.format(1 + later), request(temperature=temperature)
    with pytest.raises(UserError, match=message) as raised:
        other.answer(asked)
    assert "\n" not in str(raised.value)
    with pytest.raises(UserError, match=message):
        answer_batch(other, [asked, request(question="stop")], other.native)
    said = []
    with pytest.raises(UserError, match=message):
        said.extend(other.stream(asked))
    assert len(said) == later


@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_lanes_say_it_and_serve_on(engine: Engine, temperature: float) -> None:
    pytest.importorskip("triton")
    if torch.cuda.is_available():
        pytest.skip("what the interpreter runs; see tests/gpu")
    from tempovlm.engine.cuda.graphs import GraphDecoder
    from tempovlm.model.kernels.decode import Tile, Tiling

    other = broken(engine, "modules", torch.nan, later=True)
    guard, model = Guard.fixed(engine.space.cheapest, engine.space), other.runner.model
    asked, first = next(
        (one, token)
        for one in (request(question=word, temperature=temperature, max_new_tokens=2) for word in tiny_model.WORDS)
        if (token := engine.answer(one, guard).tokens[0])
        not in engine.runner.prepare(None, "low", one).prompt.tokens
    )
    with torch.no_grad():
        model.decoder.embedding.copy_(engine.runner.model.decoder.embedding)
        model.decoder.embedding[first] = torch.nan
    tile = Tile(64, 64)
    tiling = Tiling(tile, tile, tile, tile, tile, tile, splits=2, tokens=64)
    other.runner = replace(other.runner, graphs=GraphDecoder(model, tiling=tiling))
    with pytest.raises(UserError, match=MESSAGE.format(2)):
        other.answer(asked, guard)
    with torch.no_grad():
        model.decoder.embedding.copy_(engine.runner.model.decoder.embedding)
    assert other.answer(asked, guard).tokens == engine.answer(asked, guard).tokens


def test_a_row_of_a_batch_that_has_ended_is_passed_over(engine: Engine) -> None:
    other, short = broken(engine, "modules", torch.nan, later=True), request(max_new_tokens=1)
    first, run = engine.answer(short).tokens[0], engine.runner
    asked = (request(question=word) for word in tiny_model.WORDS)
    whole = next(
        one
        for one in asked
        if first not in (*engine.answer(one).tokens, *run.prepare(None, "low", one).prompt.tokens.tolist())
    )
    answers = answer_batch(other, [short, whole], other.native)
    assert [answer.tokens for answer in answers] == [engine.answer(one).tokens for one in (short, whole)]


def test_a_sweep_keeps_the_line_in_its_rows(engine: Engine, picture_file: Path) -> None:
    other = broken(engine, "modules", torch.nan, later=False)
    sample = Sample(
        question_id="1",
        image_id="1",
        image_path=picture_file,
        question="what is the sign?",
        answers=("red",),
        style="vqa2",
        dataset="okvqa",
        split="val",
    )
    rows = list(answer_settings(other, [Job(sample, 4)], [other.space.native]))
    assert [row.error is not None and "logits are not numbers" in row.error for row in rows] == [True]


def test_a_damaged_folder_is_named_when_it_is_loaded(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the first answer that warms it up."""
    monkeypatch.setattr("tempovlm.engine.calibration.WARM_UP_ROUNDS", 1)
    model = tiny_model.build_model()
    with torch.no_grad():
        model.decoder.head.weight[0] = torch.nan
    save_model(model, tmp_path, torch.float32)
    (tmp_path / "tokenizer.json").write_bytes((tiny_folder / "tokenizer.json").read_bytes())
    with pytest.raises(UserError, match=r"weights are damaged.*copy them again"):
        load(str(tmp_path), device="cpu", progress=False)
    assert isinstance(load(str(tiny_folder), device="cpu", progress=False).answer(None, "stop"), Answer)
