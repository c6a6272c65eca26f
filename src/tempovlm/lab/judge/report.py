"""The judge's files: every figure as JSON, every choice as Parquet, and a page that is read in five minutes.

The page carries its plots and asks the network for nothing. The Parquet file needs the extra `experiments`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tempovlm.core.files import make_folder
from tempovlm.core.paths import write_whole
from tempovlm.lab import charts
from tempovlm.lab.bench.summary import rounded
from tempovlm.lab.core_exp.parquet import as_parquet
from tempovlm.lab.drawing import with_theme
from tempovlm.lab.judge import figures as judge_figures
from tempovlm.lab.judge.judge import best_policy
from tempovlm.lab.judge.trial import Outcome, Trial
from tempovlm.lab.pages import held, points
from tempovlm.lab.pages import render as render_template
from tempovlm.lab.queueing import page as load_page

_DIGITS = 6


def headline(report: Mapping[str, Any]) -> str:
    """One sentence: whether the subject beats the best static mixture, by how much, and beside the reference."""
    name = report["names"][report["subject"]]
    name = name[:1].upper() + name[1:]
    judged = report["policies"][report["subject"]]
    rows = judged["by_budget"]
    better = sum(row["against_mixture"]["interval"][0] > 0 for row in rows)
    worse = sum(row["against_mixture"]["interval"][1] < 0 for row in rows)
    held, held_below = map(len, holding(rows))
    gain, closed = judged["against_mixture"], judged["gap_closed"]
    low, high = gain["interval"]
    verdict = "beats" if low > 0 else "loses to" if high < 0 else "does not differ from"
    text = (
        f"{name} {verdict} the best static mixture at the same mean latency: {points(gain['value'])} points "
        f"({points(low)} to {points(high)}), above it at {better} of {len(rows)} budgets "
        f"({held} after Holm's correction)"
    )
    text += f" and below it at {worse} ({held_below})" if worse else ""
    reference = report["reference"]["name"]
    if closed is None:
        return f"{text}; at that latency the {reference} itself gains nothing."
    return f"{text}; that is {100 * closed['value']:.0f} % of what the {reference} gains at that latency."


def write(
    folder: Path,
    report: dict[str, Any],
    trial: Trial,
    outcomes: Sequence[Outcome],
    simulated: Sequence[Mapping[str, Any]] = (),
) -> list[Path]:
    """Write `judge.json`, `judge.parquet`, `judge.html`, `frontier.svg` and `gain.svg`; returns their paths.

    The page has a chapter on `simulated` traffic, as `lab.queueing.page.read` returns it.

    Raises:
        UserError: the folder cannot be written.
    """
    make_folder(folder)
    report = {**report, "headline": headline(report)}
    drawn = _drawn(report)
    files: dict[str, str | bytes] = {
        "judge.json": json.dumps(rounded(report, _DIGITS), indent=1, ensure_ascii=False) + "\n",
        "judge.parquet": rows_as_parquet(trial, outcomes),
        "judge.html": render(report, simulated, drawn),
        "frontier.svg": with_theme(drawn["frontier"]),
        "gain.svg": with_theme(drawn["gaps"]),
    }
    for name, content in files.items():
        write_whole(folder / name, content)
    return [folder / name for name in files]


def rows_as_parquet(trial: Trial, outcomes: Sequence[Outcome]) -> bytes:
    """A row a policy, budget and question: what was chosen, what it scored and took; null where not measured."""
    import pyarrow as pa

    table, budgets = trial.table, trial.budgets_ms
    names = np.array([str(knobs) for knobs in table.space])
    each = len(table) * len(budgets)
    columns: dict[str, list[Any]] = {name: [] for name in ("policy", "budget_ms")}
    about = {
        name: np.repeat(getattr(table, name), len(budgets)) for name in ("dataset", "question_id", "image_id")
    }
    values: dict[str, list[Any]] = {
        name: [] for name in ("setting", "accuracy", "latency_ms", "measured_ms", "fits")
    }
    kept = [outcome for outcome in outcomes if outcome.chosen is not None]
    for outcome in kept:
        columns["policy"] += [outcome.name] * each
        columns["budget_ms"] += list(budgets) * len(table)
        values["setting"] += names[outcome.chosen].ravel().tolist()
        values["measured_ms"] += [None if np.isnan(v) else v for v in outcome.measured_ms.ravel().tolist()]
        for name in ("accuracy", "latency_ms", "fits"):
            values[name] += getattr(outcome, name).ravel().tolist()
    repeated = {name: np.tile(column, len(kept)).tolist() for name, column in about.items()}
    return as_parquet(pa.table({**columns, **repeated, **values}))


def _drawn(report: Mapping[str, Any]) -> dict[str, str]:
    return {"frontier": judge_figures.frontier(report), "gaps": judge_figures.gaps(report)}


def render(
    report: Mapping[str, Any],
    simulated: Sequence[Mapping[str, Any]] = (),
    drawn: Mapping[str, str] | None = None,
) -> str:
    """Renders the whole page; `drawn` are its wide figures, if they are there already."""
    subject = report["policies"][report["subject"]]["by_budget"]
    above_ms, below_ms = holding(subject)
    return render_template(
        "judge.html",
        report=report,
        headline=headline(report),
        **(drawn or _drawn(report)),
        frontier_narrow=judge_figures.frontier_narrow(report),
        gaps_narrow=judge_figures.gaps_narrow(report),
        knobs=charts.knobs({"budgets": subject, "knob_space": report["knob_space"]}),
        above_ms=above_ms,
        below_ms=below_ms,
        is_best=report["subject"] == best_policy(report["policies"]),
        under_load=[part for one in simulated for part in load_page.sections(one)],
        label=load_page.label,
        facts=sources(report),
    )


def sources(report: Mapping[str, Any]) -> dict[str, str]:
    """Say in words where the figures come from; leave out the unknown."""
    about = report["provenance"]
    parts = {"judged": "judged answers", "train": "training answers", "twin": "answers on twin pictures"}
    stamps, estimator = about.get("stamps", {}), about.get("latency_estimator")
    facts = {
        f"{words} computed on": f"{machine(stamps[name])}; {about.get('questions', {}).get(name, '')} questions"
        for name, words in parts.items()
        if stamps.get(name)
    }
    facts["latencies measured on"] = machine(estimator or stamps.get("judged", {}))
    facts["policies decide by"] = report["latency"]["decided_by"]
    facts["policies are charged"] = report["latency"]["scored_by"]
    if about.get("time_price"):
        facts["price of time"] = f"using a whole budget costs {100 * about['time_price']:g} points of accuracy"
    facts["questions without answers at all settings"] = ", ".join(
        f"{count} of the {parts[name]}" for name, count in about.get("left_out", {}).items() if count
    )
    facts["seed"] = str(about.get("seed", ""))
    facts["latency estimator"] = estimator["path"] if estimator else ""
    for name, words in parts.items():
        facts[f"files of the {words}"] = ", ".join(about.get("files", {}).get(name, ()))
    return {name: value for name, value in facts.items() if value}


def machine(stamp: Mapping[str, Any]) -> str:
    """Names a stamp's machine, model and code in one line."""
    named = [str(stamp[name]) for name in ("hardware", "device") if stamp.get(name)]
    labels = {"torch": "torch", "model": "model", "weights": "weights", "commit": "commit", "created": "on"}
    named += [f"{word} {str(stamp[name])[:19]}" for name, word in labels.items() if stamp.get(name)]
    return ", ".join(named)


def holding(rows: Sequence[Mapping[str, Any]], rival: str | None = None) -> tuple[list[float], list[float]]:
    """Budgets where a policy is above, and below, a rival, corrected; without one, the static mixture."""
    gains = [row["against_mixture"] if rival is None else row["at_same_budget"][rival] for row in rows]
    signs = [(row["budget_ms"], held(gain)) for row, gain in zip(rows, gains, strict=True)]
    return [budget_ms for budget_ms, sign in signs if sign > 0], [b_ms for b_ms, sign in signs if sign < 0]
