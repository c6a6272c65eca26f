"""Where stdout cannot take the output: other encodings, closed, full, or read no further."""

from __future__ import annotations

import io
import json
import os
import sys
from pathlib import Path

import pytest
from rich.table import Table

from tempovlm.cli import console
from tempovlm.cli.main import main

INFO = ["model", "info", "molmoe-1b"]
FULL = Path("/dev/full")


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_letters_that_stdout_does_not_have_are_replaced(encoding: str, monkeypatch: pytest.MonkeyPatch) -> None:
    shown = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(shown, encoding=encoding))
    assert main(INFO) == 0
    console.print_json({"answer": "größer · ✓"})
    sys.stdout.flush()
    lines = shown.getvalue().decode(encoding).splitlines()
    assert any(line.startswith("whole answer: picture 640") for line in lines)
    assert json.loads(lines[-1]) == {"answer": "größer · ✓"}


@pytest.mark.parametrize("words", [["--version"], INFO])
def test_closed_streams(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", None)
    monkeypatch.setattr(sys, "stderr", None)
    assert main(words) == 0
    assert main(["no-such-command"]) == 2


@pytest.mark.parametrize("words", [["--help"], INFO, [*INFO, "--json"]])
def test_a_reader_that_went_away(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write, "w", encoding="utf-8") as stream:
        monkeypatch.setattr(sys, "stdout", stream)
        assert main(words) == 141


@pytest.mark.skipif(not FULL.exists(), reason="the system has no full device")
@pytest.mark.parametrize("words", [["--help"], INFO])
def test_a_full_device(
    words: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with FULL.open("w", encoding="utf-8") as stream:
        monkeypatch.setattr(sys, "stdout", stream)
        assert main(words) == 2
    assert capsys.readouterr().err == "tempovlm: error: no space is left where the output goes\n"


def test_rows_are_folded_for_a_terminal_only(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)
    table = Table.grid()
    table.add_row("figure " * 20, "promised " * 20)
    console.stdout().print(table)
    assert capsys.readouterr().out.count("\n") == 1
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    console.stdout().print(table)
    assert capsys.readouterr().out.count("\n") > 1


def test_a_terminal_that_claims_no_width(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "0")
    assert main(INFO) == 0
    assert "molmoe-1b" in capsys.readouterr().out
