"""Which option a reply means: texts, letters, letters inside texts, and what means none."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from tempovlm.data.metrics.choices import choice_accuracy, choice_index

WAYS = ("east", "north", "west")
FRUITS = ("apple", "banana", "cherry", "date")
SOLUTIONS = ("neither; their concentrations are the same", "Solution B", "Solution A")


@pytest.mark.parametrize(
    ("prediction", "index"),
    [
        ("b", 1),
        ("B", 1),
        ("(b)", 1),
        ("B.", 1),
        ("**B**", 1),
        ("B: north", 1),
        ("B\nbecause of the needle", 1),
        ("The answer is C.", 2),
        ("The answer is: C", 2),
        ("Answer: (c)", 2),
        ("the correct answer is option (B)", 1),
        (r"Final answer: \boxed{B}", 1),
        ("north", 1),
        ("it is to the west of it", 2),
        ("east and west", -1),
        ("d", -1),
        ("", -1),
    ],
)
def test_letters_and_texts(prediction: str, index: int) -> None:
    assert choice_index(prediction, WAYS) == index


@pytest.mark.parametrize(
    ("prediction", "options", "index"),
    [
        ("Solution A", SOLUTIONS, 2),
        ("solution b.", SOLUTIONS, 1),
        ("The answer is Solution A", SOLUTIONS, 2),
        ("Solution A has more of it", SOLUTIONS, 2),
        ("(B) Solution A", SOLUTIONS, 1),
        ("sample B", ("sample B", "sample A"), 0),
        ("It is the sample (b)", ("sample (B)", "sample (A)"), 0),
        ("Type A", ("Type B", "Type A"), 1),
        ("only A", ("only B", "only A", "both"), 1),
        ("A and B", ("neither", "only A", "A and B"), 2),
        ("A spring", ("magnet", "spring"), 1),
        ("The answer is A magnet", ("spring", "magnet"), 1),
        ("Solution A", ("Solution B", "neither"), -1),
        ("Vitamin C is in oranges", ("apples", "bread", "oranges"), 2),
    ],
)
def test_a_letter_inside_an_options_text_is_no_letter(prediction: str, options: Sequence[str], index: int) -> None:
    assert choice_index(prediction, options) == index


@pytest.mark.parametrize(
    ("prediction", "index"),
    [
        ("I think it is B.", 1),
        ("I think B", 1),
        ("I\u2019d say b.", 1),
        ("It\u2019s C", 2),
        ("E: B is left out, and I choose C.", 2),
        ("X-ray pictures show option D", 3),
        ("Based on the picture, C.", 2),
        ("B because it is long", 1),
        ("I", -1),
        ("I guess a banana", 1),
        ("K. The answer is B", 1),
        ("U.S.", -1),
        ("e.g. this one", -1),
    ],
)
def test_a_letter_that_names_no_option_is_passed_over(prediction: str, index: int) -> None:
    assert choice_index(prediction, FRUITS) == index


@pytest.mark.parametrize(
    ("prediction", "index"),
    [
        ("A or B", -1),
        ("vitamins A, C.", -1),
        ("The answer is B. The answer is C.", -1),
        ("The answer is B. Option A is wrong.", 1),
        ("Both A and B are close. The answer is C.", 2),
        ("A. banana", 0),
    ],
)
def test_several_letters(prediction: str, index: int) -> None:
    assert choice_index(prediction, FRUITS) == index


@pytest.mark.parametrize(
    ("prediction", "options", "index"),
    [
        # A letter that an option has is that option's, whatever the texts are; another one is sought among them.
        ("b", ("b", "a", "the same"), 1),
        ("The answer is B.", ("b", "a", "the same"), 1),
        ("k", ("k", "c", "a"), 0),
        ("region k", ("k", "c", "a"), 0),
        # Longer texts hide the shorter ones that they contain.
        ("it is north east of it", ("north", "north east"), 1),
        ("north and north east", ("north", "north east"), -1),
        ("No.", ("No, it is not.", "No"), 1),
        # Texts that differ by what the official normalisation drops.
        ("-5", ("5", "-5"), 1),
        ("it is -5 degrees", ("5", "-5"), 1),
        ("\u00b0C", ("\u00b0F", "\u00b0C"), 1),
        ("+", ("-", "+"), 1),
        ("the", ("an", "a", "the"), 2),
        ("there are two of them", ("3", "2"), 1),
        ("2 cats and one dog", ("2", "1"), -1),
        # A text that is dropped whole is not said by saying nothing.
        ("", ("a", "b", "the same"), -1),
        ("---", ("g", "a", "k"), -1),
        ("same", ("the same", "the same"), -1),
    ],
)
def test_texts_that_are_letters_or_contain_each_other(prediction: str, options: Sequence[str], index: int) -> None:
    assert choice_index(prediction, options) == index


def test_choice_accuracy() -> None:
    assert choice_accuracy("a", ("yes", "no"), 0) == pytest.approx(1.0)
    assert choice_accuracy("no", ("yes", "no"), 0) == pytest.approx(0.0)
    assert choice_accuracy("maybe", ("yes", "no"), 0) == pytest.approx(0.0)
