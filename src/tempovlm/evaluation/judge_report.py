"""The judge's files: every figure as JSON, every choice as Parquet, and a page that is read in five minutes.

The page carries its drawings and asks the network for nothing. It reads the report object and the outcomes; it
knows neither models nor how anything was measured. Needs the extra `experiments` for the Parquet file.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from tempovlm.core.files import make_folder
from tempovlm.core.paths import write_whole
from tempovlm.evaluation import charts, judge_figures, judge_tables, svg
from tempovlm.evaluation.judge_tables import holding, points
from tempovlm.evaluation.judge_trial import Outcome, Trial
from tempovlm.evaluation.summary import rounded

_DIGITS = 6

_CSS = """
*{box-sizing:border-box}
body{margin:0;background:var(--page);color:var(--ink);font:16px/1.55 FONT}
main{max-width:1020px;margin:0 auto;padding:40px 24px 64px}
h1{font-size:27px;line-height:1.25;margin:0 0 12px;letter-spacing:-.01em;max-width:34em}
h2{font-size:20px;margin:44px 0 4px}p{max-width:75ch;margin:0 0 10px}
.lead{font-size:17px;color:var(--muted)}.note{color:var(--muted);font-size:14px}
.plot{background:var(--paper);border:1px solid var(--faint);border-radius:10px;padding:8px;margin:14px 0;
overflow-x:auto}
.plot svg{display:block;margin:0 auto;max-width:100%;min-width:640px;height:auto}
.scroll{overflow-x:auto}table{border-collapse:collapse;width:100%;font-size:14px;margin:10px 0}
th{text-align:right;color:var(--muted);font-weight:500;padding:6px 9px;border-bottom:1px solid var(--faint);
vertical-align:bottom}
td{text-align:right;padding:6px 9px;border-bottom:1px solid var(--grid);font-variant-numeric:tabular-nums;
white-space:nowrap;vertical-align:top}
td small{display:block;color:var(--muted);font-size:12px}
td.good small,small.good{color:var(--good);font-weight:600}td.bad small,small.bad{color:var(--bad);font-weight:600}
td small.plain{color:var(--muted);font-weight:400}
th:first-child,td:first-child{text-align:left}tr.subject td{background:var(--page)}
tr.subject td:first-child{font-weight:600}
.facts td{text-align:left;white-space:normal;overflow-wrap:anywhere}.facts td:first-child{width:260px}
details{margin:14px 0}summary{cursor:pointer;color:var(--muted)}
@media print{.plot{break-inside:avoid}}
""".replace("FONT", svg.FONT)

_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>TempoVLM: controllers judged</title>
<style>{style}</style>
</head>
<body>
<main>
<h1>{headline}</h1>
<p class="lead">{lead}</p>
<h2>What latency buys</h2>
<div class="plot">{frontier}</div>
<p class="note">{frontier_note}</p>
<h2>Gain over the best static mixture</h2>
<div class="plot">{gaps}</div>
<p class="note">{gaps_note}</p>
<h2>Accuracy by budget</h2>
<p>Below each accuracy: the difference to the best static mixture at the same mean latency, in points, with its
95 % interval; coloured where the interval excludes zero, starred where the difference also holds after the
Holm-Bonferroni correction over the budgets of the policy.</p>
<div class="scroll">{policies}</div>
<h2>What holds at which budget: {subject}</h2>
<p>{budgets_note}</p>
<div class="scroll">{budgets}</div>
<p class="note">{p_note}</p>
<h2>By data set: {subject}</h2>
<p>Accuracy; the gain in points, with its 95 % interval, over the best static mixture of the data set, which is
fitted on the training questions of that data set; mean latency. These intervals are not corrected for several
tests.</p>
<div class="scroll">{datasets}</div>
<h2>Over all budgets</h2>
<p>Area: mean accuracy over log latency, from the cheapest static setting to the dearest, in points. Regret: points
below the oracle at the same budget. Gap closed: of the difference between oracle and mixture, both at the mean
latency of the policy.</p>
<div class="scroll">{overall}</div>
<h2>On time, and time used: {subject}</h2>
<p>{timeliness_note}</p>
<div class="scroll">{timeliness}</div>
<h2>Settings chosen: {subject}</h2>
<div class="plot">{knobs}</div>
<h2>Controls</h2>
<p>Shuffled: the policy is shown another question's words and picture, the mean of several permutations. A gain
that stays did not come from content.</p>
<div class="scroll">{controls}</div>
<h2>One, two and three knobs</h2>
<p>The same rules where only the named knobs may leave the native setting: area under the frontier of accuracy over
log latency, in points.</p>
<div class="scroll">{ablation}</div>
<h2>Where these figures come from</h2>
<div class="scroll">{facts}</div>
</main>
</body>
</html>
"""


def headline(report: Mapping[str, Any]) -> str:
    """One sentence: whether the subject beats the best static mixture, by how much, and what share of the gap."""
    name = judge_figures.short(report["subject"])
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
    if closed is None:
        return f"{text}; there is no gap to the {report['oracle']['kind']} oracle that could be closed."
    return f"{text}; it closes {100 * closed['value']:.0f} % of the gap to the {report['oracle']['kind']} oracle."


