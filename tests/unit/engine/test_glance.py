"""Policies that glance, from checkpoint to answer: the same answer, one look, honest stages and budgets."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import tiny_model
from tempovlm.api import TempoVLM, load
from tempovlm.control.checkpoint import save_controller
from tempovlm.control.guard import Guard
from tempovlm.control.learned.llm_based import LLMBasedController
from tempovlm.control.learned.networks import Knob1PredictorBudgetLanguageGlance, Knob2Knob3Predictor
from tempovlm.control.learned.observation import vision_width
from tempovlm.control.learned.policies import policy_from_checkpoint
from tempovlm.control.policy import Policy, Question, Sight
from tempovlm.control.select import Floats
from tempovlm.core.knobs import KnobConfig
from tempovlm.core.request import STAGES, Request
from tempovlm.engine import calibration
from tempovlm.engine.batching import answer_batch
from tempovlm.engine.engine import Engine
from tempovlm.engine.glance import guarded, measure_split_ms, take_glance, without_global
from tempovlm.engine.runner import Runner
from tempovlm.latency.clock import stage_clock
from tempovlm.model.vision.encoder import VisionTransformer
from timings import TICK_MS, UNTOLD_MS, untold_ms

SPACE = tiny_model.SPACE
PROFILE = tiny_model.make_profile()
WIDTH = tiny_model.CONFIG.width
SIZES = {"num_top_ks": len(SPACE.top_ks), "num_block_counts": len(SPACE.block_counts)}
KINDS = pytest.mark.parametrize("kind", ["llm_based", "two_stage", "two_stage_stage1"])


def networks(kind: str) -> dict[str, nn.Module]:
    """Untrained networks of a kind that glances."""
    torch.manual_seed(3)
    if kind == "llm_based":
        return {"controller": LLMBasedController(WIDTH, 16, num_blocks=2, num_tiers=len(SPACE.tiers), **SIZES)}
    first: dict[str, nn.Module] = {"knob1": Knob1PredictorBudgetLanguageGlance(WIDTH, vision_width(WIDTH), 16)}
    if kind == "two_stage":
        first["knob2knob3"] = Knob2Knob3Predictor(vision_width(WIDTH), WIDTH, 16, **SIZES)
    return first


def saved(folder: Path, kind: str) -> Path:
    path = folder / f"{kind}.pt"
    save_controller(path, kind=kind, networks=networks(kind), space=SPACE)
    return path


@pytest.fixture
def policy_of(engine: Engine, tmp_path: Path) -> Callable[[str], Policy]:
    """An untrained policy of a kind, from its file."""
    run = engine.runner
    return lambda kind: policy_from_checkpoint(saved(tmp_path, kind), SPACE, run.model, run.tokenizer)


class Wanting(Policy):
    """Glances, wants one setting, else the dearest that fits, and remembers its questions."""

    name = "wanting"
    sees_picture = True

    def __init__(self, knobs: KnobConfig) -> None:
        self.knobs = knobs
        self.asked: list[Question] = []

    @property
    def sees_glance(self) -> bool:
        return True

    def look(self, question: Question, left_ms: float) -> Floats:  # noqa: ARG002
        self.asked.append(question)
        return self.scores()

    def settle(self, question: Question, sight: Sight, left_ms: float) -> Floats:  # noqa: ARG002
        return self.scores()

    def scores(self) -> Floats:
        return np.arange(len(SPACE)) + len(SPACE) * np.eye(len(SPACE))[SPACE.index(self.knobs)]


class WantingAtOnce(Wanting):
    """The same, scoring all knobs at once; it is not to be asked again."""

    sees_picture = False

    def settle(self, question: Question, sight: Sight, left_ms: float) -> Floats:
        raise AssertionError(f"asked again with {left_ms} of {question} and {sight}")


def unmasked(policy: Policy) -> Guard:
    return Guard(policy, SPACE, tuple(range(len(SPACE))))


def request(**fields: Any) -> Request:
    picture = Image.fromarray(tiny_model.picture())
    asked: dict[str, Any] = {"images": (picture,), "question": "what is the sign?", "budget_ms": 1e6, **fields}
    return Request(**asked)


@pytest.fixture
def encoded(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many crops each pass of the vision transformer took."""
    passes: list[int] = []
    whole = VisionTransformer.forward

    def counted(self: VisionTransformer, patches: torch.Tensor, *rest: Any, **named: Any) -> torch.Tensor:
        passes.append(len(patches))
        return whole(self, patches, *rest, **named)

    monkeypatch.setattr(VisionTransformer, "forward", counted)
    return passes


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("tier", SPACE.tiers)
def test_what_the_answer_sees_is_what_it_sees_without_a_glance(engine: Engine, tier: str, exact: bool) -> None:
    run = replace(engine.runner, exact=exact)
    one = request()
    image = run.open(one)
    assert image is not None
    plain = run.prepare(image, tier, one)
    glance = take_glance(run, image, SPACE.tiers[0], one, stage_clock(run.device))
    ready = glance.prepare(run, tier, one)
    assert plain.crops is not None
    assert ready.crops is not None
    assert ready.crops.grid == plain.crops.grid
    assert ready.prompt.tokens.tolist() == plain.prompt.tokens.tolist()
    tiles = ready.crops.patches if tier != SPACE.tiers[0] else ready.crops.patches[1:]
    torch.testing.assert_close(tiles, plain.crops.patches[1:], rtol=0, atol=1e-6)
    if tier != SPACE.tiers[0]:
        spared = without_global(plain.crops)
        assert (spared.live is None) == (ready.crops.live is None)
        torch.testing.assert_close(spared.patches, tiles, rtol=0, atol=1e-6)
    torch.testing.assert_close(ready.crops.masks, plain.crops.masks, rtol=0, atol=1e-6)
    patches = run.encode(plain.crops)
    found = glance.encode(run, ready.crops)
    torch.testing.assert_close(found, patches, rtol=1e-4, atol=1e-5)
    wanted = run.project(patches, plain.crops)
    torch.testing.assert_close(run.project(found, ready.crops), wanted, rtol=1e-4, atol=1e-5)
    if tier == SPACE.tiers[0]:
        assert wanted is not None
        torch.testing.assert_close(glance.tokens, wanted[:1], rtol=1e-4, atol=1e-5)


