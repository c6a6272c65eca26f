"""The page of a study of shared lanes, and its chapter in the judge's: plots and tables that need no network."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tempovlm.core.errors import UserError
from tempovlm.core.files import writing_to
from tempovlm.core.paths import write_whole
from tempovlm.lab.drawing import new_figure, style, tip, to_svg
from tempovlm.lab.pages import render as render_template
from tempovlm.lab.queueing.choosers import CLAIRVOYANT, GREEDY, KIND, NATIVE, SHEDS, SLACKFIT, TABLE
from tempovlm.lab.queueing.study import SCHEMA

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_WIDTH = 920
_RIGHT = "Right and on time, % of all requests"
_MOST_LINES = 12
_NAMES = {
    NATIVE: "native, no refusals",
    SHEDS: "native, refuses what would be late",
    GREEDY: "table, heeds nobody who waits",
    TABLE: "table",
    SLACKFIT: "SlackFit",
    KIND: "accuracy by kind of question",
}

_PRICES = {None: "", "derived": ", derived price", "waiting": ", price of those who wait", "0": ", no price"}

Row = Mapping[str, Any]


def write(report: Mapping[str, Any], folder: Path) -> list[Path]:
    """Write `under_load.html`, and a plot of each kind of arrivals; returns their paths.

    Raises:
        UserError: the folder cannot be written.
    """
    files = {"under_load.html": render(report)}
    for name in dict.fromkeys(row["arrivals"] for row in report["rows"]):
        rows = [row for row in report["rows"] if row["arrivals"] == name and row["budget_ms"] == _overall(report)]
        files[f"{Path(name).stem}.svg"] = lines(rows, "right_on_time", _RIGHT, theme=True)
    with writing_to(folder):
        for name, content in files.items():
            write_whole(folder / name, content)
    return [folder / name for name in files]


def read(path: Path) -> dict[str, Any]:
    """Return the report of a simulation.

    Raises:
        UserError: the file cannot be read, or holds no such report.
    """
    try:
        report: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if report["schema"] == SCHEMA:
            return report
    except (OSError, ValueError, KeyError, TypeError):
        pass
    raise UserError(f"{path}: is no report of experiments/serving/simulate.py; give the file of its --json")


def render(report: Mapping[str, Any]) -> str:
    """Render the whole page."""
    return render_template("queueing.html", sections=sections(report), facts=_facts(report), label=label)


def sections(report: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return plots and tables of each kind of arrivals, as the template of a chapter takes them."""
    whole = [row for row in report["rows"] if row["budget_ms"] == _overall(report)]
    arrivals = list(dict.fromkeys(row["arrivals"] for row in whole))
    found = []
    for name in arrivals:
        own = [row for row in whole if row["arrivals"] == name]
        kinds = [row for row in report["kinds"] if row["arrivals"] == name]
        classes = [
            row for row in report["rows"] if row["arrivals"] == name and row["budget_ms"] != _overall(report)
        ]
        found.append(
            {
                "arrivals": name,
                "right": lines(own, "right_on_time", _RIGHT),
                "refused": lines(own, "refused", "Refused at once, % of all requests"),
                "late": lines(own, "late", "Answered or refused late, % of all requests"),
                "loads": list(dict.fromkeys(row["load"] for row in own)),
                "table": _by_label(own, "load"),
                "by_kind": _parts(kinds, "kind"),
                "by_budget": _parts(classes, "budget_ms"),
                "closed": [row for row in report["closed"] if row["arrivals"] == name],
            }
        )
    return found


def _overall(report: Mapping[str, Any]) -> float | None:
    budgets_ms = report["conditions"]["budgets_ms"]
    return None if len(budgets_ms) > 1 else float(budgets_ms[0])


def label(row: Row) -> str:
    """Name a policy at a price as people do."""
    plan, _, of = str(row["policy"]).partition(":")
    name = (
        f"arrivals known in advance, {_NAMES.get(of or KIND, Path(of).name)}"
        if plan == CLAIRVOYANT
        else _NAMES.get(plan, Path(plan).name)
    )
    price = _PRICES.get(row["price"], f", price {row['price']} per ms")
    order = "" if row["discipline"] in (None, "edf") else f", {row['discipline']}"
    return f"{name}{price}{order}"


def _by_label(rows: Sequence[Row], column: str) -> dict[str, dict[Any, Row]]:
    table: dict[str, dict[Any, Row]] = {}
    for row in rows:
        table.setdefault(label(row), {})[row[column]] = row
    return table


def _parts(rows: Sequence[Row], column: str) -> list[dict[str, Any]]:
    """Split rows into one table a load, with a column for each value of a field."""
    loads = dict.fromkeys(row["load"] for row in rows)
    return [
        {
            "load": load,
            "columns": list(dict.fromkeys(row[column] for row in rows)),
            "table": _by_label([row for row in rows if row["load"] == load], column),
        }
        for load in loads
    ]


@style()
def lines(rows: Sequence[Row], name: str, title: str, *, theme: bool = False) -> str:
    """Draw a share against load, a line for each policy at each price.

    Args:
        rows: of one kind of arrivals.
        name: field of the share.
        title: of the plot, which leaves out prices that are numbers if there are too many lines.
        theme: whether the drawing has its own colours; a page defines them.
    """
    table = _by_label(rows, "load")
    if len(table) > _MOST_LINES:  # more than there are colours
        table = _by_label([row for row in rows if row["price"] in _PRICES], "load")
    figure = new_figure(_WIDTH, 340 + 8 * len(table))
    axes = figure.add_subplot()
    for i, (text, by_load) in enumerate(table.items()):
        _line(axes, text, by_load, name, f"C{i % _MOST_LINES}", "--" if text.startswith("arrivals") else "-")
    axes.set_title(title, loc="left", weight="bold")
    axes.set_xlabel("load: arrivals over what all lanes answer at the native setting")
    axes.set_ylim(bottom=0)
    axes.legend(loc="upper left", bbox_to_anchor=(1.01, 1.02))
    return to_svg(figure, title, theme=theme)


def _line(axes: Axes, text: str, by_load: Mapping[float, Row], name: str, color: str, dashes: str) -> None:
    loads = sorted(by_load)
    axes.plot(loads, [100 * by_load[load][name] for load in loads], color=color, ls=dashes, marker="o", label=text)
    for load in loads:
        row = by_load[load]
        at = 100 * row[name]
        if name == "right_on_time":
            axes.plot((load,) * 2, [100 * end for end in row["interval"]], color=color, lw=1)
        (dot,) = axes.plot(load, at, "o", color=color)
        tip(dot, f"{text}: {at:.1f} % at load {load:g}")


def _facts(report: Mapping[str, Any]) -> dict[str, Any]:
    conditions = report["conditions"]
    return {
        "simulated": f"lane time drawn from {conditions['repeats']} repeats of {conditions['timed_questions']} "
        f"pictures, answers of {conditions['questions']} questions",
        "budgets": ", ".join(f"{budget_ms:.0f} ms" for budget_ms in conditions["budgets_ms"]),
        "mean time of the native setting": f"{conditions['native_ms']:.1f} ms",
        "lanes": conditions["lanes"],
        "first request": conditions["first_request"],
        "seed": conditions["seed"],
        "results": conditions["results"],
        **report["stamp"],
    }
