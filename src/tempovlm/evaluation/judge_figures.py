"""The judge's pictures: accuracy against mean latency, and the share of the gap that each policy closes.

Reads the report object only. Lengths are CSS pixels.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape
from itertools import pairwise
from typing import Any

from tempovlm.evaluation import svg
from tempovlm.evaluation.charts import Scale

WIDTH = 920
COLORS = (
    "#0072b2",
    "#d55e00",
    "#009e73",
    "#cc79a7",
    "#8a6d00",
    "#56b4e9",
    "#8b949e",
    "#e69f00",
    "#5a5fd0",
    "#7a4b94",
)

_PLOT_RIGHT, _LEFT, _TOP, _BOTTOM, _HEIGHT = 660, 62, 56, 392, 444
_KEY = _PLOT_RIGHT + 28
_ROW = 26
_MARKS = 8
_NAME = 28


def color_of(names: Sequence[str], name: str) -> str:
    """A policy's colour, the same in every picture."""
    return COLORS[list(names).index(name) % len(COLORS)]


def frontier(report: Mapping[str, Any], *, style: str = svg.STYLE) -> str:
    """Accuracy against mean latency: static settings, their best mixtures, the oracle, a line a policy."""
    policies = {name: p["by_budget"] for name, p in report["policies"].items()}
    static, oracle = report["static"], report["oracle"]
    points = [(s["mean_latency_ms"], s["accuracy"]) for s in static["settings"]]
    points += [(r["mean_latency_ms"], r["accuracy"]["value"]) for rows in policies.values() for r in rows]
    ends = [(p["mean_latency_ms"], p["accuracy"]) for p in oracle["frontier"]]
    x, y = _axes(points, ends)
    parts = [svg.text(20, 30, "Accuracy against mean latency", "title"), *_frame(x, y)]
    for one in static["settings"]:
        tip = f"{one['knobs']}: {100 * one['accuracy']:.1f} % at {one['mean_latency_ms']:.1f} ms"
        parts.append(
            _dot(x(math.log(one["mean_latency_ms"])), y(100 * one["accuracy"]), 2.5, "#8b949e", tip, 0.55)
        )
    parts.append(_curve(static["frontier"], x, y, "var(--reference)", "7 4"))
    parts.append(_curve(oracle["frontier"], x, y, "var(--good)", "2 4"))
    subject = report["subject"]
    for name in sorted(policies, key=lambda name: name == subject):
        parts.append(_policy(name, policies[name], x, y, color_of(list(policies), name), name == subject))
    parts.append(_key(report, list(policies)))
    return svg.document("".join(parts), WIDTH, _HEIGHT, "Accuracy against mean latency", style=style)


def _axes(points: Sequence[tuple[float, float]], ends: Sequence[tuple[float, float]]) -> tuple[Scale, Scale]:
    """A logarithmic scale of milliseconds and a linear one of percent."""
    low_ms, high_ms = min(x for x, _ in points) / 1.05, max(x for x, _ in points) * 1.05
    shares = [100 * y for _, y in (*points, *ends)]
    margin = max(2.0, 0.06 * (max(shares) - min(shares)))
    x = Scale(math.log(low_ms), math.log(high_ms), _LEFT, _PLOT_RIGHT)
    return x, Scale(max(0.0, min(shares) - margin), min(100.0, max(shares) + margin), _BOTTOM, _TOP)


def _frame(x: Scale, y: Scale) -> list[str]:
    parts = []
    for value in svg.ticks(y.low, y.high, 7):
        parts.append(svg.line(_LEFT, y(value), _PLOT_RIGHT, y(value), "grid"))
        parts.append(svg.text(_LEFT - 8, y(value) + 4, f"{value:g} %", "small muted", "end"))
    for value in _log_marks(math.exp(x.low), math.exp(x.high)):
        at = x(math.log(value))
        parts.append(svg.line(at, _BOTTOM, at, _BOTTOM + 5, "axis"))
        parts.append(svg.text(at, _BOTTOM + 20, f"{value:g}", "small muted", "middle"))
    parts.append(svg.line(_LEFT, _BOTTOM, _PLOT_RIGHT, _BOTTOM, "axis"))
    label = "mean latency of an answer, ms (logarithmic)"
    parts.append(svg.text(_PLOT_RIGHT, _BOTTOM + 42, label, "small muted", "end"))
    return parts


def _log_marks(low: float, high: float) -> list[float]:
    """Round numbers spread over a logarithmic axis, at most eight."""
    start, stop = math.floor(math.log10(low)), math.ceil(math.log10(high))
    marks: list[float] = []
    for steps in (
        (1, 2, 5),
        (1, 1.5, 2, 3, 4, 5, 6, 8),
        (1, 1.2, 1.4, 1.6, 1.8, 2, 2.5, 3, 3.5, 4, 5, 6, 7, 8, 9),
    ):
        marks = [s * 10.0**e for e in range(start, stop + 1) for s in steps if low <= s * 10.0**e <= high]
        if len(marks) >= _MARKS // 2:
            break
    return marks[:: math.ceil(len(marks) / _MARKS)] if marks else [low]


def _dot(x: float, y: float, radius: float, color: str, tip: str, opacity: float = 1.0) -> str:
    place = f'cx="{x:.1f}" cy="{y:.1f}" r="{radius:g}"'
    return f'<circle {place} fill="{color}" fill-opacity="{opacity:g}"><title>{escape(tip)}</title></circle>'


def _stroke(path: str, color: str, width: float, dashes: str = "") -> str:
    style = f"stroke:{color};stroke-width:{width:g}" + (f";stroke-dasharray:{dashes}" if dashes else "")
    return f'<path d="{path}" style="{style}"/>'


