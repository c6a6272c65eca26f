"""The report of a run: accuracy overall, by data set, cost and template, and what each knob's lower values lose.

One knob at a time is changed and the others stay native. All settings answer the same questions, so what a setting
loses is a mean of paired differences, and its standard error is that of the pairs. Headroom is told at equal
operations, since a training measures no answer's time: half of the questions choose and the others are scored, and
the other way round.
"""

from __future__ import annotations

import json
from collections import defaultdict
from dataclasses import asdict, replace
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from tempovlm.core.cost import plan_cost
from tempovlm.core.knobs import KNOBS, KnobConfig, KnobSpace
from tempovlm.core.plan import Plan
from tempovlm.core.units import s_from_ms
from tempovlm.data.registry import GENERATED
from tempovlm.lab.judge.headroom import Scored, budgets_up_to, headroom_at
from tempovlm.model.prompt import image_tokens
from tempovlm.model.vision.tiling import choose_grid
from tempovlm.testbed.costs import cost_of
from tempovlm.testbed.scene import SIZES
from tempovlm.training.pocket_eval import Outcome
from tempovlm.training.recipes import name_of

if TYPE_CHECKING:
    from collections.abc import Iterable

    from tempovlm.training.pocket import Trainer

TARGETS = dict(zip(KNOBS, (15.0, 1.0, 6.0), strict=False))
"""Points that the lowest value of each knob should lose, the others being native."""

NATIVE_TARGETS = {"overall": 90.0, "each data set": 82.0}
"""Accuracy at the native setting, in per cent."""


def axes_settings(space: KnobSpace) -> dict[str, list[KnobConfig]]:
    """Return for each knob the settings in which only it is not native, from the cheapest of its values."""
    return {name: [replace(space.native, **{name: value}) for value in axis] for name, axis in space.axes.items()}


def corner_settings(space: KnobSpace) -> dict[str, KnobConfig]:
    """Return the native setting, the one with the lowest value of each knob alone, and the cheapest, by name."""
    lowest = {name: settings[0] for name, settings in axes_settings(space).items()}
    return {"native": space.native, **lowest, "cheapest": space.cheapest}


class Answers:
    """Right or wrong of each question, (N,), at each of some settings."""

    def __init__(self, results: Iterable[Outcome]) -> None:
        right: dict[KnobConfig, list[NDArray[np.bool_]]] = defaultdict(list)
        datasets: dict[KnobConfig, list[NDArray[np.int64]]] = defaultdict(list)
        templates: dict[KnobConfig, list[str]] = defaultdict(list)
        halves: dict[KnobConfig, list[NDArray[np.int64]]] = defaultdict(list)
        for one in results:
            halves[one.knobs].append(np.full(len(one.right), len(halves[one.knobs]) % 2))
            right[one.knobs].append(one.right.numpy())
            datasets[one.knobs].append(one.datasets.numpy())
            templates[one.knobs] += one.templates
        self.right = {knobs: np.concatenate(parts).astype(float) for knobs, parts in right.items()}
        first = next(iter(self.right))
        self.datasets, self.templates = np.concatenate(datasets[first]), np.array(templates[first])
        self.halves = np.concatenate(halves[first])

    def mean(self, values: NDArray[np.float64]) -> tuple[float, float]:
        """Return the mean of the data sets' means of (N,) values, and its standard error, in per cent."""
        groups = [values[self.datasets == index] for index in np.unique(self.datasets)]
        error = sum(group.var() / len(group) for group in groups) ** 0.5 / len(groups)
        return 100 * float(np.mean([group.mean() for group in groups])), 100 * float(error)

    def lost(self, native: KnobConfig, other: KnobConfig) -> tuple[float, float]:
        """Return the points that a setting loses against the native one, and their standard error."""
        return self.mean(self.right[native] - self.right[other])

    def rows(self, names: NDArray[Any], settings: dict[str, KnobConfig]) -> dict[str, dict[str, float]]:
        """Return for each name in (N,) the number of questions and the accuracy at each setting, in per cent."""
        table = {}
        for name in sorted(set(names.tolist())):
            here = names == name
            accuracies = {
                label: round(100 * float(self.right[k][here].mean()), 2) for label, k in settings.items()
            }
            table[str(name)] = {"questions": int(here.sum()), **accuracies}
        return table


def make_report(trainer: Trainer, done: bool) -> dict[str, Any]:
    """Measure a run on its validation questions."""
    space, recipe = trainer.space, trainer.recipe
    axes = axes_settings(space)
    wished = dict.fromkeys([*(knobs for settings in axes.values() for knobs in settings), *grid(space)])
    answers = Answers(trainer.answered(wished, recipe.validation_batches))
    native, corners = space.native, corner_settings(space)
    overall, error = answers.mean(answers.right[native])
    by_dataset = answers.rows(np.array(GENERATED)[answers.datasets], corners)
    knobs = {
        name: [_step(answers, native, one, one.as_dict()[name]) for one in settings]
        for name, settings in axes.items()
    }
    size = sum(one.numel() for one in trainer.model.parameters())
    report: dict[str, Any] = {
        "recipe": name_of(recipe),
        "seed": recipe.seed,
        "done": done,
        "steps": trainer.step,
        "minutes": round(s_from_ms(trainer.spent_ms) / 60, 2),
        "ms_per_step": round(trainer.spent_ms / max(trainer.step - trainer.start, 1), 1),
        "parameters": size,
        "size_mb": round(size * 2 / 1e6, 2),
        "questions": len(answers.templates),
        "accuracy": round(overall, 2),
        "accuracy_error": round(error, 2),
        "by_dataset": by_dataset,
        "knobs": knobs,
        "headroom": headroom(answers, trainer),
        "by_cost": by_cost(answers, corners),
        "by_template": answers.rows(answers.templates, corners),
        "options": asdict(recipe),
    }
    return report | {"missed": missed(report)}


