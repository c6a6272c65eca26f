"""Requests answered together: each as alone, in any mixture, with times that add up, behind who is more urgent."""

from __future__ import annotations

import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

import tiny_model
from company_fakes import PlainRows, at_once, company_of, together
from preloaded import Preloaded
from recorders import Again
from tempovlm.control.guard import Guard
from tempovlm.core.errors import UserError
from tempovlm.core.plan import Plan
from tempovlm.core.request import STAGES, Answer, Request
from tempovlm.engine.batching import answer_batch
from tempovlm.engine.company import company as companies
from tempovlm.engine.company.company import Company
from tempovlm.engine.company.member import Asked
from tempovlm.engine.company.seats import Seat, Seats
from tempovlm.engine.cuda.vision_graphs import VisionGraphs
from tempovlm.engine.engine import Engine
from tempovlm.engine.runner import Runner
from tempovlm.model.cache import KVCache
from tempovlm.model.config import MOLMOE_1B, POCKET
from tempovlm.model.packed import can_run_rows, read_packed
from tempovlm.model.prompt import build_prompt
from tempovlm.model.vision.tiling import Grid

QUESTIONS = ("what is the sign?", "stop", "is there a dog there?", "how many are there?")


@pytest.fixture
def crowded(engine: Engine) -> Engine:
    """An engine on the same model, whose company is there although it is on a CPU."""
    other = Engine(engine.runner.model, engine.runner.tokenizer, name="crowded")
    other.company = Company(other)
    return other


def asked(engine: Engine, count: int = 9) -> list[tuple[Request, Guard]]:
    """Requests with and without pictures of several sizes, at several settings, greedy and drawn."""
    space = engine.space
    settings = (space.cheapest, space.native, space.cheapest, space.largest)
    found = []
    for i in range(count):
        pictures = () if i % 3 == 1 else (Image.fromarray(tiny_model.picture(i, 84, 60 + 40 * (i % 4))),)
        drawn = {"temperature": 1.5, "top_p": 0.9, "seed": i} if i % 4 == 3 else {}
        request = Request(images=pictures, question=QUESTIONS[i % 4], max_new_tokens=1 + i % 5, **drawn)  # type: ignore[arg-type]
        found.append((request, Guard.fixed(settings[i % len(settings)], space)))
    return found


def check(answers: list[Answer], expected: list[Answer]) -> None:
    """The same answers, whose stages add up."""
    for ours, alone in zip(answers, expected, strict=True):
        assert (ours.tokens, ours.text, ours.finish_reason) == (alone.tokens, alone.text, alone.finish_reason)
        assert (ours.knobs, ours.tiling, ours.num_text_tokens) == (
            alone.knobs,
            alone.tiling,
            alone.num_text_tokens,
        )
        total_ms = ours.timings_ms["total"]
        assert sum(ours.timings_ms[stage] for stage in STAGES) == pytest.approx(total_ms)
        assert len(ours.step_ms) == len(ours.tokens) - 1
        assert ours.ttft_ms == pytest.approx(total_ms - sum(ours.step_ms))


def test_each_answer_is_that_of_the_request_alone(engine: Engine, crowded: Engine) -> None:
    pairs = asked(engine)
    check(company_of(crowded).answer_all(pairs), [engine.answer(*pair) for pair in pairs])


