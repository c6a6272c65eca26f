from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from PIL import Image

import tiny_model
from tempovlm.control.guard import Guard
from tempovlm.control.policies import TablePolicy, prior_accuracy
from tempovlm.control.policy import Question, Sight
from tempovlm.control.select import Floats
from tempovlm.core.errors import UserError
from tempovlm.core.knobs import KnobConfig
from tempovlm.core.request import STAGES, Answer, Request
from tempovlm.engine import runner
from tempovlm.engine.batching import MAX_ROWS, answer_batch
from tempovlm.engine.engine import Engine
from tempovlm.engine.threads import default_threads, physical_cores
from tempovlm.engine.transcript import Token
from tempovlm.latency.clock import HostClock
from tempovlm.model.config import CLIP_STD
from tempovlm.model.vision.image import open_image
from tempovlm.model.vision.tiling import cut_crops
from timings import TICK_MS, UNTOLD_MS, Ticks, untold_ms


def request(**fields: object) -> Request:
    picture = Image.fromarray(tiny_model.picture())
    return Request(**{"images": (picture,), "question": "what is the sign?", **fields})  # type: ignore[arg-type]


@pytest.mark.usefixtures("ticks")
@pytest.mark.parametrize("index", [0, -1])
def test_stages_add_up_to_the_total(engine: Engine, index: int) -> None:
    answer = engine.answer(request(), Guard.fixed(engine.space.settings[index], engine.space))
    assert tuple(answer.timings_ms) == (*STAGES, "total")
    assert min(answer.timings_ms.values()) >= TICK_MS
    assert untold_ms(answer.timings_ms) == pytest.approx(UNTOLD_MS)


@pytest.mark.parametrize("is_busy", [False, True])
def test_a_choice_is_rehearsed_while_a_device_is_busy(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, is_busy: bool
) -> None:
    seen: list[Sight] = []

    class Seeing(TablePolicy):
        sees_picture = True

        def settle(self, question: Question, sight: Sight, left_ms: float) -> Floats:
            seen.append(sight)
            return self.look(question, left_ms)

    policy = Seeing(engine.space, prior_accuracy(engine.space))
    guard = Guard(policy, engine.space, tuple(range(len(engine.space))), tiny_model.make_profile(), second_ms=0.1)
    monkeypatch.setattr(HostClock, "is_device_busy", lambda _: is_busy)
    answer = engine.answer(request(budget_ms=1e5), guard)
    assert answer.knobs.tier == engine.space.tiers[-1]
    assert [sight.vision is None for sight in seen] == [True, False][not is_busy :]


def test_the_first_token_belongs_to_prefill_and_the_rest_to_decode(engine: Engine) -> None:
    answer = engine.answer(request(max_new_tokens=5))
    timings_ms = answer.timings_ms
    assert len(answer.step_ms) == answer.num_output_tokens - 1
    assert sum(answer.step_ms) == pytest.approx(timings_ms["decode"])
    before_ms = sum(timings_ms[stage] for stage in STAGES if stage != "decode")
    assert answer.ttft_ms == pytest.approx(before_ms)
    assert answer.tpot_ms == pytest.approx(timings_ms["decode"] / (answer.num_output_tokens - 1))
    single = engine.answer(request(max_new_tokens=1))
    assert (single.tpot_ms, single.timings_ms["decode"], single.num_output_tokens) == (None, pytest.approx(0.0), 1)


def test_opening_the_file_is_part_of_preprocessing(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, ticks: Ticks
) -> None:
    usual_ms = engine.answer(request()).timings_ms

    def slowly(source: object) -> object:
        ticks.wait(40.0)
        return open_image(source)  # type: ignore[arg-type]

    monkeypatch.setattr(runner, "open_image", slowly)
    slow_ms = engine.answer(request()).timings_ms
    beyond_ms = {name: took_ms - usual_ms[name] for name, took_ms in slow_ms.items()}
    assert beyond_ms == pytest.approx(dict.fromkeys(STAGES, 0.0) | {"preprocess": 40.0, "total": 40.0}, abs=0.5)


def test_stream_yields_tokens_then_the_answer(engine: Engine) -> None:
    *tokens, answer = engine.stream(request(max_new_tokens=6))
    assert isinstance(answer, Answer)
    assert all(isinstance(token, Token) for token in tokens)
    assert [token.id for token in tokens if isinstance(token, Token)] == list(answer.tokens)
    assert "".join(token.text for token in tokens if isinstance(token, Token)) == answer.text


def test_cancelled_between_tokens(engine: Engine) -> None:
    seen: list[object] = []
    for item in engine.stream(request(max_new_tokens=12), cancel=lambda: len(seen) >= 3):
        seen.append(item)
    answer = seen[-1]
    assert isinstance(answer, Answer)
    assert (answer.finish_reason, answer.num_output_tokens) == ("cancelled", 3)


def test_what_was_held_back_is_said_where_a_stream_is_cut(engine: Engine) -> None:
    whole = engine.answer(request(max_new_tokens=8))
    first = engine.runner.tokenizer.decode([whole.tokens[0]])
    asked, made = request(max_new_tokens=8, stop=(f"{first} and then some",)), []
    decode = engine.runner.decode

    def counted(_: object, *args: object) -> object:
        made.append(args)
        return decode(*args)  # type: ignore[arg-type]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runner.Runner, "decode", counted)
        *tokens, answer = engine.stream(asked, cancel=lambda: bool(made))
    assert isinstance(answer, Answer)
    assert (answer.finish_reason, answer.stopped_at) == ("cancelled", "decode")
    said = [(token.text, token.id) for token in tokens if isinstance(token, Token)]
    assert said[0][1] == answer.tokens[0]
    assert "".join(text for text, _ in said) == answer.text
    assert answer.text.startswith(first)


