"""The help of every script and command, stored: a changed flag, default or text shows as a changed file.

`python tests/golden/test_help.py` writes them anew, to be read before they are committed.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
import io
import re
import shlex
import sys
from pathlib import Path
from typing import Any

import pytest

from tempovlm.cli import console
from tempovlm.cli.main import COMMANDS
from tempovlm.cli.main import main as tempovlm

ROOT = Path(__file__).resolve().parents[2]
STORE = Path(__file__).with_name("help")
SUBCOMMANDS = {"data": ("make", "check", "download"), "model": ("info", "random")}
SCRIPTS = {path.stem: path for path in sorted((ROOT / "experiments").glob("co*/*.py"))}
WORDS: dict[str, list[str]] = {
    "tempovlm": [],
    **{f"tempovlm_{name}": [name] for name in COMMANDS},
    **{f"tempovlm_{name}_{sub}": [name, sub] for name, subs in SUBCOMMANDS.items() for sub in subs},
}


@functools.cache
def help_of(name: str) -> str:
    """What a command or script prints for `--help` on a terminal of 100 columns without colours."""
    text = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(text):
        for variable, value in (("COLUMNS", "100"), ("NO_COLOR", "1"), ("TERM", "dumb")):
            patch.setenv(variable, value)
        patch.delenv("FORCE_COLOR", raising=False)
        with contextlib.suppress(SystemExit):
            if name in WORDS:
                tempovlm([*WORDS[name], "--help"])
            else:
                patch.setattr(sys, "argv", [str(SCRIPTS[name]), "--help"])
                run_script(SCRIPTS[name])
    return "\n".join(line.rstrip() for line in text.getvalue().splitlines()) + "\n"


def run_script(path: Path) -> None:
    spec = importlib.util.spec_from_file_location(f"script_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    sys.modules[spec.name] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.main(["--help"])


@pytest.mark.parametrize("name", [*WORDS, *SCRIPTS])
def test_help_is_the_stored_one(name: str) -> None:
    assert help_of(name) == (STORE / f"{name}.txt").read_text(encoding="utf-8")


class ParsedError(Exception):
    """Ends a command whose words were right."""


OF_THE_PARSER = re.compile(r"\b(STR|INT|FLOAT)\b|\{None|\{fixed\}|default: (None|False)?\)")


@pytest.mark.parametrize("name", [*WORDS, *SCRIPTS])
def test_values_have_names(name: str) -> None:
    """The help says IMAGE or N, and has no default where there is none."""
    assert not OF_THE_PARSER.search(help_of(name))


def examples(name: str) -> list[list[str]]:
    """The commands that a stored help shows as examples, word by word, without `tempovlm`."""
    stored = (STORE / f"{name}.txt").read_text(encoding="utf-8")
    shown = stored.partition("\nexamples:\n")[2].partition("\n\n")[0].replace("\\\n", " ")
    return [shlex.split(line)[1:] for line in shown.splitlines()]


@pytest.mark.parametrize(
    "words",
    [words for name in WORDS if (STORE / f"{name}.txt").exists() for words in examples(name)],
    ids=" ".join,
)
def test_examples_are_taken_and_read_what_is_there(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    real = console.parse

    def stop(*given: Any, **more: Any) -> None:
        real(*given, **more)
        raise ParsedError

    monkeypatch.setattr(console, "parse", stop)
    with pytest.raises(ParsedError):
        importlib.import_module(f"tempovlm.cli.{words[0]}").main(words[1:])
    read = [word for word in words if word.startswith(("results/", "checkpoints/"))]
    assert not [word for word in read if not (ROOT / word).exists()]


def test_no_help_of_what_is_gone_is_stored() -> None:
    assert {path.stem for path in STORE.iterdir()} == {*WORDS, *SCRIPTS}


if __name__ == "__main__":
    for one in (*WORDS, *SCRIPTS):
        (STORE / f"{one}.txt").write_text(help_of(one), encoding="utf-8")
    sys.stdout.write(f"{STORE}\n")
