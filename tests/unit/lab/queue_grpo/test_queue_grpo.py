"""Policies for a queue: their values, and GRPO whose reward is that of the whole episode."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from decision_worlds import COST_MS, SPACE, K

from tempovlm.control.checkpoint import load_controller
from tempovlm.control.learned.networks import AccuracyNetwork
from tempovlm.core.errors import UserError
from tempovlm.lab.exp5.values import draw_reliability, predicted, reliability, train_values
from tempovlm.lab.fit import seeded
from tempovlm.lab.options import FitOptions, GrpoOptions, QueueFlags
from tempovlm.lab.queue_grpo import algorithm, study
from tempovlm.lab.queue_grpo.algorithm import Corrected, QueueTraining, Rollout, roll_out
from tempovlm.lab.queue_grpo.episodes import Source
from tempovlm.lab.queueing.world import World, about_training
from tempovlm.lab.table import Table

COUNT, LENGTH = 24, 6
OPTIONS = GrpoOptions(num_epochs=3, batch_size=2, num_generations=4, lr=0.1, scale_rewards="none", seed=1)
DEAREST = int(COST_MS.argmax())


@pytest.fixture(autouse=True)
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    """Judge an epoch by few episodes."""
    monkeypatch.setattr(algorithm, "VALIDATED", 4)


def language(count: int = COUNT) -> torch.Tensor:
    return torch.randn(count, 4, generator=torch.Generator().manual_seed(0))


def world(accuracy: np.ndarray) -> World:
    """Questions that are each answered with these accuracies (K,), in exactly the expected time."""
    judged = Table.of(SPACE, np.tile(accuracy, (COUNT, 1)), COST_MS)
    return World(judged, judged, np.tile(COST_MS, (1, 2, 1)), [np.zeros(1, dtype=np.int64)] * COUNT)


def source(of: World, gap: float = 1.0, load: float = 1.0) -> Source:
    """Arrivals at even times, a factor apart."""
    gaps = np.full(4 * LENGTH, gap)
    return Source(world=of, gaps=gaps, loads=(load,), budgets_ms=(2 * float(COST_MS.max()),), length=LENGTH)


def believing(accuracy: np.ndarray) -> Corrected:
    """A policy that expects the same accuracies (K,) of every question."""
    net = seeded(0, lambda: AccuracyNetwork(4, 16, K))
    net.fit_inputs(language(), torch.tensor(np.tile(accuracy, (COUNT, 1)), dtype=torch.float32))
    return Corrected(net.eval(), language(), language(), COST_MS)


def trained(policy: Corrected, of: Source, tmp_path: Path, options: GrpoOptions = OPTIONS) -> QueueTraining:
    training = QueueTraining(policy, of, of, options, 0.3)
    training.resume(tmp_path / "state.pt")
    training.run(tmp_path / "state.pt", "test")
    return training


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


RISING = np.linspace(0.3, 0.9, K)[np.argsort(np.argsort(COST_MS))]
BLOCKING = np.where(np.arange(K) == DEAREST, 0.95, 0.05)


def test_a_choice_earns_what_its_whole_episode_earns() -> None:
    episode = source(world(RISING), load=3.0).draw(np.random.default_rng(0))
    policy = believing(RISING)
    found = roll_out(policy, episode, 3, 0.3, generator())
    noise = 0.3 * torch.randn(3, *policy.weight.shape, generator=generator())
    for sample, own in zip(noise, found.returns.tolist(), strict=True):
        earned = episode.earned(*policy.expected(torch.as_tensor(episode.rows), policy.weight + sample))
        assert len(earned) == LENGTH
        assert own == pytest.approx(earned.mean())
    assert found.log_probs.shape == (LENGTH, 3)


def test_the_gradient_leads_towards_samples_that_earned_more() -> None:
    of = source(world(RISING))
    training = QueueTraining(believing(RISING), of, of, OPTIONS, 0.3)
    found = training.roll_out(of.draw(np.random.default_rng(0)), generator())
    training.backward(found, torch.tensor([1.0, -1.0, 0.0, 0.0]))
    assert training.policy.weight.grad is not None
    before = training.policy.corrections(found.rows).detach()
    with torch.no_grad():
        training.policy.weight -= 0.01 * training.policy.weight.grad
    moved = training.policy.corrections(found.rows).detach() - before
    towards = found.corrections[:, 0] - found.corrections[:, 1]
    assert float((moved * towards).sum()) > 0


def test_equal_outcomes_teach_nothing(tmp_path: Path) -> None:
    """Requests that come one by one are all answered rightly, whatever a sample says."""
    training = trained(believing(RISING), source(world(np.ones(K)), load=0.1), tmp_path)
    assert training.policy.weight.abs().max() == 0
    assert [record["spread"] for record in training.history] == pytest.approx([0.0] * OPTIONS.num_epochs)


def test_who_blocks_others_learns_to_be_cheap(tmp_path: Path) -> None:
    """All settings are right as often; the policy believes in the dearest alone, which takes others' time."""
    of, policy = source(world(np.full(K, 0.8)), load=2.5), believing(BLOCKING)
    training = trained(policy, of, tmp_path, replace(OPTIONS, num_epochs=6, lr=0.2))
    assert training.best_score > training.start_reward + 0.05
    by_lane_time = policy.corrections(torch.arange(COUNT))[:, 1]
    assert by_lane_time.mean() < 0


