from __future__ import annotations

import json
import logging
import pickle
import re
import shutil
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import tiny_model
from tempovlm.api import TempoVLM, check_policy, load, model_folder
from tempovlm.control.policies import FixedPolicy
from tempovlm.control.policy import Policy, Question
from tempovlm.core.errors import UserError, explained
from tempovlm.core.knobs import KnobConfig
from tempovlm.core.request import Answer, Request, check_budget_ms
from tempovlm.engine import calibration
from tempovlm.engine.environment import fingerprint
from tempovlm.engine.forks import FORKS
from tempovlm.engine.threads import pick_device
from tempovlm.engine.transcript import Token
from tempovlm.latency.profile import LatencyProfile
from tempovlm.model.vision.tiling import grids_of

MIDDLE = KnobConfig(tier="medium", top_k=3, num_blocks=4)


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[int]:
    """Calibrations are made up; the list grows by one for each."""
    calls: list[int] = []

    def made_up(*_: object, **__: object) -> object:
        calls.append(1)
        return tiny_model.make_profile().measurements

    monkeypatch.setenv("TEMPOVLM_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(calibration, "measure", made_up)
    return calls


def test_tokens_are_told_as_they_come_and_answers_cancelled(model: TempoVLM, picture: Image.Image) -> None:
    told = list[Token]()
    answer = model.answer(picture, "what?", max_new_tokens=6, on_token=told.append)
    *tokens, _ = model.stream(picture, "what?", max_new_tokens=6)
    assert told == tokens
    assert "".join(token.text for token in told) == answer.text
    assert model.answer(picture, "what?", cancel=lambda: True).finish_reason == "cancelled"
    assert model.answer(picture, "what?", cancel=lambda: bool(told)).finish_reason == "cancelled"
    for name in ("cancel", "on_token"):
        with pytest.raises(UserError, match=f"{name}: must be a function"):
            model.answer(picture, "what?", **{name: 5})


def test_calibration_waits_for_the_first_budget(
    model: TempoVLM, counted: list[int], picture: Image.Image, picture_file: Path
) -> None:
    assert model.profile is None
    assert model.answer(picture, "what?").knobs == model.space.native
    model.answer(picture, "what?", 50, tier="low", top_k=2, num_blocks=3)
    model.answer(picture, "what?", 50, knobs=model.space.cheapest)
    assert not counted
    answers = [
        model.answer(one, "what?", budget_ms=1e5) for one in (picture, picture_file, picture_file.read_bytes())
    ]
    assert len(counted) == 1
    assert model.profile is not None
    assert {answer.policy for answer in answers} == {"table (assumed)"}
    assert answers[0].predicted is not None
    assert model.answer(picture, "what?").predicted is not None


@pytest.mark.usefixtures("counted")
def test_budgets_choose_and_partial_knobs_bind(model: TempoVLM, picture: Image.Image) -> None:
    rich = model.answer(picture, "what?", budget_ms=1e5)
    assert rich.knobs == model.space.native, "the prior sees no gain above the trained top-k"
    poor = model.answer(picture, "what?", budget_ms=0.1)
    assert (poor.knobs, poor.budget_feasible, poor.budget_met) == (model.space.cheapest, False, False)
    bound = model.answer(picture, "what?", budget_ms=1e5, tier="medium", num_blocks=4)
    assert (bound.knobs.tier, bound.knobs.num_blocks, bound.policy) == ("medium", 4, "table (assumed)")


@pytest.mark.usefixtures("counted")
def test_the_guard_of_a_setting_is_made_once_for_each_calibration(model: TempoVLM) -> None:
    request = Request(images=(), question="what?")
    before = model.guard_for(request)
    model.calibrate()
    guard = model.guard_for(request)
    assert (before.profile, guard.profile) == (None, model.profile.for_lengths(model.lengths.of(request)))
    assert model.guard_for(request) is guard
    model.calibrate(force=True)
    assert model.guard_for(request) is not guard
    assert model.guard_for(request).profile is not guard.profile


@pytest.mark.usefixtures("counted")
def test_own_policies(tiny_folder: Path, picture: Image.Image) -> None:
    class Middle(Policy):
        name = "middle"

        def look(self, question: Question, left_ms: float) -> np.ndarray:
            assert question.left_ms == left_ms
            return np.eye(len(tiny_model.SPACE))[tiny_model.SPACE.index(MIDDLE)]

    own = load(str(tiny_folder), policy=Middle(), warmup=False, progress=False)
    answer = own.answer(picture, "what?", budget_ms=1e5)
    assert (str(answer.knobs), answer.policy) == ("medium/k3/b4", "middle")
    fixed = load(str(tiny_folder), policy=FixedPolicy(own.space.cheapest, own.space), warmup=False, progress=False)
    for budget_ms in (None, 1e5):
        answer = fixed.answer(picture, "what?", budget_ms=budget_ms)
        assert (answer.knobs, answer.policy) == (own.space.cheapest, "fixed")
    assert fixed.answer(picture, "what?", 1e5, tier="high").knobs.tier == "high"


class Named(Policy):
    """Scores that a test gives."""

    name = "named"

    def __init__(self, scores: Any) -> None:
        self.scores = scores

    def look(self, question: Question, left_ms: float) -> Any:  # noqa: ARG002 - the protocol's
        return self.scores


@pytest.mark.usefixtures("counted")
@pytest.mark.parametrize(
    ("scores", "told"),
    [
        (np.ones(3), r"an array of shape \(3,\)"),
        (np.ones((1, 60)), r"an array of shape \(1, 60\)"),
        (0.5, r"an array of shape \(\)"),
        (None, "a NoneType that is no array of real numbers"),
        ("high", "a str that is no array of real numbers"),
        (np.where(np.arange(60) == 1, np.nan, 1.0), "NaN for low/k2/b4"),
    ],
)
def test_wrong_scores_name_the_class_and_the_shape(
    tiny_folder: Path, picture: Image.Image, scores: Any, told: str
) -> None:
    own = load(str(tiny_folder), policy=Named(scores), warmup=False, progress=False)
    with pytest.raises(UserError, match=rf"policy Named: scored ({told}); expected numbers of shape \(60,\)"):
        own.answer(picture, "what?", budget_ms=1e5)


def test_wrong_policies_are_told(tiny_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(
        "from tempovlm.control.policy import Policy\n"
        "class Half(Policy):\n    name = 'half'\n"
        "class Nameless(Policy):\n    def look(self, question, left_ms): return [0.0]\n"
        "class Asks(Nameless):\n    def __init__(self, weight): pass\n"
    )
    (tmp_path / "broken.py").write_text("import no_such_module")
    given: tuple[tuple[Any, str], ...] = (
        (Named, r"policy Named: a class, where an object is due; call it, or name it as '.*test_api:Named'"),
        (f"{tmp_path}/mine.py:Half", r"mine\.py:Half: has no method look"),
        (f"{tmp_path}/mine.py:Nameless", r"policy Nameless: needs an attribute name"),
        (
            f"{tmp_path}/mine.py:Asks",
            r"mine\.py:Asks: Asks\(\) failed \(TypeError: .*may take the knob space as `space`",
        ),
        (f"{tmp_path}/broken.py:Mine", r"broken\.py cannot be imported \(ModuleNotFoundError: No module named"),
    )
    for policy, told in given:
        with pytest.raises(UserError, match=told):
            load(str(tiny_folder), policy=policy, warmup=False, progress=False)


def test_a_subset_of_the_knobs(tiny_folder: Path, counted: list[int], picture: Image.Image) -> None:
    few = {"tier": ["high", "low"], "top_k": [2, 3], "num_blocks": 4}
    quick: dict[str, Any] = {"warmup": False, "progress": False}
    whole = load(str(tiny_folder), **quick)
    whole.answer(picture, "what?", budget_ms=1e5)
    model = load(str(tiny_folder), space=few, **quick)
    assert model.space.axes == {"tier": ("low", "high"), "top_k": (2, 3), "num_blocks": (4,)}
    assert load(str(tiny_folder), space=model.space, **quick).space == model.space
    assert str(model.space.native) == "high/k3/b4"
    assert model.stamp().knob_space != whole.stamp().knob_space
    answer = model.answer(picture, "what?", budget_ms=1e5)
    assert (str(answer.knobs), counted) == ("high/k3/b4", [1]), "its part of the whole calibration is taken"
    assert model.profile is not None
    assert whole.profile is not None
    for i, knobs in enumerate(model.space):
        assert model.profile.p50_total_ms(i) == pytest.approx(
            whole.profile.p50_total_ms(whole.space.index(knobs)), rel=0.1
        )
    assert str(model.answer(picture, "what?").knobs) == "high/k3/b4"
    assert model.answer(picture, "what?", budget_ms=0.1).knobs == model.space.cheapest
    with pytest.raises(
        UserError, match="tier='medium': not in the knob space of this model; choose from low, high"
    ):
        model.answer(picture, "what?", tier="medium")


def test_a_subset_is_measured_by_itself_where_nothing_was(
    tiny_folder: Path, picture: Image.Image, counted: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    del counted
    few = tiny_model.SPACE.subset({"tier": ["low"], "num_blocks": [3, 6]})
    monkeypatch.setattr(calibration, "measure", lambda *_, **__: tiny_model.make_profile(few).measurements)
    quick: dict[str, Any] = {"warmup": False, "progress": False}
    model = load(str(tiny_folder), space=few, **quick)
    assert model.answer(picture, "what?", budget_ms=1e5).knobs == model.space.native
    assert model.profile is not None
    assert load(str(tiny_folder), space=few, **quick).profile is not None
    assert load(str(tiny_folder), **quick).profile is None


@pytest.mark.parametrize(
    ("space", "told"),
    [
        ({"tier": ["huge"]}, "tier='huge': not in the knob space"),
        ({"top_k": [99]}, "top_k=99: not in the knob space"),
        ({"top_k": ["two"]}, "top_k='two': must be an integer"),
        ({"depth": [4]}, "there is no knob 'depth'; choose from tier, top_k, num_blocks"),
        ({"tier": []}, "space: tier has no value"),
        ("low", "space low: give a KnobSpace, or values by knob"),
    ],
)
def test_a_wrong_subset_is_told(tiny_folder: Path, space: Any, told: str) -> None:
    with pytest.raises(UserError, match=told):
        load(str(tiny_folder), space=space, warmup=False, progress=False)


def test_another_ranking(
    tiny_folder: Path, tmp_path: Path, counted: list[int], picture: Image.Image, caplog: pytest.LogCaptureFixture
) -> None:
    folder = Path(shutil.copytree(tiny_folder, tmp_path / "model"))
    rows = [{**knobs.as_dict(), "accuracy": 0.5} for knobs in tiny_model.SPACE]
    (folder / "accuracy.json").write_text(json.dumps({"settings": rows, "ranking": [0, 5, 2, 3, 1, 4]}))
    (tmp_path / "ranking.json").write_text('{"1": 0.1, "2": 0.2, "3": 0.3, "4": 0.4}')
    quick: dict[str, Any] = {"warmup": False, "progress": False}
    own = load(str(folder), **quick)
    same = load(str(folder), ranking=[5, 0, 2, 3, 1, 4], **quick)
    other = load(str(folder), ranking=tmp_path / "ranking.json", **quick)
    assert other.ranking.order == (0, 5, 4, 3, 2, 1)
    blocks = [one.engine.plan(KnobConfig(tier="low", top_k=2, num_blocks=3)).blocks for one in (own, same, other)]
    assert blocks == [(0, 2, 5), (0, 2, 5), (0, 4, 5)]
    fingerprints = [fingerprint(one.stamp()) for one in (own, same, other)]
    assert fingerprints[0] == fingerprints[1] != fingerprints[2]
    with caplog.at_level(logging.WARNING, "tempovlm"):
        policies = [one.answer(picture, "what?", budget_ms=1e5).policy for one in (own, same, other)]
    assert policies == ["table", "table", "table (assumed)"]
    assert "accuracies are assumed" in caplog.text
    assert "the model's own are of another ranking of its blocks" in caplog.text
    assert len(counted) == 2
    deep = load(str(folder), ranking=[5, 0, 4, 3, 2, 1], space={"num_blocks": [6]}, **quick)
    assert deep.answer(picture, "what?", budget_ms=1e5).policy == "table", "all blocks run, whatever the ranking"
    with pytest.raises(UserError, match="ranking: block 2 stands at places 1 and 3"):
        load(str(folder), ranking=[2, 1, 2], **quick)


def test_not_calibrated(
    tiny_folder: Path, picture: Image.Image, counted: list[int], caplog: pytest.LogCaptureFixture
) -> None:
    model = load(str(tiny_folder), calibrate=False, warmup=False)
    with caplog.at_level(logging.WARNING, "tempovlm"):
        answer = model.answer(picture, "what?", budget_ms=20)
    assert (answer.knobs, answer.budget_feasible, counted) == (model.space.native, None, [])
    assert "not calibrated" in caplog.text


@pytest.mark.usefixtures("counted")
def test_batches(model: TempoVLM, picture: Image.Image) -> None:
    pairs = [(picture, "what is the sign?"), (None, "stop"), (picture, "is there a dog?")]
    answers = model.answer_batch(pairs, knobs=model.space.cheapest, max_new_tokens=3)
    alone = [model.answer(*pair, knobs=model.space.cheapest, max_new_tokens=3) for pair in pairs]
    assert [answer.tokens for answer in answers] == [answer.tokens for answer in alone]
    requests = [Request(images=(picture,), question="what?", budget_ms=b) for b in (0.1, None, 1e5)]
    first, second, third = model.answer_batch(requests)
    assert (first.knobs, first.budget_feasible) == (model.space.cheapest, False)
    assert second.knobs == model.space.native
    assert third.knobs == model.space.native
    assert third.policy == "table (assumed)"


def test_a_damaged_calibration_is_told_once_and_measured_again(
    model: TempoVLM, counted: list[int], picture: Image.Image, caplog: pytest.LogCaptureFixture
) -> None:
    path = calibration.profile_path(model.stamp())
    path.parent.mkdir(parents=True)
    path.write_text("{")
    with caplog.at_level(logging.WARNING, "tempovlm"):
        assert model.answer(picture, "what?", budget_ms=1e5).budget_feasible is True
    assert len(counted) == 1
    assert sum("measuring again" in message for message in caplog.messages) == 1
    assert model.calibrate() is model.profile
    assert len(counted) == 1
    model.calibrate(force=True)
    assert len(counted) == 2


def test_threads_look_for_the_calibration_together(
    model: TempoVLM, counted: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    stored, seen = tiny_model.make_profile(model.space), []
    other = threading.Thread(target=lambda: seen.append(model.calibrate()))
    locked: list[bool] = []

    def read(*_: object) -> LatencyProfile:
        if not other.ident:
            try_lock = threading.Thread(
                target=lambda: locked.append(not model._lock._lock().acquire(blocking=False))
            )
            try_lock.start()
            try_lock.join()
            other.start()
        return stored

    monkeypatch.setattr(calibration, "stored_profile", read)
    assert model.profile is stored
    other.join()
    assert locked == [True], "another thread has to wait while the file is read"
    assert seen == [stored]
    assert not counted


def test_a_calibration_of_other_threads_is_not_used(
    tiny_folder: Path, counted: list[int], monkeypatch: pytest.MonkeyPatch, picture: Image.Image
) -> None:
    one, two = (load(str(tiny_folder), threads=n, warmup=False, progress=False) for n in (1, 2))
    assert two.calibrate().stamp["threads"] == 2
    assert one.profile is None, "measured by a model with other threads, which was loaded later"
    assert one.calibrate().stamp["threads"] == 1
    two.answer(picture, "what?", budget_ms=1e5)
    assert len(counted) == 2
    monkeypatch.setattr(FORKS, "one_thread", True)
    assert two.profile is not None
    assert two.profile.stamp["threads"] == 1, "as in a fork that lost its threads"
    assert two.answer(picture, "what?", budget_ms=1e5).budget_feasible is True
    assert len(counted) == 2


@pytest.mark.parametrize("ambient", [1, 3])
def test_a_model_keeps_its_threads_and_gives_back_the_callers(
    tiny_folder: Path, picture: Image.Image, ambient: int
) -> None:
    model, seen = load(str(tiny_folder), threads=2, warmup=False, progress=False), []
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(ambient)
        for item in model.stream(picture, "what?", cancel=lambda: bool(seen.append(torch.get_num_threads()))):
            assert torch.get_num_threads() == ambient, item
        assert {2} <= set(seen) <= {1, 2}, "small work of a stage has one"
        assert model.stamp().threads == 2
    finally:
        torch.set_num_threads(before)


def test_stream(model: TempoVLM, picture: Image.Image) -> None:
    *tokens, answer = model.stream(picture, "what?", knobs=model.space.cheapest, cancel=lambda: False)
    assert isinstance(answer, Answer)
    assert tokens


def test_loading_warms_up(tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tempovlm.engine.engine import Engine

    seen: list[object] = []
    original = Engine.answer

    def watched(self: Engine, request: Request, guard: object = None) -> Answer:
        answer = original(self, request, guard)  # type: ignore[arg-type]
        seen.append(answer.knobs)
        return answer

    monkeypatch.setattr(Engine, "answer", watched)
    monkeypatch.setattr("tempovlm.engine.calibration.WARM_UP_ROUNDS", 1)
    model = load(str(tiny_folder))
    assert {model.space.cheapest, model.space.native} <= set(seen)


def test_the_stamp_names_model_weights_and_machine(model: TempoVLM) -> None:
    stamp = model.stamp("synthetic")
    assert (stamp.model, stamp.data_source, stamp.device) == ("tiny", "synthetic", "cpu/float32")
    assert stamp.weights == model.weights_hash
    assert len(model.weights_hash) == 12
    assert stamp.knob_space == model.space.fingerprint
    assert model.ranking.order[0] == 0


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"question": None}, "the question: must be text, not NoneType"),
        ({"question": b"what?"}, "the question: must be text, not bytes"),
        ({"budget_ms": "100"}, "budget_ms='100': must be a positive, finite number of milliseconds, not text"),
        ({"budget_ms": 10**400}, "must be a positive, finite number"),
        ({"temperature": "hot"}, "temperature='hot': must be zero or a positive number, not text"),
        ({"temperature": 1.0, "seed": 1 << 64}, "seed=18446744073709551616: must fit 64 bits"),
        ({"stop": "Q:"}, "stop='Q:': must be a tuple"),
        ({"stop": ("",)}, "must be a tuple of texts that are not empty"),
        ({"on_deadline": "later"}, "on_deadline='later': choose from finish, stop"),
    ],
)
def test_a_request_of_wrong_values_is_told(options: dict[str, object], named: str) -> None:
    with pytest.raises(UserError, match=re.escape(named)):
        Request(**{"images": (), "question": "what?", **options})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("call", "in_python", "on_the_command_line"),
    [
        (lambda: check_budget_ms(np.float64(-2)), "budget_ms=-2.0: must be", "--budget_ms -2.0: must be"),
        (lambda: grids_of("ultra"), "tier='ultra': unknown", "--tier ultra: unknown"),
        (lambda: pick_device("tpu"), "device='tpu': unknown", "--device tpu: unknown"),
        (lambda: model_folder("/no/" + "deep/" * 30), "model='/no/deep", "deep/: no such model"),
        (lambda: check_policy("clever"), "policy='clever': no such policy", "--policy clever: no such policy"),
    ],
)
def test_errors_name_the_argument_in_python_and_the_flag_on_the_command_line(
    call: Callable[[], object], in_python: str, on_the_command_line: str
) -> None:
    with pytest.raises(UserError) as refused:
        call()
    message = str(refused.value)
    assert in_python in message
    assert "--" not in message
    assert on_the_command_line in explained(refused.value)[0]
    assert str(pickle.loads(pickle.dumps(refused.value))) == message


