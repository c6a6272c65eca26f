"""The tables of the judge's page, and which budgets hold once several of them are allowed for.

Reads the report object only and gives HTML; it knows neither models nor how anything was measured.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from tempovlm.evaluation import judge_figures
from tempovlm.evaluation.report import flatten

ALPHA = 0.05
"""What a corrected p-value must not exceed for a budget to hold."""


def holding(rows: Sequence[Mapping[str, Any]]) -> tuple[list[float], list[float]]:
    """Budgets where a policy is above, and below, the static mixture after the correction over its budgets."""
    signs = [(row["budget_ms"], _held(row["against_mixture"])) for row in rows]
    return [budget_ms for budget_ms, sign in signs if sign > 0], [b_ms for b_ms, sign in signs if sign < 0]


def _held(gain: Mapping[str, Any]) -> int:
    """1 above, -1 below, 0 where the difference does not hold after the correction."""
    if gain["holm_p_value"] > ALPHA:
        return 0
    return 1 if gain["value"] > 0 else -1


def policies(report: Mapping[str, Any]) -> str:
    """Accuracy of every policy at every budget, and its gain; the oracle below."""
    head = ["policy", *(f"{budget:g} ms" for budget in report["budgets_ms"])]
    rows = []
    for name, judged in report["policies"].items():
        cells = [f"<td>{escape(judge_figures.short(name))}</td>"]
        for row in judged["by_budget"]:
            gain = row["against_mixture"]
            star = " *" if _held(gain) else ""
            text = f"{100 * row['accuracy']['value']:.1f} %{star}{_signed(gain)}"
            cells.append(f'<td class="{_verdict(gain)}">{text}</td>')
        rows.append(_row(cells, name == report["subject"]))
    bound = [f"<td>{100 * one['value']:.1f} %</td>" for one in report["oracle"]["accuracy"]]
    rows.append(_row([f"<td>{escape(report['oracle']['kind'])} oracle</td>", *bound], False))
    return _table(head, rows)


def budgets(report: Mapping[str, Any]) -> str:
    """The subject's gain at each budget, over the best static mixture and over the best that keeps the budget."""
    head = (
        "budget",
        "gain",
        "p",
        "p, corrected",
        "after correction",
        "gain over the feasible mixture",
        "it mixes",
    )
    feasible = report["static"]["feasible_mixtures"]
    rows = []
    for row, mixture in zip(report["policies"][report["subject"]]["by_budget"], feasible, strict=True):
        gain, other = row["against_mixture"], row["against_feasible_mixture"]
        verdict = {1: "above", -1: "below", 0: "no difference"}[_held(gain)]
        cells = [
            f"<td>{row['budget_ms']:g} ms</td>",
            _gain(gain),
            f"<td>{_probability(gain['p_value'])}</td>",
            f"<td>{_probability(gain['holm_p_value'])}</td>",
            f"<td>{verdict}</td>",
            _gain(other),
            f"<td>{escape(_mixes(mixture))}</td>",
        ]
        rows.append(_row(cells, False))
    return _table(head, rows)


def _mixes(mixture: Mapping[str, Any]) -> str:
    settings = mixture["settings"]
    if not mixture["fits"]:
        return f"nothing fits: {settings[0]}"
    return settings[0] if len(settings) == 1 else f"{len(settings)} settings up to {settings[-1]}"


def datasets(report: Mapping[str, Any]) -> str:
    """A row a data set of the subject, and below it, folded, those of all policies."""
    parts, subject = report["by_dataset"], report["subject"]
    if len(parts) < 2:
        return '<p class="note">There is one data set only: the figures are those above.</p>'
    head = [f"{budget:g} ms" for budget in report["budgets_ms"]]
    own = [
        _dataset_row(f"{name}, {part['num_questions']}", part["policies"][subject]) for name, part in parts.items()
    ]
    every = []
    for name, part in parts.items():
        about = f"{name}: {part['num_questions']} questions on {part['num_images']} pictures"
        every.append(f'<tr><th colspan="{len(head) + 1}">{escape(about)}</th></tr>')
        every += [
            _dataset_row(judge_figures.short(policy), rows, policy == subject)
            for policy, rows in part["policies"].items()
        ]
    return (
        f"{_table(('data set, questions', *head), own)}<details><summary>Every policy on each data set</summary>"
        f"{_table(('policy', *head), every)}</details>"
    )


def _dataset_row(label: str, rows: Sequence[Mapping[str, Any]], is_subject: bool = False) -> str:
    cells = [f"<td>{escape(label)}</td>"]
    for row in rows:
        gain = row["against_mixture"]
        cells.append(
            f'<td class="{_verdict(gain)}">{100 * row["accuracy"]["value"]:.1f} %'
            f"{_signed(gain)}"
            f'<small class="plain">{row["mean_latency_ms"]:.3g} ms</small></td>'
        )
    return _row(cells, is_subject)