def _curve(points: Sequence[Mapping[str, float]], x: Scale, y: Scale, color: str, dashes: str) -> str:
    """A frontier, straight in milliseconds between its points, so bent on this axis, and flat to the right."""
    where: list[tuple[float, float]] = []
    for one, other in pairwise(points):
        for step in range(12):
            share = step / 12
            ms = one["mean_latency_ms"] + share * (other["mean_latency_ms"] - one["mean_latency_ms"])
            where.append((ms, one["accuracy"] + share * (other["accuracy"] - one["accuracy"])))
    last = points[-1]
    where += [(last["mean_latency_ms"], last["accuracy"])]
    pixels = [f"{x(math.log(ms)):.1f},{y(100 * a):.1f}" for ms, a in where] + [
        f"{x.end:.1f},{y(100 * last['accuracy']):.1f}"
    ]
    return _stroke("M" + " L".join(pixels), color, 2, dashes)


def _policy(name: str, rows: Sequence[Mapping[str, Any]], x: Scale, y: Scale, color: str, strong: bool) -> str:
    ordered = sorted(rows, key=lambda row: row["mean_latency_ms"])
    places = [(x(math.log(r["mean_latency_ms"])), y(100 * r["accuracy"]["value"]), r) for r in ordered]
    parts = [_stroke("M" + " L".join(f"{a:.1f},{b:.1f}" for a, b, _ in places), color, 2.5 if strong else 1.2)]
    for left, top, row in places:
        low, high = (min(max(y(100 * v), _TOP), _BOTTOM) for v in row["accuracy"]["interval"])
        if strong:
            parts.append(_stroke(f"M{left:.1f},{low:.1f} L{left:.1f},{high:.1f}", color, 1.5))
        tip = (
            f"{name} at {row['budget_ms']:g} ms: {100 * row['accuracy']['value']:.1f} % in "
            f"{row['mean_latency_ms']:.1f} ms on average"
        )
        parts.append(_dot(left, top, 5 if strong else 3, color, tip))
    return "".join(parts)


def _key(report: Mapping[str, Any], names: Sequence[str]) -> str:
    parts: list[str] = []
    top = _TOP + 4
    for name in names:
        is_subject = name == report["subject"]
        parts.append(
            _stroke(f"M{_KEY},{top - 4} L{_KEY + 22},{top - 4}", color_of(names, name), 3 if is_subject else 1.5)
        )
        parts.append(_dot(_KEY + 11, top - 4, 4 if is_subject else 3, color_of(names, name), name))
        parts.append(svg.text(_KEY + 32, top, short(name), "small strong" if is_subject else "small"))
        top += 22
    top += 8
    for label, color, dashes in (
        ("best static mixture", "var(--reference)", "7 4"),
        (f"{report['oracle']['kind']} oracle", "var(--good)", "2 4"),
    ):
        parts.append(_stroke(f"M{_KEY},{top - 4} L{_KEY + 22},{top - 4}", color, 2, dashes))
        parts.append(svg.text(_KEY + 32, top, label, "small"))
        top += 22
    parts.append(_dot(_KEY + 11, top - 4, 2.5, "#8b949e", "a static setting", 0.7))
    parts.append(svg.text(_KEY + 32, top, "a static setting", "small"))
    return "".join(parts)


def short(name: str) -> str:
    """A name that fits the key: of a path its last folder and file; the plain oracle says that it is a bound."""
    if name == "oracle":
        return "plain oracle (optimistic)"
    name = "/".join(name.split("/")[-2:])
    return name if len(name) <= _NAME else "…" + name[1 - _NAME :]


def gaps(report: Mapping[str, Any], *, style: str = svg.STYLE) -> str:
    """What each policy gains over the best static mixture at its own latency, with the shuffled controls."""
    rows = [(name, judged["against_mixture"], False) for name, judged in report["policies"].items()]
    rows += [(name, control["against_mixture"], True) for name, control in report["shuffled"].items()]
    bound = report["oracle"]["against_mixture"]["value"]
    ends = [100 * v for _, e, _ in rows for v in e["interval"]] + [0.0, 100 * bound]
    room = 0.06 * (max(ends) - min(ends)) + 0.2
    x = Scale(min(ends) - room, max(ends) + room, 250, WIDTH - 40)
    height = 92 + _ROW * len(rows)
    title = "Gain over the best static mixture at the same mean latency, points, mean over the budgets"
    parts = [svg.text(20, 30, title, "title")]
    for value in svg.ticks(x.low, x.high, 9):
        parts.append(svg.line(x(value), 46, x(value), height - 40, "grid"))
        parts.append(svg.text(x(value), height - 22, f"{value:+g}" if value else "0", "small muted", "middle"))
    parts.append(svg.line(x(0), 46, x(0), height - 40, "deadline"))
    oracle = x(100 * bound)
    parts.append(_stroke(f"M{oracle:.1f},46 L{oracle:.1f},{height - 40}", "var(--good)", 2, "2 4"))
    parts.append(svg.text(oracle - 6, height - 4, f"{report['oracle']['kind']} oracle", "tiny good", "end"))
    names = list(report["policies"])
    for i, (name, gain, is_control) in enumerate(rows):
        at, color = 64 + i * _ROW, "#8b949e" if is_control else color_of(names, name)
        label = f"{short(name)}, shuffled" if is_control else short(name)
        parts.append(svg.text(238, at + 4, label, "small muted" if is_control else "small", "end"))
        low, high = (x(100 * v) for v in gain["interval"])
        parts.append(_stroke(f"M{low:.1f},{at} L{high:.1f},{at}", color, 3))
        tip = f"{label}: {100 * gain['value']:+.2f} points"
        parts.append(_dot(x(100 * gain["value"]), at, 5, color, tip))
    return svg.document("".join(parts), WIDTH, height, title, style=style)
