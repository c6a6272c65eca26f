"""Requests that choose by their pictures among others: encoded with them, settled before the prompt, as alone."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import tiny_model
from company_fakes import (
    READING,
    STEP,
    Arrivals,
    asked,
    company_of,
    needed_ms,
    slower,
    steep,
)
from recorders import Again
from tempovlm.control.checkpoint import save_controller
from tempovlm.control.guard import Guard
from tempovlm.control.learned.networks import Knob1PredictorBudgetLanguage, Knob2Knob3Predictor
from tempovlm.control.learned.observation import vision_feature, vision_width
from tempovlm.control.learned.policies import policy_from_checkpoint
from tempovlm.control.policy import Policy, Question, Sight
from tempovlm.control.select import Floats
from tempovlm.core.errors import UserError
from tempovlm.core.request import STAGES
from tempovlm.engine.batching import answer_batch
from tempovlm.engine.company import company as companies
from tempovlm.engine.company.company import Company
from tempovlm.engine.company.looks import Look
from tempovlm.engine.company.member import Member
from tempovlm.engine.cuda.vision_graphs import VisionGraphs
from tempovlm.engine.engine import Engine
from tempovlm.latency.profile import LatencyProfile

Seen = tuple[str, str, np.ndarray | None, int, int]


class Seeing(Policy):
    """Takes the lowest tier; then by the picture one of its settings, and without seeing it another one."""

    name = "seeing"
    sees_picture = True

    def __init__(self, count: int, of_picture: Callable[[np.ndarray], int], unseen: int = 0) -> None:
        self.count, self.of_picture, self.unseen = count, of_picture, unseen
        self.seen = list[Seen]()

    def look(self, question: Question, left_ms: float) -> Floats:
        del question, left_ms
        return -np.arange(self.count, dtype=float)

    def settle(self, question: Question, sight: Sight, left_ms: float) -> Floats:
        del left_ms
        place = self.unseen
        if sight.num_text_tokens:
            pooled = None if sight.vision is None else vision_feature(sight.vision)
            if sight.pooled is not None:
                np.testing.assert_allclose(sight.pooled.numpy(), pooled, rtol=1e-4, atol=1e-5)
            self.seen.append((question.text, sight.tier, pooled, sight.num_vision_tokens, sight.num_text_tokens))
            place = self.unseen if pooled is None else self.of_picture(pooled)
        return np.eye(self.count)[place]


def low(engine: Engine) -> int:
    """The number of settings of the lowest tier, which come first."""
    return len(engine.space) // len(engine.space.tiers)


def drawn(engine: Engine) -> Callable[[np.ndarray], int]:
    """A setting that differs between pictures."""
    return lambda pooled: int(1e4 * abs(float(pooled[0]))) % low(engine)


def guarded(engine: Engine, profile: LatencyProfile, policy: Policy) -> Guard:
    return Guard(policy, engine.space, tuple(range(len(engine.space))), profile)


@pytest.mark.parametrize("has_graphs", [False, True])
def test_each_chooses_by_its_own_picture_as_alone(
    engine: Engine,
    crowded: Engine,
    profile: LatencyProfile,
    monkeypatch: pytest.MonkeyPatch,
    *,
    has_graphs: bool,
) -> None:
    if has_graphs:
        vision = VisionGraphs(engine.runner.model, Again())
        vision.warmup(engine.space.tiers)
        crowded.runner = replace(crowded.runner, vision=vision)
    policy = Seeing(len(engine.space), drawn(engine))
    pairs = [(asked(1e9, i, question=f"what is sign {i}?"), guarded(engine, profile, policy)) for i in range(5)]
    pairs.append((replace(asked(1e9, 5, question="no picture?"), images=()), pairs[0][1]))
    alone = [engine.answer(*pair) for pair in pairs]
    expected = sorted(policy.seen, key=lambda one: one[0])
    policy.seen.clear()
    arrivals = Arrivals(crowded, monkeypatch)
    answers = arrivals.come(pairs)
    assert len(arrivals.joined) == len(pairs)
    assert len({one.knobs for one in alone}) > 2
    assert [one.knobs for one in answers] == [one.knobs for one in alone]
    assert [one.tokens for one in answers] == [one.tokens for one in alone]
    found = sorted(policy.seen, key=lambda one: one[0])
    assert len(found) == len(expected), "each sees its picture once"
    for ours, own in zip(found, expected, strict=True):
        assert (ours[0], ours[1], *ours[3:]) == (own[0], own[1], *own[3:])
        if own[2] is None:
            assert ours[2] is None
        else:
            np.testing.assert_allclose(ours[2], own[2], rtol=1e-4, atol=1e-5)
    for one in answers:
        assert (one.policy, one.budget_met) == ("seeing", True)
        total_ms = one.timings_ms["total"]
        assert sum(one.timings_ms[stage] for stage in STAGES) == pytest.approx(total_ms)
        assert one.ttft_ms == pytest.approx(total_ms - sum(one.step_ms))


def test_a_two_stage_controller_joins(
    engine: Engine,
    crowded: Engine,
    profile: LatencyProfile,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    torch.manual_seed(5)
    space, width = engine.space, tiny_model.CONFIG.width
    sizes = {"num_top_ks": len(space.top_ks), "num_block_counts": len(space.block_counts)}
    networks = {
        "knob1": Knob1PredictorBudgetLanguage(width, 16),
        "knob2knob3": Knob2Knob3Predictor(vision_width(width), width, 16, **sizes),
    }
    path = tmp_path / "two_stage.pt"
    save_controller(path, kind="two_stage", networks=networks, space=space)
    policy = policy_from_checkpoint(path, space, engine.runner.model, engine.runner.tokenizer)
    guard = guarded(engine, profile, policy).only(range(low(engine)))
    pairs = [(asked(1e9, i, question=f"what is sign {i}?"), guard) for i in range(4)]
    alone = [engine.answer(*pair) for pair in pairs]
    arrivals = Arrivals(crowded, monkeypatch)
    answers = arrivals.come(pairs)
    assert len(arrivals.joined) == len(pairs)
    assert [(one.knobs, one.tokens) for one in answers] == [(one.knobs, one.tokens) for one in alone]


@pytest.mark.parametrize(("spare", "takes"), [(1.2, True), (0.8, False)])
def test_a_setting_that_would_make_another_one_late_is_not_taken(
    engine: Engine,
    crowded: Engine,
    profile: LatencyProfile,
    monkeypatch: pytest.MonkeyPatch,
    spare: float,
    takes: bool,
) -> None:
    """It takes longer to read, and its steps would be everybody's."""
    space, profile = engine.space, steep(profile)
    cheap, dear = space.index(space.cheapest), space.index(slower(engine))
    guard = guarded(engine, profile, Seeing(len(space), lambda _: dear, unseen=cheap))
    (cheap_ms, cheap_steps_ms), (_, dear_steps_ms) = (
        needed_ms(profile, space.settings[place]) for place in (cheap, dear)
    )
    prompt_ms = READING * (profile.p50_reading_ms(dear) - profile.p50_picture_ms(dear))
    budget_ms = cheap_ms + prompt_ms + spare * dear_steps_ms
    assert budget_ms > 1.1 * (2 * cheap_ms + cheap_steps_ms), "both are let in"
    monkeypatch.setattr(type(crowded.door), "strangers", lambda *_: 0)
    monkeypatch.setattr(companies, "FEW", 0)  # else the other one has ended by then
    pairs = [(asked(budget_ms), Guard.fixed(space.cheapest, space, profile)), (asked(1e9, 1), guard)]
    arrivals = Arrivals(crowded, monkeypatch)
    first, second = arrivals.come(pairs)
    assert len(arrivals.joined) == 2
    assert second.knobs == (slower(engine) if takes else space.cheapest)
    for answer, knobs in ((first, space.cheapest), (second, second.knobs)):
        fixed = Guard.fixed(knobs, space, profile)
        request = pairs[0][0] if answer is first else pairs[1][0]
        assert answer.tokens == engine.answer(replace(request, budget_ms=None), fixed).tokens


