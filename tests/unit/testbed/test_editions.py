"""Both editions of the test bed: the first stays as the shipped pocket learned it, the second asks for more."""

from __future__ import annotations

import hashlib
from collections import Counter
from itertools import pairwise
from random import Random

import numpy as np
import pytest

from tempovlm.core.errors import UserError
from tempovlm.data.registry import GENERATED
from tempovlm.testbed.content import things
from tempovlm.testbed.content.companies import COMPANIES, rare_companies
from tempovlm.testbed.content.things import Thing, ask_steps, ask_yes_no
from tempovlm.testbed.content.written import Written, ask_about_written
from tempovlm.testbed.generate import make_scene
from tempovlm.testbed.lexicon import COLORS, PLAIN_SHAPES, SHAPES, plural
from tempovlm.testbed.scene import Quiz, Scene, SceneQuestion
from tempovlm.testbed.words import split_words

KINDS = {
    "text_vqa": {
        "tier": {"sign_color", "menu_price", "ticket_number"},
        "depth": {"menu_sum", "sign_beside", "cheaper", "hour_later"},
        "experts": {"fact_company_city", "fact_company_product"},
        "none": {"color_of_carrier", "count_signs"},
    },
    "coco_2014_vqa": {
        "tier": {"smallest", "what_is_at", "number_on"},
        "depth": {"nearest_to_extreme", "count_side", "count_more", "extreme_is", "both_exist"},
        "experts": {"fact_owner", "fact_home"},
        "none": {"shape_exists", "is_color", "largest"},
    },
    "okvqa": {
        "tier": {"note_says"},
        "depth": {"beside_company", "older_company", "beside_object"},
        "experts": {"fact_company_city", "fact_company_decade"},
        "none": {"color_at", "count_animals"},
    },
    "science_qa_img": {
        "tier": {"bar_value", "thermo_read"},
        "depth": {"bar_sum", "bar_difference", "bar_count", "map_two_steps", "chain_two_up"},
        "experts": {"fact_bar_product", "fact_bar_founder"},
        "none": {"bar_color_of", "map_color", "circuit_color"},
    },
}
"""Templates of each data set by what their answers should cost most of."""


@pytest.fixture(scope="module")
def second() -> dict[str, list[Scene]]:
    return {
        name: [make_scene(name, "train", index, edition=2, size=(300, 450)) for index in range(600)]
        for name in GENERATED
    }


def _questions(scenes: list[Scene]) -> list[SceneQuestion]:
    return [item for scene in scenes for item in scene.questions]


def test_the_first_edition_stays_as_the_shipped_pocket_learned_it() -> None:
    digest = hashlib.sha256()
    for name in GENERATED:
        for split in ("train", "val"):
            for index in range(25):
                scene = make_scene(name, split, index, edition=1)
                digest.update(
                    repr([(item.question, item.answer, item.options) for item in scene.questions]).encode()
                )
                digest.update(scene.shape_ids.tobytes() + scene.color_ids.tobytes())
    assert digest.hexdigest()[:16] == "8e9de9dc1db98316"


@pytest.mark.parametrize("name", GENERATED)
def test_every_data_set_asks_for_each_cost(name: str, second: dict[str, list[Scene]]) -> None:
    asked = Counter(item.template for item in _questions(second[name]))
    for cost, templates in KINDS[name].items():
        assert all(asked[template] > 0 for template in templates), cost
        assert sum(asked[template] for template in templates) > 0.015 * asked.total(), cost


def test_more_questions_leave_the_picture_as_it_is() -> None:
    few, many = (make_scene("okvqa", "train", 3, edition=2, most=most) for most in (2, 12))
    assert few.image.tobytes() == many.image.tobytes()
    assert len(few.questions) == 2 < len(many.questions)
    with pytest.raises(UserError, match="unknown edition 3"):
        make_scene("okvqa", "train", 3, edition=3)


def test_yes_or_no_is_asked_as_often_as_in_vqa(second: dict[str, list[Scene]]) -> None:
    closed = [item.answer in ("yes", "no") for item in _questions(second["coco_2014_vqa"])]
    assert np.mean(closed) == pytest.approx(0.38, abs=0.02)


def _claims(first: int, count: int) -> list[SceneQuestion]:
    scenes = (
        make_scene("coco_2014_vqa", "train", first + i, edition=2, size=(300, 450), most=12) for i in range(count)
    )
    return [item for scene in scenes for item in scene.questions if item.answer in ("yes", "no")]


@pytest.fixture(scope="module")
def claims() -> list[SceneQuestion]:
    return _claims(0, 1500)


def test_a_yes_or_no_question_alone_says_nothing(claims: list[SceneQuestion]) -> None:
    counts: dict[str, Counter[str]] = {"yes": Counter(), "no": Counter()}
    for item in claims:
        counts[item.answer].update({item.template, *_pairs(item.question)})
    words = {*counts["yes"], *counts["no"]}
    weight = {word: np.log((counts["yes"][word] + 2) / (counts["no"][word] + 2)) for word in words}
    tested = _claims(10_000, 1000)
    said = [sum(weight.get(word, 0.0) for word in _pairs(item.question)) > 0 for item in tested]
    right = np.mean([guess == (item.answer == "yes") for guess, item in zip(said, tested, strict=True)])
    assert len(tested) > 3000
    assert right < 0.55


def _pairs(question: str) -> set[str]:
    words = question.split()
    return {*words, *(f"{one} {two}" for one, two in pairwise(words))}


