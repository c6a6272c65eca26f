"""The results table: every target beside the value in the repository's result files, as JSON and Markdown.

A figure whose file is absent is listed as not measured, with the command that makes it. Every verdict is
`Target.is_met` of the measured value. The output depends on the files alone, so two runs agree byte for byte.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from experiments.published import commands
from experiments.scoreboard.readings import AbsentError
from experiments.scoreboard.result_files import ResultFile, read_result, shipped_weights
from experiments.scoreboard.targets import TARGETS, Bound, Reading, Source, Target, sources
from tempovlm.core.errors import UserError

JSON_FILE, MARKDOWN_FILE = "docs/results.json", "docs/results.md"
PAGES = ("experiments/README.md", "experiments/README.zh.md")
"""Pages whose figures, between `<!--NAME-->` and `<!--/-->`, are those of the rows NAME."""

_FIGURE = re.compile(r"<!--(\w+)-->.*?<!--/-->")
_MARKS = {True: " ✓", False: " ✗", None: ""}

Files = Mapping[str, ResultFile | None]

_HEAD = """\
# Results

This page lists the project's targets beside the measured values. `tempovlm report` writes it and `results.json`
from the stamped result files in the repository and from nothing else; a test fails if they differ.

- *seed* is the target of the seed document, the specification that this project started from; *ours* is our own
  target. A *first target* was set first; a *goal* is a harder one that followed.
- *met* and *missed* compare the unrounded value with our target. *reported* figures have no target. *of other
  weights* means that the value was measured with other weights than the shipped ones, so it has no verdict.
- Targets for a GPU are for an H200 unless the row names another. A row that would repeat another one for a second
  device is left out; the files of both GPUs are in the repository.
- The name in `code` identifies the row in `results.json` and in `experiments/scoreboard/targets.toml`.
- The last table says which figures come from generated pictures (`synthetic`) or random weights. Do not compare
  such accuracies with published ones; random weights have no accuracy.

