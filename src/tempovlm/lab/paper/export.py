"""Writes results for papers: tidy CSV, booktabs tabulars and PDF figures of a column's width."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

from tempovlm.core.errors import UserError
from tempovlm.core.paths import write_whole

Format = Literal["csv", "latex", "pdf"]

_DIGITS = 6
_SPECIAL = {**{c: f"\\{c}" for c in "&%$#_{}"}, "\\": r"\textbackslash{}", "~": r"\~{}", "^": r"\^{}"}
_SIGNS = {"–": "--", "·": r"$\cdot$", "≤": r"$\leq$", "≥": r"$\geq$", "…": r"\ldots{}"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Tabular:
    """A table as a paper prints it.

    Attributes:
        caption: what it shows, with how intervals were made.
        head: the columns' names.
        rows: cells in LaTeX; `number` and `text` make them.
    """

    caption: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Export:
    """The tables and figures of a command, each by the name of its file without the ending.

    Attributes:
        tables: tidy rows, each with the same fields; shares are of 1, an absent value is None.
        tabulars: tables to print.
        figures: functions that draw a PDF page.
    """

    tables: Mapping[str, Sequence[Mapping[str, Any]]]
    tabulars: Mapping[str, Tabular]
    figures: Mapping[str, Callable[[], bytes]]


def check_formats(formats: Sequence[Format]) -> None:
    """Raise a `UserError` before anything is measured if a format needs what is not installed."""
    if "pdf" in formats and find_spec("matplotlib") is None:
        raise UserError("--export pdf: needs matplotlib; pip install matplotlib, or leave pdf out")


def write(folder: Path, export: Export, formats: Sequence[Format]) -> list[Path]:
    """Write the formats, each once, and return the paths.

    Raises:
        UserError: the folder cannot be written.
    """
    files: dict[str, str | bytes] = {}
    if "csv" in formats:
        files |= {f"{name}.csv": to_csv(rows) for name, rows in export.tables.items()}
    if "latex" in formats:
        files |= {f"{name}.tex": to_latex(name, tabular) for name, tabular in export.tabulars.items()}
    if "pdf" in formats:
        files |= {f"{name}.pdf": draw() for name, draw in export.figures.items()}
    for name, content in files.items():
        write_whole(folder / name, content)
    return [folder / name for name in files]


def to_csv(rows: Sequence[Mapping[str, Any]]) -> str:
    """Format tidy rows, the fields of the first as the header; None is an empty cell."""
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, list(rows[0]) if rows else [], lineterminator="\n")
    writer.writeheader()
    for row in rows:
        values = {key: round(v, _DIGITS) if isinstance(v, float) else v for key, v in row.items()}
        writer.writerow(values)
    return buffer.getvalue()


def interval(name: str, value: float | None, ends: Sequence[float] | None) -> dict[str, float | None]:
    """Fields of a value with its interval: `NAME`, `NAME_low`, `NAME_high`."""
    low, high = ends or (None, None)
    return {name: value, f"{name}_low": low, f"{name}_high": high}


def to_latex(name: str, tabular: Tabular) -> str:
    """Format a tabular of the package booktabs; its caption and label stand in comments, to be copied."""
    body = "\n".join(" & ".join(row) + r" \\" for row in tabular.rows)
    head = " & ".join(text(column) for column in tabular.head)
    label = name.replace("_", "-")
    return (
        "% Needs \\usepackage{booktabs}. Read it with \\input inside a table, with\n"
        f"% \\caption{{{text(tabular.caption)}}}\n"
        f"% \\label{{tab:{label}}}\n"
        "\\begingroup\\footnotesize\\setlength{\\tabcolsep}{4pt}\n"
        f"\\begin{{tabular}}{{l{'r' * (len(tabular.head) - 1)}}}\n"
        f"\\toprule\n{head} \\\\\n\\midrule\n{body}\n\\bottomrule\n\\end{{tabular}}\n"
        "\\endgroup\n"
    )


def text(value: object) -> str:
    """Escape a text for LaTeX."""
    return "".join(_SIGNS.get(c, _SPECIAL.get(c, c)) for c in " ".join(str(value).split()))


def number(
    value: float | None,
    ends: Sequence[float] | None = None,
    *,
    scale: float = 100.0,
    digits: int = 1,
    sign: bool = False,
    stacked: bool = False,
) -> str:
    """Format a value with its interval in small type as a LaTeX cell; an en dash where there is none.

    Args:
        value: the value.
        ends: of its interval.
        scale: factor of both; 100 turns shares into percent or points.
        digits: after the point.
        sign: write a plus too.
        stacked: put the interval below the value, for tables with many columns.
    """
    if value is None:
        return "--"

    def shown(one: float) -> str:
        rounded = round(scale * one, digits)
        return f"${rounded if rounded else 0.0:{'+' if sign and rounded else ''}.{digits}f}$"

    if ends is None:
        return shown(value)
    low, high = map(shown, ends)
    small = f"{{\\tiny [{low}, {high}]}}"
    if not stacked:
        return f"{shown(value)} {small}"
    # Of \shortstack the last line would stand beside the row's name, here it is the first.
    return f"\\begin{{tabular}}[t]{{@{{}}r@{{}}}}{shown(value)}\\\\[-2pt]{small}\\end{{tabular}}"
