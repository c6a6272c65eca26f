"""Answers of questions that take steps, worked out anew from the dense labels and from the words alone."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable
from random import Random

import numpy as np
import pytest
from unpainted import unpainted

from tempovlm.data.registry import GENERATED
from tempovlm.testbed.content.facts import ANIMALS, FACTS
from tempovlm.testbed.content.lives import WEIGHT, legs
from tempovlm.testbed.content.values import Entry, ask_values
from tempovlm.testbed.generate import make_scene
from tempovlm.testbed.lexicon import CHARSET, COLORS, PLAIN_SHAPES, SHAPES, plural
from tempovlm.testbed.scene import Scene, SceneQuestion
from tempovlm.testbed.words import split_words

_SINGULAR = {plural(shape): shape for shape in PLAIN_SHAPES} | {shape: shape for shape in PLAIN_SHAPES}
_STEPS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "above": (0, -1), "down": (0, 1), "below": (0, 1),
          "north": (0, -1), "south": (0, 1), "west": (-1, 0), "east": (1, 0)}  # fmt: skip


class Labelled:
    """An object as its labels tell of it: class, colour, middle, and what is written on it."""

    def __init__(self, shape: str, color: str, box: np.ndarray, text: str) -> None:
        self.shape, self.color, self.box, self.text = shape, color, box, text
        self.middle = np.array(((box[0] + box[2]) / 2, (box[1] + box[3]) / 2))

    def is_named(self, name: str) -> bool:
        """Whether this is what some words of a question may mean."""
        return set(name.split()) <= {self.shape, self.color, "object", "region", "animal", "bar", "disc"}


def labelled(scene: Scene) -> list[Labelled]:
    middles = (scene.char_boxes[:, :2] + scene.char_boxes[:, 2:]) / 2
    found = []
    for box, shape, color in zip(scene.shape_boxes, scene.shape_ids, scene.color_ids, strict=True):
        inside = np.all((middles > box[:2]) & (middles < box[2:]), axis=1)
        text = "".join(CHARSET[i] for i in scene.char_ids[inside])
        found.append(Labelled(SHAPES[shape], COLORS[color], box, text))
    return found


@pytest.fixture(scope="module")
def asked() -> dict[str, list[tuple[SceneQuestion, list[Labelled]]]]:
    found = {}
    for name in GENERATED:
        with unpainted():
            scenes = [make_scene(name, "train", index, most=14) for index in range(350)]
        found[name] = [(item, labelled(scene)) for scene in scenes for item in scene.questions]
    return found


def answer_of(item: SceneQuestion) -> str:
    return item.options[item.answer_index] if item.options else item.answer


def check(
    asked: Iterable[tuple[SceneQuestion, list[Labelled]]],
    truth: Callable[[SceneQuestion, list[Labelled]], str | None],
    templates: str,
    least: int = 6,
) -> None:
    """Compare the answers of some templates with what the labels tell."""
    checked: Counter[str] = Counter()
    for item, seen in asked:
        if item.template in templates.split():
            right = truth(item, seen)
            if right is not None:
                assert answer_of(item) == right, item.question
                checked[item.template] += 1
    assert set(checked) == set(templates.split())
    assert min(checked.values()) >= least, checked


def shape_words(item: SceneQuestion) -> list[str]:
    return [_SINGULAR[word] for word in split_words(item.question) if word in _SINGULAR]


def color_words(item: SceneQuestion) -> list[str]:
    return [word for word in split_words(item.question) if word in COLORS]


def count_truth(item: SceneQuestion, seen: list[Labelled]) -> str:
    shapes, colors, kind = shape_words(item), color_words(item), item.template
    of = {word: sum(word in (one.shape, one.color) for one in seen) for word in (*shapes, *colors)}
    if kind in ("count_shape", "count_color"):
        return str(of[(*shapes, *colors)[0]])
    if kind in ("count_more", "count_sum", "kind_of_most"):
        one, two = shapes or colors
        if kind == "kind_of_most":
            more = max((one, two), key=of.__getitem__)
            return plural(more) if shapes else more
        return str(of[one] + of[two] if kind == "count_sum" else of[one] - of[two])
    tests: dict[str, Callable[[Labelled], bool]] = {
        "count_both": lambda one: one.shape == shapes[0] and one.color == colors[0],
        "count_others": lambda one: one.shape == shapes[0] and one.color != colors[0],
        "count_not": lambda one: one.color != colors[0],
        "count_neither": lambda one: one.color != colors[0] and one.shape != shapes[0],
    }
    return str(sum(map(tests[kind], seen)))


def test_counts_under_conditions(asked: dict[str, list[tuple[SceneQuestion, list[Labelled]]]]) -> None:
    check(asked["coco_2014_vqa"], count_truth, "count_shape count_color count_both count_others count_not "
          "count_neither count_more count_sum kind_of_most")  # fmt: skip


def order_truth(item: SceneQuestion, seen: list[Labelled]) -> str:
    words = split_words(item.question)
    group = [one for one in seen if one.shape in shape_words(item)] or [
        one for one in seen if one.color in color_words(item)
    ]
    keys: dict[str, Callable[[Labelled], float]] = {
        "leftmost": lambda one: one.middle[0], "left": lambda one: one.middle[0],
        "rightmost": lambda one: -one.middle[0], "right": lambda one: -one.middle[0],
        "highest": lambda one: one.middle[1], "top": lambda one: one.middle[1],
        "lowest": lambda one: -one.middle[1], "bottom": lambda one: -one.middle[1],
        "largest": lambda one: one.box[0] - one.box[2], "smallest": lambda one: one.box[2] - one.box[0],
    }  # fmt: skip
    if item.template in ("pair_colors", "triple_colors"):
        colors = [one.color for one in sorted(group, key=keys["left"])]
        return (" and " if len(colors) == 2 else " ").join(colors)
    key = next(keys[word] for word in words if word in keys)
    found = sorted(group, key=key)["second" in words]
    return found.color if "color" in words[:2] else found.shape


def test_orders(asked: dict[str, list[tuple[SceneQuestion, list[Labelled]]]]) -> None:
    templates = "color_of_extreme shape_of_extreme color_of_second shape_of_second pair_colors triple_colors"
    check(asked["coco_2014_vqa"], order_truth, templates)


def named(seen: list[Labelled], name: str) -> Labelled:
    (found,) = [one for one in seen if one.is_named(name)]
    return found


def large(seen: list[Labelled]) -> list[Labelled]:
    """Objects with a single digit; small numbers have two or three."""
    return [one for one in seen if len(one.text) == 1 and one.text.isdigit()]


def number_truth(item: SceneQuestion, seen: list[Labelled]) -> str:
    kind, words = item.template, item.question
    values = sorted((int(one.text) for one in large(seen)), reverse=True)
    if kind == "number_range":
        return str(values[0] - values[-1])
    if kind == "number_ends":
        return str(values[0] + values[-1])
    if kind == "number_top_two":
        return str(values[0] + values[1])
    if kind == "number_over":
        return str(sum(value > int(re.findall(r"\d+", words)[0]) for value in values))
    names = re.findall(rf"(?:(?:{'|'.join(COLORS)}) )?(?:{'|'.join(PLAIN_SHAPES)})\b", words)
    terms = [int(named(seen, name).text) for name in names]
    if kind == "number_twice":
        return str(2 * terms[0] + terms[1])
    if kind == "number_less":
        return str(terms[0] + terms[1] - terms[2])
    if kind == "number_difference":
        return str(terms[0] - terms[1])
    if kind == "number_compare":
        return names[int(terms[1] > terms[0])]
    if kind == "number_higher":
        return "yes" if (terms[0] > terms[1]) == ("higher" in words) else "no"
    if kind == "sum_is":
        return "yes" if sum(terms) == int(re.findall(r"\d+", words)[0]) else "no"
    return str(sum(terms))


def test_numbers_on_objects(asked: dict[str, list[tuple[SceneQuestion, list[Labelled]]]]) -> None:
    ways = "sum three difference twice less range ends top_two over compare higher"
    check(asked["coco_2014_vqa"], number_truth, " ".join(f"number_{way}" for way in ways.split()) + " sum_is")


def walk(seen: list[Labelled], start: Labelled, ways: list[str]) -> Labelled:
    """Go to the nearest middle in each direction, almost straight."""
    here = start
    for way in ways:
        step = np.array(_STEPS[way])
        ahead = [
            (one, float((one.middle - here.middle) @ step), abs(float((one.middle - here.middle) @ step[::-1])))
            for one in seen
            if one is not here
        ]
        here = min((far + off, id(one), one) for one, far, off in ahead if far > 20 and off < 0.5 * far)[2]
    return here


def walk_truth(item: SceneQuestion, seen: list[Labelled]) -> str | None:
    words = split_words(item.question)
    ways = [word for word in words if word in _STEPS]
    name = item.question.split(" go ")[0].removeprefix("from ") if " go " in item.question else ""
    if not name:
        ways.reverse()
        name = re.split(r" of | above | below ", item.question)[-1].removesuffix("?").removesuffix(" one")
    end = walk(seen, named(seen, name.removeprefix("the ")), ways)
    return end.text if item.template == "number_of_beside" else end.shape if "shape" in words else end.color


def test_hops_on_a_shelf(asked: dict[str, list[tuple[SceneQuestion, list[Labelled]]]]) -> None:
    check(asked["coco_2014_vqa"], walk_truth, "hop_shape hop_color two_hops three_hops number_of_beside")


def test_walks_on_a_map(asked: dict[str, list[tuple[SceneQuestion, list[Labelled]]]]) -> None:
    maps = [(item, [one for one in seen if one.shape == "region"]) for item, seen in asked["science_qa_img"]]
    check(maps, walk_truth, "map_direction map_two_steps map_three_steps map_four_steps")


def legs_truth(item: SceneQuestion, seen: list[Labelled]) -> str:
    animals = {one.color: legs(one.shape) for one in seen if one.shape in ANIMALS}
    kind, colors = item.template, color_words(item)
    if kind == "legs_total":
        return str(sum(animals.values()))
    if kind == "legs_most":
        return max(animals, key=animals.__getitem__)
    one, two = colors
    if kind == "compare_legs":
        return max(colors, key=animals.__getitem__)
    return str(animals[one] + animals[two] if kind == "legs_sum" else animals[one] - animals[two])


def life_truth(item: SceneQuestion, seen: list[Labelled]) -> str | None:
    known, kind = [one for one in seen if one.shape in FACTS], item.template
    if kind == "count_animals":
        return str(sum(one.shape in ANIMALS for one in known))
    if kind == "count_made":
        stuff = split_words(item.question)[-1]
        return str(sum(FACTS[one.shape].get("made") == stuff for one in known))
    if kind == "color_by_use":
        (found,) = [one for one in known if item.question.endswith(f" used {FACTS[one.shape].get('use')}?")]
        return found.color
    weights = {one.color: WEIGHT[one.shape] for one in known if one.shape in WEIGHT}
    if kind == "heaviest":
        return max(weights, key=weights.__getitem__)
    best = max if "heavier" in item.question else min
    return best(color_words(item), key=weights.__getitem__)


def test_legs_weights_and_materials(asked: dict[str, list[tuple[SceneQuestion, list[Labelled]]]]) -> None:
    check(asked["okvqa"], legs_truth, "legs_sum legs_difference legs_total legs_most compare_legs")
    check(asked["okvqa"], life_truth, "count_animals count_made color_by_use heavier heaviest")


def beside_truth(item: SceneQuestion, seen: list[Labelled]) -> str | None:
    """Whether the answer is a fact of the object that the walk leads to; its own words where it is one."""
    known = [one for one in seen if one.shape in FACTS]
    ways = [word for word in split_words(item.question) if word in _STEPS][::-1]
    (color,) = color_words(item)
    end = walk(known, next(one for one in known if one.color == color), ways)
    return item.answer if item.answer in FACTS[end.shape].values() else "no fact of it"


def test_facts_of_what_is_beside(asked: dict[str, list[tuple[SceneQuestion, list[Labelled]]]]) -> None:
    check(asked["okvqa"], beside_truth, "beside_object beside_two")


def board_truth(item: SceneQuestion, seen: list[Labelled]) -> str | None:
    """Answers about teams, from the numbers in their panels."""
    teams = {one.color: int(one.text) for one in seen if one.shape == "box" and one.color != "brown"}
    if len(teams) < sum(one.shape == "box" for one in seen):
        return None  # a box of cardboard, or a brown team
    kind, terms = item.template.removeprefix("score_"), [teams[word] for word in color_words(item)]
    ordered = sorted(teams, key=lambda color: -teams[color])
    points = [teams[color] for color in ordered]
    found: dict[str, Callable[[], object]] = {
        "sum": lambda: sum(terms), "three": lambda: sum(terms), "difference": lambda: terms[0] - terms[1],
        "twice": lambda: 2 * terms[0] + terms[1], "less": lambda: terms[0] + terms[1] - terms[2],
        "range": lambda: points[0] - points[-1], "ends": lambda: points[0] + points[-1],
        "top_two": lambda: points[0] + points[1], "second": lambda: ordered[1], "winner": lambda: ordered[0],
        "over": lambda: sum(value > int(re.findall(r"\d+", item.question)[0]) for value in points),
        "compare": lambda: max(color_words(item), key=teams.__getitem__),
    }  # fmt: skip
    return str(found[kind]())


def test_points_of_teams(asked: dict[str, list[tuple[SceneQuestion, list[Labelled]]]]) -> None:
    ways = "sum three difference twice less range ends top_two second winner over compare"
    check(asked["text_vqa"], board_truth, " ".join(f"score_{way}" for way in ways.split()))


def bar_truth(item: SceneQuestion, seen: list[Labelled]) -> str | None:
    """Answers about bars, from their heights: the unit is the highest that makes every height a whole number."""
    bars = sorted((one for one in seen if one.shape == "bar"), key=lambda one: one.middle[0])
    heights = {one.color: float(one.box[3] - one.box[1]) for one in bars}
    if item.template == "bar_second":
        return sorted(heights, key=lambda color: -heights[color])[1]
    ref, side = color_words(item)[:1], 1 if "right of" in item.question else -1
    if "tallest" in item.question:
        ref = [max(heights, key=heights.__getitem__)]
    if "shortest" in item.question:
        ref = [min(heights, key=heights.__getitem__)]
    colors = list(heights)
    return colors[colors.index(ref[0]) + side]


def test_ranks_and_neighbours_of_bars(asked: dict[str, list[tuple[SceneQuestion, list[Labelled]]]]) -> None:
    check(asked["science_qa_img"], bar_truth, "bar_second bar_beside")


def test_arithmetic_over_values() -> None:
    entries = [Entry("a", 9), Entry("b", 4), Entry("c", 2)]
    ways = "sum three difference twice less left range ends top_two second over between"
    phrases = {way: f"{way} {{a}} {{b}} {{c}} {{low}} {{high}}" for way in ways.split()}
    value = {entry.name: entry.value for entry in entries}
    seen: set[str] = set()
    for seed in range(60):
        for found in ask_values(Random(seed), entries, phrases):
            way, *names = found.question.split()
            a, b, c = (value.get(name, 0) for name in names[:3])
            low, high = map(int, names[3:])
            assert not {low, high} & set(value.values())
            assert found.answer == {
                "sum": a + b, "three": a + b + c, "difference": a - b, "twice": 2 * a + b, "less": a + b - c,
                "left": 20 - a - b, "range": 7, "ends": 11, "top_two": 13, "second": "b",
                "over": sum(low < v for v in value.values()),
                "between": sum(low < v < high for v in value.values()),
            }[way]  # fmt: skip
            seen.add(way)
    assert seen == set(phrases)
