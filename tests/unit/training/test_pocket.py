"""The recipe of the pocket model: its schedule, its settings, its batches and its labels, on a tiny model."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch

from tempovlm.core.errors import UserError
from tempovlm.core.files import writing_to
from tempovlm.core.knobs import KnobConfig, KnobSpace
from tempovlm.core.plan import Plan, Ranking
from tempovlm.model.config import POCKET, VisionConfig
from tempovlm.model.prompt import IMAGE_PATCH, Tokenizer, feature_slots, image_tokens
from tempovlm.model.vision.tiling import choose_grid, cut_crops
from tempovlm.testbed.costs import SHARES
from tempovlm.testbed.lexicon import CHARSET
from tempovlm.testbed.scene import SceneQuestion
from tempovlm.testbed.words import alphabet, vocabulary
from tempovlm.training.dense import dense_labels
from tempovlm.training.elastic import packed_mask, read, sample_plan, sample_setting, see
from tempovlm.training.pictures import IGNORE, PictureBatch, Pictures
from tempovlm.training.pocket import Trainer, learning_rate, main, working_copy
from tempovlm.training.recipes import Recipe
from tempovlm.training.step import Gradients
from tempovlm.training.tokenizer import build_tokenizer
from tiny_model import TRAINED as TINY

RECIPE = Recipe(steps=6, decay_steps=2, vision_steps=2, batch=2, passes=2, warmup=2, elastic_after=3)


@pytest.fixture(scope="module")
def trainer(tmp_path_factory: pytest.TempPathFactory) -> Trainer:
    return Trainer(tmp_path_factory.mktemp("run"), RECIPE, TINY, torch.device("cpu"))


@pytest.fixture(scope="module")
def batch(trainer: Trainer) -> PictureBatch:
    pictures = Pictures(trainer.out / "tokenizer.json", "train", 3, 5, 0, 1)
    return next(iter(pictures))


def test_batches_repeat_and_differ_by_number(trainer: Trainer, batch: PictureBatch) -> None:
    pictures = Pictures(trainer.out / "tokenizer.json", "train", 3, 5, 0, 2)
    again, other = pictures
    assert torch.equal(again.images, batch.images)
    assert torch.equal(again.targets, batch.targets)
    assert again.images.shape != other.images.shape or not torch.equal(again.images, other.images)


@pytest.mark.parametrize("tier", ["low", "medium"])
def test_packed_questions_get_the_logits_that_they_get_alone(
    tier: str, trainer: Trainer, batch: PictureBatch
) -> None:
    model, tokenizer = trainer.model.eval(), trainer.tokenizer
    knobs = KnobConfig(tier=tier, top_k=3, num_blocks=3)
    plan = Plan.build(knobs, trainer.ranking, TINY.shape)
    row, number = 1, 2
    own = batch.segments[row] == number
    tokens, targets = batch.tokens[row][own], batch.targets[row][own]
    with torch.no_grad():
        packed, _, _ = read(model, batch, see(model, batch, tier), plan, tokenizer)
        crops = cut_crops(batch.images[row].numpy(), tier, TINY.vision, exact=True)
        features = model.projector(model.vision(crops.patches)[crops.index], crops.masks)
        image = torch.tensor([tokenizer.end, *image_tokens(crops.grid, TINY.vision, tokenizer)])
        slots = feature_slots(crops.grid, TINY.vision)
        x = model.embed(torch.cat((image, tokens))[None], features, torch.where(slots >= 0, slots + 1, slots))
        hidden = model.decoder(x, torch.arange(x.shape[1])[None], plan)
        alone = model.decoder.logits(hidden[0, -len(tokens) :][targets != IGNORE])
    rows = batch.answers // batch.tokens.shape[1]
    mine = (rows == row) & (batch.segments.flatten()[batch.answers] == number)
    torch.testing.assert_close(packed[mine], alone, rtol=1e-4, atol=1e-5)


def test_a_question_does_not_see_its_neighbours() -> None:
    mask = packed_mask(torch.tensor([[0, 0, 1, 1, 2, -1]]))[0, 0]
    assert mask[4].tolist() == [True, True, False, False, True, False]
    assert mask[3].tolist() == [True, True, True, True, False, False]
    assert mask[5].tolist() == [True, True, False, False, False, True]


def test_half_of_the_training_choices_are_put_as_open_questions(trainer: Trainer) -> None:
    options = ("north", "south", "east")
    item = SceneQuestion(
        question="which way?", answers=("b",) * 10, answer="b", template="t", options=options, answer_index=1
    )
    rng = np.random.default_rng(0)
    tokenizer = trainer.out / "tokenizer.json"
    said = Counter(
        Pictures(tokenizer, split, 2, 0, 0, 1).word(item, "science_qa", rng)
        for split in ("train", "val")
        for _ in range(100)
    )
    (closed, letter), (opened, word) = sorted(said, key=lambda pair: len(pair[0]), reverse=True)
    assert (letter, word) == ("b", "south")
    assert "B: south" in closed
    assert "south" not in opened
    assert 130 < said[(closed, letter)] < 170  # all 100 of validation and half of training


def test_gradients_of_the_bfloat16_copy_are_those_of_the_weights(trainer: Trainer, batch: PictureBatch) -> None:
    pupil, working = trainer.pupil, working_copy(trainer.pupil)
    found = []
    for candidate in (pupil, working):
        seen = see(candidate.model, batch, "low")
        plan = Plan.build(KnobConfig(tier="low", top_k=4, num_blocks=4), trainer.ranking, TINY.shape)
        logits, targets, _ = read(candidate.model, batch, seen, plan, trainer.tokenizer)
        gradients = Gradients(candidate, pupil)
        gradients.show(gradients.take(torch.nn.functional.cross_entropy(logits.float(), targets)))
        found.append([p.grad.clone() if p.grad is not None else None for p in pupil.parameters()])
    for plain, handed in zip(*found, strict=True):
        assert (plain is None) == (handed is None)
        if plain is not None and handed is not None:
            assert handed.dtype == torch.float32
            assert 0 < (plain - handed).norm() <= 0.25 * plain.norm() + 1e-6 or plain.norm() == 0
    assert any(one is None for one in found[0]), "the read-outs took no part"
    gradients.show(())
    assert all(p.grad is None for p in pupil.parameters())


def test_dense_labels_stand_where_the_boxes_are(batch: PictureBatch) -> None:
    vision: VisionConfig = TINY.vision
    height, width = batch.images.shape[1:3]
    grid = choose_grid("high", height, width, vision)
    ids = torch.full_like(batch.char_ids, -1)
    ids[0, 0] = CHARSET.index("k")
    boxes = torch.zeros_like(batch.char_boxes)
    boxes[0, 0] = torch.tensor([0.0, 0.0, width / 2, height / 2])
    labels = dense_labels(replace(batch, char_ids=ids, char_boxes=boxes), grid, vision)
    chars = labels.chars.view(len(batch.images), grid.num_crops, vision.grid, vision.grid, 2)
    held = chars > 0
    assert not held[1:].any()
    assert set(chars[0][held[0]].tolist()) == {CHARSET.index("k") + 1}
    assert 0.15 < held[0, 0].float().mean() < 0.3
    assert held[0, 1].float().mean() > 0.6
    assert not held[0, -1].any()


def test_the_rate_rises_stays_and_falls() -> None:
    recipe = Recipe(steps=1000, decay_steps=100, vision_steps=200, warmup=50, lr=1.0)
    assert learning_rate(24, False, recipe) == pytest.approx(0.5)
    assert learning_rate(500, False, recipe) == pytest.approx(1.0)
    assert learning_rate(199, True, recipe) == pytest.approx(0.0)
    assert learning_rate(224, True, recipe) == pytest.approx(0.5)
    assert learning_rate(950, True, recipe) == pytest.approx(0.5)
    longer = replace(recipe, steps=2000)
    assert learning_rate(850, False, longer) == pytest.approx(learning_rate(850, False, recipe))


def test_settings_cover_the_space_and_favour_the_native_one() -> None:
    space = KnobSpace.for_model(POCKET.shape)
    generator = torch.Generator().manual_seed(0)
    drawn = Counter(sample_setting(space, torch.rand(4, generator=generator)) for _ in range(20000))
    assert set(drawn) == set(space)
    assert drawn.most_common(1)[0][0] == space.native


def test_some_plans_take_blocks_beside_the_ranking() -> None:
    ranking, generator = Ranking.evenly_spaced(16), torch.Generator().manual_seed(0)
    knobs = KnobConfig(tier="low", top_k=8, num_blocks=8)
    plans = [sample_plan(knobs, ranking, POCKET, generator) for _ in range(200)]
    assert all(len(p.steps) == 8 and {0, 15} <= set(p.blocks) for p in plans)
    assert 0.6 < sum(p.blocks == ranking.blocks(8) for p in plans) / 200 < 0.9


def test_known_words_are_one_token_and_control_tokens_cannot_be_typed() -> None:
    tokenizer = Tokenizer(build_tokenizer(vocabulary(), alphabet(), 1024))
    assert len(tokenizer.encode("red")) == 1
    assert tokenizer.decode(tokenizer.encode("zx81 red $4.50")) == "zx81 red $4.50"
    typed = Tokenizer.load(Path("src/tempovlm/pocket/tokenizer.json"))
    assert typed.ids[IMAGE_PATCH] not in typed.encode(f"a {IMAGE_PATCH} b{IMAGE_PATCH}")


def test_a_run_goes_on_where_it_stopped_and_exports(tmp_path: Path) -> None:
    trainer = Trainer(tmp_path, RECIPE, TINY, torch.device("cpu"))
    assert not trainer.train(workers=0, max_minutes=0.0, log_every=2)
    again = Trainer(tmp_path, RECIPE, TINY, torch.device("cpu"))
    assert again.step == trainer.step == 2
    ours, theirs = trainer.model.state_dict(), again.model.state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert again.train(workers=0, max_minutes=1e9, log_every=2)
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [2, 4, 6]
    assert "answer" not in lines[0]
    assert lines[2]["answer"] > 0


def test_the_model_card_tells_what_questions_cost(tmp_path: Path) -> None:
    recipe = replace(RECIPE, batch=4, validation_batches=4)
    trainer = Trainer(tmp_path, recipe, TINY, torch.device("cpu"))
    trainer.export()
    card = (tmp_path / "pocket" / "MODEL_CARD.md").read_text()
    rows = [line.split(" | ") for line in card.split("## What questions cost")[1].splitlines() if " | " in line]
    assert rows[0] == ["| cost", "questions", "native", "tier", "top_k", "num_blocks", "cheapest |"]
    assert {row[0].removeprefix("| ") for row in rows[1:]} <= set(SHARES)
    record = json.loads((tmp_path / "pocket" / "accuracy.json").read_text())
    asked = sum(int(row[1]) for row in rows[1:])
    assert asked == sum(row["questions"] for row in record["by_cost"].values()) > 0


def test_a_run_keeps_its_recipe(tmp_path: Path) -> None:
    Trainer(tmp_path, RECIPE, TINY, torch.device("cpu"))
    Trainer(tmp_path, replace(RECIPE, steps=8), TINY, torch.device("cpu"))
    assert json.loads((tmp_path / "recipe.json").read_text()) == asdict(replace(RECIPE, steps=8))
    with pytest.raises(UserError, match="--lr"):
        Trainer(tmp_path, replace(RECIPE, lr=1.0), TINY, torch.device("cpu"))
    with pytest.raises(UserError, match="--decay_steps 9"):
        main(["--output_dir", str(tmp_path), "--decay_steps", "9", "--device", "cpu"])


def test_two_trainings_in_one_folder_are_not_mixed(tmp_path: Path) -> None:
    with (
        writing_to(tmp_path),
        pytest.raises(UserError, match=f"--output_dir {tmp_path}: another process is writing"),
    ):
        main(["--output_dir", str(tmp_path), "--device", "cpu"])
    assert not list(tmp_path.iterdir())
