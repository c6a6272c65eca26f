"""Named recipes, runs whose course follows the clock, teaching, and the report: on a tiny model."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import tempovlm.training.recipes as recipes
from tempovlm.core.errors import UserError
from tempovlm.core.knobs import KNOBS, KnobConfig, KnobSpace
from tempovlm.model.config import POCKET
from tempovlm.model.moe import MoE
from tempovlm.testbed.costs import SHARES
from tempovlm.training.elastic import moe_elastic, router_terms, sample_setting
from tempovlm.training.pictures import PictureBatch, Pictures
from tempovlm.training.pocket import Trainer, check_size, learning_rate, main
from tempovlm.training.pocket_eval import Outcome
from tempovlm.training.recipes import RECIPES, Recipe, find_recipe, name_of
from tempovlm.training.report import Answers, axes_settings, by_cost, make_report, missed, summary
from tiny_model import TRAINED as TINY

CPU = torch.device("cpu")
RECIPE = Recipe(
    steps=8, decay_steps=2, vision_steps=2, batch=2, passes=2, warmup=2, elastic_after=2, questions=6,
    taught_weight=1.0, elastic_share=0.5, spread_weight=0.01, validation_batches=2,
)  # fmt: skip


def trainer_in(folder: Path, **options: float | str) -> Trainer:
    return Trainer(folder, replace(RECIPE, **options), TINY, CPU)


@pytest.fixture(scope="module")
def trainer(tmp_path_factory: pytest.TempPathFactory) -> Trainer:
    return trainer_in(tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def batch(trainer: Trainer) -> PictureBatch:
    return next(iter(Pictures(trainer.out / "tokenizer.json", "train", 2, 5, 0, 1, questions=6)))


def test_candidates_fit_the_package_and_keep_the_shapes_that_a_cpu_is_fast_at() -> None:
    assert len(RECIPES) >= 6
    shapes = {(one.num_experts, one.expert_width) for one in RECIPES.values()}
    assert shapes == {(16, 48), (32, 24), (32, 16)}
    for name, one in RECIPES.items():
        check_size(replace(one.config, embedding_size=896))
        assert name_of(replace(one, seed=4, total_minutes=8.0)) == name
        assert (one.config.top_k, one.questions) == (8, 8)
    space, draws = (
        KnobSpace.for_model(POCKET.shape),
        torch.rand(9999, 4, generator=torch.Generator().manual_seed(0)),
    )
    for share in {one.elastic_share for one in RECIPES.values()}:
        assert {sample_setting(space, draw, share) for draw in draws} == set(space), "each setting is trained"
    with pytest.raises(UserError, match=r"--num_experts 64 --expert_width 48: makes .* MB; at most 24"):
        check_size(replace(POCKET, num_experts=64, expert_width=48))


def test_given_options_replace_those_of_a_named_recipe() -> None:
    found = find_recipe("32x16-taught", {"seed": 3, "elastic_share": 0.18})
    assert found == replace(RECIPES["32x16-taught"], seed=3, elastic_share=0.18)
    assert find_recipe(None, {"batch": 8}) == Recipe(batch=8)
    with pytest.raises(UserError, match="--recipe 32x8: choose from 16x48"):
        find_recipe("32x8", {})


def test_the_share_of_smaller_settings_is_as_asked() -> None:
    space, generator = KnobSpace.for_model(POCKET.shape), torch.Generator().manual_seed(0)
    for share in (0.0, 0.18, 0.6):
        drawn = [sample_setting(space, torch.rand(4, generator=generator), share) for _ in range(4000)]
        other = np.mean([(one.top_k, one.num_blocks) != (8, 16) for one in drawn])
        assert other == pytest.approx(share, abs=0.03)


def test_the_router_terms_tell_even_from_peaked() -> None:
    layer = MoE(replace(TINY, num_experts=8))
    for weight in layer.parameters():
        torch.nn.init.ones_(weight)
    x = torch.randn(1, 50, TINY.width)
    torch.nn.init.zeros_(layer.router.weight)
    assert router_terms(moe_elastic(layer, x, 4)[1].unsqueeze(0), 50)[1].item() == pytest.approx(1.0)
    torch.nn.init.normal_(layer.router.weight, std=50.0)
    assert router_terms(moe_elastic(layer, x, 4)[1].unsqueeze(0), 50)[1].item() > 6


def test_the_course_follows_the_clock(tmp_path: Path) -> None:
    piece = trainer_in(tmp_path, total_minutes=1000.0)
    assert not piece.train(workers=0, max_minutes=0.0, log_every=2)
    assert piece.step == 2
    again = trainer_in(tmp_path, total_minutes=1000.0)
    assert again.spent_ms == pytest.approx(piece.spent_ms)
    assert 0 < again.place < 0.1
    with pytest.raises(UserError, match="--total_minutes 8"):
        trainer_in(tmp_path, total_minutes=8.0)
    short = trainer_in(tmp_path / "short", total_minutes=1e-4)
    assert short.train(workers=0, max_minutes=1e9, log_every=50)
    assert short.place == pytest.approx(RECIPE.steps)
    assert json.loads((tmp_path / "short" / "log.jsonl").read_text().splitlines()[-1])["place"] == RECIPE.steps


def test_a_run_starts_with_the_vision_side_of_another(tmp_path: Path) -> None:
    other = trainer_in(tmp_path / "other", seed=7)
    other.save()
    mine = trainer_in(tmp_path / "mine")
    decoder = mine.model.decoder.blocks[0].moe.down.clone()
    mine.see_with(other.out)
    assert torch.equal(mine.model.vision.positions, other.model.vision.positions)
    assert torch.equal(mine.pupil.head.from_tokens.weight, other.pupil.head.from_tokens.weight)
    assert torch.equal(mine.model.decoder.blocks[0].moe.down, decoder)
    assert mine.place == RECIPE.vision_steps
    assert learning_rate(2, False, RECIPE, start=2) == pytest.approx(RECIPE.lr / 2)
    mine.save()
    assert trainer_in(tmp_path / "mine").start == RECIPE.vision_steps
    with pytest.raises(UserError, match=r"--vision_from .*nothing: holds no state.pt"):
        mine.see_with(tmp_path / "nothing")


def test_small_settings_learn_the_native_answers_to_the_same_pictures(trainer: Trainer) -> None:
    native = trainer.space.native
    trainer.step, trainer.teacher = 4, None
    assert {(knobs.top_k, knobs.num_blocks) for knobs in (trainer.setting() for _ in range(50))} == {
        (native.top_k, native.num_blocks)
    }, "the first step on a batch is native"
    logits = torch.randn(5, 7)
    assert trainer.told(replace(native, tier="medium"), logits) is None
    small = replace(native, num_blocks=2)
    same = trainer.told(replace(small, tier="low"), logits)
    assert same is not None
    assert same.item() == pytest.approx(0.0, abs=1e-6)
    other = trainer.told(replace(small, tier="medium"), -logits)
    assert other is not None
    assert other.item() > 0.1
    assert trainer.told(small, logits) is None, "the teacher saw less"
    assert trainer.told(replace(native, tier="low"), logits) is None, "a native answer has its own labels"
    drawn = [trainer.setting() for _ in range(200)]
    assert any((knobs.top_k, knobs.num_blocks) != (native.top_k, native.num_blocks) for knobs in drawn)
    trainer.step, trainer.teacher = 0, None


def test_a_run_that_teaches_logs_how_far_the_answers_are(tmp_path: Path) -> None:
    run = trainer_in(tmp_path, steps=14)
    assert run.train(workers=0, max_minutes=1e9, log_every=2)
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(2, 15, 2))
    taught = [line["taught"] for line in lines if "taught" in line]
    assert taught
    assert min(taught) > 0
    assert all(line["spread"] >= 1 for line in lines if "spread" in line)
    assert all(0 <= line["waiting"] <= 1 for line in lines)


def test_training_pictures_have_as_many_questions_as_asked(batch: PictureBatch) -> None:
    counts = batch.segments.amax(1).tolist()
    assert counts == [len(names) for names in batch.templates]
    assert 2 <= min(counts) <= max(counts) <= 6


def outcome(knobs: KnobConfig, right: list[bool]) -> Outcome:
    return Outcome(knobs, torch.tensor([0, 0, 1, 1]), ["a", "b", "a", "c"], torch.tensor(right))


def test_losses_are_paired() -> None:
    space = KnobSpace.for_model(POCKET.shape)
    answers = Answers(
        [outcome(space.native, [True, True, True, False]), outcome(space.cheapest, [True, False, True, False])]
    )
    assert answers.mean(answers.right[space.native])[0] == pytest.approx(75)
    lost, error = answers.lost(space.native, space.cheapest)
    assert lost == pytest.approx(25)
    assert error == pytest.approx(100 * (0.25 / 2) ** 0.5 / 2)
    rows = answers.rows(answers.templates, {"native": space.native})
    assert rows["a"] == {"questions": 2, "native": pytest.approx(100)}
    assert rows["c"]["native"] == pytest.approx(0)


def test_losses_are_told_by_what_a_question_should_cost() -> None:
    space = KnobSpace.for_model(POCKET.shape)
    kinds, datasets = ["menu_sum", "price", "menu_sum", "largest_color"], torch.tensor([0, 0, 1, 1])
    corners = {"native": space.native, "cheapest": space.cheapest}
    answers = Answers(
        [
            Outcome(space.native, datasets, kinds, torch.tensor([True, True, True, False])),
            Outcome(space.cheapest, datasets, kinds, torch.tensor([True, False, False, False])),
        ]
    )
    rows = by_cost(answers, corners)
    assert {cost: (row["questions"], row["lost"]) for cost, row in rows.items()} == {
        "depth": (2, {"cheapest": pytest.approx(50)}),
        "tier": (1, {"cheapest": pytest.approx(100)}),
        "unknown": (1, {"cheapest": pytest.approx(0)}),
    }


def test_a_report_has_every_figure_that_a_choice_needs(trainer: Trainer) -> None:
    report = make_report(trainer, done=True)
    assert set(report["knobs"]) == set(KNOBS)
    for name, settings in axes_settings(trainer.space).items():
        steps = report["knobs"][name]
        assert [step["value"] for step in steps] == [one.as_dict()[name] for one in settings]
        own = [step["lost"] for step in steps if step["value"] == trainer.space.native.as_dict()[name]]
        assert own == pytest.approx([0.0])
    shares = [row["operations"] for row in report["headroom"]]
    assert len(shares) == 5
    assert sorted(shares) == shares
    assert 0 < shares[0] < shares[-1] <= 1
    asked = [row["questions"] for row in report["by_template"].values()]
    assert sum(asked) == report["questions"] == sum(row["questions"] for row in report["by_dataset"].values())
    assert report["size_mb"] == pytest.approx(report["parameters"] * 2e-6, abs=0.01)
    assert set(report["by_cost"]) <= set(SHARES)
    assert sum(row["questions"] for row in report["by_cost"].values()) == report["questions"]
    assert "native accuracy, overall" in report["missed"][0]
    assert all(line in summary(report) for line in report["missed"])
    json.dumps(report)


def test_what_a_report_misses_is_told() -> None:
    steps = [
        {"value": 4, "accuracy": 91.0, "lost": 2.0, "error": 0.3},
        {"value": 8, "accuracy": 93.0, "lost": 0.0, "error": 0.0},
    ]
    deep = [{**steps[0], "lost": 20.0}, steps[1]]
    report = {
        "accuracy": 93.0,
        "by_dataset": {"okvqa": {"native": 85.0}},
        "knobs": dict.fromkeys(KNOBS, deep) | {KNOBS[1]: steps},
    }
    assert missed(report) == []
    assert missed(report | {"knobs": report["knobs"] | {KNOBS[0]: steps}})[0].startswith(
        "lost at the lowest tier: 2.0"
    )
    falling = [steps[0], {**steps[1], "accuracy": 90.0}]
    assert "is below" in missed(report | {"knobs": report["knobs"] | {KNOBS[1]: falling}})[0]


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recipes, "POCKET", TINY)


@pytest.mark.usefixtures("tiny")
def test_pilots_leave_a_report_each(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    few = ["--batch", "2", "--validation_batches", "1", "--workers", "0", "--device", "cpu", "--minutes", "0.0001"]
    main(["--output_dir", str(tmp_path), "--recipe", "32x16", "16x48-taught", *few])
    for name in ("32x16", "16x48-taught"):
        report = json.loads((tmp_path / name / "report.json").read_text())
        assert (report["recipe"], report["done"]) == (name, True)
        assert report["options"]["total_minutes"] == pytest.approx(0.0001)
        assert not (tmp_path / name / "pocket").exists(), "a pilot is not exported"
        assert f'"recipe": "{name}"' in capsys.readouterr().err or name == "16x48-taught"
    with pytest.raises(UserError, match="--resume goes on with it"):
        main(["--output_dir", str(tmp_path / "32x16"), "--recipe", "32x16", *few])


@pytest.mark.usefixtures("tiny")
def test_a_run_in_pieces_goes_on_where_it_stopped(tmp_path: Path) -> None:
    piece = ["--output_dir", str(tmp_path), "--recipe", "32x24", "--resume", "--batch", "2", "--device", "cpu"]
    piece += [
        "--validation_batches",
        "1",
        "--workers",
        "0",
        "--log_every",
        "2",
        "--minutes",
        "0",
        "--vision_steps",
        "0",
    ]
    steps = []
    for _ in range(2):
        main(piece)
        report = json.loads((tmp_path / "report.json").read_text())
        steps.append(report["steps"])
        assert not report["done"]
    assert steps == [2, 4]
    assert report["options"]["total_minutes"] == pytest.approx(24)
