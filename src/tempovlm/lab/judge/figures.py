"""The judge's plots: accuracy against mean latency, and the gain of each policy over the best static mixture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from tempovlm.lab.drawing import (
    COLUMN_PX,
    GOOD,
    INK,
    MUTED,
    REFERENCE,
    mark_log,
    new_figure,
    style,
    tip,
    to_pdf,
    to_svg,
    zoom,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_WIDTH = 920
_OTHERS = "#8b949e"
_SUBJECT = "C0"
_COLORS = ("C1", "C10", "C4", "C7", "C3", "C11")
"""Of policies beside the subject: no blue, which is the subject's, and no green, which is the reference's."""
_BLIND = ("fixed", "best_static", "only_tier", "only_top_k", "only_num_blocks", "random")
"""Baselines that share one colour, as a line of each its own colour would be too many to tell apart."""

_CLOSE = 0.06
"""Share of both axes within which budgets share a label."""

_LEFT = 0.05
"""Share of the axis that is added on the left."""

FRONTIER = "Accuracy against mean latency"
GAIN = "Gain over the best static mixture at the same mean latency, points, mean over the budgets"


def _colors(report: Mapping[str, Any]) -> dict[str, str]:
    """A colour for each policy, the same in both plots."""
    colors = {report["subject"]: _SUBJECT}
    free = iter(_COLORS)
    for name in report["policies"]:
        if name not in colors:
            colors[name] = _OTHERS if name in _BLIND else next(free, _OTHERS)
    return colors


@style()
def frontier(report: Mapping[str, Any]) -> str:
    """Draws accuracy against mean latency: static settings, their best mixtures, the reference, a line a policy.

    For a page that defines the theme.

    Args:
        report: of the judge.
    """
    return to_svg(_frontier(report), FRONTIER, theme=False)


@style(paper=True)
def frontier_narrow(report: Mapping[str, Any]) -> str:
    """Draws the same for a narrow page that defines the theme."""
    return to_svg(_frontier(report), FRONTIER, theme=False)


@style(paper=True)
def frontier_pdf(report: Mapping[str, Any]) -> bytes:
    """Draws the same for a column of a paper."""
    return to_pdf(_frontier(report), FRONTIER)


def _frontier(report: Mapping[str, Any]) -> Figure:
    is_page = zoom() >= 1
    figure = new_figure(_WIDTH, 444) if is_page else new_figure(COLUMN_PX, 240)
    axes = figure.add_subplot()
    colors, static, subject = _colors(report), report["static"], report["subject"]
    for name in sorted(report["policies"], key=lambda name: (colors[name] != _OTHERS, name == subject)):
        label = report["names"][name] if colors[name] != _OTHERS else "other baselines"
        _draw_policy(axes, label, report["policies"][name]["by_budget"], colors[name], name == subject)
    for one in static["settings"]:
        times_ms, share = one["mean_latency_ms"], one["accuracy"]
        (dot,) = axes.plot(times_ms, 100 * share, "o", ms=4 * zoom(), mew=0, color=_OTHERS, alpha=0.55)
        tip(dot, f"{one['knobs']}: {100 * share:.1f} % at {times_ms:.1f} ms")
    dot.set_label("a fixed setting")
    reference = report["reference"]
    _scale(axes, [one["accuracy"] for part in (static, reference) for one in part["frontier"]])
    _draw_bound(axes, static["frontier"], color=REFERENCE, ls="--", label="best static mixture")
    _draw_bound(axes, reference["frontier"], color=GOOD, ls=":", label=reference["name"])
    _mark_budgets(axes, report["policies"][subject]["by_budget"])
    axes.set_xlabel("mean latency of an answer, ms (logarithmic)")
    if is_page:
        axes.set_title(FRONTIER, loc="left", weight="bold")
    else:
        axes.set_ylabel("accuracy")
    _draw_legend(axes, report, colors)
    return figure


def _draw_legend(axes: Axes, report: Mapping[str, Any], colors: Mapping[str, str]) -> None:
    """The subject first, then the other policies with a colour, then what they are compared with."""
    handles = dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
    subject = report["names"][report["subject"]]
    named = [report["names"][name] for name in report["policies"] if colors[name] not in (_OTHERS, _SUBJECT)]
    rest = ("best static mixture", report["reference"]["name"], "other baselines", "a fixed setting")
    shown = [name for name in (subject, *named, *rest) if name in handles]
    marks = [handles[name] for name in shown]
    if zoom() >= 1:
        key = axes.legend(marks, shown, loc="upper left", bbox_to_anchor=(1.01, 1.02))
    else:
        figure = axes.get_figure(root=True)
        assert figure is not None
        key = figure.legend(marks, shown, loc="outside lower center", ncols=2, handlelength=1.6, columnspacing=1)
    key.get_texts()[0].set_fontweight("bold")


def _draw_policy(axes: Axes, name: str, rows: Sequence[Mapping[str, Any]], color: str, is_subject: bool) -> None:
    """Draws a line with a dot a budget; of the subject with the intervals of accuracy."""
    rows = sorted(rows, key=lambda row: row["mean_latency_ms"])
    times_ms = [row["mean_latency_ms"] for row in rows]
    values = [100 * row["accuracy"]["value"] for row in rows]
    width, size = (2.5, 9) if is_subject else (0.9, 4) if color == _OTHERS else (1.4, 6)
    look: dict[str, Any] = {"color": color, "ms": size * zoom(), "mew": 0}
    axes.plot(times_ms, values, lw=width * zoom(), marker="o", label=name, **look)
    for time_ms, value, row in zip(times_ms, values, rows, strict=True):
        (dot,) = axes.plot(time_ms, value, "o", **look)
        tip(dot, f"{name} at {row['budget_ms']:g} ms: {value:.1f} % in {time_ms:.1f} ms on average")
        if is_subject:
            ends = [100 * end for end in row["accuracy"]["interval"]]
            axes.plot((time_ms,) * 2, ends, color=color, lw=1.5 * zoom())


def _mark_budgets(axes: Axes, rows: Sequence[Mapping[str, Any]]) -> None:
    """Writes the budgets to the left of the subject's dots; one label for dots that lie close together."""
    (left, right), (low, high) = np.log(axes.get_xlim()), axes.get_ylim()
    groups: list[list[Mapping[str, Any]]] = []
    for row in sorted(rows, key=lambda row: row["budget_ms"]):
        if groups:
            first = groups[-1][0]
            x = np.log(row["mean_latency_ms"] / first["mean_latency_ms"]) / (right - left)
            y = 100 * (row["accuracy"]["value"] - first["accuracy"]["value"]) / (high - low)
            if abs(x) < _CLOSE and abs(y) < _CLOSE:
                groups[-1].append(row)
                continue
        groups.append([row])
    for group in groups:
        first = group[0]
        ends = dict.fromkeys((first["budget_ms"], group[-1]["budget_ms"]))
        axes.annotate(
            f"{' to '.join(f'{budget_ms:g}' for budget_ms in ends)} ms",
            (first["mean_latency_ms"], 100 * first["accuracy"]["value"]),
            (-8 * zoom(), 2 * zoom()),
            textcoords="offset points",
            ha="right",
            color=_SUBJECT,
            weight="bold",
            fontsize=11 * zoom(),
        )