def test_a_seed_gives_the_same_policy_and_is_resumed(tmp_path: Path) -> None:
    of = source(world(RISING), load=2.0)
    one, two = (trained(believing(RISING), of, tmp_path / name) for name in ("one", "two"))
    torch.testing.assert_close(one.policy.weight, two.policy.weight)
    again = QueueTraining(believing(RISING), of, of, OPTIONS, 0.3)
    again.resume(tmp_path / "one" / "state.pt")
    assert again.epoch == OPTIONS.num_epochs
    assert again.best_score == one.best_score
    other = QueueTraining(believing(RISING), of, of, replace(OPTIONS, seed=2), 0.3)
    other.resume(tmp_path / "one" / "state.pt")
    assert other.epoch == 0


def test_the_correction_becomes_part_of_the_network() -> None:
    policy = believing(RISING)
    with torch.no_grad():
        policy.weight.normal_(generator=generator())
    expected, usual = policy.expected(torch.arange(COUNT), policy.weight)
    net = policy.folded(language())
    np.testing.assert_allclose(predicted(net, language()), expected, rtol=1e-4)
    np.testing.assert_allclose(net.usual.numpy(), usual, rtol=1e-4)


def test_an_episode_asks_the_questions_that_its_rows_name() -> None:
    accuracy = np.arange(COUNT * K).reshape(COUNT, K) / (COUNT * K)
    judged = Table.of(SPACE, accuracy, COST_MS)
    of = replace(source(replace(world(RISING), judged=judged)), offset=7)
    episode = of.draw(np.random.default_rng(3))
    np.testing.assert_array_equal(episode.world.judged.accuracy, accuracy[episode.rows - 7])
    assert sorted(episode.traffic.question) == list(range(LENGTH))
    assert episode.past_ms.size == 0 or episode.past_ms[-1] == 0


def test_training_questions_of_a_part_take_times_of_their_like() -> None:
    train = replace(world(RISING).judged, part=np.array(["train"] * 20 + ["test"] * 4, dtype="<U10"))
    timed = [("okvqa", "q0021", 100)]
    of = about_training(replace(world(RISING), train=train, timed=timed), "test")
    assert len(of.judged) == 4
    assert [places.tolist() for places in of.stands_for] == [[0]] * 4


def test_values_learn_what_a_question_tells(tmp_path: Path) -> None:
    seen = language(240)
    chance = np.where(seen[:, :1].numpy() > 0, 0.9, 0.2) * np.ones(K)
    right = (np.random.default_rng(0).random(chance.shape) < chance).astype(float)
    table = Table.of(SPACE, right, COST_MS).split_by_picture(0.7, 0)
    net = train_values(table, seen, FitOptions(num_epochs=12, lr=1e-2, hidden_dim=16, weight_decay=0.1), tmp_path)
    expected = predicted(net, seen)
    rows = table.rows("test")
    assert np.abs(expected - chance)[rows].mean() < 0.25  # 0.35 without the question
    assert reliability(expected[rows], table.take(rows))["error"] < 0.15
    np.testing.assert_allclose(net.usual.numpy(), expected[table.rows("train")].mean(axis=0), rtol=1e-4)


