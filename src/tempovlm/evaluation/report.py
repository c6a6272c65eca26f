"""The demo's report: one HTML file that carries its pictures, answers, drawings and where all of it comes from.

HTML by string templates; every text that is not written here is escaped. It knows results, not how to get them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from tempovlm.evaluation import charts, svg
from tempovlm.evaluation.figure import bar_scale_ms, data_uri, describe
from tempovlm.evaluation.showcase import Example, Shown

_CSS = """
*{box-sizing:border-box}
body{margin:0;background:var(--page);color:var(--ink);font:16px/1.55 FONT}
main{max-width:1080px;margin:0 auto;padding:40px 24px 64px}
h1{font-size:30px;line-height:1.2;margin:0 0 12px;letter-spacing:-.01em}
h2{font-size:21px;margin:48px 0 6px}h3{font-size:17px;margin:2px 0 2px}
p{max-width:70ch;margin:0 0 12px}.lead{font-size:17px;color:var(--muted)}
.note{color:var(--muted);font-size:14px}.key{overflow-x:auto;margin:12px 0 4px}
.card{display:grid;grid-template-columns:minmax(200px,320px) 1fr;gap:28px;background:var(--paper);
border:1px solid var(--faint);border-radius:10px;padding:20px;margin:16px 0}
.card img{width:100%;border-radius:6px;display:block}
.caption{color:var(--muted);font-size:14px;margin:8px 0 0}.truth{color:var(--muted);font-size:14px;margin:0 0 10px}
.row{padding:9px 0 6px;border-top:1px solid var(--grid)}
.line{display:flex;flex-wrap:wrap;align-items:baseline;gap:2px 14px}
.budget{font-weight:600;min-width:104px;font-variant-numeric:tabular-nums}.said{font-weight:600;font-size:17px}
.good{color:var(--good)}.bad{color:var(--bad)}.knobs{color:var(--muted);font-size:14px;margin-left:auto}
.bar{display:grid;grid-template-columns:1fr 96px;gap:12px;align-items:center}
.bar svg{width:100%;height:26px;display:block;overflow:visible}
.total{text-align:right;font-weight:600;font-size:14px;font-variant-numeric:tabular-nums}
.plot{background:var(--paper);border:1px solid var(--faint);border-radius:10px;padding:8px;margin:16px 0;
overflow-x:auto}
.plot svg{display:block;margin:0 auto;max-width:100%;min-width:600px;height:auto}
.scroll{overflow-x:auto}table{border-collapse:collapse;width:100%;font-size:14px;margin:12px 0}
th{text-align:right;color:var(--muted);font-weight:500;padding:6px 10px;border-bottom:1px solid var(--faint);
vertical-align:bottom}
td{text-align:right;padding:7px 10px;border-bottom:1px solid var(--grid);font-variant-numeric:tabular-nums;
white-space:nowrap}
th:first-child,td:first-child{text-align:left}.facts td{text-align:left;white-space:normal;overflow-wrap:anywhere}
.facts td:first-child{color:var(--muted);width:240px}
@media(max-width:720px){.card{grid-template-columns:1fr}.knobs{margin-left:0;width:100%}.bar-label{display:none}
main{padding:24px 14px 48px}}
@media print{.card,.plot{break-inside:avoid}}
""".replace("FONT", svg.FONT)

_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>TempoVLM: answers within a deadline</title>
<style>{style}</style>
</head>
<body>
<main>
<h1>A vision-language model with a deadline</h1>
<p class="lead">{lead}</p>
<h2>The same question at three budgets</h2>
<p>{how}</p>
<div class="key">{key}</div>
{cards}
<h2>What a budget buys</h2>
<p>{bench}</p>
<div class="plot">{plot}</div>
<div class="scroll">{table}</div>
<p class="note">{notes}</p>
<h2>Where these figures come from</h2>
<div class="scroll">{facts}</div>
</main>
</body>
</html>
"""

