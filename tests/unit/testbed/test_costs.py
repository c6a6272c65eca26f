"""Scenes ask by cost: shares, sizes of print and objects, yes and no, nothing told by words."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise
from random import Random

import numpy as np
import pytest
from unpainted import unpainted

from tempovlm.data.registry import GENERATED
from tempovlm.testbed.costs import SHARES, cost_of, costs
from tempovlm.testbed.generate import make_scene
from tempovlm.testbed.lexicon import COLORS, SHAPES
from tempovlm.testbed.scene import Quiz, Scene, SceneQuestion

_PICTURES = 300
_LOW_TIER = 96
"""Pixels of the longest side of a picture in the low tier."""
_READ, _SEEN = 7.0, 7.5
"""Em size of print, and extent of an object, in pixels of the low tier from which they are taken in."""


@pytest.fixture(scope="module")
def scenes() -> dict[str, list[Scene]]:
    with unpainted():
        return {name: [make_scene(name, "train", index) for index in range(_PICTURES)] for name in GENERATED}


@pytest.fixture(scope="module")
def trained() -> dict[str, list[Scene]]:
    """Scenes with as many questions as a training takes of each."""
    numbers = range(_PICTURES)
    with unpainted():
        return {name: [make_scene(name, "train", index, most=8) for index in numbers] for name in GENERATED}


def _shares(scenes: list[Scene]) -> dict[str, float]:
    asked = Counter(cost_of(item.template) for scene in scenes for item in scene.questions)
    return {cost: asked[cost] / asked.total() for cost in (*SHARES, "unknown")}


@pytest.mark.parametrize("name", GENERATED)
def test_each_data_set_asks_by_the_declared_shares(
    name: str, scenes: dict[str, list[Scene]], trained: dict[str, list[Scene]]
) -> None:
    for drawn in (scenes[name], trained[name]):
        shares = _shares(drawn)
        assert shares["unknown"] == 0
        assert 0.40 <= shares["depth"] <= 0.48
        assert 0.30 <= shares["tier"] <= 0.40
        assert 0.09 <= shares["experts"] <= 0.15
        assert shares["none"] <= 0.12


def test_every_declared_template_is_asked(trained: dict[str, list[Scene]]) -> None:
    asked = Counter(item.template for drawn in trained.values() for scene in drawn for item in scene.questions)
    meant = {template for template, cost in costs().items() if cost != "none"}
    assert meant <= set(asked) <= set(costs()), "some facts for which a look is enough are rare"
    assert sum(SHARES.values()) == pytest.approx(1)


def test_no_kind_of_steps_is_too_rare_to_be_learned(trained: dict[str, list[Scene]]) -> None:
    for name, drawn in trained.items():
        asked = Counter(item.template for scene in drawn for item in scene.questions)
        deep = {template: number for template, number in asked.items() if cost_of(template) == "depth"}
        assert len(deep) >= 14, name
        assert min(deep.values()) > 0.001 * asked.total(), name


def _asks_steps(scene: Scene) -> bool:
    return any(cost_of(item.template) in ("depth", "experts") for item in scene.questions)


def _boxes(scene: Scene, *shapes: str) -> list[np.ndarray]:
    return [box for box, shape in zip(scene.shape_boxes, scene.shape_ids, strict=True) if SHAPES[shape] in shapes]


def _inside(scene: Scene, box: np.ndarray) -> np.ndarray:
    middles = (scene.char_boxes[:, :2] + scene.char_boxes[:, 2:]) / 2
    return np.all((middles > box[:2]) & (middles < box[2:]), axis=1)


def test_objects_of_steps_are_seen_in_the_low_tier(trained: dict[str, list[Scene]]) -> None:
    checked = 0
    for name in ("coco_2014_vqa", "okvqa", "science_qa_img"):
        for scene in filter(_asks_steps, trained[name]):
            unit = _LOW_TIER / max(scene.image.shape)
            kinds = [SHAPES[shape] for shape in scene.shape_ids]
            boxes = [
                box
                for box, kind in zip(scene.shape_boxes, kinds, strict=True)
                if kind not in ("sign", "flag", "bar")  # a bar of 1 is low, and told from 2 by the scale
            ]
            for box in boxes:
                assert unit * max(box[2] - box[0], box[3] - box[1]) >= _SEEN
                checked += 1
    assert checked > 1000


def test_print_of_steps_is_read_in_the_low_tier(trained: dict[str, list[Scene]]) -> None:
    heights = []
    for scene in trained["text_vqa"]:
        unit = _LOW_TIER / max(scene.image.shape)
        board = max(_boxes(scene, "tag", "box"), key=lambda box: (box[2] - box[0]) * (box[3] - box[1]))
        letters = scene.char_boxes[_inside(scene, board)]
        heights.append(unit * (letters[:, 3] - letters[:, 1]).max() / 0.72)
    for scene in trained["coco_2014_vqa"]:
        unit = _LOW_TIER / max(scene.image.shape)
        if any(
            item.template.startswith("number_") and cost_of(item.template) == "depth" for item in scene.questions
        ):
            heights.append(unit * (scene.char_boxes[:, 3] - scene.char_boxes[:, 1]).max() / 0.72)
    assert len(heights) > 350
    assert min(heights) >= _READ


def test_small_print_is_not_read_in_the_low_tier_and_all_of_it_in_the_high_one(
    trained: dict[str, list[Scene]],
) -> None:
    for drawn in trained.values():
        ems = np.concatenate(
            [(s.char_boxes[:, 3] - s.char_boxes[:, 1]) / 0.72 * 448 / max(s.image.shape) for s in drawn]
        )
        capitals = ems[ems > 9]  # small letters are lower
        between = (capitals > 25) & (capitals < 34)
        assert between.mean() < 0.1, "print is large or small, not between"
        assert (capitals < 25).mean() > 0.2
        assert (capitals < 14).mean() > 0.08, "some of it is fine"


def test_yes_or_no_is_asked_as_often_as_in_vqa(scenes: dict[str, list[Scene]]) -> None:
    closed = [item.answer in ("yes", "no") for scene in scenes["coco_2014_vqa"] for item in scene.questions]
    assert np.mean(closed) == pytest.approx(0.38, abs=0.02)


def _claims(first: int, count: int) -> list[SceneQuestion]:
    with unpainted():
        scenes = [make_scene("coco_2014_vqa", "train", first + i, most=12) for i in range(count)]
    return [item for scene in scenes for item in scene.questions if item.answer in ("yes", "no")]


@pytest.fixture(scope="module")
def claims() -> list[SceneQuestion]:
    return _claims(0, 1000)


def _pairs(question: str) -> set[str]:
    words = question.split()
    return {*words, *(f"{one} {two}" for one, two in pairwise(words))}


def test_a_yes_or_no_question_alone_says_nothing(claims: list[SceneQuestion]) -> None:
    counts: dict[str, Counter[str]] = {"yes": Counter(), "no": Counter()}
    for item in claims:
        counts[item.answer].update({item.template, *_pairs(item.question)})
    words = {*counts["yes"], *counts["no"]}
    weight = {word: np.log((counts["yes"][word] + 2) / (counts["no"][word] + 2)) for word in words}
    tested = _claims(10_000, 800)
    said = [sum(weight.get(word, 0.0) for word in _pairs(item.question)) > 0 for item in tested]
    right = np.mean([guess == (item.answer == "yes") for guess, item in zip(said, tested, strict=True)])
    assert len(tested) > 2500
    assert right < 0.55


def test_each_template_of_yes_or_no_has_both_answers_alike(claims: list[SceneQuestion]) -> None:
    answers: dict[str, list[bool]] = {}
    for item in claims:
        answers.setdefault(item.template, []).append(item.answer == "yes")
    assert len(answers) >= 10
    assert {cost_of(template) for template in answers} == set(SHARES)
    for template, yes in answers.items():
        assert abs(np.mean(yes) - 0.5) < 4 * 0.5 / len(yes) ** 0.5, template
    assert any(" no " in item.question or " not " in item.question for item in claims)


@pytest.mark.parametrize("name", GENERATED)
def test_a_question_alone_does_not_tell_its_answer(name: str, trained: dict[str, list[Scene]]) -> None:
    """The commonest answer to the same words is right about as seldom as a guess among a handful."""
    told: dict[str, Counter[str]] = {}
    for scene in trained[name]:
        for item in scene.questions:
            if item.answer not in ("yes", "no"):
                answer = item.options[item.answer_index] if item.options else item.answer
                told.setdefault(f"{item.template} {item.question}", Counter())[answer] += 1
    often = [counter for counter in told.values() if counter.total() >= 6]
    right = sum(counter.most_common(1)[0][1] for counter in often) / sum(counter.total() for counter in often)
    assert len(often) > 3
    assert right < 0.62


@pytest.mark.parametrize("name", GENERATED)
def test_open_questions_have_no_letter_and_no_empty_answer(name: str, scenes: dict[str, list[Scene]]) -> None:
    for item in (item for scene in scenes[name] for item in scene.questions):
        if not item.options:
            assert item.answer.strip()
            assert not (len(item.answer) == 1 and item.answer.isalpha())


def test_counts_of_costs_are_the_shares_rounded() -> None:
    for seed in range(20):
        quiz = make_quiz(seed, 40)
        chosen = Counter(cost_of(item.template) for item in quiz.pick(10))
        assert chosen.total() == 10
        assert all(abs(chosen[cost] - 10 * share) < 1 for cost, share in SHARES.items())


def test_another_cost_takes_the_place_of_one_that_a_scene_lacks() -> None:
    quiz = make_quiz(0, 12)
    quiz.items = [item for item in quiz.items if cost_of(item.template) != "tier"]
    assert len(quiz.pick(6)) == 6
    few = make_quiz(0, 3)
    assert len(few.pick(8)) == 3


def make_quiz(seed: int, count: int) -> Quiz:
    """A quiz with as many questions of each cost, which all have other words."""
    quiz = Quiz(Random(seed))
    kinds = {cost: next(name for name, own in costs().items() if own == cost) for cost in SHARES}
    for number in range(count):
        quiz.ask(kinds[list(SHARES)[number % 4]], f"question {number}?", COLORS[number % 10])
    return quiz