def by_cost(answers: Answers, corners: dict[str, KnobConfig]) -> dict[str, dict[str, Any]]:
    """Return a row for each cost that templates are meant to have: accuracies, and points lost at each corner."""
    rows: dict[str, dict[str, Any]] = {}
    for cost, row in answers.rows(np.array([cost_of(name) for name in answers.templates]), corners).items():
        lost = {name: round(row["native"] - row[name], 2) for name in corners if name != "native"}
        rows[cost] = {**row, "lost": lost}
    return rows


def grid(space: KnobSpace) -> list[KnobConfig]:
    """Return the settings between which headroom is told: no top-k but the lowest and the native one."""
    top_ks = (space.cheapest.top_k, space.native.top_k)
    return [knobs for knobs in space if knobs.top_k in top_ks]


def operations(trainer: Trainer, knobs: KnobConfig) -> float:
    """Return the operations of a short answer about a usual picture, as a share of the native setting's."""
    config, space = trainer.config, trainer.space
    found = []
    for one in (knobs, space.native):
        cut = choose_grid(one.tier, *SIZES[0], config.vision)
        tokens = len(image_tokens(cut, config.vision, trainer.tokenizer))
        plan = Plan.build(one, trainer.ranking, config.shape)
        found.append(plan_cost(plan, config.shape, cut.num_crops, tokens, 20, 3).total_flops)
    return found[0] / found[1]


def headroom(answers: Answers, trainer: Trainer) -> list[dict[str, Any]]:
    """Return at five shares of the native setting's operations what a setting for each template gains."""
    settings = grid(trainer.space)
    taken = np.array([operations(trainer, knobs) for knobs in settings])
    accuracy = np.stack([answers.right[knobs] for knobs in settings], axis=1)
    names = np.array(GENERATED)[answers.datasets]
    kinds = np.char.add(np.char.add(names, "/"), answers.templates)
    halves = [
        Scored(accuracy[here], names[here], kinds[here]) for here in (answers.halves == 0, answers.halves == 1)
    ]
    rows = []
    if all(len(half.kinds) for half in halves):
        for budget in budgets_up_to(taken, 1.0):
            both = [headroom_at(one, other, taken <= budget) for one, other in (halves, halves[::-1])]
            gained = float(np.mean([found.gains.mean() for found in both]))
            rows.append(
                {"operations": round(budget, 3), "single": str(settings[both[0].single]), "gain": round(gained, 2)}
            )
    return rows


def _step(answers: Answers, native: KnobConfig, knobs: KnobConfig, value: Any) -> dict[str, Any]:
    """Return one value of a knob: accuracy, points lost and their standard error."""
    lost, error = answers.lost(native, knobs)
    accuracy, _ = answers.mean(answers.right[knobs])
    return {"value": value, "accuracy": round(accuracy, 2), "lost": round(lost, 2), "error": round(error, 2)}


def missed(report: dict[str, Any]) -> list[str]:
    """Return the targets that a report misses, a line each."""
    worst = min(row["native"] for row in report["by_dataset"].values())
    lines = [
        f"native accuracy, {what}: {found:.1f} %, wanted {wanted:.0f}"
        for (what, wanted), found in zip(NATIVE_TARGETS.items(), (report["accuracy"], worst), strict=True)
        if found < wanted
    ]
    for name, wanted in TARGETS.items():
        steps = report["knobs"][name]
        lost, error = steps[0]["lost"], steps[0]["error"]
        if lost < wanted or lost - 1.96 * error <= 0:
            lines.append(f"lost at the lowest {name}: {lost:.1f} ± {1.96 * error:.1f} points, wanted {wanted:.0f}")
        for low, high in pairwise(steps):
            if high["accuracy"] < low["accuracy"] - 0.3:
                lines.append(
                    f"{name} {high['value']} is below {low['value']}: {high['accuracy']} and {low['accuracy']} %"
                )
    return lines


def summary(report: dict[str, Any]) -> str:
    """Return the report's main figures as lines for people."""
    head = ("recipe", "seed", "steps", "minutes", "ms_per_step", "size_mb", "accuracy", "questions")
    lines = [json.dumps({name: report[name] for name in head})]
    lines += [f"  {name}: {json.dumps(row)}" for name, row in report["by_dataset"].items()]
    for cost, row in report["by_cost"].items():
        lines.append(f"  {cost} ({row['questions']} questions): {row['native']}, lost {json.dumps(row['lost'])}")
    for name, steps in report["knobs"].items():
        lines.append(
            f"  {name}: "
            + ", ".join(f"{one['value']} {one['accuracy']} ({0 - one['lost']:+.2f})" for one in steps)
        )
    rows = (f"{row['gain']:+.2f} at {row['operations']:.2f} ({row['single']})" for row in report["headroom"])
    lines.append("  headroom by template at equal operations: " + ", ".join(rows))
    return "\n".join([*lines, *(f"  missed: {line}" for line in report["missed"])])