[measuring.md](measuring.md) explains how times are taken and lists the files; [design.md](design.md#words) defines
the terms.
"""

_VERDICTS = {True: "met", False: "**missed**"}
_DASH = "–"


@dataclass(frozen=True, slots=True)
class Row:
    """A target with its verdict.

    Attributes:
        measured: None where there is nothing to read. met: None where there is nothing to judge.
        reason: why there is no verdict, or by which bound a target was met; None otherwise.
        command: what makes the missing figure; None where nothing is missing.
        data_source, hardware: from the file's stamp; None without a file.
    """

    target: Target
    measured: float | None
    met: bool | None
    reason: str | None
    command: str | None
    data_source: str | None
    hardware: str | None

    @property
    def value(self) -> str:
        """The measured value with its unit, as text."""
        if self.measured is None:
            return _DASH
        return f"{shown(self.measured, self.target.bound)} {self.target.unit}".strip()

    def to_json(self) -> dict[str, Any]:
        """The entry of `results.json`."""
        target = self.target
        return {
            "name": target.name,
            "experiment": target.experiment,
            "seed_target": target.seed,
            "our_target": target.our_target,
            "measured": self.measured,
            "unit": target.unit,
            "met": self.met,
            "reason": self.reason,
            "source_file": target.source.path,
            "data_source": self.data_source,
            "hardware": self.hardware,
        }


def build(repository: Path) -> dict[str, str]:
    """Return the text of both files, and of the pages that are there, by their path in the repository.

    Raises:
        UserError: a result file is broken, without a stamp, or not of the model and machine that it is for.
    """
    shipped = shipped_weights(repository)
    files = {source.path: read_result(repository, source, shipped) for source in sources()}
    rows = [judge_row(target, files[target.source.path], shipped, repository) for target in TARGETS]
    record = {"targets": [row.to_json() for row in rows]}
    pages = [page for page in PAGES if (repository / page).exists()]
    return {
        JSON_FILE: json.dumps(record, indent=1, ensure_ascii=False, allow_nan=False) + "\n",
        MARKDOWN_FILE: markdown(rows, files, shipped),
        **{page: with_figures(page, (repository / page).read_text(encoding="utf-8"), rows) for page in pages},
    }


def with_figures(path: str, text: str, rows: Sequence[Row]) -> str:
    """Return a page with the figures that it names as the rows have them.

    Raises:
        UserError: it names a row that the table does not have.
    """
    found = {row.target.name: row for row in rows}

    def figure(match: re.Match[str]) -> str:
        row = found.get(match[1])
        if row is None:
            raise UserError(f"{path}: names the figure {match[1]}, which targets.toml does not have")
        mark = "" if row.target.bound.sign == "reported" else _MARKS[row.met]
        return f"<!--{match[1]}-->{row.value}{mark}<!--/-->"

    return _FIGURE.sub(figure, text)


def rows_of_run(folder: Path) -> list[Row]:
    """The targets whose result files a folder has, judged there, whatever model and machine they are of.

    Raises:
        UserError: a result file is broken or without a stamp.
    """
    own = [source for source in sources() if (folder / source.path).exists()]
    files = {one.path: read_result(folder, replace(one, model=None, hardware=None), None) for one in own}
    return [judge_row(one, files[one.source.path], None, folder) for one in TARGETS if one.source in own]


def judge_row(target: Target, file: ResultFile | None, shipped: str | None, repository: Path) -> Row:
    """Read a target's value and judge it.

    Args:
        target: what to judge.
        file: its result file; None where it is absent.
        shipped: hash of the shipped pocket's weights.
        repository: its root; the files there need not be made again to make a missing one.

    Raises:
        UserError: the file holds something else than a number there.
    """
    source = target.source
    command = commands(source.path, repository)
    if file is None:
        return Row(target, None, None, f"not measured yet: {command}", command, None, None)
    origin = file.origin
    about = (origin.data_source, origin.machine)
    try:
        reading = target.measure(file.content)
    except AbsentError as absent:
        reason = f"not measured yet: {source.path}: {absent}; {command}"
        return Row(target, None, None, reason, command, *about)
    except UserError as error:
        raise UserError(f"{source.path}: {error}") from None
    except (AttributeError, TypeError, ValueError, KeyError, ZeroDivisionError) as error:
        raise UserError(f"{source.path}: not the layout that {target.name} is read from ({error})") from None
    if source.shipped and shipped is not None and origin.weights != shipped:
        stale = f"not measured yet with the shipped weights {shipped}, the value is of {origin.weights}"
        reason = f"{stale}: {command}"
        return Row(target, reading.value, None, reason, command, *about)
    return Row(target, reading.value, target.is_met(reading), _why(target, reading), None, *about)


def _why(target: Target, reading: Reading) -> str | None:
    """Names the second bound where it decided."""
    if target.other is None or reading.other is None or target.bound.holds(reading.value):
        return None
    _, bound = target.other
    verdict = "kept" if bound.holds(reading.other) else "missed too"
    return f"second bound {bound.text('')} {verdict}: {shown(reading.other, bound)}"


def shown(value: float, bound: Bound) -> str:
    """A value with four digits, or with all where four would change the verdict."""
    text = f"{value:.4g}" if abs(value) < 1e4 else f"{value:.0f}"
    return text if bound.holds(float(text)) == bound.holds(value) else repr(value)


def markdown(rows: Sequence[Row], files: Files, shipped: str | None) -> str:
    """The page: a summary, a table for each experiment, what is missing, and the origin of every file."""
    experiments = list(dict.fromkeys(row.target.experiment for row in rows))
    parts = [_HEAD, _summary(rows, experiments)]
    parts += [_section(name, [row for row in rows if row.target.experiment == name]) for name in experiments]
    parts += [_missing(rows), _origins(files, shipped)]
    return "\n".join(parts)


def _table(head: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    cells = [tuple(head), ("---",) * len(head), *lines]
    return "".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |\n" for line in cells)


def _summary(rows: Sequence[Row], experiments: Sequence[str]) -> str:
    lines = []
    for name in (*experiments, None):
        mine = [row for row in rows if name in (None, row.target.experiment)]
        given = [verdict(row) for row in mine]
        counts = [given.count(one) for one in (*_VERDICTS.values(), "reported")]
        lines.append((name or "all", *map(str, counts), str(len(mine) - sum(counts)), str(len(mine))))
    return _table(("experiment", "met", "missed", "reported", "not judged", "total"), lines)


def _section(name: str, rows: Sequence[Row]) -> str:
    lines = []
    for row in rows:
        target = row.target
        figure = f"{target.about} `{target.name}`"
        lines.append((figure, target.seed, target.our_target, row.value, verdict(row)))
    notes = [f"- `{row.target.name}`: {row.reason}\n" for row in rows if row.command is None and row.reason]
    table = _table(("figure", "seed", "ours", "measured", "verdict"), lines)
    return f"## {name}\n\n{table}" + ("\n" + "".join(notes) if notes else "")


def verdict(row: Row) -> str:
    """Met or missed, as the page marks it, or why neither."""
    if row.met is None:
        return "not measured" if row.measured is None else "of other weights"
    return "reported" if row.target.bound.sign == "reported" else _VERDICTS[row.met]


def _missing(rows: Sequence[Row]) -> str:
    """Each file that is missing or lacks something, and what makes it."""
    missing: dict[Source, list[Row]] = {}
    for row in rows:
        if row.command is not None:
            missing.setdefault(row.target.source, []).append(row)
    lines = []
    for source, mine in missing.items():
        reasons = "; ".join(dict.fromkeys(_short(row) for row in mine))
        lines.append((f"`{source.path}`", str(len(mine)), reasons, f"`{mine[0].command}`"))
    return "## Not measured yet\n\n" + _table(("file", "figures", "why", "command that makes it"), lines)


def _short(row: Row) -> str:
    """A reason without the file and the command, which stand beside it."""
    reason = str(row.reason).removesuffix(str(row.command)).rstrip(":; ").removeprefix("not measured yet")
    return reason.removeprefix(": ").removeprefix(f"{row.target.source.path}: ").strip() or "no such file"


def _origins(files: Files, shipped: str | None) -> str:
    lines = []
    for path, file in files.items():
        if file is None:
            continue
        origin = file.origin
        weights = f"`{origin.weights}`"
        if str(origin.model).startswith("pocket") and shipped not in (None, origin.weights):
            weights += " (not the shipped pocket's)"
        about = (origin.model, origin.data_source, origin.machine, origin.device, origin.torch, origin.commit)
        lines.append((f"`{path}`", weights, *(cell or _DASH for cell in about), (origin.created or _DASH)[:10]))
    head = ("file", "weights", "model", "data", "hardware", "device", "torch", "commit", "made")
    note = f"The shipped pocket has the weights `{shipped}`.\n\n" if shipped else ""
    return f"## Where the figures come from\n\n{note}" + _table(head, lines)
