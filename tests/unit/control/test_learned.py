"""Learned policies: only allowed settings, the joint of the heads, the right features, and behind the guard."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import tiny_model
from tempovlm.control.checkpoint import save_controller
from tempovlm.control.guard import CONTROL_REPEATS, Guard, measure_control_ms
from tempovlm.control.learned.host import HostNetwork
from tempovlm.control.learned.llm_based import LLMBasedController
from tempovlm.control.learned.networks import (
    AccuracyNetwork,
    Knob1PredictorBudgetLanguage,
    Knob1PredictorBudgetLanguageGlance,
    Knob2Knob3Predictor,
    SeenAccuracyNetwork,
    SupervisedController,
)
from tempovlm.control.learned.observation import (
    language_feature,
    question_ids,
    token_vectors,
    vision_feature,
    vision_width,
)
from tempovlm.control.learned.policies import (
    LearnedPolicy,
    SupervisedPolicy,
    TwoStagePolicy,
    policy_from_checkpoint,
)
from tempovlm.control.policy import Policy, Question, Sight
from tempovlm.core.errors import UserError
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
    save_controller(tmp_path / "both.pt", kind="two_stage", networks=nets, space=SPACE, weights_hash="abc")
    runner = engine.runner
    return policy_from_checkpoint(tmp_path / "both.pt", SPACE, runner.model, runner.tokenizer, "abc")


@pytest.fixture
def supervised(engine: Engine, tmp_path: Path) -> Policy:
    torch.manual_seed(0)
    nets = {"controller": SupervisedController(16, **SIZES)}
    save_controller(tmp_path / "one.pt", kind="supervised", networks=nets, space=SPACE)
    return policy_from_checkpoint(tmp_path / "one.pt", SPACE, engine.runner.model, engine.runner.tokenizer)


QUESTION = Question(text="what does the sign say?", left_ms=40.0)


def sight(tier: str = "low", seed: int = 0) -> Sight:
    return Sight(tier, torch.randn(3, 36, WIDTH, generator=torch.Generator().manual_seed(seed)), 100, 12)


def test_a_policy_scores_every_setting(two_stage: Policy, supervised: Policy) -> None:
    for policy in (two_stage, supervised):
        for scores in (policy.look(QUESTION, 40.0), policy.settle(QUESTION, sight(), 30.0)):
            assert scores.shape == (len(SPACE),)
            assert np.isfinite(scores).all()
        assert policy.scale == "logit"


def test_a_score_is_the_sum_of_the_knobs_logits() -> None:
    rng = np.random.default_rng(0)
    tiers, top_ks, blocks = (rng.random(n) for n in (len(SPACE.tiers), len(SPACE.top_ks), len(SPACE.block_counts)))
    policy = SupervisedPolicy(SPACE, "x", SupervisedController(16, **SIZES))
    scores = policy.joint(np.concatenate((tiers, top_ks, blocks)))
    for knobs, score in zip(SPACE, scores, strict=True):
        places = (SPACE.tiers.index(knobs.tier), SPACE.top_ks.index(knobs.top_k))
        wanted = tiers[places[0]] + top_ks[places[1]] + blocks[SPACE.block_counts.index(knobs.num_blocks)]
        assert score == pytest.approx(wanted)


def test_the_second_stage_sees_the_picture_and_what_is_left(two_stage: Policy) -> None:
    assert isinstance(two_stage, TwoStagePolicy)
    assert two_stage.sees_picture
    net, seen = two_stage.knob2knob3, sight("medium")
    ids = question_ids(two_stage.reader.tokenizer, QUESTION.text)
    language = torch.from_numpy(language_feature(token_vectors(two_stage.reader.model), ids)).unsqueeze(0)
    vision = torch.from_numpy(vision_feature(seen.vision)).unsqueeze(0)
    top_k, blocks = (row[0].detach() for row in net(vision, language, torch.tensor([33.0]), torch.tensor([1])))
    wanted = (top_k[:, None] + blocks).flatten().repeat(len(SPACE.tiers)).numpy()
    found = two_stage.settle(QUESTION, seen, 33.0)
    np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-5)
    two_stage.settle(replace(QUESTION, text="what else?"), seen, 33.0)
    np.testing.assert_allclose(two_stage.settle(QUESTION, seen, 33.0), found, rtol=1e-5)
    pooled = replace(seen, vision=None, pooled=vision[0])
    np.testing.assert_allclose(two_stage.settle(QUESTION, pooled, 33.0), found, rtol=1e-5)


def test_supervision_answers_the_budget_of_the_first_choice(supervised: Policy) -> None:
    assert isinstance(supervised, SupervisedPolicy)
    assert not supervised.sees_picture
    # An untrained network says nearly the same to every budget: let it speak up.
    supervised.net.budget.mlp[0].weight.mul_(20)
    supervised.net.trunk[-1].bias.zero_()
    asked = [replace(QUESTION, left_ms=20.0 * 1.3**i) for i in range(12)]
    scores = [supervised.look(one, one.left_ms or 0.0) for one in asked]
    assert len({int(row.argmax()) for row in scores}) > 1
    for one, row in zip(asked, scores, strict=True):
        np.testing.assert_allclose(supervised.settle(one, sight(), 1.0), row, rtol=1e-5)


@pytest.mark.usefixtures("ticks")
def test_the_guard_measures_and_asks(two_stage: Policy, supervised: Policy) -> None:
    for policy in (two_stage, supervised):
        second_ms = TICK_MS if policy.sees_picture else 0.0
        assert measure_control_ms(policy, SPACE) == pytest.approx((TICK_MS, second_ms))
        guard = Guard.around(policy, SPACE, tiny_model.make_profile())
        request = Request(images=(), question="what?", budget_ms=60.0)
        chosen = guard.choose_tier(request, (84, 112), 1.0)
        assert chosen.question.left_ms is not None
        choice = guard.choose_compute(request, chosen, Sight(chosen.tier, None, 0, 0), 10.0)
        assert choice.knobs in SPACE
        assert choice.policy == policy.name


def test_the_network_runs_anew_for_every_budget_that_is_measured(
    supervised: Policy, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[float] = []
    run = HostNetwork.__call__
    monkeypatch.setattr(HostNetwork, "__call__", lambda net, b: (seen.append(b), run(net, b))[1])
    measure_control_ms(supervised, SPACE)
    assert len(seen) == len(set(seen)) == CONTROL_REPEATS


def test_a_first_stage_alone_runs_what_is_nearest_to_the_trained_model(engine: Engine, tmp_path: Path) -> None:
    net, path = Knob1PredictorBudgetLanguage(WIDTH, 16), tmp_path / "first.pt"
    save_controller(path, kind="two_stage_stage1", networks={"knob1": net}, space=SPACE)
    policy = policy_from_checkpoint(path, SPACE, engine.runner.model, engine.runner.tokenizer)
    scores = policy.settle(QUESTION, sight(), 10.0)
    low = SPACE.settings[int(np.where([knobs.tier == "low" for knobs in SPACE], scores, -1.0).argmax())]
    assert low == replace(SPACE.native, tier="low")
    by_tier = policy.look(QUESTION, 40.0).reshape(len(SPACE.tiers), -1)
    assert np.ptp(by_tier, axis=1) == pytest.approx(0.0)
    assert np.ptp(by_tier) > 0


def test_a_glance_decides_the_tier(engine: Engine, tmp_path: Path) -> None:
    torch.manual_seed(0)
    net, run = Knob1PredictorBudgetLanguageGlance(WIDTH, vision_width(WIDTH), 16).eval(), engine.runner
    # An untrained network says nearly the same to every glance: let it speak up.
    net.requires_grad_(False).glance.linear.weight.mul_(20)
    save_controller(tmp_path / "g.pt", kind="two_stage_stage1", networks={"knob1": net}, space=SPACE)
    policy = policy_from_checkpoint(tmp_path / "g.pt", SPACE, run.model, run.tokenizer)
    assert policy.sees_glance
    ids = question_ids(run.tokenizer, QUESTION.text)
    language = torch.from_numpy(language_feature(token_vectors(run.model), ids)).unsqueeze(0)
    tiers = set()
    for seed in range(8):
        tokens = 4 * torch.randn(1, 36, WIDTH, generator=torch.Generator().manual_seed(seed))
        seen = torch.from_numpy(vision_feature(tokens)).unsqueeze(0)
        wanted = SPACE.tiers[int(net(language, torch.tensor([50.0]), seen).argmax())]
        scores = policy.look(replace(QUESTION, glance=tokens), 50.0)
        assert SPACE.settings[int(scores.argmax())].tier == wanted
        tiers.add(wanted)
    assert len(tiers) > 1
    wanted = SPACE.tiers[int(net(language, torch.tensor([50.0]), torch.zeros(1, 2 * WIDTH)).argmax())]
    assert SPACE.settings[int(policy.look(QUESTION, 50.0).argmax())].tier == wanted


def test_expected_accuracies_have_a_price_and_know_an_ordinary_question(engine: Engine, tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = AccuracyNetwork(WIDTH, 16, len(SPACE)).eval()
    net.fit_usual(torch.randn(20, WIDTH))
    save_controller(tmp_path / "value.pt", kind="value", networks={"accuracy": net}, space=SPACE)
    runner = engine.runner
    policy = policy_from_checkpoint(tmp_path / "value.pt", SPACE, runner.model, runner.tokenizer)
    assert policy.scale == "accuracy"
    assert not policy.sees_glance
    assert not policy.sees_picture
    row = language_feature(token_vectors(runner.model), question_ids(runner.tokenizer, QUESTION.text))
    want = net(torch.from_numpy(row)[None]).sigmoid()[0].detach().numpy()
    for left_ms in (3.0, 300.0):
        np.testing.assert_allclose(policy.look(QUESTION, left_ms), want, rtol=1e-4)
    np.testing.assert_allclose(policy.usual, net.usual.numpy())
    assert policy.look(QUESTION, 3.0) is policy.look(QUESTION, 300.0), "the door asks, then the guard"
    other = policy.look(replace(QUESTION, text="how many are there?"), 3.0)
    assert np.abs(other - want).max() > 1e-3


def test_an_ensemble_expects_the_mean_of_its_networks_logits() -> None:
    torch.manual_seed(0)
    features, accuracy = torch.randn(40, 6), torch.rand(40, 9)
    nets = [AccuracyNetwork(6, hidden, 9) for hidden in (4, 8, 8)]
    for net in nets:
        net.fit_inputs(features, accuracy)
        torch.nn.init.normal_(net.last.weight)
    ensemble = AccuracyNetwork.ensemble([net.eval() for net in nets])
    assert ensemble.sizes["hidden_dim"] == 20
    want = torch.stack([net(features) for net in nets]).mean(dim=0)
    torch.testing.assert_close(ensemble(features), want, rtol=1e-4, atol=1e-5)
    assert float(want.std()) > 0.1


def spoken(width: int, seen_width: int, hidden_dim: int, settings: int = 12) -> SeenAccuracyNetwork:
    """An untrained network with logits that differ by more than rounding."""
    net = SeenAccuracyNetwork(width, seen_width, hidden_dim, num_top_ks=settings // 6, num_block_counts=2)
    return net.requires_grad_(False).eval()


def test_an_ensemble_of_those_who_see_expects_the_mean_too() -> None:
    torch.manual_seed(0)
    language, vision, accuracy = torch.randn(40, 6), torch.randn(40, 3, 5), torch.rand(40, 12)
    nets = [spoken(6, 5, hidden) for hidden in (4, 8)]
    for net in nets:
        net.fit_inputs(language, vision, accuracy)
        for own in net.at_tiers:
            torch.nn.init.normal_(own.trunk[-1].weight)
    ensemble = SeenAccuracyNetwork.ensemble(nets)
    want = torch.stack([net(language, vision) for net in nets]).mean(dim=0)
    torch.testing.assert_close(ensemble(language, vision), want, rtol=1e-4, atol=1e-5)
    assert float(want.std()) > 0.1
    blind = vision.clone()
    blind[:, 1] = 0
    changed = (ensemble(language, blind) - want).abs().amax(dim=0) > 1e-3
    assert changed.tolist() == [False] * 4 + [True] * 4 + [False] * 4, (
        "a tier's picture decides about its settings"
    )


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_a_shrunk_network_lies_between_its_own_logits_and_the_usual_ones(share: float) -> None:
    torch.manual_seed(0)
    language, vision, usual = torch.randn(8, 6), torch.randn(8, 3, 5), torch.rand(12) * 0.8 + 0.1
    first, seen = AccuracyNetwork(6, 4, 12).eval(), spoken(6, 5, 4)
    own, also = first(language), seen(language, vision)
    first.shrink(share, usual)
    seen.shrink(share, usual)
    for got, before in ((first(language), own), (seen(language, vision), also)):
        torch.testing.assert_close(got, share * before + (1 - share) * torch.logit(usual).expand(8, -1))


def test_an_encoded_picture_changes_what_is_expected_at_its_tier(engine: Engine, tmp_path: Path) -> None:
    torch.manual_seed(0)
    first = AccuracyNetwork(WIDTH, 16, len(SPACE)).eval()
    seen = SeenAccuracyNetwork(WIDTH, vision_width(WIDTH), 16, len(SPACE.tiers), **SIZES).eval()
    seen.requires_grad_(False)
    path, run = tmp_path / "seen.pt", engine.runner
    save_controller(path, kind="seen_value", networks={"accuracy": first, "seen": seen}, space=SPACE)
    policy = policy_from_checkpoint(path, SPACE, run.model, run.tokenizer)
    assert policy.scale == "accuracy"
    assert policy.sees_picture
    assert not policy.sees_glance
    foreseen = policy.settle(QUESTION, Sight("medium", None, 0, 0), 20.0)
    np.testing.assert_allclose(foreseen, policy.look(QUESTION, 20.0))
    row = language_feature(token_vectors(run.model), question_ids(run.tokenizer, QUESTION.text))
    for place, tier in enumerate(SPACE.tiers):
        shown = replace(sight(), tier=tier)
        picture = torch.from_numpy(vision_feature(shown.vision))
        every = torch.zeros(1, len(SPACE.tiers), len(picture))
        every[0, place] = picture
        want = seen(torch.from_numpy(row)[None], every).sigmoid()[0].numpy().reshape(len(SPACE.tiers), -1)[place]
        got = policy.settle(QUESTION, shown, 20.0).reshape(len(SPACE.tiers), -1)
        np.testing.assert_allclose(got[place], want, rtol=1e-4)
        assert np.abs(got[place] - foreseen.reshape(got.shape)[place]).max() > 1e-3


def test_the_llm_based_one_scores_all_knobs_at_once(engine: Engine, tmp_path: Path) -> None:
    torch.manual_seed(0)
    net, run = LLMBasedController(WIDTH, 16, num_blocks=2, num_tiers=3, **SIZES).eval(), engine.runner
    save_controller(tmp_path / "l.pt", kind="llm_based", networks={"controller": net}, space=SPACE)
    policy = policy_from_checkpoint(tmp_path / "l.pt", SPACE, run.model, run.tokenizer)
    assert policy.sees_glance
    assert not policy.sees_picture
    tokens = torch.randn(1, 36, WIDTH, generator=torch.Generator().manual_seed(1))
    question = Question(text="how many dogs?", glance=tokens, style="")
    stream = run.model.glance_tokens("how many dogs?", "", run.tokenizer).unsqueeze(0)
    for budget_ms in (50.0, 5.0):
        with torch.no_grad():
            logits = net(run.model, tokens, stream, torch.tensor([stream.shape[1]]), torch.tensor([budget_ms]))
        tier, top_k, blocks = (row[0] for row in logits)
        wanted = (tier[:, None, None] + top_k[:, None] + blocks).flatten().numpy()
        np.testing.assert_allclose(policy.look(question, budget_ms), wanted, rtol=1e-4, atol=1e-5)
    long = Question(text="what is the sign? " * 200)
    assert np.isfinite(policy.look(long, 50.0)).all()
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
    good = np.zeros(len(SPACE.tiers) + len(SPACE.top_ks) + len(SPACE.block_counts), np.float32)
    assert not policy.joint(good).any()
    for place, value in ((1, np.inf), (0, -np.inf), (4, np.nan), (-1, np.nan)):
        bad = good.copy()
        bad[place] = value
        with pytest.raises(UserError, match=r"logits are not numbers.*the policy table"):
            policy.joint(bad)


def test_features_that_are_not_numbers_choose_nothing(two_stage: Policy) -> None:
    blank = Sight("low", torch.full((1, 4, WIDTH), torch.nan), 4, 9)
    with pytest.raises(UserError, match="logits are not numbers"):
        two_stage.settle(QUESTION, blank, 50.0)
