from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import tiny_model
from tempovlm.core.errors import AllFailedError, UserError
from tempovlm.data.sample import Sample
from tempovlm.engine.batching import answer_batch
from tempovlm.engine.engine import Engine
from tempovlm.lab.core_exp.batched import prepare_all, see_all
from tempovlm.lab.core_exp.plan import Job
from tempovlm.lab.exp6_importance.measure import (
    Blocks,
    Protocol,
    ScoreFile,
    Scores,
    ablations,
    answer_plans,
    eliminate,
    joint_ranking,
    measure,
    single_ranking,
)
from tempovlm.model.prompt import Tokenizer

IDLE = 2
NUM_BLOCKS = 6
HEADER = {"dataset": "text_vqa", "plans": [[0, 1]]}


@pytest.fixture(scope="module")
def idle_engine(tiny_folder: Path) -> Engine:
    """A tiny model whose block 2 adds nothing."""
    model = tiny_model.build_model()
    with torch.no_grad():
        for name, weight in model.decoder.blocks[IDLE].named_parameters():
            if name.endswith(("attention.out.weight", "moe.down")):
                weight.zero_()
    return Engine(model, Tokenizer.load(tiny_folder / "tokenizer.json"), name="tiny")


@pytest.fixture(scope="module")
def samples(idle_engine: Engine, tmp_path_factory: pytest.TempPathFactory) -> list[Sample]:
    """Questions whose right answer is what the whole model says."""
    folder = tmp_path_factory.mktemp("pictures")
    found = []
    for i in range(6):
        path = folder / f"{i}.png"
        Image.fromarray(tiny_model.picture(i)).save(path)
        found.append(sample(path, i, "x"))
    requests = [Job(one, 4).request for one in found]
    texts = [answer.text for answer in answer_batch(idle_engine, requests)]
    return [sample(one.image_path, i, text) for i, (one, text) in enumerate(zip(found, texts, strict=True))]


def sample(path: Path, number: int, answer: str) -> Sample:
    return Sample(
        question_id=str(number),
        image_id=f"picture{number // 2}",
        image_path=path,
        question="what does the sign say?",
        answers=(answer,) * 10,
        style="vqa2",
        dataset="coco_2014_vqa",
        split="train",
    )


@pytest.fixture
def protocol(idle_engine: Engine) -> Protocol:
    return Protocol(idle_engine.space.native, max_new_tokens=4, batch_size=4)


def test_a_block_that_adds_nothing_has_no_importance_and_no_influence(
    idle_engine: Engine, samples: list[Sample], protocol: Protocol, tmp_path: Path
) -> None:
    plans = ablations(NUM_BLOCKS)
    assert plans[0] == (0, 1, 2, 3, 4, 5)
    assert plans[1 + IDLE] == (0, 1, 3, 4, 5)
    scores = measure(idle_engine, samples, plans, ScoreFile(tmp_path / "a.jsonl", {}), protocol, influence=True)
    assert scores.images == tuple(one.image_id for one in samples)
    assert scores.scores[:, 0].mean() == pytest.approx(1)
    importance, influence = scores.drops.mean(axis=0), scores.influence.mean(axis=0)
    assert importance[IDLE] == pytest.approx(0)
    assert abs(influence[IDLE]) < 1e-6
    others = [block for block in range(NUM_BLOCKS) if block != IDLE]
    assert importance[others].max() > 0.3
    assert influence[others].min() > 0.01


def test_influence_does_not_depend_on_the_batch(
    idle_engine: Engine, samples: list[Sample], tmp_path: Path
) -> None:
    found = []
    questions = [*samples[:3], sample(samples[3].image_path, 3, "x")]
    for size in (1, 4):
        protocol = Protocol(idle_engine.space.native, max_new_tokens=2, batch_size=size)
        file = ScoreFile(tmp_path / f"{size}.jsonl", {})
        found.append(measure(idle_engine, questions, ablations(NUM_BLOCKS)[:1], file, protocol, influence=True))
    np.testing.assert_allclose(found[0].influence, found[1].influence, atol=2e-5)
    np.testing.assert_allclose(found[0].scores, found[1].scores)


def test_shared_beginnings_change_no_answer(idle_engine: Engine, samples: list[Sample]) -> None:
    protocol = Protocol(idle_engine.space.native, max_new_tokens=4, batch_size=16)
    plans = [protocol.plan(blocks) for blocks in (*ablations(NUM_BLOCKS), (0, 3, 5), (0, 3), (0, 1, 2))]
    ready, failed = prepare_all(idle_engine, [Job(sample, 4) for sample in samples], protocol.base.tier)
    assert not failed
    seen = see_all(idle_engine.runner, ready)
    found = [answered.texts for answered in answer_plans(idle_engine, seen, plans)]
    alone = [next(answer_plans(idle_engine, seen, [plan])).texts for plan in plans]
    assert found == alone
    assert len({tuple(texts) for texts in found}) > 3
    single = [next(answer_plans(idle_engine, [one], [plans[1]])).texts[0] for one in seen]
    assert single == found[1]