def overall(report: Mapping[str, Any]) -> str:
    """Every policy over all budgets; mixture and oracle below."""
    head = ("policy", "area", "area against the mixture", "gap closed", "regret to the oracle", "own time")
    rows = []
    for name, judged in report["policies"].items():
        area, lead = judged["area"], judged["area_against_mixture"]
        cells = [
            f"<td>{escape(judge_figures.short(name))}</td>",
            f"<td>{100 * area['value']:.1f}<small>{_range(area)}</small></td>",
            _gain(lead),
            f"<td>{_closed(judged['gap_closed'])}</td>",
            f"<td>{100 * judged['regret']['value']:.1f}<small>{_range(judged['regret'])}</small></td>",
            f"<td>{judged['control_ms']:.2g} ms</td>" if judged["control_ms"] else "<td></td>",
        ]
        rows.append(_row(cells, name == report["subject"]))
    for name, area in (
        ("best static mixture", report["static"]["mixture_area"]),
        (f"{report['oracle']['kind']} oracle", report["oracle"]["area"]),
    ):
        shown = f"<td>{100 * area['value']:.1f}<small>{_range(area)}</small></td>"
        rows.append(_row([f"<td>{escape(name)}</td>", shown, "<td></td>" * 4], False))
    return _table(head, rows)


def timeliness(rows: Sequence[Mapping[str, Any]]) -> str:
    """A row a budget of one policy: who was on time and how much time was used."""
    head = ("budget", "on time", "95 % interval", "requests", "p50", "p95", "p99", "time used", "fallback")
    shown = []
    for row in rows:
        ratios, interval = row["latency_over_budget"], row["adherence_wilson"]
        cells = [
            f"{row['budget_ms']:g} ms",
            _share(row["adherence"]),
            "" if interval is None else f"{100 * interval[0]:.1f} to {100 * interval[1]:.1f} %",
            str(row["num_measured"]),
            *(("", "", "") if ratios is None else (f"{ratios[name]:.2f}" for name in ("p50", "p95", "p99"))),
            _share(row["utilisation"]),
            _share(row["fallback_rate"]),
        ]
        shown.append(_row([f"<td>{escape(cell)}</td>" for cell in cells], False))
    return _table(head, shown) + '<p class="note">p50, p95 and p99 are of latency / budget.</p>'


def controls(report: Mapping[str, Any]) -> str:
    """Policies that look at content, beside themselves with that of another question."""
    if not report["shuffled"]:
        return '<p class="note">No policy that was judged looks at content.</p>'
    head = ("policy", "gain, real", "gain, shuffled", "gap closed, real", "gap closed, shuffled", "area lost")
    rows = []
    for name, control in report["shuffled"].items():
        real = report["policies"][name]
        gains = (real["against_mixture"], control["against_mixture"])
        cells = [f"<td>{escape(judge_figures.short(name))}</td>"]
        cells += [_gain(gain) for gain in gains]
        cells += [f"<td>{_closed(one['gap_closed'])}</td>" for one in (real, control)]
        lost = control["content_gain"]
        cells.append(f"<td>{100 * lost['value']:.2f}<small>{_range(lost)}</small></td>")
        rows.append(_row(cells, name == report["subject"]))
    return _table(head, rows)


def ablation(report: Mapping[str, Any]) -> str:
    """Area by the knobs that may move."""
    if not report["ablation"]:
        return ""
    names = list(report["ablation"])
    head = ("knobs", *map(judge_figures.short, names))
    rows = []
    for i, first in enumerate(report["ablation"][names[0]]):
        areas = [report["ablation"][name][i]["area"] for name in names]
        label = " + ".join(first["knobs"]).replace("_", " ")
        cells = [f"<td>{100 * area['value']:.1f}<small>{_range(area)}</small></td>" for area in areas]
        rows.append(_row([f"<td>{escape(label)}</td>", *cells], False))
    return _table(head, rows)


def facts(provenance: Mapping[str, Any]) -> str:
    """Where the figures come from, a row a field."""
    rows = "".join(
        f"<tr><td>{escape(name)}</td><td>{escape(value)}</td></tr>" for name, value in flatten(provenance).items()
    )
    return f'<table class="facts"><tbody>{rows}</tbody></table>'


def _table(head: Sequence[str], rows: Sequence[str]) -> str:
    cells = "".join(f"<th>{escape(name)}</th>" for name in head)
    return f"<table><thead><tr>{cells}</tr></thead><tbody>{''.join(rows)}</tbody></table>"


def _row(cells: Sequence[str], is_subject: bool) -> str:
    mark = ' class="subject"' if is_subject else ""
    return f"<tr{mark}>{''.join(cells)}</tr>"


def _verdict(gain: Mapping[str, Any]) -> str:
    low, high = gain["interval"]
    return "good" if low > 0 else "bad" if high < 0 else ""


def _gain(gain: Mapping[str, Any]) -> str:
    """A cell of points and their interval."""
    return f'<td class="{_verdict(gain)}">{points(gain["value"])}<small>{_range(gain, sign=True)}</small></td>'


def _probability(value: float) -> str:
    return f"{value:.3f}" if value >= 0.001 else "&lt; 0.001"


def points(share: float) -> str:
    """A signed number of points."""
    shown = round(100 * share, 1)
    return f"{shown:+.1f}" if shown else "0.0"


def _signed(gain: Mapping[str, Any]) -> str:
    return f"<small>{points(gain['value'])}</small><small>{_range(gain, sign=True)}</small>"


def _range(one: Mapping[str, Any], *, sign: bool = False) -> str:
    low, high = one["interval"]
    return f"{points(low)} to {points(high)}" if sign else f"{100 * low:.1f} to {100 * high:.1f}"


def _closed(closed: Mapping[str, Any] | None) -> str:
    if closed is None:
        return "no gap"
    low, high = closed["interval"]
    return f"{100 * closed['value']:.0f} %<small>{100 * low:.0f} to {100 * high:.0f} %</small>"


def _share(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.1f} %"
