"""What the generator promises: the same bytes, clean splits, short answers, labels that fit."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
from unpainted import unpainted

from tempovlm.core.errors import UserError
from tempovlm.data.metrics.choices import choice_accuracy
from tempovlm.data.metrics.text import vqa_accuracy
from tempovlm.data.registry import GENERATED
from tempovlm.testbed.generate import make_scene
from tempovlm.testbed.lexicon import CHARSET, COLORS, HELD_OUT_WORDS, SHAPES
from tempovlm.testbed.scene import SIZES, Scene
from tempovlm.testbed.words import alphabet, split_words, vocabulary

_PICTURES, _PAINTED = 120, 12
_SPELLED = {
    "sign_color",
    "number_on",
    "shop_name",
    "box_label",
    "bottle_label",
    "plate_number",
    "gate_number",
}


@pytest.fixture(scope="module")
def scenes() -> dict[tuple[str, str], list[Scene]]:
    found = {}
    for dataset, split in product(GENERATED, ("train", "val")):
        found[dataset, split] = [make_scene(dataset, split, index) for index in range(_PAINTED)]
        with unpainted():
            found[dataset, split] += [make_scene(dataset, split, index) for index in range(_PAINTED, _PICTURES)]
    return found


@pytest.mark.parametrize("dataset", GENERATED)
def test_same_arguments_same_bytes(dataset: str) -> None:
    first, second = (make_scene(dataset, "val", 7, seed=3) for _ in range(2))
    assert first.image.tobytes() == second.image.tobytes()
    assert first.questions == second.questions
    assert np.array_equal(first.char_boxes, second.char_boxes)
    assert make_scene(dataset, "val", 7, seed=4).image.tobytes() != first.image.tobytes()
    assert make_scene(dataset, "val", 8, seed=3).image.tobytes() != first.image.tobytes()
    assert make_scene(dataset, "train", 7, seed=3).image.tobytes() != first.image.tobytes()


@pytest.mark.parametrize("dataset", GENERATED)
def test_twin_has_other_pixels_and_the_same_questions(dataset: str) -> None:
    for index in range(5):
        scene, twin = make_scene(dataset, "val", index), make_scene(dataset, "val", index, twin=True)
        assert scene.questions == twin.questions
        assert scene.image.shape == twin.image.shape
        assert (scene.image != twin.image).mean() > 0.005
        both = (scene.shape_boxes - twin.shape_boxes, scene.char_boxes - twin.char_boxes)
        moved = np.concatenate(both)[0]
        assert 0 < abs(moved[0]) < 8
        assert 0 < abs(moved[1]) < 8


@pytest.mark.parametrize("dataset", GENERATED)
def test_what_is_asked_and_labelled_needs_no_paint(dataset: str) -> None:
    """So tests that look at no pixel may leave it out."""
    for index in range(8):
        painted = make_scene(dataset, "train", index)
        with unpainted():
            other = make_scene(dataset, "train", index)
        assert painted.image.any()
        assert not other.image.any()
        assert other.image.shape == painted.image.shape
        assert other.questions == painted.questions
        for labels in ("char_boxes", "char_ids", "shape_boxes", "shape_ids", "color_ids"):
            assert np.array_equal(getattr(other, labels), getattr(painted, labels))


def test_sizes(scenes: dict[tuple[str, str], list[Scene]]) -> None:
    drawn = {scene.image.shape[:2] for scene in scenes["text_vqa", "train"]}
    assert drawn == set(SIZES)
    assert make_scene("okvqa", "train", 0, size=(300, 500)).image.shape == (300, 500, 3)


def test_labels_fit_the_picture(scenes: dict[tuple[str, str], list[Scene]]) -> None:
    for found in scenes.values():
        for scene in found:
            height, width = scene.image.shape[:2]
            assert scene.image.dtype == np.uint8
            assert scene.char_boxes.dtype == scene.shape_boxes.dtype == np.float32
            assert scene.char_boxes.shape == (len(scene.char_ids), 4)
            assert scene.shape_boxes.shape == (len(scene.shape_ids), 4)
            assert scene.shape_ids.shape == scene.color_ids.shape
            assert np.all(scene.char_boxes[:, :2] <= scene.char_boxes[:, 2:])
            boxes = np.concatenate((scene.char_boxes, scene.shape_boxes))
            assert boxes.min() >= -12
            assert boxes[:, 2].max() <= width + 12
            assert boxes[:, 3].max() <= height + 12
            assert set(scene.char_ids) <= set(range(len(CHARSET)))
            assert set(scene.shape_ids) <= set(range(len(SHAPES)))
            assert set(scene.color_ids) <= set(range(len(COLORS)))


def test_characters_are_where_the_labels_say() -> None:
    for index in range(20):
        scene = make_scene("text_vqa", "train", index)
        for x0, y0, x1, y1 in scene.char_boxes.astype(int):
            patch = scene.image[max(0, y0) : y1, max(0, x0) : x1].astype(int).sum(axis=2)
            assert patch.size == 0 or patch.max() - patch.min() > 120


def test_lettering_needs_different_tiers(scenes: dict[tuple[str, str], list[Scene]]) -> None:
    heights = np.concatenate([s.char_boxes[:, 3] - s.char_boxes[:, 1] for s in scenes["text_vqa", "val"]])
    ems = heights / 0.72
    assert 0.2 < (ems >= 30).mean() < 0.55
    assert 0.15 < (ems < 19).mean() < 0.5


def test_questions_are_short_and_scored_right(scenes: dict[tuple[str, str], list[Scene]]) -> None:
    for (dataset, _), found in scenes.items():
        for scene in found:
            assert 1 <= len(scene.questions) <= 5
            assert len({question.question for question in scene.questions}) == len(scene.questions)
            for item in scene.questions:
                assert item.question == item.question.lower()
                assert len(item.question.split()) <= 14
                assert len(item.answers) == 10
                if dataset == "science_qa_img":
                    assert 2 <= len(item.options) <= 4
                    assert len(set(item.options)) == len(item.options)
                    assert choice_accuracy(item.answer, item.options, item.answer_index) == pytest.approx(1.0)
                else:
                    assert vqa_accuracy(item.answer, item.answers) == pytest.approx(1.0)


def test_at_least_twenty_templates(scenes: dict[tuple[str, str], list[Scene]]) -> None:
    templates = {q.template for found in scenes.values() for scene in found for q in scene.questions}
    assert len(templates) >= 20


def test_held_out_only_in_validation(scenes: dict[tuple[str, str], list[Scene]]) -> None:
    held = []
    for (_, split), found in scenes.items():
        for scene in found:
            for item in scene.questions:
                if split == "train":
                    words = " ".join((item.question, item.answer, *item.options)).split()
                    assert not set(words) & set(HELD_OUT_WORDS)
                    assert not item.held_out
                else:
                    held.append(item.held_out)
    assert 0.08 < np.mean(held) < 0.16
    assert not set(HELD_OUT_WORDS) & set(vocabulary())


def test_vocabulary_covers_training(scenes: dict[tuple[str, str], list[Scene]]) -> None:
    known, letters = set(vocabulary()), set(alphabet())
    assert len(known) <= 900
    for (_, split), found in scenes.items():
        for scene in found:
            for item in scene.questions:
                texts = [item.question, *item.options, *([] if item.template in _SPELLED else [item.answer])]
                assert set("".join((*texts, item.answer))) <= letters
                words = {word for text in texts for word in split_words(text) if word.isalpha()}
                assert split == "val" or words <= known


def test_answers_take_about_three_tokens(scenes: dict[tuple[str, str], list[Scene]]) -> None:
    known = set(vocabulary())
    lengths = [
        1 + sum(1 if word in known else len(word) for word in item.answer.split())
        for (_, split), found in scenes.items()
        if split == "val"
        for scene in found
        for item in scene.questions
    ]
    assert 2.5 <= np.mean(lengths) <= 3.5


def test_unknown_names() -> None:
    with pytest.raises(UserError, match="unknown data set 'vqa'"):
        make_scene("vqa", "train", 0)
    with pytest.raises(UserError, match="unknown split 'test'"):
        make_scene("okvqa", "test", 0)
