"""The rules of the official evaluation."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tempovlm.core.errors import UserError
from tempovlm.data.metrics.captions import cider
from tempovlm.data.metrics.text import (
    anls,
    exact_match,
    normalise,
    number_match,
    relaxed_accuracy,
    text_vqa_accuracy,
    vqa_accuracy,
)
from tempovlm.data.sample import Sample, choice_question
from tempovlm.data.scoring import score


@pytest.mark.parametrize(
    ("raw", "expected"),
    [
        ("The Red Car.", "red car"),
        ("two", "2"),
        ("None", "0"),
        ("ten", "10"),
        ("dont", "don't"),
        ("its", "its"),
        ("1,000", "1000"),
        ("a, b", "b"),
        ("red/blue", "red blue"),
        ("yes!", "yes"),
        ("$5.75", "$5.75"),
        ("3.5", "3.5"),
        ("mr. smith", "mr smith"),
        ("7:45", "7:45"),
        (" on\nthe  table ", "on table"),
        ("at the airport", "at airport"),
        ("", ""),
    ],
)
def test_normalise(raw: str, expected: str) -> None:
    assert normalise(raw) == expected


@pytest.mark.parametrize(("matches", "expected"), [(0, 0.0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1.0), (10, 1.0)])
def test_vqa_accuracy_is_the_mean_over_leave_one_out_sets(matches: int, expected: float) -> None:
    answers = ["red"] * matches + [f"other {k}x" for k in range(10 - matches)]
    assert vqa_accuracy("red", answers) == pytest.approx(expected)
    assert text_vqa_accuracy("Red.", answers) == pytest.approx(expected)


def test_unanimous_answers_are_compared_as_they_stand() -> None:
    """The official program normalises only where people disagree."""
    assert vqa_accuracy("Red.", ["red"] * 10) == pytest.approx(0.0)
    assert vqa_accuracy("Red.", ["red"] * 9 + ["pink"]) == pytest.approx(1.0)


def test_vqa_accuracy_without_answers_is_zero() -> None:
    assert vqa_accuracy("red", []) == pytest.approx(0.0)


@pytest.mark.parametrize(
    ("prediction", "answers", "expected"),
    [
        ("The Red.", ("red",), 1.0),
        ("two", ("3", "2"), 1.0),
        ("reddish", ("red",), 0.0),
        ("", ("red",), 0.0),
        ("a.", ("A",), 1.0),
        ("", ("A",), 0.0),
        ("the", ("A",), 0.0),
        ("?", ("A",), 0.0),
        ("(A)", ("A",), 1.0),
        ("", ("?",), 0.0),
    ],
)
def test_exact_match_is_of_normalised_texts(prediction: str, answers: tuple[str, ...], expected: float) -> None:
    assert exact_match(prediction, answers) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("prediction", "answer", "expected"),
    [
        ("105", "100", 1.0),
        ("94.9", "100", 0.0),
        ("12%", "0.12", 1.0),
        ("0.1", "0", 0.0),
        ("0", "0", 1.0),
        ("-98", "-100", 1.0),
        ("Japan", "japan", 1.0),
        ("1,000", "1000", 0.0),
    ],
)
def test_relaxed_accuracy_allows_numbers_five_per_cent(prediction: str, answer: str, expected: float) -> None:
    assert relaxed_accuracy(prediction, [answer]) == pytest.approx(expected)
    assert relaxed_accuracy(prediction, ["other", answer]) == pytest.approx(expected)


def _sample(**changes: object) -> Sample:
    values: dict[str, object] = {
        "question_id": "1", "image_id": "1", "image_path": Path("x.jpg"), "question": "q",
        "answers": ("red",) * 10, "style": "vqa2", "dataset": "coco_2014_vqa", "split": "val",
    }  # fmt: skip
    return Sample(**(values | changes))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("prediction", "answers", "expected"),
    [
        ("coca-cola", ("Coca-Cola",), 1.0),
        ("coca cola", ("coca-cola", "pepsi"), 8 / 9),
        ("abcd", ("wxyz",), 0.0),
        ("ab", ("abcd",), 0.5),
        ("a", ("abcd",), 0.0),
        ("x", (), 0.0),
    ],
)
def test_anls(prediction: str, answers: tuple[str, ...], expected: float) -> None:
    assert anls(prediction, answers) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("prediction", "expected"),
    [("4", 1), ("four", 1), (" Four. ", 1), ("04", 1), ("14", 0), ("4 dogs", 0), ("many", 0), ("", 0)],
)
def test_number_match(prediction: str, expected: int) -> None:
    assert number_match(prediction, ("4",)) == pytest.approx(expected)


def test_score_goes_by_the_data_set() -> None:
    for dataset, answers, said, expected in (
        ("coco_2014_vqa", ("red",) * 10, "Red", 0.0),
        ("okvqa", ("red",) * 10, "red", 1.0),
        ("text_vqa", ("red",) * 10, "Red", 1.0),
        ("doc_qa", ("coca-cola",), "coca cola", 8 / 9),
        ("st_qa", ("coca-cola",), "coca cola", 8 / 9),
        ("tally_qa", ("2",), "two", 1.0),
    ):
        assert score(_sample(dataset=dataset, answers=answers), said) == pytest.approx(expected), dataset
    with pytest.raises(UserError, match=r"CIDEr .*: use tempovlm bench or test_adaptive_inference\.py"):
        score(_sample(dataset="coco_caption"), "a dog")


def test_captions_are_scored_together() -> None:
    pytest.importorskip("pycocoevalcap")
    texts = ("a dog on a bench", "two cats near the sea", "a red bus")
    scores = cider([texts[0], texts[1], "nothing of it"], [(text, text + " today") for text in texts])
    assert scores[0] > 3
    assert scores[2] < 1


def test_captions_without_their_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pycocoevalcap", None)
    monkeypatch.setitem(sys.modules, "pycocoevalcap.cider.cider", None)
    with pytest.raises(UserError, match=r"tempovlm\[captions\]"):
        cider(["a dog", "a cat"], [("red",)] * 2)


def test_score_picks_the_rule_by_the_options() -> None:
    assert score(_sample(), "red") == pytest.approx(1.0)
    assert score(_sample(), "blue") == pytest.approx(0.0)
    multiple = _sample(options=("yes", "no"), answer_index=1, answers=("b",))
    assert score(multiple, "b") == pytest.approx(1.0)
    assert score(multiple, "yes") == pytest.approx(0.0)


def test_choice_question() -> None:
    assert choice_question("will it rain?", ("yes", "no")) == "will it rain?\nA: yes\nB: no\n"
