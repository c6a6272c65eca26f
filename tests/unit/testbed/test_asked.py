"""What a scene can be asked: only what is clear in it, and facts that are spread over things."""

from __future__ import annotations

from random import Random

from tempovlm.testbed.content import things
from tempovlm.testbed.content.companies import ALL_FACTS, COMPANIES, fact_values, facts_of, rare_companies
from tempovlm.testbed.content.invented import QUESTIONS, invented, values_of
from tempovlm.testbed.content.steps import ask_looks, ask_steps
from tempovlm.testbed.content.things import Thing
from tempovlm.testbed.content.yes_no import ask_yes_no
from tempovlm.testbed.generate import make_scene
from tempovlm.testbed.lexicon import PLAIN_SHAPES
from tempovlm.testbed.scene import Quiz
from tempovlm.testbed.words import vocabulary


def test_more_questions_leave_the_picture_as_it_is() -> None:
    few, many = (make_scene("okvqa", "train", 3, most=most) for most in (2, 12))
    assert few.image.tobytes() == many.image.tobytes()
    assert len(few.questions) == 2 < len(many.questions)


def test_what_is_not_clear_is_not_asked() -> None:
    row = [Thing("star", "red", (100.0, 100.0), 20.0), Thing("car", "blue", (110.0, 100.0), 20.0)]
    assert things.extreme(row, "leftmost") is None
    assert things.ordered_from(row, "left") is None
    assert things.hop(row[0], row, "right of") is None, "only a shelf has places beside one another"
    twins = [row[0], row[0], row[1]]
    assert [ref for _, ref in things.named(twins)] == ["car"]
    more = [*row, Thing("car", "red", (9.0, 9.0), 20.0)]
    assert [ref for _, ref in things.looked_up(more)] == ["star", "blue object"]


def test_one_object_of_each_asks_without_failing() -> None:
    for seed in range(50):
        rng = Random(seed)
        quiz = Quiz(rng)
        seen = [Thing(rng.choice(PLAIN_SHAPES), "red", (rng.uniform(0, 300), rng.uniform(0, 300)), 20.0)] * 3
        ask_steps(quiz, seen)
        ask_looks(quiz, seen)
        ask_yes_no(quiz, seen, "train")
        assert all(item.answer for item in quiz.items)


def test_rare_companies_have_names_and_facts_of_their_own_kind() -> None:
    rare = rare_companies()
    assert len(rare) == 1600
    assert not set(rare) & set(COMPANIES)
    for fact in ALL_FACTS:
        assert {facts_of(name)[fact] for name in rare} == set(fact_values(fact))
    kinds: dict[str, str] = {}
    for name in rare:
        for place in range(len(name)):
            but_one = f"{name[:place]}*{name[place + 1 :]}"
            assert kinds.setdefault(but_one, name) == name, "one misread letter makes another"


def test_invented_facts_are_spread_and_said_in_known_words() -> None:
    names = [f"{color} {shape}" for color in ("red", "blue", "green", "pink") for shape in PLAIN_SHAPES]
    for fact in QUESTIONS:
        told = [invented(name, fact) for name in names]
        assert set(told) <= set(values_of(fact))
        assert max(map(told.count, told)) <= len(names) / 3
        assert all(value.isdigit() or value in vocabulary() for value in values_of(fact))