def _scale(axes: Axes, shares: Sequence[float]) -> None:
    """Sets a logarithmic axis of milliseconds and one of percent that shows these shares too."""
    axes.set_xscale("log")
    low_ms, high_ms = axes.get_xlim()
    # Room for the labels left of the subject's dots.
    axes.set_xlim(low_ms * (low_ms / high_ms) ** _LEFT, high_ms)
    mark_log(axes.xaxis)
    axes.yaxis.set_major_formatter("{x:g} %")
    low, high = axes.get_ylim()
    axes.set_ylim(max(0, min(low, 100 * min(shares) - 2)), min(100, max(high, 100 * max(shares) + 2)))


def _draw_bound(axes: Axes, points: Sequence[Mapping[str, float]], **line: Any) -> None:
    """Draws a frontier: straight in milliseconds, so bent on this axis, and flat beyond its last point."""
    known_ms = [point["mean_latency_ms"] for point in points]
    times_ms = np.union1d(known_ms, np.geomspace(known_ms[0], max(axes.get_xlim()[1], known_ms[-1]), 100))
    values = 100 * np.interp(times_ms, known_ms, [point["accuracy"] for point in points])
    axes.plot(times_ms, values, lw=2 * zoom(), **line)


@style()
def gaps(report: Mapping[str, Any]) -> str:
    """Draws each policy's gain over the best static mixture at its own latency, and that of the shuffled controls.

    For a page that defines the theme.

    Args:
        report: of the judge.
    """
    return to_svg(_gaps(report), GAIN, theme=False)


@style(paper=True)
def gaps_narrow(report: Mapping[str, Any]) -> str:
    """Draws the same for a narrow page that defines the theme."""
    return to_svg(_gaps(report), GAIN, theme=False)


@style(paper=True)
def gaps_pdf(report: Mapping[str, Any]) -> bytes:
    """Draws the same for a column of a paper."""
    return to_pdf(_gaps(report), GAIN)


def _gaps(report: Mapping[str, Any]) -> Figure:
    colors, names = _colors(report), report["names"]
    rows = [(names[name], judged["against_mixture"], colors[name]) for name, judged in report["policies"].items()]
    rows += [
        (f"{names[name]}, shuffled", control["against_mixture"], _OTHERS)
        for name, control in report["shuffled"].items()
    ]
    is_page = zoom() >= 1
    figure = new_figure(_WIDTH, 100 + 26 * len(rows)) if is_page else new_figure(COLUMN_PX, 40 + 12 * len(rows))
    axes = figure.add_subplot()
    axes.axvline(0, color=INK, lw=2 * zoom())
    bound, reference = 100 * report["reference"]["against_mixture"]["value"], report["reference"]["name"]
    axes.axvline(bound, color=GOOD, lw=2 * zoom(), ls=":")
    axes.text(bound, -0.6, reference, ha="right", va="bottom", color=GOOD)
    for at, (label, gain, color) in enumerate(rows):
        ends = [100 * end for end in gain["interval"]]
        axes.plot(ends, (at, at), color=color, lw=3 * zoom(), solid_capstyle="butt")
        (dot,) = axes.plot(100 * gain["value"], at, "o", color=color, ms=10 * zoom(), mew=0)
        tip(dot, f"{label}: {100 * gain['value']:+.2f} points")
    axes.set_yticks(range(len(rows)), [label for label, _, _ in rows])
    for i, text in enumerate(axes.get_yticklabels()):
        text.set_color(INK if i < len(report["policies"]) else MUTED)
    axes.get_yticklabels()[list(report["policies"]).index(report["subject"])].set_fontweight("bold")
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.grid(visible=False, axis="y")
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:+g}" if value else "0")
    if is_page:
        figure.suptitle(GAIN, x=0.02, ha="left", weight="bold")
    else:
        axes.set_xlabel("points over the best static mixture")
    return figure