def test_other_values_are_no_policy_and_no_setting(model: TempoVLM) -> None:
    with pytest.raises(UserError, match="of type NoneType is no policy; choose from auto, table, fixed, or give"):
        check_policy(None)  # type: ignore[arg-type]
    with pytest.raises(UserError, match="knobs 'native': must be a KnobConfig"):
        model.answer(None, "what?", knobs="native")  # type: ignore[arg-type]


def test_unknown_names(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such model and no such folder"):
        model_folder(str(tmp_path / "absent"))
    with pytest.raises(UserError, match="choose from auto, cpu, cuda"):
        pick_device("cpu:3")
    with pytest.raises(UserError, match="2 images"):
        Request(images=(b"", b""), question="what?")


def _pickled(value: Any) -> Any:
    return pickle.loads(pickle.dumps(value))


@pytest.mark.parametrize("copied", [deepcopy, _pickled])
def test_a_copy_of_a_model_answers_alike(
    model: TempoVLM, picture: Image.Image, copied: Callable[[Any], Any]
) -> None:
    again = copied(model)
    for question in ("what is the sign?", "what is <im_patch>?"):
        assert again.answer(picture, question).tokens == model.answer(picture, question).tokens
    assert (again.space, again.ranking, again.card) == (model.space, model.ranking, model.card)
    with ThreadPoolExecutor(1) as other, model._lock:  # one that is held here is free in the copy
        assert other.submit(lambda: copied(model).profile).result(timeout=60) is None


@pytest.mark.parametrize("copied", [deepcopy, _pickled])
def test_values_are_equal_to_their_copies(model: TempoVLM, copied: Callable[[Any], Any]) -> None:
    request = Request(images=(b"png",), question="what?", budget_ms=5.0, stop=("a",))
    answer = model.answer(None, "what is the sign?")
    knobs = answer.knobs
    values = (request, answer, knobs, model.space, model.engine.plan(knobs), model.engine.native)
    for value in values:
        assert copied(value) == value
    again = copied(model.space)
    assert (again.index(knobs), again.fingerprint) == (model.space.index(knobs), model.space.fingerprint)
    assert copied({knobs: 1})[knobs] == 1


@pytest.mark.parametrize("style", ["nonsense", "VQA2"])
def test_an_unknown_style_is_refused_with_the_list(style: str, model: TempoVLM) -> None:
    for ask in (
        lambda: model.answer(None, "what?", style=style),
        lambda: model.answer_batch([(None, "what?")], style=style),
        lambda: list(model.stream(None, "what?", style=style)),
    ):
        with pytest.raises(UserError, match=rf"style.*{style}.*: unknown; .*choose from vqa2, text_vqa"):
            ask()
    assert model.answer(None, "what?", style="", max_new_tokens=1).num_output_tokens == 1