def test_so_it_is_by_vision_graphs_and_in_small_turns(
    engine: Engine, crowded: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(companies, "TURN_TOKENS", 200)
    vision = VisionGraphs(engine.runner.model, Again())
    vision.warmup(engine.space.tiers)
    crowded.runner = replace(crowded.runner, vision=vision)
    pairs = asked(engine)
    check(company_of(crowded).answer_all(pairs), [engine.answer(*pair) for pair in pairs])


def test_so_it_is_on_the_lane(engine: Engine, crowded: Engine) -> None:
    pytest.importorskip("triton")
    if torch.cuda.is_available():
        pytest.skip("what the interpreter runs; see tests/gpu")
    from tempovlm.engine.cuda.graphs import GraphDecoder
    from tempovlm.model.kernels.decode import Tile, Tiling

    tile = Tile(64, 64)
    tiling = Tiling(tile, tile, tile, tile, tile, tile, splits=2, tokens=64)
    crowded.runner = replace(crowded.runner, graphs=GraphDecoder(engine.runner.model, tiling=tiling))
    pairs = [(replace(request, max_new_tokens=2), guard) for request, guard in asked(engine, 5)]
    check(company_of(crowded).answer_all(pairs), [engine.answer(*pair) for pair in pairs])


def test_so_it_is_in_rows_that_are_joined_and_left_at_any_step(engine: Engine, crowded: Engine) -> None:
    pairs = asked(engine, 20)
    company, rows = company_of(crowded), PlainRows(crowded.runner)
    company._seats = Seats(rows)  # type: ignore[arg-type]
    expected = [engine.answer(*pair) for pair in pairs]
    check(company.answer_all(pairs), expected)
    check(at_once(company, crowded, pairs), expected)
    assert rows.most > 1
    assert rows.free == [0, 1, 2, 3]


def test_broken_logits_leave_the_other_rows(
    engine: Engine, crowded: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    pairs = [(replace(request, temperature=0.0, max_new_tokens=4), guard) for request, guard in asked(engine, 4)]
    expected = [engine.answer(*pair).tokens for pair in pairs]
    assert len(expected[2]) > 1
    company, rows = company_of(crowded), PlainRows(crowded.runner)
    company._seats, add = Seats(rows), Seat.add  # type: ignore[arg-type]

    def adding(seat: Seat, token: int, at_ms: float) -> None:
        is_bad = seat.member.request is pairs[2][0] and len(seat.member.transcript.tokens) == 1
        add(seat, -1 if is_bad else token, at_ms)

    monkeypatch.setattr(Seat, "add", adding)
    found = at_once(company, crowded, pairs)
    assert isinstance(found[2], UserError)
    assert [found[i].tokens for i in (0, 1, 3)] == [expected[i] for i in (0, 1, 3)]
    assert rows.free == [0, 1, 2, 3]


def test_rows_are_for_heads_that_their_attention_takes() -> None:
    assert can_run_rows(MOLMOE_1B)
    assert can_run_rows(POCKET)
    tiny = tiny_model.CONFIG
    assert tiny.head_width % 8, "the small model of the tests is one that reads and decodes without rows"
    assert not can_run_rows(tiny)
    assert can_run_rows(replace(tiny, width=64))
    assert not can_run_rows(replace(tiny, width=4 * 264))


def test_packs_have_equal_plans_and_no_more_tokens_than_a_graph(engine: Engine) -> None:
    native, cheapest = (engine.plan(one) for one in (engine.space.native, engine.space.cheapest))

    class Prompt:
        def __init__(self, length: int, plan: Plan) -> None:
            self.length, self.plan = length, plan

        def __len__(self) -> int:
            return self.length

    lengths = [(1250, native), (300, cheapest), (1250, native), (1250, native), (2000, native), (300, cheapest)]
    reads = [companies.Read(Prompt(*one), None, ()) for one in lengths]  # type: ignore[arg-type]
    found = [[reads.index(one) for one in pack] for pack in companies.packs(reads)]
    assert found == [[0, 2], [1, 5], [3], [4]]
    assert companies.packs([]) == []


def test_a_pack_reads_each_prompt_as_itself(engine: Engine) -> None:
    model = engine.runner.model
    plan = engine.plan(engine.space.largest)
    prompts = [model.embed(torch.arange(length).unsqueeze(0) % 40, None, None)[0] for length in (7, 90, 1)]

    def caches() -> list[KVCache]:
        return [KVCache.allocate(model.config, len(plan.steps), 1, 100, prompts[0]) for _ in prompts]

    packed, apart = caches(), caches()
    logits = read_packed(model.decoder, prompts, plan, packed)  # type: ignore[arg-type]
    expected = [model.prefill(x.unsqueeze(0), plan, cache) for x, cache in zip(prompts, apart, strict=True)]
    torch.testing.assert_close(logits, torch.cat(expected), rtol=1e-4, atol=1e-4)
    for ours, plain in zip(packed, apart, strict=True):
        torch.testing.assert_close(ours.keys, plain.keys, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(ours.values, plain.values, rtol=1e-4, atol=1e-4)


def test_callers_join_who_is_there_and_one_that_fails_fails_alone(engine: Engine, crowded: Engine) -> None:
    pairs = asked(engine, 8)
    expected = [engine.answer(*pair) for pair in pairs]
    wrong = Request(images=(b"no picture",), question="what?"), pairs[0][1]
    joined: list[Request] = []
    company = company_of(crowded)
    answer = company.answer
    company.answer = lambda request, *rest: (joined.append(request), answer(request, *rest))[1]  # type: ignore[method-assign]
    with crowded.door.enter(crowded.door.line_up(0.0)):
        inside = crowded.answer(*pairs[0])  # a thread that is inside does not wait for others
        calls = [lambda pair=pair: crowded.answer(*pair) for pair in [*pairs, wrong]]
        thread = threading.Thread(target=lambda: joined_answers.extend(together(calls)))
        joined_answers: list[Any] = []
        thread.start()
        while len(joined) < len(calls):
            pass
    thread.join()
    assert inside.tokens == expected[0].tokens
    check(joined_answers[:-1], expected)
    assert isinstance(joined_answers[-1], UserError)
    assert not crowded.door.is_busy
    assert crowded.answer(*pairs[0]).tokens == expected[0].tokens
    assert len(joined) == len(calls), "alone it does not wait for others"


def test_broken_logits_end_one_answer_only(
    engine: Engine, crowded: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    pairs = asked(engine, 4)
    take, bad = companies.first_token, pairs[2][0]
    monkeypatch.setattr(
        companies,
        "first_token",
        lambda run, one, state: take(run, one, state) - (10**6 if one.member.request is bad else 0),
    )
    monkeypatch.setattr("tempovlm.engine.transcript.BROKEN", -(10**6) + int(engine.answer(*pairs[2]).tokens[0]))
    company = company_of(crowded)
    found = together([lambda pair=pair: company.answer(Asked(*pair, 0.0)) for pair in pairs])
    assert isinstance(found[2], UserError)
    assert all(isinstance(one, Answer) for place, one in enumerate(found) if place != 2)


def test_a_fault_of_the_device_reaches_every_caller(
    engine: Engine, crowded: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    pairs = asked(engine, 3)
    expected = [engine.answer(*pair).tokens for pair in pairs]

    def fail(*_: object) -> None:
        raise UserError("out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(companies, "encode_together", fail)
        for one in together([lambda pair=pair: company_of(crowded).answer(Asked(*pair, 0.0)) for pair in pairs]):
            assert isinstance(one, UserError)
    assert [one.tokens for one in company_of(crowded).answer_all(pairs)] == expected


def test_a_deadline_waits_for_a_piece_of_work_at_most(
    engine: Engine, crowded: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    order, pairs = list[str](), asked(engine, 3)
    hurried = threading.Thread(target=lambda: crowded.answer(replace(pairs[0][0], budget_ms=1000.0)))
    decode, encode = Company._decode, companies.encode_together

    def encoding(*pair: Any) -> Any:
        if hurried.ident is not None:  # a second turn, of those who came later
            return encode(*pair)
        hurried.start()
        while not crowded.door.waiting:
            pass
        return encode(*pair)

    def decoding(*args: Any, **named: Any) -> None:
        order.append("joined")
        decode(*args, **named)

    monkeypatch.setattr(companies, "encode_together", encoding)
    monkeypatch.setattr(Company, "_decode", decoding)
    monkeypatch.setattr(Runner, "settle", lambda *_: order.append("hurried"))
    company_of(crowded).answer_all(pairs)
    hurried.join()
    assert order == ["hurried", "joined", "joined", "joined"]


def test_batches_with_company(engine: Engine, crowded: Engine) -> None:
    pairs = asked(engine)
    requests, guards = [pair[0] for pair in pairs], {id(pair[0]): pair[1] for pair in pairs}
    requests[4] = replace(requests[4], budget_ms=1e6)
    guards[id(requests[4])] = pairs[4][1]
    answers = answer_batch(crowded, requests, lambda one: guards[id(one)])
    assert [one.tokens for one in answers] == [engine.answer(*pair).tokens for pair in pairs]
    assert not crowded.door.is_busy


ENDS = """
import sys, threading
from pathlib import Path
sys.path.append(sys.argv[2])
import tiny_model
from tempovlm.control.guard import Guard
from tempovlm.core.errors import UserError
from tempovlm.core.request import Request
from tempovlm.core.units import now_ms
from tempovlm.engine.company.company import Company
from tempovlm.engine.company.member import Asked
from tempovlm.engine.engine import Engine
from tempovlm.model.prompt import Tokenizer

engine = Engine(tiny_model.build_model(), Tokenizer.load(Path(sys.argv[1])))
engine.company = Company(engine)
request = Request(images=(tiny_model.picture(),), question="stop", max_new_tokens=8)
answered = threading.Event()

def ask():
    try:
        while True:
            engine.company.answer(Asked(request, engine.native, now_ms()))
            answered.set()
    except UserError:
        pass

for _ in range(3):
    threading.Thread(target=ask, daemon=True).start()
answered.wait()
"""


def test_a_process_ends_in_good_order_while_requests_are_in_flight(
    tiny_folder: Path, tmp_path: Path, preloaded: Preloaded
) -> None:
    script = tmp_path / "ends.py"
    script.write_text(ENDS, encoding="utf-8")
    words = tiny_folder / "tokenizer.json", Path(tiny_model.__file__).parent
    for _ in range(3):
        done = preloaded.run(script, *words, cwd=tmp_path)
        assert (done.returncode, done.stderr) == (0, "")


def test_who_waits_when_the_process_ends_gets_an_error(
    engine: Engine, crowded: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    company, ending = company_of(crowded), threading.Event()
    encode = companies.encode_together

    def encoding(*pair: Any) -> Any:
        ending.set()
        while not company._is_over:
            pass
        return encode(*pair)

    monkeypatch.setattr(companies, "encode_together", encoding)
    monkeypatch.setattr(companies, "MOST_TOGETHER", 1)
    pairs = asked(engine, 3)
    found: list[Any] = []
    thread = threading.Thread(
        target=lambda: found.extend(
            together([lambda pair=pair: company.answer(Asked(*pair, 0.0)) for pair in pairs])
        )
    )
    thread.start()
    ending.wait()
    while len(company._pending) < 2:
        pass
    companies.end_all()
    thread.join()
    assert sum(isinstance(one, Answer) for one in found) == 1, "the one that was at work"
    assert sum("process ends" in str(one) for one in found if isinstance(one, UserError)) == 2
    with pytest.raises(UserError, match="process ends"):
        company.answer(Asked(*pairs[0], 0.0))


def test_there_is_none_on_a_cpu(engine: Engine) -> None:
    assert engine.company is None


def test_prompts_are_embedded_together_as_alone(engine: Engine) -> None:
    run, rng = engine.runner, torch.Generator().manual_seed(0)
    config, prompts = run.model.config, []
    for grid, question in ((Grid(1, 1), "a"), (None, "what is it?"), (Grid(2, 3), "stop"), (Grid(1, 1), "is it?")):
        prompt = build_prompt(question, "vqa2", grid, config, run.tokenizer, 4)
        seen = None
        if grid is not None:
            seen = torch.randn(grid.num_crops, config.vision.pooled**2, config.width, generator=rng)
        prompts.append((prompt.tokens, seen, prompt.slots))
    together = run.model.embed_packed(prompts)
    for x, (tokens, seen, slots) in zip(together, prompts, strict=True):
        torch.testing.assert_close(x, run.model.embed(tokens.unsqueeze(0), seen, slots)[0])
    (alone,) = run.model.embed_packed(prompts[1:2])
    torch.testing.assert_close(alone, together[1])