_LEAD = (
    "Each answer below had a budget in milliseconds. For each request TempoVLM chooses how many crops of the "
    "picture to look at, how many experts each token visits and how many blocks run, so that the answer arrives "
    "in time."
)
_HOW = (
    "Pictures are drawn by the project's generator and were not used in training. They are chosen by what is on "
    "them, not by how the model answers. Bars show where the time of an answer went; the mark across a bar is its "
    "deadline."
)
_NOTES = (
    "On time: share of requests whose total was at most the budget, with its 95 % Wilson interval. Time used: "
    "mean of total / budget over requests for which a slower setting existed. The fixed setting ran between the "
    "others, so its p99 / p50 shows how steady the machine was. A p99 of few requests is close to their largest "
    "value."
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """What the report shows.

    Attributes:
        examples: each with its answers, from the tightest budget to the loosest.
        bench: the result object of a bench. facts: provenance, names to values, nested as they come.
    """

    examples: Sequence[tuple[Example, Sequence[Shown]]]
    bench: Mapping[str, Any]
    facts: Mapping[str, Any]


def render(report: Report) -> str:
    """The whole page."""
    bench = dict(report.bench)
    label = 'role="img" aria-label="colours of the stages"'
    key = f'<svg class="tv" width="600" height="18" {label}>{svg.stage_key(0, 13)}</svg>'
    return _PAGE.format(
        style=svg.page_style(_CSS),
        lead=escape(_LEAD),
        how=escape(_HOW),
        key=key,
        cards="\n".join(_card(example, shown) for example, shown in report.examples),
        bench=escape(_bench_text(bench)),
        plot=charts.trade_off(bench, style=""),
        table=_bench_table(bench),
        notes=escape(_NOTES),
        facts=_facts(report.facts),
    )


def _card(example: Example, shown: Sequence[Shown]) -> str:
    scale_ms = bar_scale_ms(shown)
    alt = escape(f"{example.caption}: {example.question}")
    rows = "".join(_row(item, scale_ms) for item in shown)
    options = example.sample.options
    choices = f" · options: {', '.join(options)}" if options else ""
    return (
        f'<section class="card"><div><img src="{data_uri(example.path)}" alt="{alt}">'
        f'<p class="caption">{escape(example.caption)}</p></div>'
        f"<div><h3>{escape(example.question)}</h3>"
        f'<p class="truth">right: {escape(example.truth + choices)}</p>{rows}</div></section>'
    )


def _row(shown: Shown, scale_ms: float) -> str:
    answer = shown.answer
    mark, ink, word = ("✓", "good", "right") if shown.is_right else ("✗", "bad", "wrong")
    late = "" if answer.budget_met else ' <span class="bad">late</span>'
    infeasible = ' · <span class="bad" title="no setting was expected to fit">infeasible</span>'
    setting = escape(describe(answer.knobs)) + (infeasible if answer.budget_feasible is False else "")
    said = escape(shown.spoken) or "<em>(nothing)</em>"
    bar = svg.stage_bar(answer.timings_ms, scale_ms, shown.budget_ms, 520)
    return (
        f'<div class="row"><div class="line"><span class="budget">within {shown.budget_ms:g} ms</span>'
        f'<span class="said"><span class="{ink}" title="{word}">{mark}</span> {said}</span>'
        f'<span class="knobs">{setting}</span></div>'
        f'<div class="bar"><svg class="tv" role="img" aria-label="stages of this answer">{bar}</svg>'
        f'<span class="total">{answer.timings_ms["total"]:.0f} ms{late}</span></div></div>'
    )


def _bench_text(bench: Mapping[str, Any]) -> str:
    samples = max((row["num_samples"] for row in bench["budgets"]), default=0)
    return (
        f"{samples} questions ({', '.join(bench['dataset'])}), each answered at every budget, one at a time, "
        f"budgets interleaved. Data source: {bench['data_source']}; figures do not compare with published ones."
    )


_HEAD = ("budget", "accuracy", "on time", "95 % interval", "p50", "p95", "p99", "time used", "commonest setting")


def _bench_table(bench: Mapping[str, Any]) -> str:
    rows = [_budget_cells(row) for row in bench["budgets"]]
    fixed = bench.get("fixed")
    if fixed:
        times = [_ms(fixed[name]) for name in ("p50_ms", "p95_ms", "p99_ms")]
        ratio = "" if fixed["p99_over_p50"] is None else f"p99 / p50 {fixed['p99_over_p50']:.2f}"
        rows.append(["fixed setting", _share(fixed["accuracy"]), "", "", *times, ratio, str(fixed["knobs"])])
    head = "".join(f"<th>{escape(name)}</th>" for name in _HEAD)
    body = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in cells) + "</tr>" for cells in rows)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def _budget_cells(row: Mapping[str, Any]) -> list[str]:
    low, high = row["adherence_wilson"]
    commonest = next(iter(row["knobs"].items()), None)
    return [
        f"{row['budget_ms']:g} ms",
        _share(row["accuracy"]),
        _share(row["adherence"]),
        f"{100 * low:.1f} to {100 * high:.1f} %",
        _ms(row["p50_ms"]),
        _ms(row["p95_ms"]),
        _ms(row["p99_ms"]),
        _share(row["utilisation"]),
        f"{commonest[0]} ({_share(commonest[1])})" if commonest else "",
    ]


def _share(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.1f} %"


def _ms(value_ms: float | None) -> str:
    return "" if value_ms is None else f"{value_ms:.0f} ms"


def _facts(facts: Mapping[str, Any]) -> str:
    rows = "".join(
        f"<tr><td>{escape(name)}</td><td>{escape(value)}</td></tr>" for name, value in flatten(facts).items()
    )
    return f'<table class="facts"><tbody>{rows}</tbody></table>'


def flatten(facts: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Nested values as one level of names, such as `versions.torch`; what is unknown is left out."""
    flat: dict[str, str] = {}
    for name, value in facts.items():
        full = f"{prefix}{name}"
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{full}.")
        elif isinstance(value, list | tuple):
            flat[full] = ", ".join(str(item) for item in value)
        elif value is not None and value != "":
            flat[full] = str(value)
    return flat
