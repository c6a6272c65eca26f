"""Answers, options and ids of other types than published: read where their meaning is plain, else named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tempovlm.core.errors import UserError
from tempovlm.data.catalog import load_samples
from tempovlm.data.sample import Sample
from tempovlm.data.scoring import score

PART = "val2014"


def dump(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content), encoding="utf-8")


def text_vqa(root: Path, **fields: Any) -> None:
    entry = {"question_id": 34602, "question": "how many?", "image_id": "i", "answers": ["4"] * 10}
    dump(root / "text_vqa" / "TextVQA_0.5.1_val.json", {"data": [entry | fields]})
    (root / "text_vqa" / "train_images").mkdir(exist_ok=True)


def vqa(root: Path, dataset: str, answers: Any) -> None:
    prefix = "v2_" if dataset == "coco_2014_vqa" else ""
    asked = {"question_id": 5, "image_id": 42, "question": "what?"}
    notes = {"annotations": [{"question_id": 5, "answers": answers}]}
    dump(root / dataset / f"{prefix}OpenEnded_mscoco_{PART}_questions.json", {"questions": [asked]})
    dump(root / dataset / f"{prefix}mscoco_{PART}_annotations.json", notes)
    (root / dataset / PART).mkdir(exist_ok=True)


def doc_qa(root: Path, answers: Any) -> None:
    entry = {"questionId": 49153, "question": "what?", "image": "documents/p_1.png", "answers": answers}
    dump(root / "doc_qa" / "val_v1.0.json", {"data": [entry]})
    (root / "doc_qa" / "documents").mkdir(exist_ok=True)


def st_qa(root: Path, answers: Any) -> None:
    entry = {"question_id": 7, "question": "what?", "file_path": "coco-text/1.jpg", "answers": answers}
    dump(root / "st_qa" / "train_task_3.json", {"data": [entry]})


def tally_qa(root: Path, answer: Any) -> None:
    entry = {"question_id": 9, "image_id": 3, "image": "VG_100K/3.jpg", "question": "how many?", "answer": answer}
    dump(root / "tally_qa" / "test.json", [entry])


def captions(root: Path, caption: Any) -> None:
    content = {"images": [{"id": 42, "file_name": "x.jpg"}], "annotations": [{"image_id": 42, "caption": caption}]}
    dump(root / "coco_caption" / "captions_val2014.json", content)
    (root / "coco_caption" / PART).mkdir(exist_ok=True)


def science(root: Path, **fields: Any) -> None:
    problem = {"question": "which?", "choices": ["this", "that"], "answer": 1, "image": "image.png", "hint": ""}
    dump(root / "science_qa_img" / "problems.json", {"7": problem | fields})
    dump(root / "science_qa_img" / "pid_splits.json", {"val": ["7"]})
    (root / "science_qa_img" / "images" / "val").mkdir(parents=True, exist_ok=True)


def only(root: Path, dataset: str) -> Sample:
    (sample,) = load_samples(dataset, data_dir=root)
    return sample


@pytest.mark.parametrize(
    ("answers", "expected", "reply"),
    [
        ([4] * 10, ("4",) * 10, "four"),
        ([4.0, 4, "4"], ("4", "4", "4"), None),
        ([0.28, "x"], ("0.28", "x"), None),
        ("red", ("red",), "Red"),
        (4, ("4",), "4"),
    ],
)
def test_text_vqa(answers: Any, expected: tuple[str, ...], reply: str | None, tmp_path: Path) -> None:
    text_vqa(tmp_path, answers=answers)
    sample = only(tmp_path, "text_vqa")
    assert sample.answers == expected
    if reply is not None:
        assert score(sample, reply) == pytest.approx(1.0)
        assert score(sample, "r") == pytest.approx(0.0)


@pytest.mark.parametrize(
    ("answers", "field"),
    [
        (None, r"answers is null"),
        ([], r"answers is empty"),
        (["red", None], r"answers\[1\] is null"),
        ([True], r"answers\[0\] is true"),
        ([["red"]], r"answers\[0\] is \['red'\]"),
        ([float("nan")], r"answers\[0\] is nan"),
    ],
)
def test_what_is_no_answer_is_named(answers: Any, field: str, tmp_path: Path) -> None:
    text_vqa(tmp_path, answers=answers)
    with pytest.raises(UserError, match=rf"TextVQA_0\.5\.1_val\.json: question 34602: {field}[^\n]*$"):
        load_samples("text_vqa", data_dir=tmp_path)


@pytest.mark.parametrize("dataset", ["coco_2014_vqa", "okvqa"])
def test_answers_of_vqa(dataset: str, tmp_path: Path) -> None:
    for answers, expected in (
        ([{"answer": 2}, {"answer": 3.0}], ("2", "3")),
        ([{"answer": "race", "raw_answer": "racing"}, {"answer": "run", "raw_answer": None}], ("racing", "run")),
        (["red", 4], ("red", "4")),
        ("red", ("red",)),
    ):
        vqa(tmp_path, dataset, answers)
        assert only(tmp_path, dataset).answers == expected
    assert score(only(tmp_path, dataset), "red") == pytest.approx(1.0)
    for wrong, field in (([{"answer": None}], r"answers\[0\]\.answer is null"), ([{}], r"answers\[0\]\.answer")):
        vqa(tmp_path, dataset, wrong)
        with pytest.raises(UserError, match=rf"annotations\.json: question 5: {field}"):
            load_samples(dataset, data_dir=tmp_path)


def test_a_question_without_annotation_is_named(tmp_path: Path) -> None:
    vqa(tmp_path, "okvqa", ["red"])
    dump(tmp_path / "okvqa" / f"mscoco_{PART}_annotations.json", {"annotations": []})
    with pytest.raises(UserError, match=r"questions\.json: question 5: question_id has no annotation"):
        load_samples("okvqa", data_dir=tmp_path)


def test_answers_of_documents_scenes_and_captions(tmp_path: Path) -> None:
    doc_qa(tmp_path, [0.28, 12])
    assert only(tmp_path, "doc_qa").answers == ("0.28", "12")
    doc_qa(tmp_path, "coca cola")
    assert score(only(tmp_path, "doc_qa"), "coca-cola") == pytest.approx(8 / 9)
    st_qa(tmp_path, 7.0)
    assert only(tmp_path, "st_qa").answers == ("7",)
    for make, dataset, wrong in (
        (doc_qa, "doc_qa", [True]),
        (st_qa, "st_qa", []),
        (captions, "coco_caption", None),
        (captions, "coco_caption", ["a dog"]),
    ):
        make(tmp_path, wrong)
        with pytest.raises(UserError, match=r"json: (question|picture) \d+: (answers|caption)"):
            load_samples(dataset, data_dir=tmp_path)


@pytest.mark.parametrize("answer", [4, 4.0, "4", "4.0", " 04 ", [4]])
def test_counts(answer: Any, tmp_path: Path) -> None:
    tally_qa(tmp_path, answer)
    sample = only(tmp_path, "tally_qa")
    assert sample.answers == ("4",)
    assert (score(sample, "four"), score(sample, "5")) == pytest.approx((1.0, 0.0))


@pytest.mark.parametrize("answer", [4.5, -1, None, True, "many", "", [], [[4]]])
def test_what_is_no_count_is_named(answer: Any, tmp_path: Path) -> None:
    tally_qa(tmp_path, answer)
    with pytest.raises(UserError, match=r"test\.json: question 9: answer"):
        load_samples("tally_qa", data_dir=tmp_path)


def test_options_and_the_right_one(tmp_path: Path) -> None:
    for answer in (1, 1.0, "1"):
        science(tmp_path, choices=[2, 2.5], answer=answer)
        sample = only(tmp_path, "science_qa_img")
        assert (sample.options, sample.answer_index) == (("2", "2.5"), 1)
        assert (score(sample, "B"), score(sample, "2")) == pytest.approx((1.0, 0.0))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        # A right index of -1 is also that of a reply which names no option.
        ({"answer": -1}, "answer is -1"),
        ({"answer": 2}, "answer is 2, and the last of 2 options is 1"),
        ({"answer": True}, "answer is true"),
        ({"answer": None}, "answer is null"),
        ({"answer": "B"}, "answer is 'B'"),
        ({"answer": 0.5}, "answer is 0.5"),
        ({"choices": "red"}, "choices is 'red', no list"),
        ({"choices": []}, "choices holds 0 options"),
        ({"choices": ["x"] * 27}, "choices holds 27 options"),
        ({"choices": ["x", None]}, r"choices\[1\] is null"),
        ({"choices": ["x", ["y"]]}, r"choices\[1\] is \['y'\]"),
        ({"question": None}, "question is null"),
        ({"hint": ["look"]}, r"hint is \['look'\]"),
    ],
)
def test_wrong_problems_are_named(fields: dict[str, Any], message: str, tmp_path: Path) -> None:
    science(tmp_path, **fields)
    with pytest.raises(UserError, match=rf"problems\.json: question 7: {message}"):
        load_samples("science_qa_img", data_dir=tmp_path)


def test_fields_and_entries_that_are_missing(tmp_path: Path) -> None:
    text_vqa(tmp_path)
    path = tmp_path / "text_vqa" / "TextVQA_0.5.1_val.json"
    for content, message in (
        ({}, "the file: data is missing"),
        ([], "holds no JSON object"),
        ({"data": {}}, "holds {} where a list of questions belongs"),
        ({"data": [1]}, "entry 0 is 1, no object"),
        ({"data": [{}]}, "entry 0: question_id is missing"),
        ({"data": [{"question_id": 1, "image_id": "i", "answers": ["x"]}]}, "question 1: question is missing"),
    ):
        dump(path, content)
        with pytest.raises(UserError, match=rf"TextVQA_0\.5\.1_val\.json: {message}"):
            load_samples("text_vqa", data_dir=tmp_path)
