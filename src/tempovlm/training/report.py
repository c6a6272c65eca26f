"""The report of a run: accuracy overall, by data set and by template, and what each knob's lower values lose.

One knob at a time is changed and the others stay native. All settings answer the same questions, so what a setting
loses is a mean of paired differences, and its standard error is that of the pairs.
"""

from __future__ import annotations

import json
from collections import defaultdict
from dataclasses import asdict, replace
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from tempovlm.core.knobs import KNOBS, KnobConfig, KnobSpace
from tempovlm.core.units import s_from_ms
from tempovlm.data.registry import GENERATED
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


class Answers:
    """Right or wrong of each question, (N,), at each of some settings."""

    def __init__(self, results: Iterable[Outcome]) -> None:
        right: dict[KnobConfig, list[NDArray[np.bool_]]] = defaultdict(list)
        datasets: dict[KnobConfig, list[NDArray[np.int64]]] = defaultdict(list)
        templates: dict[KnobConfig, list[str]] = defaultdict(list)
        for one in results:
            right[one.knobs].append(one.right.numpy())
            datasets[one.knobs].append(one.datasets.numpy())
            templates[one.knobs] += one.templates
        self.right = {knobs: np.concatenate(parts).astype(float) for knobs, parts in right.items()}
        first = next(iter(self.right))
        self.datasets, self.templates = np.concatenate(datasets[first]), np.array(templates[first])

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
    wished = dict.fromkeys([*(knobs for settings in axes.values() for knobs in settings), space.cheapest])
    answers = Answers(trainer.answered(wished, recipe.validation_batches))
    native = space.native
    corners = {
        "native": native,
        **{name: settings[0] for name, settings in axes.items()},
        "cheapest": space.cheapest,
    }
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
        "by_template": answers.rows(answers.templates, corners),
        "options": asdict(recipe),
    }
    return report | {"missed": missed(report)}


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
    for name, steps in report["knobs"].items():
        lines.append(
            f"  {name}: "
            + ", ".join(f"{one['value']} {one['accuracy']} ({0 - one['lost']:+.2f})" for one in steps)
        )
    return "\n".join([*lines, *(f"  missed: {line}" for line in report["missed"])])
