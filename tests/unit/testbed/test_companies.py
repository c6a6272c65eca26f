"""Companies of the knowledge scenes: names told apart, one store of facts, signs that a person could ask about."""

from __future__ import annotations

from collections import Counter
from itertools import combinations

import numpy as np
import pytest
from unpainted import unpainted

from tempovlm.testbed.content.companies import (
    COMPANIES,
    COMPANY_FACTS,
    facts_of,
    rare_companies,
    said_otherwise,
)
from tempovlm.testbed.generate import make_scene
from tempovlm.testbed.lexicon import CHARSET, COLORS, HELD_OUT_WORDS, SHAPES, SIGN_WORDS
from tempovlm.testbed.scene import Scene
from tempovlm.testbed.words import split_words, vocabulary

_KINDS = ("sign", "shop")
_ABOUT_COMPANY = tuple(f"fact_company_{fact}" for fact in COMPANY_FACTS)
_PICTURES = 400
_NAMES = {*COMPANIES, *rare_companies()}


@pytest.fixture(scope="module")
def scenes() -> dict[str, list[Scene]]:
    numbers = range(_PICTURES)
    with unpainted():
        return {split: [make_scene("okvqa", split, i) for i in numbers] for split in ("train", "val")}


def _signs(scene: Scene) -> list[tuple[str, str, str, np.ndarray]]:
    """What the dense labels say of each company sign: its kind, colour, name and box."""
    found = []
    centers = (scene.char_boxes[:, :2] + scene.char_boxes[:, 2:]) / 2
    for box, shape, color in zip(scene.shape_boxes, scene.shape_ids, scene.color_ids, strict=True):
        if SHAPES[shape] in _KINDS:
            inside = np.all((centers > box[:2]) & (centers < box[2:]), axis=1)
            name = "".join(CHARSET[i] for i in scene.char_ids[inside])
            if name in _NAMES:  # else a note
                found.append((SHAPES[shape], COLORS[color], name, box))
    return found


def _edits(first: str, second: str) -> int:
    """Levenshtein distance."""
    row = list(range(len(second) + 1))
    for i, a in enumerate(first, start=1):
        last, row[0] = row[0], i
        for j, b in enumerate(second, start=1):
            last, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, last + (a != b))
    return row[-1]


def test_names_are_told_apart_and_mean_nothing() -> None:
    assert len(COMPANIES) == 200
    assert all(4 <= len(name) <= 6 and name.isalpha() and name.islower() for name in COMPANIES)
    assert min(_edits(a, b) for a, b in combinations(COMPANIES, 2)) >= 2
    assert not set(COMPANIES) & {*vocabulary(), *SIGN_WORDS, *HELD_OUT_WORDS}


def test_answers_are_single_words_of_the_vocabulary_and_cannot_be_guessed() -> None:
    known = set(vocabulary())
    for fact, kinds in zip(COMPANY_FACTS, (24, 20, 24, 7), strict=True):
        counts = Counter(facts[fact] for facts in COMPANIES.values())
        assert set(counts) <= known
        assert len(counts) == kinds
        assert max(counts.values()) <= len(COMPANIES) / kinds + 2
    assert len({tuple(facts.values()) for facts in COMPANIES.values()}) == len(COMPANIES)


@pytest.mark.parametrize("split", ["train", "val"])
def test_both_splits_tell_the_facts_of_the_table(scenes: dict[str, list[Scene]], split: str) -> None:
    asked: Counter[str] = Counter()
    for scene in scenes[split]:
        by_look = {f"company {'in' if kind == 'shop' else 'on'} the {color} {kind}": name
                   for kind, color, name, _ in _signs(scene)}  # fmt: skip
        for item in scene.questions:
            if item.template not in _ABOUT_COMPANY:
                continue
            fact = item.template.removeprefix("fact_company_")
            names = [name for look, name in by_look.items() if look in item.question] or list(by_look.values())
            assert item.answer in {facts_of(name)[fact] for name in names}
            said = {item.answer, *said_otherwise(fact, item.answer), "unanswerable"}
            assert {answer.lower() for answer in item.answers} <= said
            asked[fact] += len(names) == 1
    assert min(asked[fact] for fact in COMPANY_FACTS) > 5


def test_questions_never_name_a_company(scenes: dict[str, list[Scene]]) -> None:
    for found in scenes.values():
        for scene in found:
            for item in scene.questions:
                texts = (item.question, item.answer, *item.answers)
                assert not {word for text in texts for word in split_words(text)} & _NAMES


def test_one_company_a_color_and_each_inside_its_picture(scenes: dict[str, list[Scene]]) -> None:
    for scene in (*scenes["train"], *scenes["val"]):
        signs = _signs(scene)
        names = [name for _, _, name, _ in signs]
        assert set(names) <= _NAMES
        assert len(set(names)) == len(names)
        plain = [COLORS[color] for color in scene.color_ids if COLORS[color] != "mixed"]
        assert len(set(plain)) == len(plain)
        height, width = scene.image.shape[:2]
        for *_, box in signs:
            assert np.all(box[:2] >= 0)
            assert np.all(box[2:] <= (width, height))
