"""The plots of a bench: accuracy or CIDEr against measured latency, and the settings that each budget used."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tempovlm.core.knobs import AXES, KNOBS, TIERS
from tempovlm.lab.drawing import (
    COLUMN_PX,
    INK,
    RAMP,
    REFERENCE,
    new_figure,
    style,
    tip,
    to_pdf,
    to_svg,
    zoom,
)
from tempovlm.lab.statistics import marginals

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_WIDTH = 860
_LETTER_PX = 6.6
_COLUMN_PX = 236


@dataclass(frozen=True, slots=True)
class Score:
    """The quantity on the vertical axis, times 100.

    Attributes:
        name: of the field in a row.
        title: its name in the plot's title.
        label: its name on the axis and in the legend.
        most: the largest value.
    """

    name: str
    title: str
    label: str
    most: float

    def has(self, row: Mapping[str, Any]) -> bool:
        """Whether a row has it."""
        return row.get(self.name) is not None

    def of(self, row: Mapping[str, Any]) -> tuple[float, float, float]:
        """Return a row's value and the ends of its interval, times 100."""
        low, high = row[f"{self.name}_interval"]
        return 100 * row[self.name], 100 * low, 100 * high


ACCURACY = Score("accuracy", "Accuracy", "accuracy, %", 100.0)
CIDER = Score("cider", "CIDEr, times 100,", "CIDEr", 1000.0)


def score_of(result: Mapping[str, Any]) -> Score:
    """Return CIDEr if all questions ask for captions, else accuracy."""
    rows = result["budgets"]
    return CIDER if any(map(CIDER.has, rows)) and not any(map(ACCURACY.has, rows)) else ACCURACY


@style(paper=True)
def trade_off_narrow(result: Mapping[str, Any]) -> str:
    """Draws the plot of `trade_off_pdf` for a narrow page that defines the theme."""
    return to_svg(*_narrow(result), theme=False)


@style(paper=True)
def trade_off_pdf(result: Mapping[str, Any]) -> bytes:
    """Draws accuracy or CIDEr against measured latency for a column of a paper, without the settings chosen."""
    return to_pdf(*_narrow(result))


def _narrow(result: Mapping[str, Any]) -> tuple[Figure, str]:
    """The figure of a column's width, drawn within the style for papers, and its title."""
    score = score_of(result)
    figure = new_figure(COLUMN_PX, 200 + 10 * len(result["budgets"]))
    _draw_scores(figure.add_subplot(), result, score)
    return figure, f"{score.title} against measured latency at each budget"


@style()
def trade_off(result: Mapping[str, Any], *, theme: bool = True) -> str:
    """Draws accuracy or CIDEr against measured latency and, below it, the settings chosen at each budget.

    Args:
        result: result of a bench.
        theme: False inside a page that defines the theme.
    """
    score, rows = score_of(result), result["budgets"]
    knobs_height = 90 + 30 * len(rows)
    figure = new_figure(_WIDTH, 440 + knobs_height)
    (upper,), (lower,) = figure.subfigures(2, 1, squeeze=False, height_ratios=(440, knobs_height))
    upper.suptitle(
        f"{score.title} against measured latency · {_sources(result)}", x=0.02, ha="left", weight="bold"
    )
    _draw_scores(upper.add_subplot(), result, score)
    _draw_knobs(lower, result)
    return to_svg(
        figure,
        f"{score.title} against measured latency at each budget, and the settings chosen",
        theme=theme,
    )


@style()
def knobs(result: Mapping[str, Any]) -> str:
    """Draws how often each tier, top-k and depth was chosen at each budget, for a page that defines the theme."""
    figure = new_figure(_WIDTH, 90 + 30 * len(result["budgets"]))
    _draw_knobs(figure, result)
    return to_svg(figure, "Settings chosen at each budget", theme=False)


def _sources(result: Mapping[str, Any]) -> str:
    return " · ".join(str(result[name]) for name in ("model", "device", "data_source") if result.get(name))


def _draw_scores(axes: Axes, result: Mapping[str, Any], score: Score) -> None:
    """A point a budget, with the interval of its score, the 95th percentile of its latency and its deadline."""
    rows = [row for row in result["budgets"] if row["p50_ms"] is not None and score.has(row)]
    fixed = result.get("fixed")
    if not fixed or fixed["p50_ms"] is None or not score.has(fixed):
        fixed = None
    if not rows and fixed is None:
        axes.set_axis_off()
        axes.text(0, 1, "no request was answered", va="top")
        return
    ordered = sorted(rows, key=lambda row: row["p50_ms"])
    axes.plot([row["p50_ms"] for row in ordered], [score.of(row)[0] for row in ordered], color=INK, alpha=0.25)
    for i, row in enumerate(rows):
        color = f"C{i}"
        label = f"{row['budget_ms']:g} ms budget\n{_percent(row['adherence'], 1)} on time"
        at = _draw_point(axes, row, score, color, label, "o")
        axes.plot((row["p95_ms"], row["budget_ms"]), (at, at), color=color, ls=":", lw=zoom())
        axes.plot(row["budget_ms"], at, color=color, marker="|", ms=18 * zoom(), mew=2 * zoom())
    if fixed is not None:
        label = f"fixed {fixed['knobs']}\nslowest 1 %: {fixed['p99_over_p50']:.2f} × median"
        _draw_point(axes, fixed, score, REFERENCE, label, "D")
    _fit(axes, score, [*rows, *([fixed] if fixed else [])])
    axes.set_xlabel("measured latency of an answer, ms")
    axes.set_ylabel(score.label)
    if zoom() >= 1:
        axes.legend(loc="upper left", bbox_to_anchor=(1.01, 1.02), labelspacing=0.8)
        _explain(axes, score, ncols=4)
    else:
        figure = axes.get_figure(root=True)
        assert figure is not None
        figure.legend(loc="outside upper center", ncols=2, columnspacing=1, handletextpad=0.2)
        _explain(axes, score, ncols=2)


