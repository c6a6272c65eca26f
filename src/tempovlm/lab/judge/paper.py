"""The judge's report for papers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tempovlm.lab.judge import figures
from tempovlm.lab.paper.export import Export, Tabular, interval, number, text

_QUANTILES = ("p50", "p95", "p99")


def export(report: Mapping[str, Any]) -> Export:
    """Return tables, tabulars and figures of a report of the judge."""
    return Export(
        tables={"judge_by_budget": _by_budget(report), "judge_overall": _overall(report)},
        tabulars={"judge_by_budget": _budget_tabular(report), "judge_overall": _overall_tabular(report)},
        figures={
            "frontier": lambda: figures.frontier_pdf(report),
            "gain": lambda: figures.gaps_pdf(report),
        },
    )


def _by_budget(report: Mapping[str, Any]) -> list[dict[str, Any]]:
    """A row for each policy and the reference, data set and budget; the data set `all` is all of them together."""
    rows = []
    for key, name in report["names"].items():
        whole = report["policies"][key]["by_budget"]
        rows += [_row(name, key, "all", row) for row in whole]
        for dataset, part in report["by_dataset"].items():
            rows += [_row(name, key, dataset, row) for row in part["policies"][key]]
    reference = report["reference"]
    for budget_ms, one in zip(report["budgets_ms"], reference["accuracy"], strict=True):
        about = {"policy": reference["name"], "dataset": "all", "budget_ms": budget_ms}
        rows.append({**dict.fromkeys(rows[0]), **about, **interval("accuracy", one["value"], one["interval"])})
    return rows


def _row(name: str, key: str, dataset: str, row: Mapping[str, Any]) -> dict[str, Any]:
    gain, feasible = row["against_mixture"], row.get("against_feasible_mixture", {})
    ratios = row.get("latency_over_budget") or {}
    return {
        "policy": name,
        "policy_id": key,
        "dataset": dataset,
        "budget_ms": row["budget_ms"],
        **interval("accuracy", row["accuracy"]["value"], row["accuracy"]["interval"]),
        "mean_latency_ms": row["mean_latency_ms"],
        "mixture_accuracy": gain["mixture_accuracy"],
        **interval("gain", gain["value"], gain["interval"]),
        "p_value": gain.get("p_value"),
        "holm_p_value": gain.get("holm_p_value"),
        **interval("gain_over_feasible", feasible.get("value"), feasible.get("interval")),
        "num_timed": row.get("num_measured"),
        **interval("on_time", row.get("adherence"), row.get("adherence_wilson")),
        "budget_used": row.get("utilisation"),
        **{f"latency_over_budget_{name}": ratios.get(name) for name in _QUANTILES},
        "fallback_rate": row.get("fallback_rate"),
    }


def _overall(report: Mapping[str, Any]) -> list[dict[str, Any]]:
    """A row for each policy, its shuffled control below it."""
    rows = []
    for key, name in report["names"].items():
        rows.append(_overall_row(name, key, False, report["policies"][key]))
        if key in report["shuffled"]:
            rows.append(_overall_row(name, key, True, report["shuffled"][key]))
    return rows


def _overall_row(name: str, key: str, is_shuffled: bool, judged: Mapping[str, Any]) -> dict[str, Any]:
    row: dict[str, Any] = {"policy": name, "policy_id": key, "shuffled": is_shuffled}
    parts = ("against_mixture", "gain"), ("area", "area"), ("area_against_mixture", "area_gain")
    for field, column in (*parts, ("gap_closed", "share_of_reference")):
        one = judged[field] or {}
        row |= interval(column, one.get("value"), one.get("interval"))
    return {**row, "control_ms": judged.get("control_ms")}


def _budget_tabular(report: Mapping[str, Any]) -> Tabular:
    rows = []
    for key, name in report["names"].items():
        cells = [row["accuracy"] for row in report["policies"][key]["by_budget"]]
        rows.append([text(name), *(number(one["value"], one["interval"], stacked=True) for one in cells)])
    return Tabular(
        caption=f"Accuracy in percent at each budget with 95 % intervals. {_about(report)}",
        head=("policy", *(f"{budget_ms:g} ms" for budget_ms in report["budgets_ms"])),
        rows=rows,
    )


def _overall_tabular(report: Mapping[str, Any]) -> Tabular:
    rows = []
    for row in _overall(report):
        gain, area = ((row[name], (row[f"{name}_low"], row[f"{name}_high"])) for name in ("gain", "area"))
        name = f"{row['policy']}, shuffled" if row["shuffled"] else row["policy"]
        cells = (number(*gain, sign=True), number(*area), number(row["share_of_reference"], digits=0))
        rows.append([text(name), *cells])
    return Tabular(
        caption=(
            "Gain in points over the best mixture of fixed settings at the same mean latency, mean of the budgets "
            f"{', '.join(f'{budget_ms:g}' for budget_ms in report['budgets_ms'])} ms; area under the frontier "
            f"of accuracy over log latency; gain as a share of the {report['reference']['name']}'s, in percent. "
            f"{_about(report)}"
        ),
        head=("policy", "gain", "area", f"of the {report['reference']['name']}'s"),
        rows=rows,
    )


def _about(report: Mapping[str, Any]) -> str:
    return (
        f"{report['num_questions']} questions on {report['num_images']} pictures ({report['data_source']} data); "
        f"{report['draws']} resamples of whole pictures."
    )