@pytest.mark.usefixtures("ticks")
@pytest.mark.parametrize("kind", [Wanting, WantingAtOnce])
@pytest.mark.parametrize("knobs", [SPACE.cheapest, SPACE.settings[len(SPACE) // 2], SPACE.native], ids=str)
def test_a_glanced_answer_is_the_setting_s_own(
    engine: Engine, encoded: list[int], kind: type[Wanting], knobs: KnobConfig
) -> None:
    policy = kind(knobs)
    answer = engine.answer(request(max_new_tokens=5), unmasked(policy))
    assert answer.tiling is not None
    tiles = answer.tiling[0] * answer.tiling[1]
    assert encoded == ([1] if tiles == 1 else [1, tiles]), "the global crop is encoded once"
    plain = engine.answer(request(max_new_tokens=5), Guard.fixed(knobs, SPACE))
    assert (answer.knobs, answer.policy) == (knobs, "wanting")
    assert answer.tokens == plain.tokens
    assert answer.num_vision_tokens == plain.num_vision_tokens
    (question,) = policy.asked
    assert question.glance.shape == (1, tiny_model.CONFIG.vision.pooled**2, WIDTH)
    assert question.style == request().style
    assert tuple(answer.timings_ms) == (*STAGES, "total")
    assert untold_ms(answer.timings_ms) == pytest.approx(UNTOLD_MS)


@KINDS
def test_a_checkpoint_answers(
    engine: Engine, policy_of: Callable[[str], Policy], encoded: list[int], kind: str
) -> None:
    guard = unmasked(policy_of(kind))
    answer = engine.answer(request(), guard)
    assert answer.policy == kind
    assert answer.tiling is not None
    tiles = answer.tiling[0] * answer.tiling[1]
    assert encoded == ([1] if tiles == 1 else [1, tiles])
    assert answer.tokens == engine.answer(request(), Guard.fixed(answer.knobs, SPACE)).tokens
    assert engine.answer(request(), guard).knobs == answer.knobs
    assert engine.answer(request(images=()), guard).num_vision_tokens == 0


@KINDS
def test_what_the_policy_runs_is_charged_to_control(
    engine: Engine, policy_of: Callable[[str], Policy], monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    marks: list[str] = []
    clock = stage_clock(engine.device)
    before, project = clock.mark, Runner.project

    def mark(stage: str, at: Any = None) -> None:
        marks.append(stage)
        before(stage, at)

    def projected(self: Runner, *args: Any) -> Any:
        marks.append("(projects)")
        return project(self, *args)

    monkeypatch.setattr(clock, "mark", mark, raising=False)
    monkeypatch.setattr(Runner, "project", projected)
    monkeypatch.setattr("tempovlm.engine.engine.stage_clock", lambda *_: clock)
    engine.answer(request(max_new_tokens=1), unmasked(policy_of(kind)))
    glance = ["preprocess", "control", "preprocess", "vision_encoder", "(projects)", "control"]
    assert marks == [*glance, "preprocess", "vision_encoder", "(projects)", "projector", "control", "prefill"]


@pytest.mark.usefixtures("ticks")
@pytest.mark.parametrize("kind", [Wanting, WantingAtOnce])
def test_nothing_fits(engine: Engine, encoded: list[int], kind: type[Wanting]) -> None:
    policy = kind(SPACE.native)
    guard = replace(unmasked(policy), profile=PROFILE)
    answer = engine.answer(request(budget_ms=TICK_MS), guard)
    assert (answer.knobs, answer.budget_feasible, answer.budget_met) == (SPACE.cheapest, False, False)
    assert not policy.asked, "where nothing can be chosen, nobody is asked and nothing is glanced at"
    assert encoded == [1]


def test_no_budget_needs_no_glance(engine: Engine, encoded: list[int]) -> None:
    policy = Wanting(SPACE.cheapest)
    answer = engine.answer(request(budget_ms=None), unmasked(policy))
    assert (answer.knobs, len(encoded), policy.asked) == (SPACE.native, 1, [])


@pytest.mark.parametrize("kind", [Wanting, WantingAtOnce])
def test_the_guard_counts_a_glance_once(kind: type[Wanting]) -> None:
    usual_ms = PROFILE.p50_prefix_ms(0)
    guard = replace(unmasked(kind(SPACE.largest)), profile=PROFILE)
    for late_ms in (0.0, 7.0):
        chosen = guard.choose_tier(request(budget_ms=30.0), None, usual_ms + late_ms, torch.zeros(1, 4, WIDTH))
        assert chosen.question.left_ms == pytest.approx(30.0 - late_ms)
        fits = {i for i in range(len(SPACE)) if PROFILE.upper_total_ms(i) <= 30.0 - late_ms}
        assert chosen.tier == SPACE.settings[max(fits)].tier
        assert len(fits) < len(SPACE)
    own = replace(guard, control_ms=4.0, second_ms=1.0, split_ms={"medium": 3.0, "high": 60.0})
    chosen = own.choose_tier(request(budget_ms=30.0), None, usual_ms, torch.zeros(1, 4, WIDTH))
    assert chosen.question.left_ms == pytest.approx(26.0)
    upper_ms = [PROFILE.upper_total_ms(i) + own.split_ms.get(knobs.tier, 0.0) for i, knobs in enumerate(SPACE)]
    wanted = max(i for i in range(len(SPACE)) if upper_ms[i] <= 26.0)
    assert chosen.tier == SPACE.settings[wanted].tier


@pytest.mark.parametrize("kind", [Wanting, WantingAtOnce])
def test_nobody_is_asked_about_a_picture_unseen(kind: type[Wanting]) -> None:
    policy, seen = kind(SPACE.largest), torch.zeros(1, 4, WIDTH)
    guard = replace(unmasked(policy), profile=PROFILE, control_ms=1.0, split_ms={"medium": 9.0, "high": 9.0})
    for budget_ms in range(10, 60):
        one = request(budget_ms=float(budget_ms))
        if guard.wants_glance(one, 1.0):
            chosen = guard.choose_tier(one, None, PROFILE.p50_prefix_ms(0), seen)
        else:
            chosen = guard.choose_tier(one, None, 1.0)
        assert chosen.feasible or chosen.tier == SPACE.cheapest.tier
    assert policy.asked
    assert all(question.glance is seen for question in policy.asked)


def test_what_no_longer_fits_is_lowered() -> None:
    guard = replace(unmasked(WantingAtOnce(SPACE.largest)), profile=PROFILE, control_ms=2.0, second_ms=0.0)
    one = request(budget_ms=60.0)
    chosen = guard.choose_tier(one, None, 1.0, torch.zeros(1, 4, WIDTH))
    assert chosen.index == SPACE.index(SPACE.largest)
    seen: Any = None
    assert guard.choose_compute(one, chosen, seen, 20.0).knobs == SPACE.largest
    late = guard.choose_compute(one, chosen, seen, 38.0)
    assert late.knobs != SPACE.largest
    assert (late.knobs.tier, late.feasible) == ("high", True)
    assert PROFILE.upper_remainder_ms(SPACE.index(late.knobs)) <= 22.0


@pytest.mark.usefixtures("ticks")
@KINDS
def test_the_guard_measures_the_glance(
    engine: Engine, policy_of: Callable[[str], Policy], monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    seen: list[int] = []
    project = Runner.project

    def projected(self: Runner, patches: Any, crops: Any) -> Any:
        seen.append(len(crops.index))
        return project(self, patches, crops)

    monkeypatch.setattr(Runner, "project", projected)
    guard = guarded(engine.runner, SPACE, policy_of(kind), PROFILE)
    assert seen
    assert set(seen) == {1}
    second_ms = 0.0 if kind == "llm_based" else TICK_MS
    assert (guard.control_ms, guard.second_ms) == pytest.approx((TICK_MS + second_ms, second_ms))
    assert tuple(guard.split_ms) == SPACE.tiers


def test_two_passes_are_compared_with_one(
    engine: Engine, encoded: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    # Each pass takes a millisecond and each crop two: a second pass costs its millisecond.
    def timed(run: Runner, crops: Any, patches: torch.Tensor) -> float:
        run.encode(replace(crops, patches=patches))
        return 1.0 + 2.0 * len(patches)

    monkeypatch.setattr("tempovlm.engine.glance._encode_ms", timed)
    assert measure_split_ms(engine.runner, SPACE.tiers) == pytest.approx({"low": 0.0, "medium": 1.0, "high": 1.0})
    assert encoded[0] == 1 + encoded[2]


def test_a_batch_is_answered_one_by_one(engine: Engine, policy_of: Callable[[str], Policy]) -> None:
    guard = unmasked(policy_of("llm_based"))
    requests = [request(), request(budget_ms=None), request(images=(), question="stop")]
    together = answer_batch(engine, requests, guard)
    alone = [engine.answer(one, guard) for one in requests]
    assert [one.knobs for one in together] == [one.knobs for one in alone]
    assert [one.tokens for one in together] == [one.tokens for one in alone]
    assert [one.policy for one in together] == ["llm_based", "fixed", "llm_based"]


@pytest.mark.usefixtures("ticks")
@KINDS
def test_a_path_is_a_policy(
    tiny_folder: Path, tmp_path: Path, picture: Image.Image, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    monkeypatch.setenv("TEMPOVLM_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(calibration, "measure", lambda *_, **__: PROFILE.measurements)
    model: TempoVLM = load(
        str(tiny_folder), device="cpu", policy=saved(tmp_path, kind), warmup=False, progress=False
    )
    answer = model.answer(picture, "what is the sign?", budget_ms=1e5)
    assert (answer.policy, answer.budget_feasible, answer.budget_met) == (kind, True, True)
    assert answer.predicted is not None
    assert answer.tokens == model.answer(picture, "what is the sign?", knobs=answer.knobs).tokens
    assert model.answer(picture, "what?", budget_ms=1e5, tier="medium").knobs.tier == "medium"
    assert model.answer_batch([request()])[0].policy == kind
