"""An open question is answered with words: never with an option's letter alone and never with nothing."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

import tiny_model
from open_questions import CHOICE, OPEN, PICTURES, says_something
from tempovlm.api import TempoVLM, load
from tempovlm.control.guard import Guard
from tempovlm.core.errors import UserError
from tempovlm.core.request import Answer, Request
from tempovlm.data.sample import choice_question, lists_options
from tempovlm.engine.batching import Ragged, answer_batch
from tempovlm.engine.cpu.library import fault
from tempovlm.engine.engine import Engine
from tempovlm.engine.open_answers import Limits, OpenAnswers
from tempovlm.engine.transcript import Token
from tempovlm.lab.core_exp.batched import decode_greedily
from tempovlm.model.prompt import Tokenizer
from tempovlm.testbed.generate import make_scene

ROOT = Path(__file__).resolve().parents[3]
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


@pytest.fixture(scope="module")
def pocket() -> TempoVLM:
    return load("pocket", device="cpu", warmup=False, progress=False, calibrate=False)


def requests(questions: tuple[str, ...] = OPEN, **fields: object) -> list[Request]:
    return [
        Request(images=(one,), question=text, style=style, **fields)  # type: ignore[arg-type]
        for one in PICTURES
        for style, text in zip(("vqa2", "science_qa", "", "text_vqa"), questions, strict=False)
    ]


@pytest.fixture(scope="module")
def free(pocket: TempoVLM) -> Engine:
    """The same model without limits on open answers."""
    run = pocket.engine.runner
    return Engine(run.model, run.tokenizer, ranking=pocket.ranking)


@pytest.fixture(scope="module")
def quick(pocket: TempoVLM) -> Guard:
    return Guard.fixed(pocket.space.cheapest, pocket.space)


@pytest.mark.parametrize(
    ("question", "is_listed"),
    [
        (CHOICE, True),
        ("\ufeff" + CHOICE, True),
        ("which is bigger?\n(a) the cat (b) the dog", True),
        ("which is bigger? a) the cat b) the dog", True),
        ("which is bigger? A. the cat B. the dog", True),
        ("\uff21\uff1athe cat \uff22\uff1athe dog", True),
        ("which solution is denser, A or B?", True),
        ("what is it?", False),
        ("A: what is it?", False),
        ("a cat sits beside a bus", False),
        ("what colour is region b?", False),
        ("is it a - the cat or b - the dog?", True),
        ("is that mary's a-b-c book?", False),
        ("what is a vitamin b source?", False),
        ("is this a plan b?", False),
        ("does the bus go from point a to point b?", False),
        ("I can't tell, d'you see a c or a d?", False),
    ],
)
def test_where_options_are_listed(question: str, is_listed: bool) -> None:
    assert lists_options(question) is is_listed


@pytest.mark.parametrize(("temperature", "most"), [(0.0, 1), (0.0, 8), (3.0, 8)])
def test_the_pocket_says_something(pocket: TempoVLM, quick: Guard, temperature: float, most: int) -> None:
    for request in requests(temperature=temperature, max_new_tokens=most):
        *tokens, last = pocket.engine.stream(request, quick)
        assert isinstance(last, Answer)
        assert says_something(last.text), (request.question, last.text)
        assert last.text == "".join(token.text for token in tokens if isinstance(token, Token))


def test_unlimited_it_would_not(free: Engine, quick: Guard) -> None:
    """What the limits are for: without them some of the same questions get nothing, or a letter."""
    said = [free.answer(request, quick).text for request in requests()]
    assert not all(map(says_something, said))


def test_questions_with_options_get_their_letters(pocket: TempoVLM, free: Engine) -> None:
    native = Guard.fixed(pocket.space.native, pocket.space)
    scenes = [make_scene("science_qa_img", "val", index) for index in range(2)]
    items = [(scene.image, item) for scene in scenes for item in scene.questions]
    asked = [
        Request(images=(image,), question=choice_question(item.question, item.options), style="science_qa")
        for image, item in items
    ]
    answers = answer_batch(pocket.engine, asked, native)
    assert [one.tokens for one in answers] == [one.tokens for one in answer_batch(free, asked, native)]
    assert {answer.text for answer in answers} <= set("abcd")
    right = sum(answer.text == item.answer for answer, (_, item) in zip(answers, items, strict=True))
    assert right > len(items) / 2


def test_open_questions_that_it_knows_get_the_same_answers(pocket: TempoVLM, free: Engine, quick: Guard) -> None:
    for dataset in ("text_vqa", "okvqa"):
        scene = make_scene(dataset, "val", 3)
        asked = [Request(images=(scene.image,), question=item.question) for item in scene.questions]
        answers = answer_batch(pocket.engine, asked, quick)
        assert [one.tokens for one in answers] == [one.tokens for one in answer_batch(free, asked, quick)]


def test_stored_replies_keep_to_the_limits() -> None:
    """None of the measured replies would change: no first choice among them was one that limits take away."""
    pytest.importorskip("pyarrow")
    replies: set[str] = set()
    for path in sorted((ROOT / "results").glob("core_exp_pocket_*/*.parquet")):
        if path.stem != "science_qa_img":
            import pyarrow.parquet as pq

            replies |= set(pq.read_table(path, columns=["prediction"])["prediction"].unique().to_pylist())
    assert len(replies) > 1000
    assert [reply for reply in replies if reply is not None and not says_something(reply)] == []
    assert not any("##" in reply or "[unk]" in reply for reply in replies if reply)
    letters = [reply for reply in replies if reply and not reply[1:2].isalnum() and reply[0].isalpha()]
    assert all(reply[1] == " " and len(reply.split()[1]) > 1 for reply in letters)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_every_way_on_a_cpu_says_the_same(pocket: TempoVLM, quick: Guard, temperature: float) -> None:
    run = pocket.engine.runner
    letters = pocket.card.option_letters
    engine, narrow, fast = (
        Engine(run.model, run.tokenizer, ranking=pocket.ranking, option_letters=letters, precision=one)
        for one in (None, None, None if fault() else "float32")
    )
    engine.runner = replace(engine.runner, narrow=None)
    asked = [*requests(temperature=temperature, max_new_tokens=4)[:5], *requests((CHOICE,), max_new_tokens=4)[:1]]
    alone = [engine.answer(one, quick).tokens for one in asked]
    for other in (narrow, fast):
        assert [other.answer(one, quick).tokens for one in asked] == alone
    assert [one.tokens for one in answer_batch(engine, asked, quick)] == alone
    if temperature == 0:
        assert swept(engine, asked) == alone


def swept(engine: Engine, asked: list[Request]) -> list[tuple[int, ...]]:
    """Tokens as a sweep decodes them."""
    run, knobs = engine.runner, engine.space.cheapest
    ready = [run.prepare(run.open(one), knobs.tier, one) for one in asked]
    vision = [run.project(run.encode(one.crops), one.crops) for one in ready]
    state = Ragged.prefill(run, ready, vision, engine.plan(knobs), 4)
    return [tuple(one.tokens) for one in decode_greedily(run, asked, state, 4)]


@pytest.fixture(scope="module")
def tokenizer(tiny_folder: Path) -> Tokenizer:
    return Tokenizer.load(tiny_folder / "tokenizer.json")


@pytest.fixture(scope="module")
def rules(tokenizer: Tokenizer) -> OpenAnswers:
    found = OpenAnswers.of(tokenizer, LETTERS, torch.zeros(tiny_model.CONFIG.embedding_size, 1))
    assert found is not None
    return found


def allowed(logits: torch.Tensor, tokenizer: Tokenizer, row: int = 0) -> set[str | None]:
    return {tokenizer._fast.id_to_token(i) for i in logits[row].isfinite().nonzero().flatten().tolist()}


def ids(tokenizer: Tokenizer, *pieces: str) -> torch.Tensor:
    return torch.tensor([tokenizer._fast.token_to_id(piece) for piece in pieces])


def test_how_an_open_answer_begins_and_goes_on(rules: OpenAnswers, tokenizer: Tokenizer) -> None:
    V = tiny_model.CONFIG.embedding_size
    asked = [Request(images=(), question=text, max_new_tokens=most) for text, most in (("dog?", 4), ("dog?", 1))]
    limits = Limits(rules, [*asked, Request(images=(), question=CHOICE)])
    zeros = torch.zeros(3, V)
    first = limits(zeros)
    assert {"dog", "a", "5", "."} <= allowed(first, tokenizer, 0)
    assert {"dog", "5"} <= allowed(first, tokenizer, 1)
    assert not {"a", "."} & allowed(first, tokenizer, 1)
    for row in (0, 1):
        assert not {"##a", "[unk]", "<|endoftext|>", "<im_patch>", None} & allowed(first, tokenizer, row)
    assert first[2].isfinite().all()
    second = limits(zeros, ids(tokenizer, "a", "dog", "a"), 1)
    assert {"##a", "##5", "dog"} <= allowed(second, tokenizer, 0)
    assert not {"<|endoftext|>", "##.", "b", ".", "[unk]", None} & allowed(second, tokenizer, 0)
    assert second[1:].isfinite().all()
    assert limits(zeros, ids(tokenizer, "a", "a", "a"), 2) is zeros


def test_letters_that_are_no_tokens_are_refused(tokenizer: Tokenizer) -> None:
    with pytest.raises(UserError, match="field option_letters"):
        OpenAnswers.of(tokenizer, "\u0416\u042f", torch.zeros(8, 1))


def test_other_models_have_no_limits(tokenizer: Tokenizer, rules: OpenAnswers) -> None:
    zeros, asked = torch.zeros(1, tiny_model.CONFIG.embedding_size), Request(images=(), question="dog?")
    assert OpenAnswers.of(tokenizer, "", zeros.T) is None
    assert Limits(None, [asked])(zeros) is zeros
    assert Limits(None, [asked]).second(torch.tensor([3])) is None
    assert Limits(rules, [replace(asked, question=CHOICE)])(zeros) is zeros


@pytest.mark.parametrize("temperature", [0.0, 1.5])
def test_lanes_keep_to_the_limits_too(engine: Engine, temperature: float) -> None:
    pytest.importorskip("triton")
    if torch.cuda.is_available():
        pytest.skip("what the interpreter runs; see tests/gpu")
    from tempovlm.engine.cuda.graphs import GraphDecoder
    from tempovlm.model.kernels.decode import Tile, Tiling

    run = engine.runner
    limited = Engine(run.model, run.tokenizer, option_letters=LETTERS)
    tile = Tile(64, 64)
    tiling = Tiling(tile, tile, tile, tile, tile, tile, splits=2, tokens=64)
    lanes = GraphDecoder(run.model, tiling=tiling, is_limited=True)
    on_lanes = Engine(run.model, run.tokenizer, option_letters=LETTERS)
    on_lanes.runner = replace(on_lanes.runner, graphs=lanes)
    guard = Guard.fixed(engine.space.cheapest, engine.space)
    asked = (
        Request(images=(), question=f"{word}?", temperature=temperature, seed=seed, max_new_tokens=3)
        for word in tiny_model.WORDS
        for seed in range(20)
    )
    letters = {run.tokenizer.encode(letter)[0] for letter in LETTERS}
    changed = (
        (one, limited.answer(one, guard).tokens)
        for one in asked
        if (free := engine.answer(one, guard).tokens)[0] in letters and free != limited.answer(one, guard).tokens
    )
    one, expected = next(changed)
    assert expected[0] in letters
    answer = on_lanes.answer(one, guard)
    assert isinstance(answer, Answer)
    assert answer.tokens == expected
    choice = Request(images=(), question=CHOICE, max_new_tokens=3)
    assert on_lanes.answer(choice, guard).tokens == engine.answer(choice, guard).tokens