def test_a_closed_stream_stops(engine: Engine) -> None:
    stream = engine.stream(request(max_new_tokens=12))
    next(stream)
    stream.close()  # type: ignore[attr-defined]
    assert list(stream) == []


@pytest.mark.usefixtures("ticks")
def test_deadline_stops_or_is_overrun(engine: Engine) -> None:
    stopped = engine.answer(request(budget_ms=TICK_MS, max_new_tokens=9, on_deadline="stop"))
    assert (stopped.finish_reason, stopped.num_output_tokens, stopped.budget_met) == ("deadline", 0, False)
    assert (stopped.text, stopped.ttft_ms, stopped.stopped_at) == ("", None, "queue")
    finished = engine.answer(request(budget_ms=TICK_MS, max_new_tokens=9))
    assert finished.finish_reason in ("length", "stop")
    assert finished.num_output_tokens > 1
    assert engine.answer(request(budget_ms=1e6, on_deadline="stop")).budget_met is True


def test_stop_texts_end_the_answer(engine: Engine) -> None:
    whole = engine.answer(request(max_new_tokens=8))
    assert len(whole.text) > 3
    stop = whole.text[2:4]
    answer = engine.answer(request(max_new_tokens=8, stop=("never said", stop)))
    assert answer.finish_reason == "stop"
    assert answer.text == whole.text[: whole.text.index(stop)].rstrip()
    assert answer.num_output_tokens < whole.num_output_tokens


def test_native_without_a_budget(engine: Engine) -> None:
    answer = engine.answer(request())
    assert answer.knobs == engine.space.native
    assert (answer.budget_met, answer.budget_feasible, answer.predicted, answer.policy) == (
        None,
        None,
        None,
        "fixed",
    )


def test_exact_engines_resize_in_float32(engine: Engine) -> None:
    run = engine.runner
    exact = Engine(run.model, run.tokenizer, exact=True).runner
    wanted = request()
    image = run.open(wanted)
    assert image is not None
    fine, fast = (one.prepare(image, "high", wanted).crops for one in (exact, run))
    assert fine is not None
    assert fast is not None
    expected = cut_crops(image, "high", run.model.config.vision, exact=True).patches
    torch.testing.assert_close(fine.patches, expected)
    difference = (fine.patches - fast.patches).abs().max()
    assert 0 < difference < 2 / 255 / min(CLIP_STD)
    assert (fine.live is not None, fast.live) == (True, None)


def test_no_picture(engine: Engine) -> None:
    answer = engine.answer(request(images=()))
    assert (answer.num_vision_tokens, answer.tiling) == (0, None)
    assert answer.num_output_tokens >= 1


def test_question_over_the_context(engine: Engine) -> None:
    with pytest.raises(UserError, match="exceed the context of 512"):
        engine.answer(request(question="what " * 600))


def test_setting_outside_the_space(engine: Engine) -> None:
    with pytest.raises(UserError, match=r"top_k=7: .*choose from"):
        engine.plan(KnobConfig(tier="low", top_k=7, num_blocks=4))


def test_seeded_samples_repeat(engine: Engine) -> None:
    runs = [engine.answer(request(temperature=1.5, seed=seed, max_new_tokens=8)).tokens for seed in (1, 1, 2)]
    assert runs[0] == runs[1] != runs[2]


def test_large_batches_are_answered_in_order(engine: Engine) -> None:
    guard = Guard.fixed(engine.space.cheapest, engine.space)
    questions = ["what is the sign?", "stop", "how many dogs are there?"]
    requests = [request(question=questions[i % 3], max_new_tokens=2) for i in range(MAX_ROWS + 2)]
    answers = answer_batch(engine, requests, guard)
    expected = [engine.answer(one, guard).tokens for one in requests[:3]]
    assert [answer.tokens for answer in answers] == [expected[i % 3] for i in range(MAX_ROWS + 2)]
    assert answer_batch(engine, []) == []


def test_threads_are_set_before_torch_is_imported() -> None:
    code = (
        "import os, sys; from tempovlm.engine.threads import prepare; prepare(1);"
        "assert 'torch' not in sys.modules;"
        "import tempovlm.api; assert 'torch' not in sys.modules;"
        "print(os.environ['OMP_WAIT_POLICY'], os.environ['OMP_NUM_THREADS'])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env={})
    assert done.stdout.split() == ["PASSIVE", "1"]


def test_one_thread_where_torch_came_first_and_spins() -> None:
    code = "import torch; from tempovlm.engine.threads import prepare; print(prepare(), torch.get_num_threads())"
    for env, count in (({}, "1"), ({"OMP_WAIT_POLICY": "passive", "TEMPOVLM_THREADS": "2"}, "2")):
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=env)
        assert done.stdout.split() == [count, count]


def test_thread_count(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TEMPOVLM_THREADS", "5")
    assert default_threads() == 5
    monkeypatch.setenv("TEMPOVLM_THREADS", "")
    assert 1 <= default_threads() <= min(2, physical_cores())