def test_after_the_choice_all_are_foreseen_by_what_was_chosen(
    engine: Engine, crowded: Engine, profile: LatencyProfile, monkeypatch: pytest.MonkeyPatch
) -> None:
    space = engine.space
    cheap, dear = space.index(space.cheapest), space.index(slower(engine))
    needs, expect = list[tuple[float, float]](), Member.expect

    def expecting(member: Member, forecast: Any) -> None:
        assert forecast is not None
        needs.append((forecast.reading_ms, forecast.step_ms))
        expect(member, forecast)

    monkeypatch.setattr(Member, "expect", expecting)
    guard = guarded(engine, profile, Seeing(len(space), lambda _: dear, unseen=cheap))
    (answer,) = Arrivals(crowded, monkeypatch).come([(asked(1e9), guard)])
    assert answer.knobs == slower(engine)
    prompt_ms = READING * (profile.p50_reading_ms(dear) - profile.p50_picture_ms(dear))
    assert needs == [
        pytest.approx((READING * profile.p50_reading_ms(cheap), STEP * profile.step_ms(cheap))),
        pytest.approx((prompt_ms, STEP * profile.step_ms(dear))),
    ]
    rest_ms = prompt_ms + needed_ms(profile, slower(engine))[1]
    assert answer.predicted.p50_ms == pytest.approx(rest_ms, rel=0.01), "its waiting took next to nothing"