def write(folder: Path, report: dict[str, Any], trial: Trial, outcomes: Sequence[Outcome]) -> list[Path]:
    """Write `judge.json`, `judge.parquet`, `judge.html`, `frontier.svg` and `gain.svg`; returns their paths.

    Raises:
        UserError: the folder cannot be written.
    """
    make_folder(folder)
    report = {**report, "headline": headline(report)}
    texts = {
        "judge.json": json.dumps(rounded(report, _DIGITS), indent=1, ensure_ascii=False) + "\n",
        "judge.html": render(report),
        "frontier.svg": judge_figures.frontier(report),
        "gain.svg": judge_figures.gaps(report),
    }
    for name, text in texts.items():
        write_whole(folder / name, text)
    write_whole(folder / "judge.parquet", rows_as_parquet(trial, outcomes))
    return [folder / name for name in (*texts, "judge.parquet")]


def rows_as_parquet(trial: Trial, outcomes: Sequence[Outcome]) -> bytes:
    """A row a policy, budget and question: what was chosen, what it scored and took; null where not measured."""
    import io

    import pyarrow as pa
    import pyarrow.parquet as pq

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
    buffer = io.BytesIO()
    pq.write_table(pa.table({**columns, **repeated, **values}), buffer, compression="zstd")
    return buffer.getvalue()


def render(report: Mapping[str, Any]) -> str:
    """The whole page."""
    name = judge_figures.short(report["subject"])
    return _PAGE.format(
        style=svg.page_style(_CSS),
        headline=escape(headline(report)),
        lead=escape(_lead(report)),
        frontier=judge_figures.frontier(report, style=""),
        frontier_note=escape(_frontier_note(report)),
        gaps=judge_figures.gaps(report, style=""),
        gaps_note=escape(_gaps_note(report)),
        policies=judge_tables.policies(report),
        budgets_note=escape(_budgets_note(report)),
        p_note=escape(_p_note(report)),
        budgets=judge_tables.budgets(report),
        datasets=judge_tables.datasets(report),
        overall=judge_tables.overall(report),
        subject=escape(name),
        timeliness_note=escape(_timeliness_note(report)),
        timeliness=judge_tables.timeliness(report["policies"][report["subject"]]["by_budget"]),
        knobs=_knobs(report),
        controls=judge_tables.controls(report),
        ablation=judge_tables.ablation(report),
        facts=judge_tables.facts(report["provenance"]),
    )


def _lead(report: Mapping[str, Any]) -> str:
    return (
        f"{report['num_questions']} questions on {report['num_images']} pictures "
        f"({', '.join(report['datasets'])}; data source: {report['data_source']}) of the validation split, each "
        f"at {len(report['budgets_ms'])} budgets; everything that was fitted comes from the training split. "
        f"Intervals are 95 %, from {report['draws']} resamples of whole pictures, the same for all policies."
    )


def _frontier_note(report: Mapping[str, Any]) -> str:
    mixed = ", ".join(report["static"]["mixture"])
    return (
        f"Latency charged: {report['latency']['scored_by']}. The static mixture draws at random among {mixed}, "
        "chosen on training questions. Bars: 95 % interval of accuracy."
    )


def _gaps_note(report: Mapping[str, Any]) -> str:
    if report["oracle"]["kind"] == "plain":
        return (
            "The plain oracle picks, for each question, the cheapest setting that is known to be right. It is an "
            "optimistic bound, because it also profits from luck; results on twin pictures (--twin_results_dir) "
            "correct it."
        )
    return (
        "The noise-corrected oracle picks the setting that is best on the twin picture (the same scene with other "
        "noise and a small shift) and is scored on the original, so it does not profit from luck."
    )


def _budgets_note(report: Mapping[str, Any]) -> str:
    above, below = holding(report["policies"][report["subject"]]["by_budget"])
    return (
        f"After the correction it is above the best static mixture at {_listed(above)} and below it at "
        f"{_listed(below)}. That mixture may take settings that break the deadline, so long as its mean latency "
        "is the policy's; the feasible mixture takes only settings whose latency, as policies go by it and on "
        "average over training questions, fits the budget, and stays at its dearest setting where the policy "
        "takes longer."
    )


def _p_note(report: Mapping[str, Any]) -> str:
    return (
        f"p: two-sided, from the same resamples; {report['draws']} of them can show none below "
        f"{2 / (report['draws'] + 1):.2g}. Corrected: after Holm and Bonferroni over the "
        f"{len(report['budgets_ms'])} budgets. A difference holds at {100 * judge_tables.ALPHA:g} % or less."
    )


def _listed(budgets_ms: Sequence[float]) -> str:
    return f"{', '.join(f'{budget_ms:g}' for budget_ms in budgets_ms)} ms" if budgets_ms else "no budget"


def _timeliness_note(report: Mapping[str, Any]) -> str:
    own_ms = report["policies"][report["subject"]]["control_ms"]
    return (
        "Of requests whose chosen setting was timed on that question. Policies go by "
        f"{report['latency']['decided_by']}. On time: latency at most the budget, with its Wilson interval. Time "
        "used: latency / budget where a slower setting existed. Fallback: nothing was expected to fit. Latencies "
        f"are medians of repeats and the policy's own {own_ms:.2g} ms; the share on time of live requests is "
        "measured by test_adaptive_inference.py."
    )


def _knobs(report: Mapping[str, Any]) -> str:
    rows = report["policies"][report["subject"]]["by_budget"]
    result = {"budgets": rows, "knob_space": report["knob_space"]}
    height = charts.knob_plot_height(result)
    body = charts.knob_plot(result)
    return svg.document(body, charts.WIDTH, height, "Settings chosen at each budget", style="")