def test_each_template_of_yes_or_no_has_both_answers_alike(claims: list[SceneQuestion]) -> None:
    answers: dict[str, list[bool]] = {}
    for item in claims:
        answers.setdefault(item.template, []).append(item.answer == "yes")
    assert len(answers) >= 10
    for template, yes in answers.items():
        assert abs(np.mean(yes) - 0.5) < 4 * 0.5 / len(yes) ** 0.5, template
    assert any(" no " in item.question or " not " in item.question for item in claims)


def _seen(scene: Scene) -> list[Thing]:
    boxes = zip(scene.shape_boxes, scene.shape_ids, scene.color_ids, strict=True)
    return [
        Thing(
            SHAPES[s],
            COLORS[c],
            (float(box[0] + box[2]) / 2, float(box[1] + box[3]) / 2),
            float(box[2] - box[0]) / 2,
        )
        for box, s, c in boxes
    ]


def _truth(item: SceneQuestion, seen: list[Thing]) -> str | None:
    """The answer worked out from the dense labels, in another way than the generator's; None where not covered."""
    words = split_words(item.question)
    singular = {plural(shape): shape for shape in PLAIN_SHAPES}
    count = {shape: sum(thing.shape == shape for thing in seen) for shape in PLAIN_SHAPES}
    named = [singular.get(word, word) for word in words if singular.get(word, word) in PLAIN_SHAPES]
    colors = [word for word in words if word in COLORS]
    if item.template == "count_more":
        return str(count[named[0]] - count[named[1]])
    if item.template == "count_sum":
        return str(count[named[0]] + count[named[1]])
    if item.template == "count_both":
        return str(sum((thing.color, thing.shape) == (colors[0], named[0]) for thing in seen))
    if item.template == "count_not":
        return str(sum(thing.color != colors[0] for thing in seen))
    if item.template in ("exists", "both_exist"):
        there = all(any(t.name == f"{c} {s}" for t in seen) for c, s in zip(colors, named, strict=True))
        return "yes" if there != (" no " in item.question) else "no"
    if item.template == "color_of_extreme" and "leftmost" in words:
        return min((t for t in seen if t.shape == named[0]), key=lambda t: t.place[0]).color
    if item.template == "nearest":
        (start,) = [t for t in seen if t.shape == named[0]]
        others = [t for t in seen if t is not start]
        return min(others, key=lambda t: np.hypot(t.place[0] - start.place[0], t.place[1] - start.place[1])).shape
    return None


def test_answers_about_objects_are_those_of_the_labels(second: dict[str, list[Scene]]) -> None:
    checked: Counter[str] = Counter()
    for scene in second["coco_2014_vqa"]:
        for item in scene.questions:
            truth = _truth(item, _seen(scene))
            if truth is not None:
                assert item.answer == truth, item.question
                checked[item.template] += 1
    assert len(checked) == 8
    assert min(checked.values()) >= 10


def test_what_is_not_clear_is_not_asked() -> None:
    row = [Thing("star", "red", (100.0, 100.0), 20.0), Thing("car", "blue", (110.0, 100.0), 20.0)]
    third = Thing("car", "green", (104.0, 180.0), 20.5)
    assert things.extreme(row, "leftmost") is None
    assert things.nearest(row[0], [*row, third]) is row[1]
    assert things.nearest(third, [*row, third]) is None
    assert things.beside(row[0], row, "left of") is None


def test_one_object_of_each_asks_without_failing() -> None:
    for seed in range(50):
        rng = Random(seed)
        quiz = Quiz(rng, 2)
        seen = [Thing(rng.choice(PLAIN_SHAPES), "red", (rng.uniform(0, 300), rng.uniform(0, 300)), 20.0)] * 3
        ask_steps(quiz, seen)
        ask_yes_no(quiz, seen, (300, 300), "train", steps=seed % 2 == 0)
        assert all(item.answer for item in quiz.items)


def test_rare_companies_have_names_and_facts_of_their_own_kind() -> None:
    rare = rare_companies()
    assert len(rare) == 400
    assert not set(rare) & set(COMPANIES)
    for fact in ("product", "city", "founder", "decade"):
        known = {facts[fact] for facts in COMPANIES.values()}
        assert {facts[fact] for facts in rare.values()} == known
    letters = sorted(rare)
    near = [
        (a, b)
        for i, a in enumerate(letters)
        for b in letters[i + 1 :]
        if sum(x != y for x, y in zip(a, b, strict=True)) < 2
    ]
    assert not near


@pytest.mark.parametrize("name", GENERATED)
def test_open_questions_have_no_letter_and_no_empty_answer(name: str, second: dict[str, list[Scene]]) -> None:
    for item in _questions(second[name]):
        if not item.options:
            assert item.answer.strip()
            assert not (len(item.answer) == 1 and item.answer.isalpha())


def _sign(color: str, x: float, text: str, high: float = 60.0) -> Written:
    return Written("sign", color, (x, 100.0, x + 80, 100.0 + high), text, False)


def test_a_sign_beside_something_is_the_only_one_there() -> None:
    menu = Written("tag", "white", (150.0, 90.0, 230.0, 170.0), "", False)

    def asked(*signs: Written) -> set[tuple[str, str]]:
        said = set()
        for seed in range(20):
            quiz = Quiz(Random(seed), 2)
            ask_about_written(quiz, [menu, *signs], (300, 400))
            said |= {(item.question, item.answer) for item in quiz.items if "beside" in item.template}
        return said

    both = {
        ("what does the sign left of the menu say?", "open"),
        ("what color is the sign left of the menu?", "red"),
    }
    assert asked(_sign("red", 10.0, "open")) == both
    assert asked(_sign("red", 10.0, "open"), _sign("blue", 30.0, "")) == set(), "two signs on the left"
    assert asked(_sign("red", 10.0, "open", high=20.0)) == set(), "small print costs crops, not steps"
