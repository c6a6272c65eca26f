"""The two pictures of a bench: accuracy or CIDEr against measured latency, and which settings each budget used.

Reads the result object only; knows neither records nor models.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from tempovlm.core.knobs import TIERS
from tempovlm.evaluation import svg
from tempovlm.lab.statistics import marginals

WIDTH = 760
_PLOT_HEIGHT = 400
_LEFT, _RIGHT, _TOP, _BOTTOM = 62, 24, 84, 52
_ROW = 30


@dataclass(frozen=True, slots=True)
class Scale:
    """Numbers on an axis to pixels."""

    low: float
    high: float
    start: float
    end: float

    def __call__(self, value: float) -> float:
        """The pixel of a value."""
        return self.start + (value - self.low) / (self.high - self.low) * (self.end - self.start)


@dataclass(frozen=True, slots=True)
class Score:
    """What the upright axis shows, a hundredfold.

    Attributes:
        name: of the field in a row. title, label: at the top and in the key.
        unit: after a number. most: the largest there can be.
    """

    name: str
    title: str
    label: str
    unit: str
    most: float

    def has(self, row: dict[str, Any]) -> bool:
        """Whether a row has it."""
        return row.get(self.name) is not None

    def drawn(self, row: dict[str, Any]) -> dict[str, Any]:
        """The row with this score and its interval as `score` and `score_interval`."""
        return row | {"score": row[self.name], "score_interval": row[f"{self.name}_interval"]}


ACCURACY = Score("accuracy", "Accuracy", "accuracy", " %", 100.0)
CIDER = Score("cider", "CIDEr, times 100,", "CIDEr", "", 1000.0)


def score_of(result: dict[str, Any]) -> Score:
    """CIDEr where all questions ask for captions, else accuracy."""
    rows = result["budgets"]
    return CIDER if any(map(CIDER.has, rows)) and not any(map(ACCURACY.has, rows)) else ACCURACY


@dataclass(slots=True)
class Labels:
    """Finds a place for each two-line label beside its point where it covers no other label and no point."""

    taken: list[tuple[float, float, float, float]] = field(default_factory=list)

    def block(self, x: float, y: float, half_width: float, half_height: float) -> None:
        """Keep labels off a box around (x, y)."""
        self.taken.append((x - half_width, y - half_height, x + half_width, y + half_height))

    def place(self, x: float, y: float, width: float) -> tuple[float, float, str]:
        """Where the first baseline goes, and its anchor: above or below the point, to the right or the left."""
        # Below to the right first: a curve that rises leaves that side empty.
        options = [
            (x + 9, y + 26, "start"),
            (x - 9, y - 26, "end"),
            (x + 9, y - 26, "start"),
            (x - 9, y + 26, "end"),
        ]
        options += [
            (x + 9, y + 60, "start"),
            (x - 9, y - 60, "end"),
            (x + 9, y - 60, "start"),
            (x - 9, y + 60, "end"),
        ]
        best = min(options, key=lambda option: self._covered(self._box(option, width)))
        self.taken.append(self._box(best, width))
        return best

    @staticmethod
    def _box(option: tuple[float, float, str], width: float) -> tuple[float, float, float, float]:
        x, y, anchor = option
        left = x if anchor == "start" else x - width
        return left, y - 12, left + width, y + 19

    def _covered(self, box: tuple[float, float, float, float]) -> float:
        outside = max(0.0, box[2] - (WIDTH - 6)) + max(0.0, _LEFT - box[0])
        outside += max(0.0, box[3] - (_PLOT_HEIGHT - _BOTTOM - 4)) + max(0.0, _TOP - box[1])
        area = outside * 40
        for other in self.taken:
            wide = min(box[2], other[2]) - max(box[0], other[0])
            high = min(box[3], other[3]) - max(box[1], other[1])
            area += max(0.0, wide) * max(0.0, high)
        return area


def trade_off(result: dict[str, Any], *, style: str = svg.STYLE) -> str:
    """Both pictures as one document."""
    plot, knobs, height = trade_off_plot(result), knob_plot(result), knob_plot_height(result)
    body = plot + svg.group(knobs, 0, _PLOT_HEIGHT)
    return svg.document(
        body,
        WIDTH,
        _PLOT_HEIGHT + height,
        f"{score_of(result).title} against measured latency at each budget, and the settings chosen",
        style=style,
    )


def trade_off_plot(result: dict[str, Any]) -> str:
    """Accuracy or CIDEr against measured latency, a point a budget, the fixed setting as a diamond; 760 × 400."""
    score = score_of(result)
    rows = [score.drawn(row) for row in result["budgets"] if row["p50_ms"] is not None and score.has(row)]
    fixed = result.get("fixed")
    points = [*rows, score.drawn(fixed)] if fixed and fixed["p50_ms"] is not None and score.has(fixed) else rows
    if not points:
        return svg.text(_LEFT, _TOP, "no request was answered", "muted")
    x, y = _axes(points, score)
    title = f"{score.title} against measured latency · {_sources(result)}"
    parts = [svg.text(20, 30, title, "title"), _key(20, 54, score), *_frame(x, y, score)]
    labels = Labels()
    for row in points:
        at = y(100 * row["score"])
        low, high = (y(100 * share) for share in row["score_interval"])
        labels.block(x(row["p50_ms"]), at, 8, 8)
        labels.block(x(row["p50_ms"]), (low + high) / 2, 3, (low - high) / 2)
        labels.block(x(row.get("budget_ms") or row["p95_ms"]), at, 3, 9)
    ordered = sorted(rows, key=lambda row: row["p50_ms"])
    trend = " ".join(f"{x(r['p50_ms']):.1f},{y(100 * r['score']):.1f}" for r in ordered)
    parts.append(f'<path class="trend" d="M{trend.replace(" ", " L")}"/>' if len(ordered) > 1 else "")
    parts += [_budget_marks(row, x, y) for row in rows]
    if len(points) > len(rows):
        parts.append(_fixed_marks(points[-1], x, y, labels))
    parts += [_budget_label(row, x, y, labels) for row in ordered]
    return "".join(parts)


def _axes(points: Sequence[dict[str, Any]], score: Score) -> tuple[Scale, Scale]:
    right_ms = max(max(row["p95_ms"], row.get("budget_ms") or 0.0) for row in points) * 1.04
    shares = [100 * share for row in points for share in (row["score"], *row["score_interval"])]
    low, high = min(shares) - 3, max(shares) + 3
    spare = max(0.0, 24 - (high - low)) / 2
    low, high = max(0.0, low - spare), min(score.most, high + spare)
    x = Scale(0.0, right_ms, _LEFT, WIDTH - _RIGHT)
    return x, Scale(low, max(high, low + 1), _PLOT_HEIGHT - _BOTTOM, _TOP)


def _frame(x: Scale, y: Scale, score: Score) -> list[str]:
    bottom = _PLOT_HEIGHT - _BOTTOM
    parts: list[str] = []
    for value in svg.ticks(y.low, y.high, 6):
        parts.append(svg.line(_LEFT, y(value), WIDTH - _RIGHT, y(value), "grid"))
        parts.append(svg.text(_LEFT - 8, y(value) + 4, f"{value:g}{score.unit}", "small muted", "end"))
    for value in svg.ticks(x.low, x.high, 8):
        parts.append(svg.line(x(value), bottom, x(value), bottom + 5, "axis"))
        parts.append(svg.text(x(value), bottom + 20, f"{value:g}", "small muted", "middle"))
    parts.append(svg.line(_LEFT, bottom, WIDTH - _RIGHT, bottom, "axis"))
    parts.append(svg.text(WIDTH - _RIGHT, bottom + 40, "measured latency of an answer, ms", "small muted", "end"))
    return parts


def _key(x: float, y: float, score: Score) -> str:
    """What the marks mean, in one line."""
    mid = y - 4
    parts = [
        f'<circle cx="{x + 5:.0f}" cy="{mid:.0f}" r="5" class="point"/>',
        svg.text(x + 16, y, "median", "small muted"),
    ]
    x += 78
    parts += [svg.line(x, mid, x + 20, mid, "whisker"), svg.line(x + 20, mid - 4, x + 20, mid + 4, "whisker")]
    parts.append(svg.text(x + 27, y, "to 95th percentile", "small muted"))
    x += 154
    parts += [svg.line(x, mid - 7, x, mid + 7, "deadline"), svg.text(x + 8, y, "deadline", "small muted")]
    x += 78
    parts += [svg.line(x, mid - 8, x, mid + 8, "interval")]
    parts.append(svg.text(x + 9, y, f"95 % interval of {score.label}", "small muted"))
    return "".join(parts)


def _budget_marks(row: dict[str, Any], x: Scale, y: Scale) -> str:
    left, right, at = x(row["p50_ms"]), x(row["p95_ms"]), y(100 * row["score"])
    low, high = (y(100 * share) for share in row["score_interval"])
    deadline = x(row["budget_ms"])
    return "".join(
        (
            svg.line(left, low, left, high, "interval"),
            svg.line(right, at, deadline, at, "lead"),
            svg.line(left, at, right, at, "whisker"),
            svg.line(right, at - 4, right, at + 4, "whisker"),
            svg.line(deadline, at - 8, deadline, at + 8, "deadline"),
            f'<circle cx="{left:.1f}" cy="{at:.1f}" r="6" class="point"/>',
        )
    )


def _budget_label(row: dict[str, Any], x: Scale, y: Scale, labels: Labels) -> str:
    first, second = f"{row['budget_ms']:g} ms budget", f"{_percent(row['adherence'], 1)} on time"
    width = max(svg.text_width(first, 14), svg.text_width(second, 12))
    left, top, anchor = labels.place(x(row["p50_ms"]), y(100 * row["score"]), width)
    return svg.text(left, top, first, "strong label", anchor) + svg.text(
        left, top + 15, second, "small muted label", anchor
    )


def _fixed_marks(row: dict[str, Any], x: Scale, y: Scale, labels: Labels) -> str:
    left, right, at = x(row["p50_ms"]), x(row["p95_ms"]), y(100 * row["score"])
    low, high = (y(100 * share) for share in row["score_interval"])
    first, second = f"fixed {row['knobs']}", f"p99/p50 {row['p99_over_p50']:.2f}"
    where = labels.place(left, at, svg.text_width(first, 14))
    return "".join(
        (
            svg.line(left, low, left, high, "interval-reference"),
            svg.line(left, at, right, at, "whisker-reference"),
            svg.line(right, at - 4, right, at + 4, "whisker-reference"),
            f'<path class="hollow" d="M{left:.1f} {at - 7:.1f}l7 7l-7 7l-7 -7z" style="fill:var(--paper)"/>',
            svg.text(where[0], where[1], first, "strong reference label", where[2]),
            svg.text(where[0], where[1] + 15, second, "small muted label", where[2]),
        )
    )


def _sources(result: dict[str, Any]) -> str:
    return " · ".join(str(result[name]) for name in ("model", "device", "data_source") if result.get(name))


def knob_plot_height(result: dict[str, Any]) -> int:
    """Pixels that `knob_plot` needs."""
    return 74 + _ROW * len(result["budgets"])


def knob_plot(result: dict[str, Any]) -> str:
    """For each budget, how often each tier, top-k and depth was chosen: three columns of bars, 760 px wide."""
    columns = list(zip(*(marginals(row["knobs"]) for row in result["budgets"]), strict=True))
    heads = ("vision tier", "experts per token", "blocks")
    left, gap = 92, 20
    width = (WIDTH - left - _RIGHT - 2 * gap) / 3
    parts = [svg.text(20, 22, "Settings chosen, share of answers", "title")]
    for row, budget in enumerate(result["budgets"]):
        parts.append(svg.text(left - 12, 80 + row * _ROW, f"{budget['budget_ms']:g} ms", "strong", "end"))
    for column, (head, bars) in enumerate(zip(heads, columns, strict=False)):
        x = left + column * (width + gap)
        seen = sorted({name for bar in bars for name in bar}, key=_order)
        legal = _legal(result, column) or seen
        parts.append(svg.text(x, 52, head, "small muted"))
        for row, bar in enumerate(bars):
            parts.append(_stacked(bar, legal, (x, 64 + row * _ROW), width))
    return "".join(parts)


def _legal(result: dict[str, Any], column: int) -> list[str]:
    """All values of a knob, so that a value keeps its shade whichever others occur."""
    space = result.get("knob_space")
    if not space:
        return []
    prefix, name = (("", "tier"), ("k", "top_k"), ("b", "num_blocks"))[column]
    return [f"{prefix}{value}" for value in space[name]]


def _stacked(bar: dict[str, float], values: list[str], origin: tuple[float, float], width: float) -> str:
    x, y = origin
    parts: list[str] = []
    for value in values:
        share = bar.get(value, 0.0)
        if share <= 0:
            continue
        place = values.index(value) / max(len(values) - 1, 1)
        shade = round(place * (len(svg.RAMP) - 1))
        name = value.lstrip("kb") if value[1:].isdigit() else value
        parts.append(
            svg.rect(
                x, y, max(share * width - 1, 0.5), 22, fill=svg.RAMP[shade], title=f"{value}: {_percent(share)}"
            )
        )
        label = f"{name} · {_percent(share)}" if share < 0.995 else name
        label = label if svg.text_width(label, 11) + 8 < share * width else name
        if svg.text_width(label, 11) + 5 < share * width:
            ink = "on-light" if shade <= 2 else "on-dark"
            parts.append(svg.text(x + share * width / 2, y + 15, label, f"tiny {ink}", "middle"))
        x += share * width
    return "".join(parts)


def _percent(share: float, digits: int = 0) -> str:
    return f"{100 * share:.{digits}f}".removesuffix(".0") + " %"


def _order(name: str) -> tuple[int, str]:
    if name in TIERS:
        return TIERS.index(name), ""
    return int("".join(c for c in name if c.isdigit()) or 0), name
