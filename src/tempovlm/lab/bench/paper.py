"""The result of a bench for papers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from tempovlm.lab import charts
from tempovlm.lab.bench.summary import Record
from tempovlm.lab.paper.export import Export, Tabular, interval, number, text
from tempovlm.lab.statistics import Resamples, percentile_interval

_LATENCIES = ("p50_ms", "p95_ms", "p99_ms")


def export(result: Mapping[str, Any], records: Sequence[Record]) -> Export:
    """Return the table, the tabular and the figure of a bench."""
    rows = _rows(result, records)
    return Export(
        tables={"bench": rows},
        tabulars={"bench": _tabular(result, rows)},
        figures={"trade_off": lambda: charts.trade_off_pdf(result)},
    )


def _rows(result: Mapping[str, Any], records: Sequence[Record]) -> list[dict[str, Any]]:
    """A row for each budget, and one for the fixed setting, without a budget."""
    policy = ", ".join(result["chosen_by"])
    rows = [_row(policy, row, difference(records, row["budget_ms"])) for row in result["budgets"]]
    if fixed := result["fixed"]:
        rows.append(_row("fixed setting", fixed, None))
    return rows


def _row(policy: str, row: Mapping[str, Any], gain: tuple[float, float, float] | None) -> dict[str, Any]:
    knobs = row["knobs"]
    common, share = (knobs, 1.0) if isinstance(knobs, str | None) else next(iter(knobs.items()), (None, None))
    value, *ends = gain or (None,)
    return {
        "policy": policy,
        "budget_ms": row.get("budget_ms"),
        "num_questions": row["num_samples"],
        "num_failed": row["num_failed"],
        **interval("accuracy", row["accuracy"], row["accuracy_interval"]),
        **interval("gain_over_fixed", value, ends or None),
        **interval("cider", row.get("cider"), row.get("cider_interval")),
        **interval("on_time", row.get("adherence"), row.get("adherence_wilson")),
        **{name: row[name] for name in _LATENCIES},
        "budget_used": row.get("utilisation"),
        "most_chosen": common,
        "most_chosen_share": share,
    }


def difference(records: Sequence[Record], budget_ms: float) -> tuple[float, float, float] | None:
    """Mean accuracy at a budget minus that of the fixed setting on the same questions, with its 95 % interval.

    Pictures are resampled, and a question keeps both of its answers. None without a fixed setting or without
    answers that have a score of their own.
    """

    def scores(run: str) -> dict[tuple[str, str], Record]:
        some = [r for r in records if r.run == run and not r.is_caption and r.score is not None]
        return {(r.dataset, r.question_id): r for r in some if run == "fixed" or r.budget_ms == budget_ms}

    here, fixed = scores("budget"), scores("fixed")
    both = [key for key in here if key in fixed]
    if not both:
        return None
    gains = np.array([[(here[key].score or 0.0) - (fixed[key].score or 0.0)] for key in both])
    means = Resamples([f"{here[key].dataset}/{here[key].image_id}" for key in both]).means(gains)[:, 0]
    low, high = percentile_interval(means[1:])
    return float(means[0]), float(low), float(high)


def _tabular(result: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> Tabular:
    has_cider = any(row["cider"] is not None for row in rows)
    scores = [name for name in ("accuracy", "gain_over_fixed") if any(row[name] is not None for row in rows)]
    scores += ["cider"] if has_cider else []
    titles = {"accuracy": "accuracy", "gain_over_fixed": "gain over fixed", "cider": "CIDEr"}
    cells = []
    for row in rows:
        budget_ms = row["budget_ms"]
        first = "none" if budget_ms is None else f"{budget_ms:g} ms"
        shown = [_number(row, name, sign=name == "gain_over_fixed") for name in (*scores, "on_time")]
        times = [number(row[name], scale=1, digits=0) for name in _LATENCIES]
        cells.append(
            [first, *shown, *times, number(row["budget_used"], digits=0), text(row["most_chosen"] or "--")]
        )
    return Tabular(
        caption=(
            f"{result['model']} on {result['device']}, {result['num_samples']} questions at each budget "
            f"({', '.join(result['dataset'])}, {result['data_source']} data). Accuracy, gain over the fixed "
            "setting and share on time in percent, latency in milliseconds; 95 % intervals, "
            "from resampled pictures and, of the share on time, Wilson's."
        ),
        head=(
            "budget",
            *(titles[name] for name in scores),
            "on time",
            *(name.removesuffix("_ms") for name in _LATENCIES),
            "budget used",
            "most chosen",
        ),
        rows=cells,
    )


def _number(row: Mapping[str, Any], name: str, *, sign: bool) -> str:
    low, high = row[f"{name}_low"], row[f"{name}_high"]
    return number(row[name], None if low is None else (low, high), sign=sign, stacked=True)
