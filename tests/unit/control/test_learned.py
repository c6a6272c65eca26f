"""Learned policies: only allowed settings, the joint of the heads, the right features, and behind the guard."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

import tiny_model
from tempovlm.control.checkpoint import save_controller
from tempovlm.control.guard import CONTROL_REPEATS, Guard, measure_control_ms
from tempovlm.control.host import HostSupervised
from tempovlm.control.learned import LearnedPolicy, SupervisedPolicy, TwoStagePolicy, policy_from_checkpoint
from tempovlm.control.llm_based import LLMBasedController, glance_tokens
from tempovlm.control.networks import (
    Knob1PredictorBudgetLanguage,
    Knob1PredictorBudgetLanguageGlance,
    Knob2Knob3Predictor,
    SupervisedController,
)
from tempovlm.control.observation import (
    language_feature,
    question_ids,
    token_vectors,
    vision_feature,
    vision_width,
)
from tempovlm.control.policy import ChoosesAtOnce, Features, Policy, Question, Sight, needs_glance
from tempovlm.core.errors import UserError
from tempovlm.core.knobs import KnobConfig
from tempovlm.core.request import Request
from tempovlm.engine.engine import Engine
from timings import TICK_MS

SPACE = tiny_model.SPACE
WIDTH = tiny_model.CONFIG.width
SIZES = {"num_top_ks": len(SPACE.top_ks), "num_block_counts": len(SPACE.block_counts)}


def second_stage() -> Knob2Knob3Predictor:
    return Knob2Knob3Predictor(vision_width(WIDTH), WIDTH, 16, **SIZES)


@pytest.fixture
def two_stage(engine: Engine, tmp_path: Path) -> Policy:
    torch.manual_seed(0)
    nets = {"knob1": Knob1PredictorBudgetLanguage(WIDTH, 16), "knob2knob3": second_stage()}
    save_controller(tmp_path / "both.pt", kind="two_stage", networks=nets, space=SPACE, weights="abc")
    runner = engine.runner
    return policy_from_checkpoint(tmp_path / "both.pt", SPACE, runner.model, runner.tokenizer, "abc")


@pytest.fixture
def supervised(engine: Engine, tmp_path: Path) -> Policy:
    torch.manual_seed(0)
    nets = {"controller": SupervisedController(16, **SIZES)}
    save_controller(tmp_path / "one.pt", kind="supervised", networks=nets, space=SPACE)
    return policy_from_checkpoint(tmp_path / "one.pt", SPACE, engine.runner.model, engine.runner.tokenizer)


def look(choices: tuple[KnobConfig, ...], budget_ms: float | None = None, seed: int = 0) -> Features:
    question = Question(text="what does the sign say?", choices=SPACE.settings, budget_ms=budget_ms)
    vision = torch.randn(3, 36, WIDTH, generator=torch.Generator().manual_seed(seed))
    return Features(question=question, choices=choices, sight=Sight(vision, 100, 12))


def test_a_policy_chooses_among_what_is_allowed(two_stage: Policy, supervised: Policy) -> None:
    for policy in (two_stage, supervised):
        for count in (1, 2, 7):
            for start in range(0, len(SPACE) - count, 5):
                choices = SPACE.settings[start : start + count]
                question = Question(text="how many dogs?", choices=choices)
                tier = policy.choose_tier(question, 40.0)
                allowed = tuple(knobs for knobs in choices if knobs.tier == tier)
                assert allowed
                top_k, blocks = policy.choose_compute(look(allowed), tier, 30.0)
                assert KnobConfig(tier=tier, top_k=top_k, num_blocks=blocks) in allowed


def test_the_joint_is_maximised_and_not_each_head() -> None:
    # The best top-k and the best depth are each allowed, but not together.
    policy = LearnedPolicy(SPACE, "x")
    top_ks, blocks = SPACE.top_ks, SPACE.block_counts
    scores = np.zeros(len(top_ks), np.float32), np.zeros(len(blocks), np.float32)
    scores[0][1], scores[1][1] = 2.0, 3.0
    choices = tuple(
        k for k in SPACE if k.tier == "low" and not (k.top_k == top_ks[1] and k.num_blocks == blocks[1])
    )
    best = policy.best_compute(*scores, choices)
    assert (best.top_k, best.num_blocks) == (top_ks[0], blocks[1])
    tiers = np.array([0.0, 0.0, 9.0], np.float32)
    best = policy.best((tiers, *scores), SPACE.settings)
    assert best == KnobConfig(tier="high", top_k=top_ks[1], num_blocks=blocks[1])
    assert policy.best_tier(tiers, choices) == "low"


def test_the_second_stage_sees_the_picture_and_what_is_left(two_stage: Policy) -> None:
    assert isinstance(two_stage, TwoStagePolicy)
    net, features = two_stage.knob2knob3, look(SPACE.settings[: len(SPACE) // 3])
    ids = question_ids(two_stage.reader.tokenizer, features.question.text)
    language = torch.from_numpy(language_feature(token_vectors(two_stage.reader.model), ids)).unsqueeze(0)
    seen = torch.from_numpy(vision_feature(features.sight.vision)).unsqueeze(0)
    logits = net(seen, language, torch.tensor([33.0]), torch.tensor([0]))
    want = two_stage.best_compute(*(row[0].detach().numpy() for row in logits), features.choices)
    assert two_stage.choose_compute(features, "low", 33.0) == (want.top_k, want.num_blocks)


def test_supervision_answers_the_budget_of_the_first_choice(supervised: Policy) -> None:
    assert isinstance(supervised, SupervisedPolicy)
    # An untrained network says nearly the same to every budget: let it speak up.
    supervised.net.budget.mlp[0].weight.mul_(20)
    supervised.net.trunk[-1].bias.zero_()
    choices = tuple(knobs for knobs in SPACE if knobs.tier == "low")
    budgets = [20.0 * 1.3**i for i in range(12)]
    alone = [supervised.choose_compute(look(choices), "low", budget_ms) for budget_ms in budgets]
    assert len(set(alone)) > 1
    assert [supervised.choose_compute(look(choices, b), "low", 1.0) for b in budgets] == alone


@pytest.mark.usefixtures("ticks")
def test_the_guard_measures_and_asks(two_stage: Policy, supervised: Policy) -> None:
    for policy in (two_stage, supervised):
        assert measure_control_ms(policy, SPACE) == pytest.approx((TICK_MS, TICK_MS))
        guard = Guard.around(policy, SPACE, tiny_model.make_profile())
        request = Request(images=(), question="what?", budget_ms=60.0)
        chosen = guard.choose_tier(request, (84, 112), 1.0)
        assert chosen.question.budget_ms is not None
        choice = guard.choose_compute(request, chosen, Sight(None, 0, 0), 10.0)
        assert choice.knobs in SPACE
        assert choice.policy == policy.name


def test_the_network_runs_anew_for_every_budget_that_is_measured(
    supervised: Policy, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[float] = []
    run = HostSupervised.__call__
    monkeypatch.setattr(HostSupervised, "__call__", lambda net, b: (seen.append(b), run(net, b))[1])
    measure_control_ms(supervised, SPACE)
    assert len(seen) == len(set(seen)) == CONTROL_REPEATS


def test_a_first_stage_alone_runs_what_is_nearest_to_the_trained_model(engine: Engine, tmp_path: Path) -> None:
    net, path = Knob1PredictorBudgetLanguage(WIDTH, 16), tmp_path / "first.pt"
    save_controller(path, kind="two_stage_stage1", networks={"knob1": net}, space=SPACE)
    policy = policy_from_checkpoint(path, SPACE, engine.runner.model, engine.runner.tokenizer)
    low = tuple(knobs for knobs in SPACE if knobs.tier == "low")
    native = SPACE.native
    assert policy.choose_compute(look(low), "low", 10.0) == (native.top_k, native.num_blocks)


def test_a_glance_decides_the_tier(engine: Engine, tmp_path: Path) -> None:
    torch.manual_seed(0)
    net, run = Knob1PredictorBudgetLanguageGlance(WIDTH, vision_width(WIDTH), 16).eval(), engine.runner
    # An untrained network says nearly the same to every glance: let it speak up.
    net.requires_grad_(False).glance.linear.weight.mul_(20)
    save_controller(tmp_path / "g.pt", kind="two_stage_stage1", networks={"knob1": net}, space=SPACE)
    policy = policy_from_checkpoint(tmp_path / "g.pt", SPACE, run.model, run.tokenizer)
    assert needs_glance(policy)
    text = "what does the sign say?"
    ids = question_ids(run.tokenizer, text)
    language = torch.from_numpy(language_feature(token_vectors(run.model), ids)).unsqueeze(0)
    tiers = set()
    for seed in range(8):
        tokens = 4 * torch.randn(1, 36, WIDTH, generator=torch.Generator().manual_seed(seed))
        question = Question(text=text, choices=SPACE.settings, budget_ms=50.0, glance=tokens)
        seen = torch.from_numpy(vision_feature(tokens)).unsqueeze(0)
        wanted = SPACE.tiers[int(net(language, torch.tensor([50.0]), seen).argmax())]
        assert policy.choose_tier(question, 50.0) == wanted
        tiers.add(wanted)
    assert len(tiers) > 1
    blind = Question(text=text, choices=SPACE.settings)
    wanted = SPACE.tiers[int(net(language, torch.tensor([50.0]), torch.zeros(1, 2 * WIDTH)).argmax())]
    assert policy.choose_tier(blind, 50.0) == wanted


def test_the_llm_based_one_chooses_all_knobs_at_once(engine: Engine, tmp_path: Path) -> None:
    torch.manual_seed(0)
    net, run = LLMBasedController(WIDTH, 16, num_blocks=2, num_tiers=3, **SIZES).eval(), engine.runner
    save_controller(tmp_path / "l.pt", kind="llm_based", networks={"controller": net}, space=SPACE)
    policy = policy_from_checkpoint(tmp_path / "l.pt", SPACE, run.model, run.tokenizer)
    assert isinstance(policy, ChoosesAtOnce)
    assert needs_glance(policy)
    tokens = torch.randn(1, 36, WIDTH, generator=torch.Generator().manual_seed(1))
    question = Question(
        text="how many dogs?", choices=SPACE.settings[20:], budget_ms=50.0, glance=tokens, style=""
    )
    stream = glance_tokens("how many dogs?", "", run.model.config, run.tokenizer).unsqueeze(0)
    with torch.no_grad():
        logits = net(run.model, tokens, stream, torch.tensor([stream.shape[1]]), torch.tensor([50.0]))
    tier, top_k, blocks = (row[0] for row in logits)
    joint = (tier[:, None, None] + top_k[:, None] + blocks).flatten()
    wanted = SPACE.settings[20 + int(joint[20:].argmax())]
    assert policy.choose_setting(question, 50.0) == wanted
    assert policy.choose_tier(question, 50.0) == wanted.tier
    same = tuple(knobs for knobs in question.choices if knobs.tier == wanted.tier)
    features = Features(question=question, choices=same, sight=Sight(None, 0, 0))
    assert policy.choose_compute(features, wanted.tier, 9.0) == (wanted.top_k, wanted.num_blocks)
    long = Question(text="what is the sign? " * 200, choices=SPACE.settings)
    assert policy.choose_setting(long, 50.0) in SPACE
    wide = LLMBasedController(WIDTH, 16, num_blocks=7, num_tiers=3, **SIZES)
    save_controller(tmp_path / "w.pt", kind="llm_based", networks={"controller": wide}, space=SPACE)
    with pytest.raises(UserError, match=r"w\.pt: trained to read with 7 blocks of width 48, this model has 6"):
        policy_from_checkpoint(tmp_path / "w.pt", SPACE, run.model, run.tokenizer)


def test_features_of_nothing_are_zeros(engine: Engine) -> None:
    assert not language_feature(token_vectors(engine.runner.model), []).any()
    tokens = torch.tensor([[[1.0, 4.0], [3.0, 0.0]]])
    for kind in (torch.float32, torch.bfloat16):
        seen = vision_feature(tokens.to(kind))
        assert (seen.dtype, seen.tolist()) == (np.float32, pytest.approx([2.0, 2.0, 3.0, 4.0]))


@pytest.mark.parametrize("kind", ["two_stage", "supervised"])
def test_logits_that_are_not_numbers_choose_nothing(kind: str, request: pytest.FixtureRequest) -> None:
    policy = request.getfixturevalue(kind)
    assert isinstance(policy, LearnedPolicy)
    good, bad = np.zeros(5, np.float32), np.array([0, 1, np.nan, 0, 0], np.float32)
    tiers = np.zeros(3, np.float32)
    assert policy.best((tiers, good, good), list(SPACE)) == SPACE.settings[0]
    with pytest.raises(UserError, match=r"logits are not numbers.*--policy table"):
        policy.best((tiers, good, bad), list(SPACE))
    with pytest.raises(UserError, match="logits are not numbers"):
        policy.best_compute(bad, good, list(SPACE))
    with pytest.raises(UserError, match="logits are not numbers"):
        policy.best_tier(np.array([0, np.inf, 0], np.float32), list(SPACE))


def test_features_that_are_not_numbers_choose_nothing(two_stage: Policy) -> None:
    question = Question(text="what is it?", choices=tuple(SPACE))
    sight = Sight(torch.full((1, 4, WIDTH), torch.nan), 4, 9)
    with pytest.raises(UserError, match="logits are not numbers"):
        two_stage.choose_compute(Features(question=question, choices=tuple(SPACE), sight=sight), "low", 50.0)