class Later:
    """A moment of the device that comes when it is told."""

    def __init__(self) -> None:
        self.is_there = False

    def query(self) -> bool:
        return self.is_there

    def synchronize(self) -> None:
        self.is_there = True


def test_while_one_looks_the_pictures_of_others_are_encoded(
    engine: Engine, crowded: Engine, profile: LatencyProfile, monkeypatch: pytest.MonkeyPatch
) -> None:
    order = list[str]()
    at, encode, settle = Look.at, companies.encode_together, Company._settle
    monkeypatch.setattr(Look, "at", lambda *given: replace(at(*given), seen=Later()))
    monkeypatch.setattr(companies, "MOST_TOGETHER", 1)
    monkeypatch.setattr(companies, "encode_together", lambda *given: (order.append("encode"), encode(*given))[1])
    monkeypatch.setattr(Company, "_settle", lambda *given: (order.append("settle"), settle(*given))[1])
    guard = guarded(engine, profile, Seeing(len(engine.space), drawn(engine)))
    pairs = [(asked(1e9, i), guard) for i in range(3)]
    expected = [engine.answer(*pair).tokens for pair in pairs]
    assert [one.tokens for one in Arrivals(crowded, monkeypatch).come(pairs)] == expected
    assert order == ["encode", "encode", "settle", "encode", "settle", "settle"]


