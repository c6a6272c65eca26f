"""Figures of a GRPO training: rewards and knobs by epoch, and accuracy against latency by budget."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tempovlm.core.knobs import KNOBS
from tempovlm.lab.drawing import can_draw, mark_log, new_figure, save_png, style
from tempovlm.lab.exp1_estimator.plots import describe


def draw(folder: Path, history: Sequence[Mapping[str, Any]], report: Mapping[str, Any]) -> None:
    """Writes `training.png`, `knobs.png` and `trade_off.png`; says so and does not without matplotlib.

    Args:
        folder: that exists.
        history: an epoch's record each.
        report: with `by_budget`, `policies` and the stamp.
    """
    if not can_draw():
        return
    panels: tuple[tuple[str, int, Callable[[Any], None]], ...] = (
        ("training", 1100, lambda figure: _training(figure, history)),
        ("knobs", 1100, lambda figure: _knobs(figure, history)),
        ("trade_off", 640, lambda figure: _trade_off(figure, report)),
    )
    for name, width, fill in panels:
        with style():
            figure = new_figure(width, 400)
            fill(figure)
            figure.suptitle(describe(report["stamp"]))
            save_png(figure, folder / f"{name}.png")


def _training(figure: Any, history: Sequence[Mapping[str, Any]]) -> None:
    epochs = [record["epoch"] for record in history]
    reward, entropy, groups = figure.subplots(1, 3)
    reward.plot(epochs, [record["train"]["reward"] for record in history], label="draws, training")
    reward.plot(epochs, [record["val"]["reward"] for record in history], label="best choices, validation")
    reward.set_ylabel("reward")
    entropy.plot(epochs, [record["entropy"] for record in history])
    entropy.set_ylabel("entropy, nats")
    groups.plot(epochs, [record["flat_groups"] for record in history], label="groups without spread")
    groups.plot(epochs, [record["clip_fraction"] for record in history], label="clipped choices")
    groups.plot(epochs, [1 - record["train"]["adherence"] for record in history], label="late draws")
    groups.set_ylabel("share")
    for axes in (reward, groups):
        axes.legend()
    for axes in (reward, entropy, groups):
        axes.set_xlabel("epoch")


def _knobs(figure: Any, history: Sequence[Mapping[str, Any]]) -> None:
    epochs = [record["epoch"] for record in history]
    for axes, knob in zip(figure.subplots(1, len(KNOBS), sharey=True), KNOBS, strict=True):
        values = list(history[0]["val"]["knobs"][knob])
        axes.stackplot(
            epochs, [[r["val"]["knobs"][knob][value] for r in history] for value in values], labels=values
        )
        axes.set_title(knob.replace("_", " "))
        axes.set_xlabel("epoch")
        axes.legend(loc="upper left", bbox_to_anchor=(0, -0.16), ncols=len(values))


def _trade_off(figure: Any, report: Mapping[str, Any]) -> None:
    axes = figure.add_subplot()
    for name in ("policy", "table", "oracle"):
        points = [(row[name]["latency_ms"], row[name]["accuracy"]) for row in report["by_budget"]]
        axes.plot(*zip(*points, strict=True), marker="o", ms=4, label=name)
    axes.set_xscale("log")
    mark_log(axes.xaxis)
    axes.set_xlabel("mean latency of a fifth of the budgets, ms")
    axes.set_ylabel("accuracy")
    axes.legend()
