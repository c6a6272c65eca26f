"""Files for papers: tidy CSV, tabulars that LaTeX reads, PDF pages; what is missing is named before any work."""

from __future__ import annotations

import csv
import io
import re
from pathlib import Path
from types import ModuleType

import pytest

from tempovlm.cli import bench, evaluate
from tempovlm.core.errors import UserError
from tempovlm.lab.paper import export
from tempovlm.lab.paper.export import Export, Tabular, number, text

TABULAR = Tabular(caption="50 % & more_", head=("policy", "a_b"), rows=[[text("x_1"), number(0.5, (0.4, 0.6))]])
EXPORT = Export(
    tables={"t": [{"policy": "a, b", "value": 0.1234567891}, {"policy": "c", "value": None}]},
    tabulars={"t": TABULAR},
    figures={"f": lambda: b"%PDF-1.4"},
)


def test_each_format_is_written_once_and_named(tmp_path: Path) -> None:
    assert export.write(tmp_path, EXPORT, ()) == []
    assert export.write(tmp_path, EXPORT, ("latex", "csv", "csv")) == [tmp_path / "t.csv", tmp_path / "t.tex"]
    assert export.write(tmp_path, EXPORT, ("pdf",)) == [tmp_path / "f.pdf"]
    assert {path.name for path in tmp_path.iterdir()} == {"t.csv", "t.tex", "f.pdf"}


def test_csv_is_tidy_and_an_absent_value_is_empty() -> None:
    rows = list(csv.DictReader(io.StringIO(export.to_csv(EXPORT.tables["t"]))))
    assert [row["policy"] for row in rows] == ["a, b", "c"]
    assert float(rows[0]["value"]) == pytest.approx(0.1234567891, abs=1e-6)
    assert rows[1]["value"] == ""
    assert export.to_csv([]).strip() == ""


def test_a_tabular_has_rules_caption_and_label_and_escapes() -> None:
    found = export.to_latex("by_budget", TABULAR)
    assert "% \\caption{50 \\% \\& more\\_}" in found
    assert "% \\label{tab:by-budget}" in found
    assert r"policy & a\_b \\" in found
    assert r"x\_1 & $50.0$ {\tiny [$40.0$, $60.0$]} \\" in found
    for rule in ("toprule", "midrule", "bottomrule"):
        assert found.count(f"\\{rule}") == 1
    lines = [line for line in found.splitlines() if not line.startswith("%")]
    assert not re.search(r"(?<!\\)[%#]", "\n".join(lines))
    counts = {len(re.findall(r"(?<!\\)&", line)) for line in lines if line.endswith(r"\\")}
    assert counts == {1}


def test_numbers_are_signed_scaled_and_dashed() -> None:
    assert number(None) == "--"
    assert number(-0.0001, sign=True) == "$0.0$"
    assert number(0.052, (0.041, -0.003), sign=True) == r"$+5.2$ {\tiny [$+4.1$, $-0.3$]}"
    assert number(61.6, scale=1, digits=0) == "$62$"
    assert number(0.5, (0.4, 0.6), stacked=True).startswith(r"\begin{tabular}[t]{@{}r@{}}$50.0$\\")


def test_text_is_escaped() -> None:
    assert text("a_b\\c~^{d}\n#1 – 5 ≤ …") == r"a\_b\textbackslash{}c\~{}\^{}\{d\} \#1 -- 5 $\leq$ \ldots{}"


@pytest.mark.parametrize("command", [bench, evaluate])
def test_an_unknown_format_is_named_with_the_known_ones(
    command: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as raised:
        command.main(["--results_dir", "x", "--export", "docx"] if command is evaluate else ["--export", "docx"])
    assert raised.value.code == 2
    told = capsys.readouterr().err
    assert all(word in told for word in ("docx", "--export", "csv", "latex", "pdf"))


def test_pdf_without_matplotlib_is_refused_before_anything_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(export, "find_spec", lambda _: None)
    with pytest.raises(UserError, match="--export pdf: needs matplotlib; pip install matplotlib"):
        export.check_formats(("csv", "pdf"))
    export.check_formats(("csv", "latex"))
