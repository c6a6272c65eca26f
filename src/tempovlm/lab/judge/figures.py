"""The judge's plots: accuracy against mean latency, and the gain of each policy over the best static mixture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from tempovlm.lab.drawing import (
    GOOD,
    INK,
    MUTED,
    REFERENCE,
    mark_log,
    new_figure,
    style,
    tip,
    to_svg,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_WIDTH = 920
_NAME = 28
_OTHERS = "#8b949e"


def short(name: str) -> str:
    """Shortens a path to its last folder and file, at most 28 characters; calls the plain oracle optimistic."""
    if name == "oracle":
        return "plain oracle (optimistic)"
    name = "/".join(name.split("/")[-2:])
    return name if len(name) <= _NAME else "…" + name[1 - _NAME :]


def _colors(report: Mapping[str, Any]) -> dict[str, str]:
    """A colour for each policy, the same in both plots."""
    return {name: f"C{i}" for i, name in enumerate(report["policies"])}


@style()
def frontier(report: Mapping[str, Any], *, theme: bool = True) -> str:
    """Draws accuracy against mean latency: static settings, their best mixtures, the oracle, a line a policy.

    Args:
        report: of the judge.
        theme: False inside a page that defines the theme.
    """
    figure = new_figure(_WIDTH, 444)
    axes = figure.add_subplot()
    colors, static = _colors(report), report["static"]
    for name in sorted(report["policies"], key=lambda name: name == report["subject"]):
        _draw_policy(axes, name, report["policies"][name]["by_budget"], colors[name], name == report["subject"])
    for one in static["settings"]:
        (dot,) = axes.plot(
            one["mean_latency_ms"], 100 * one["accuracy"], "o", ms=4, mew=0, color=_OTHERS, alpha=0.55
        )
        tip(dot, f"{one['knobs']}: {100 * one['accuracy']:.1f} % at {one['mean_latency_ms']:.1f} ms")
    dot.set_label("a static setting")
    _scale(axes, [one["accuracy"] for part in (static, report["oracle"]) for one in part["frontier"]])
    oracle = f"{report['oracle']['kind']} oracle"
    _draw_bound(axes, static["frontier"], color=REFERENCE, ls="--", label="best static mixture")
    _draw_bound(axes, report["oracle"]["frontier"], color=GOOD, ls=":", label=oracle)
    axes.set_title("Accuracy against mean latency", loc="left", weight="bold")
    axes.set_xlabel("mean latency of an answer, ms (logarithmic)")
    handles = dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
    names = [*map(short, report["policies"]), "best static mixture", oracle, "a static setting"]
    key = axes.legend([handles[name] for name in names], names, loc="upper left", bbox_to_anchor=(1.01, 1.02))
    key.get_texts()[list(report["policies"]).index(report["subject"])].set_fontweight("bold")
    return to_svg(figure, "Accuracy against mean latency", theme=theme)


def _draw_policy(axes: Axes, name: str, rows: Sequence[Mapping[str, Any]], color: str, is_subject: bool) -> None:
    """Draws a line through the budgets; of the subject with the intervals of accuracy."""
    rows = sorted(rows, key=lambda row: row["mean_latency_ms"])
    times_ms = [row["mean_latency_ms"] for row in rows]
    values = [100 * row["accuracy"]["value"] for row in rows]
    width, size = (2.5, 10) if is_subject else (1.2, 6)
    axes.plot(times_ms, values, color=color, lw=width, marker="o", ms=size, mew=0, label=short(name))
    for time_ms, value, row in zip(times_ms, values, rows, strict=True):
        (dot,) = axes.plot(time_ms, value, "o", color=color, ms=size, mew=0)
        tip(dot, f"{name} at {row['budget_ms']:g} ms: {value:.1f} % in {time_ms:.1f} ms on average")
        if is_subject:
            axes.plot((time_ms,) * 2, [100 * end for end in row["accuracy"]["interval"]], color=color, lw=1.5)


def _scale(axes: Axes, shares: Sequence[float]) -> None:
    """Sets a logarithmic axis of milliseconds and one of percent that shows these shares too."""
    axes.set_xscale("log")
    axes.set_xlim(axes.get_xlim())
    mark_log(axes.xaxis)
    axes.yaxis.set_major_formatter("{x:g} %")
    low, high = axes.get_ylim()
    axes.set_ylim(max(0, min(low, 100 * min(shares) - 2)), min(100, max(high, 100 * max(shares) + 2)))


def _draw_bound(axes: Axes, points: Sequence[Mapping[str, float]], **line: Any) -> None:
    """Draws a frontier: straight in milliseconds, so bent on this axis, and flat beyond its last point."""
    known_ms = [point["mean_latency_ms"] for point in points]
    times_ms = np.union1d(known_ms, np.geomspace(known_ms[0], max(axes.get_xlim()[1], known_ms[-1]), 100))
    axes.plot(times_ms, 100 * np.interp(times_ms, known_ms, [point["accuracy"] for point in points]), lw=2, **line)


@style()
def gaps(report: Mapping[str, Any], *, theme: bool = True) -> str:
    """Draws each policy's gain over the best static mixture at its own latency, and that of the shuffled controls.

    Args:
        report: of the judge.
        theme: False inside a page that defines the theme.
    """
    colors = _colors(report)
    rows = [(short(name), judged["against_mixture"], colors[name]) for name, judged in report["policies"].items()]
    rows += [
        (f"{short(name)}, shuffled", control["against_mixture"], _OTHERS)
        for name, control in report["shuffled"].items()
    ]
    figure = new_figure(_WIDTH, 100 + 26 * len(rows))
    axes = figure.add_subplot()
    axes.axvline(0, color=INK, lw=2)
    bound = 100 * report["oracle"]["against_mixture"]["value"]
    axes.axvline(bound, color=GOOD, lw=2, ls=":")
    axes.text(bound, -0.6, f"{report['oracle']['kind']} oracle", ha="right", va="bottom", color=GOOD)
    for at, (label, gain, color) in enumerate(rows):
        axes.plot([100 * end for end in gain["interval"]], (at, at), color=color, lw=3, solid_capstyle="butt")
        (dot,) = axes.plot(100 * gain["value"], at, "o", color=color, ms=10, mew=0)
        tip(dot, f"{label}: {100 * gain['value']:+.2f} points")
    axes.set_yticks(range(len(rows)), [label for label, _, _ in rows])
    for text, (_, _, color) in zip(axes.get_yticklabels(), rows, strict=True):
        text.set_color(MUTED if color == _OTHERS else INK)
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.grid(visible=False, axis="y")
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:+g}" if value else "0")
    title = "Gain over the best static mixture at the same mean latency, points, mean over the budgets"
    figure.suptitle(title, x=0.02, ha="left", weight="bold")
    return to_svg(figure, title, theme=theme)