def _draw_point(axes: Axes, row: Mapping[str, Any], score: Score, color: str, label: str, marker: str) -> float:
    """Draws the median latency with the way to the 95th percentile; returns the score."""
    at, low, high = score.of(row)
    axes.plot((row["p50_ms"],) * 2, (low, high), color=color, lw=5 * zoom(), alpha=0.35, solid_capstyle="butt")
    axes.plot((row["p50_ms"], row["p95_ms"]), (at, at), color=color, lw=1.5 * zoom())
    axes.plot(row["p95_ms"], at, color=color, marker="|", ms=9 * zoom(), mew=1.5 * zoom())
    (point,) = axes.plot(row["p50_ms"], at, color=color, marker=marker, ms=8 * zoom(), ls="", label=label)
    tip(point, f"{' · '.join(label.split(chr(10)))}: {at:.1f} ({low:.1f} to {high:.1f}), {row['p50_ms']:.1f} ms")
    return at


def _fit(axes: Axes, score: Score, rows: Sequence[Mapping[str, Any]]) -> None:
    """Sets limits that hold every mark, from 0 ms, and 24 points of the score at the least."""
    ends = [value for row in rows for value in score.of(row)]
    low, high = min(ends) - 3, max(ends) + 3
    spare = max(0.0, 24 - (high - low)) / 2
    axes.set_ylim(max(0.0, low - spare), min(score.most, high + spare))
    axes.set_xlim(0, 1.04 * max(max(row["p95_ms"], row.get("budget_ms") or 0.0) for row in rows))


def _explain(axes: Axes, score: Score, ncols: int) -> None:
    """Adds a key of the marks below the plot."""
    from matplotlib.lines import Line2D

    marks = {
        "median": Line2D([], [], color=INK, marker="o", ls="", ms=8 * zoom()),
        "to 95th percentile": Line2D([], [], color=INK, lw=1.5 * zoom()),
        "deadline": Line2D([], [], color=INK, marker="|", ls="", ms=16 * zoom(), mew=2 * zoom()),
        f"95 % interval of {score.label.removesuffix(', %')}": Line2D(
            [], [], color=INK, alpha=0.35, lw=5 * zoom()
        ),
    }
    figure = axes.get_figure(root=False)
    assert figure is not None
    figure.legend(marks.values(), marks, loc="outside lower center", ncols=ncols, labelcolor="linecolor")


def _draw_knobs(figure: Any, result: Mapping[str, Any]) -> None:
    """Draws three columns of stacked bars, a bar a budget."""
    rows = result["budgets"]
    columns = list(zip(*(marginals(row["knobs"]) for row in rows), strict=True)) or [()] * len(KNOBS)
    figure.suptitle("Settings chosen, share of answers", x=0.02, ha="left", weight="bold")
    panels = figure.subplots(1, len(KNOBS), sharey=True)
    for axes, (name, knob), bars in zip(panels, AXES.items(), columns, strict=True):
        values = _legal(result, name) or sorted({value for bar in bars for value in bar}, key=_order)
        left = [0.0] * len(rows)
        for place, value in enumerate(values):
            shade = round(place / max(len(values) - 1, 1) * (len(RAMP) - 1))
            shares = [bar.get(value, 0.0) for bar in bars]
            drawn = axes.barh(range(len(rows)), shares, left=left, color=RAMP[shade], height=0.74)
            for bar, share in zip(drawn, shares, strict=True):
                tip(bar, f"{value}: {_percent(share)}")
            texts = [_fitting(value, share) for share in shares]
            axes.bar_label(
                drawn, texts, label_type="center", fontsize=11, color="#11161b" if shade <= 2 else "#fefefe"
            )
            left = [start + share for start, share in zip(left, shares, strict=True)]
        axes.set_title(knob.head, loc="left", fontsize=12)
        axes.set_yticks(range(len(rows)), [f"{row['budget_ms']:g} ms" for row in rows])
        axes.set(xlim=(0, 1), xticks=[], ylim=(len(rows) - 0.5, -0.5))
        axes.spines["bottom"].set_visible(False)
        axes.grid(visible=False)


def _fitting(value: str, share: float) -> str:
    """Return the longest label that fits a bar of this share: value and share, the value, or nothing."""
    name = value.lstrip("kb") if value[1:].isdigit() else value
    texts = (f"{name} · {_percent(share)}" if share < 0.995 else name, name)
    return next((text for text in texts if _LETTER_PX * len(text) + 6 < share * _COLUMN_PX), "")


def _legal(result: Mapping[str, Any], knob: str) -> list[str]:
    """Return all values of a knob, so that a value keeps its shade whichever others occur."""
    return [f"{AXES[knob].prefix}{value}" for value in result.get("knob_space", {}).get(knob, ())]


def _percent(share: float, digits: int = 0) -> str:
    return f"{100 * share:.{digits}f}".removesuffix(".0") + " %"


def _order(name: str) -> tuple[int, str]:
    if name in TIERS:
        return TIERS.index(name), ""
    return int("".join(c for c in name if c.isdigit()) or 0), name