def test_a_killed_run_resumes_with_nothing_lost_or_doubled(
    idle_engine: Engine, samples: list[Sample], protocol: Protocol, tmp_path: Path
) -> None:
    path, plans = tmp_path / "deep" / "a.jsonl", ablations(NUM_BLOCKS)[:2]
    whole = measure(idle_engine, samples, plans, ScoreFile(path, HEADER), protocol)
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:3]) + lines[3][:20])
    calls: list[tuple[int, int]] = []
    again = measure(
        idle_engine,
        samples,
        plans,
        ScoreFile(path, HEADER),
        protocol,
        lambda done, total: calls.append((done, total)),
    )
    np.testing.assert_allclose(again.scores, whole.scores)
    assert calls == [(2, 6), (6, 6)]
    rows = [json.loads(line) for line in path.read_text().splitlines()[1:]]
    assert sorted(row["question_id"] for row in rows) == [one.question_id for one in samples]


def test_a_picture_that_cannot_be_read_is_recorded(
    idle_engine: Engine, samples: list[Sample], protocol: Protocol, tmp_path: Path
) -> None:
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"no picture")
    bad = sample(broken, 77, "x")
    scores = measure(
        idle_engine, [bad, samples[0]], ablations(NUM_BLOCKS)[:1], ScoreFile(tmp_path / "a.jsonl", {}), protocol
    )
    assert len(scores.images) == 1
    assert "broken.png" in scores.errors["77"]
    with pytest.raises(UserError, match=r"all 1 questions failed, the first with: \d+: "):
        measure(idle_engine, [bad], ablations(NUM_BLOCKS)[:1], ScoreFile(tmp_path / "b.jsonl", {}), protocol)


def test_score_files_that_cannot_be_used(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    ScoreFile(path, HEADER)
    assert not ScoreFile(path, HEADER).rows
    with pytest.raises(UserError, match=r"a\.jsonl: field plans is of another run"):
        ScoreFile(path, {**HEADER, "plans": [[0]]})
    for text in (path.read_text() + "{}\n", "3\n"):
        path.write_text(text)
        with pytest.raises(UserError, match=r"a\.jsonl: damaged"):
            ScoreFile(path, HEADER)
    path.write_text("")
    assert not ScoreFile(path, HEADER).rows


def test_the_joint_search_sees_what_single_removals_cannot() -> None:
    """Blocks 1 and 2 stand in for each other: alone each is free, together they are not."""

    def accuracy(blocks: Blocks) -> float:
        missing = set(range(NUM_BLOCKS)) - set(blocks)
        return 1.0 - 0.1 * (3 in missing) - 0.2 * (4 in missing) - 0.9 * ({1, 2} <= missing)

    steps: list[int] = []

    def evaluate(step: int, candidates: Sequence[Blocks]) -> list[float]:
        steps.append(step)
        return [accuracy(blocks) for blocks in candidates]

    removals = eliminate(NUM_BLOCKS, 3, evaluate, [0.0, 0.5, 0.4, 0.3, 0.2, 0.0])
    assert [removal.block for removal in removals] == [2, 3, 4]
    assert steps == [0, 1, 2]
    assert removals[-1].blocks == (0, 1, 5)
    assert removals[1].candidates == {1: pytest.approx(0.1), 3: pytest.approx(0.9), 4: pytest.approx(0.8)}
    importance = [1.0, 0.0, 0.0, 0.1, 0.2, 0.9]
    ranking = joint_ranking(removals, importance)
    assert ranking.order == (0, 5, 1, 4, 3, 2)
    for removal in removals:
        assert ranking.blocks(len(removal.blocks)) == removal.blocks
    smaller = [set(ranking.blocks(n)) for n in range(2, NUM_BLOCKS + 1)]
    assert all(a < b for a, b in pairwise(smaller))
    assert single_ranking(importance).order == (0, 5, 4, 3, 1, 2)


def test_ends_are_never_removed() -> None:
    removals = eliminate(4, 1, lambda _, candidates: [0.0] * len(candidates), [0.0] * 4)
    assert [removal.block for removal in removals] == [2, 1]


def test_a_resumed_file_is_about_the_same_questions_and_asks_failed_ones_again(
    idle_engine: Engine,
    samples: list[Sample],
    protocol: Protocol,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    path, plans = tmp_path / "a.jsonl", ablations(NUM_BLOCKS)[:1]
    away = sample(tmp_path / "away.png", 77, "x")

    def go(*some: Sample) -> Scores:
        return measure(idle_engine, some, plans, ScoreFile(path, {}), protocol)

    with pytest.raises(AllFailedError, match=r"all 1 questions failed, the first with: \d+: "):
        go(away)
    assert list(go(away, samples[0]).errors) == ["77"]
    assert "1 of 2 questions failed, the first with: " in caplog.text
    away.image_path.write_bytes(samples[0].image_path.read_bytes())
    assert not go(away, samples[0]).errors
    other = replace(samples[0], image_path=samples[-1].image_path)
    with pytest.raises(UserError, match=rf"a\.jsonl: the picture of question {other.question_id} has changed"):
        go(other)
    with pytest.raises(UserError, match=r"a\.jsonl: the text of question 77 has changed"):
        go(replace(away, answers=("y",)))
    with pytest.raises(UserError, match=r"a\.jsonl: question id 77 is there 2 times"):
        go(away, away)
    text = path.read_text()
    path.write_text("".join(f"{json.dumps(drop(line))}\n" for line in text.splitlines()))
    caplog.clear()
    assert not go(away, samples[0]).errors
    assert caplog.text.count("did not record the questions") == 1


def drop(line: str) -> dict[str, object]:
    """A line of a file that an earlier version wrote."""
    return {name: value for name, value in json.loads(line).items() if name != "question"}