def test_reliability_tells_who_expects_too_much() -> None:
    right = (np.random.default_rng(0).random((150, K)) < 0.6).astype(float)
    table = Table.of(SPACE, right, COST_MS)
    fair, vain = (reliability(np.full_like(right, value), table) for value in (0.6, 0.85))
    assert fair["error"] < 0.04
    assert vain["error"] == pytest.approx(0.25, abs=0.04)
    assert vain["interval"][0] < vain["error"] < vain["interval"][1]
    (row,) = vain["bins"]
    assert (row["from"], row["to"], row["share"]) == pytest.approx((0.8, 0.9, 1.0))
    assert row["interval"][0] < row["right"] < row["interval"][1]
    assert "fair: off by" in draw_reliability({"fair": fair, "vain": vain})


def test_a_verdict_is_a_gain_only_where_it_shows() -> None:
    rng = np.random.default_rng(0)
    base = (rng.random((200, 3)) < 0.5).astype(float)
    better = np.maximum(base, rng.random((200, 3)) < 0.2)
    for learned, word in ((base, "nothing that shows"), (better, "GRPO gains,"), (0.8 * base, "GRPO loses,")):
        found = study.compare({"table": base[:, :1], "value": base, "learned": learned, "ensemble": base[:, :1]})
        row = {"arrivals": "bursts", "load": 1.0, **found}
        assert word in study.verdict([row])


@pytest.mark.parametrize(
    ("changes", "flag"),
    [
        ({"arrivals": None}, "--arrivals"),
        ({"loads": (0.0,)}, "--loads"),
        ({"budgets_ms": (float("inf"),)}, "--budgets_ms"),
        ({"episode_length": 1}, "--episode_length"),
        ({"exploration": 0.0}, "--exploration"),
    ],
)
def test_flags_that_make_no_sense_are_named(changes: dict[str, object], flag: str) -> None:
    with pytest.raises(UserError, match=flag):
        QueueFlags(**{"arrivals": "bursts", **changes}).check_queue()  # type: ignore[arg-type]


def test_samples_of_a_group_share_all_but_their_policy() -> None:
    """Without exploration worth the name, all samples of an episode earn the same."""
    episode = source(world(RISING), load=3.0).draw(np.random.default_rng(0))
    found: Rollout = roll_out(believing(RISING), episode, 3, 1e-9, generator())
    assert float(found.returns.std()) == pytest.approx(0.0)


def test_the_whole_study_writes_its_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    of = world(RISING)
    train = replace(of.train, accuracy=(rng.random((COUNT, K)) < RISING).astype(float))
    of = replace(of, train=train, timed=[("okvqa", "q0000", 100)])
    looks = SimpleNamespace(features_of=lambda table: rng.random((len(table), 35)))
    monkeypatch.setattr(study, "read_world", lambda *_: of)
    monkeypatch.setattr(study, "language_of", lambda _, table: language(len(table)))
    monkeypatch.setattr(study, "Content", SimpleNamespace(read=lambda *_: looks))
    monkeypatch.setattr(study, "gaps_of", lambda *_: rng.exponential(size=40))
    job = study.QueueJob(
        results_dirs=[tmp_path],
        datasets=["okvqa"],
        output_dir=tmp_path / "out",
        engine=SimpleNamespace(space=SPACE),  # type: ignore[arg-type]
        weights_hash="abc",
        options=replace(OPTIONS, num_epochs=1, warm_start=2),
        arrivals="poisson",
        loads=(1.0,),
        hidden_dim=8,
        train_split=0.5,
        seeds=(1, 2),
    )
    report = study.run_job(job)
    assert {path.name for path in job.output_dir.glob("*.*")} >= {"report.json", *study.CHECKPOINTS.values()}
    for name in study.CHECKPOINTS.values():
        assert load_controller(job.output_dir / name, SPACE, "abc").kind == "value"
    assert set(report["reliability"]) == {"table", "kind", "nearest neighbours", "ensemble", "learned"}
    assert [row["seed"] for row in report["seeds"]] == [1, 2]
    gains = report["rows"][0]["gains"]
    assert gains["learned over value"]["over_seeds"]["interval"] is not None
    assert gains["ensemble over table"]["over_seeds"]["interval"] is None
    assert report["verdict"].split("; ")[0] in study.render(report)