def test_those_who_look_keep_their_rows(
    engine: Engine, crowded: Engine, profile: LatencyProfile, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of four rows the first three are taken by then: of the next three one follows."""
    at, groups, encode = Look.at, list[int](), companies.encode_together
    monkeypatch.setattr(Look, "at", lambda *given: replace(at(*given), seen=Later()))
    monkeypatch.setattr(companies, "MOST_TOGETHER", 3)
    monkeypatch.setattr(
        companies, "encode_together", lambda *given: (groups.append(len(given[1])), encode(*given))[1]
    )
    guard = guarded(engine, profile, Seeing(len(engine.space), drawn(engine)))
    pairs = [(asked(1e9, i), guard) for i in range(6)]
    expected = [engine.answer(*pair).tokens for pair in pairs]
    assert [one.tokens for one in Arrivals(crowded, monkeypatch).come(pairs)] == expected
    assert groups[:2] == [3, 1]
    assert sum(groups) == len(pairs)


@pytest.mark.parametrize(("place", "stage"), [(0, "queue"), (1, "control"), (2, "decode")])
def test_an_answer_may_end_before_its_choice(
    engine: Engine,
    crowded: Engine,
    profile: LatencyProfile,
    monkeypatch: pytest.MonkeyPatch,
    place: int,
    stage: str,
) -> None:
    count = itertools.count()
    guard = guarded(engine, profile, Seeing(len(engine.space), drawn(engine)))
    other = asked(1e9, 1), guard
    expected = engine.answer(*other).tokens
    arrivals = Arrivals(crowded, monkeypatch)
    whole, cut = arrivals.come([other, (asked(1e9), guard, lambda: next(count) >= place)])
    assert whole.tokens == expected
    assert (cut.finish_reason, cut.stopped_at, len(cut.tokens)) == ("cancelled", stage, int(place == 2))
    assert company_of(crowded)._seats.rows.free == [0, 1, 2, 3]  # type: ignore[union-attr]


def test_a_policy_that_fails_at_a_picture_fails_its_request_alone(
    engine: Engine, crowded: Engine, profile: LatencyProfile, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(pooled: np.ndarray) -> int:
        raise UserError(f"nothing to see in {len(pooled)} values")

    sound, broken = (Seeing(len(engine.space), one) for one in (drawn(engine), fail))
    pairs = [(asked(1e9, i), guarded(engine, profile, one)) for i, one in enumerate((sound, broken, sound))]
    expected = [engine.answer(*pairs[i]).tokens for i in (0, 2)]
    first, failed, last = Arrivals(crowded, monkeypatch).come(pairs)
    assert [first.tokens, last.tokens] == expected
    assert isinstance(failed, UserError)
    assert company_of(crowded)._seats.rows.free == [0, 1, 2, 3]  # type: ignore[union-attr]


def test_a_fault_of_the_device_reaches_those_who_look(
    engine: Engine, crowded: Engine, profile: LatencyProfile, monkeypatch: pytest.MonkeyPatch
) -> None:
    at, encode, count = Look.at, companies.encode_together, itertools.count()

    def encoding(*given: Any) -> Any:
        if next(count):
            raise UserError("out of memory")
        return encode(*given)

    monkeypatch.setattr(Look, "at", lambda *given: replace(at(*given), seen=Later()))
    monkeypatch.setattr(companies, "MOST_TOGETHER", 1)
    monkeypatch.setattr(companies, "encode_together", encoding)
    guard = guarded(engine, profile, Seeing(len(engine.space), drawn(engine)))
    found = Arrivals(crowded, monkeypatch).come([(asked(1e9, i), guard) for i in range(2)])
    assert ["out of memory" in str(one) for one in found] == [True, True]


def test_a_policy_that_glances_stays_alone(
    engine: Engine, crowded: Engine, profile: LatencyProfile, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its first choice needs the device."""
    policy = Seeing(len(engine.space), drawn(engine))
    monkeypatch.setattr(Seeing, "sees_glance", True)
    arrivals = Arrivals(crowded, monkeypatch)
    (answer,) = arrivals.come([(asked(1e9), guarded(engine, profile, policy))])
    assert answer.tokens
    assert (arrivals.joined, arrivals.alone) == ([], ["request 0"])


def test_those_of_a_batch_choose_by_their_pictures(
    engine: Engine, crowded: Engine, profile: LatencyProfile, monkeypatch: pytest.MonkeyPatch
) -> None:
    guard = guarded(engine, profile, Seeing(len(engine.space), drawn(engine)))
    requests = [asked(1e9, i) for i in range(6)]
    alone = [engine.answer(one, guard) for one in requests]
    arrivals = Arrivals(crowded, monkeypatch)
    answers = answer_batch(crowded, requests, guard)
    assert len(arrivals.joined) == len(requests)
    assert [(one.knobs, one.tokens) for one in answers] == [(one.knobs, one.tokens) for one in alone]
