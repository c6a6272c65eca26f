"""The `tempovlm` command: picks a subcommand, runs it and turns its failures into one line and an exit code.

Each subcommand is a module of this package with `main(argv)`, imported when it is chosen, so that
`tempovlm --help` imports neither torch nor the flag parser.
"""

from __future__ import annotations

import errno
import importlib
import io
import os
import sys
from collections.abc import Callable
from pathlib import Path

from tempovlm import __version__
from tempovlm.core.errors import EXIT_INTERRUPTED, EXIT_USAGE, UserError, did_you_mean, explained

COMMANDS = {
    "answer": "answer a question about a picture within a budget in milliseconds",
    "serve": "serve the model over HTTP as OpenAI's API, with a deadline for each request",
    "bench": "run a data set at several budgets: accuracy, adherence, latency quantiles",
    "calibrate": "measure what each knob setting costs on this machine and store it",
    "tune": "measure how accurate the settings are on your own questions and store it",
    "evaluate": "judge policies on recorded answers against baselines, and write a report",
    "demo": "answer example pictures at three budgets and write an HTML report",
    "data": "make, check or download the data sets",
    "model": "show what a model is and costs, or write a random one",
    "reproduce": "run the eight experiments in their order and put what was promised beside what was measured",
    "report": "write the table of promised against measured figures from the result files",
}

_HELP = """\
usage: tempovlm COMMAND [FLAGS]

A vision-language model with a deadline: an image, a question and a latency budget in; the answer out on time.

commands:
{commands}

examples:
  tempovlm answer street.png "what does the sign say?" --budget_ms 150
  tempovlm answer street.png "what does the sign say?" --budget_ms 150 --json
  tempovlm serve --default_budget_ms 300
  tempovlm bench --dataset text_vqa --budgets 60 100 200 --num_samples 100
  tempovlm calibrate --force
  tempovlm tune my.csv

tempovlm COMMAND --help lists the flags of a command; tempovlm --version prints the version.
"""

_EXIT_OK = 0
_EXIT_BROKEN_PIPE = 141


def main(argv: list[str] | None = None) -> int:
    """Run one subcommand.

    Args:
        argv: the words after `tempovlm`; None takes them from the command line.

    Returns:
        The exit code: 0; 1 if every question failed, 2 for invalid input, 130 after Ctrl-C, 141 if the reader
        of stdout went away. A subcommand's parser may also leave through SystemExit with its own code.
    """
    words = sys.argv[1:] if argv is None else argv
    _make_streams_usable()
    try:
        code = _run(words)
        sys.stdout.flush()
    except BrokenPipeError:
        _discard_stdout()
        return _EXIT_BROKEN_PIPE
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        _discard_stdout()
        return _fail("no space is left where the output goes")
    except KeyboardInterrupt:
        return _fail("interrupted", EXIT_INTERRUPTED)
    return code


def _run(words: list[str]) -> int:
    name = words[0] if words else "--help"
    if name in ("-h", "--help", "help"):
        sys.stdout.write(help_text())
        return _EXIT_OK
    if name == "--version":
        sys.stdout.write(f"tempovlm {__version__}\n")
        return _EXIT_OK
    if name not in COMMANDS:
        return _fail(_unknown(name))
    try:
        command: Callable[[list[str]], None] = importlib.import_module(f"tempovlm.cli.{name}").main
        command(words[1:])
    except (UserError, ModuleNotFoundError) as error:
        return _fail(*explained(error, name))
    return _EXIT_OK


def help_text() -> str:
    """Return the text of `tempovlm --help`."""
    width = max(map(len, COMMANDS))
    lines = (f"  {name:<{width}}  {purpose}" for name, purpose in COMMANDS.items())
    return _HELP.format(commands="\n".join(lines))


def _unknown(name: str) -> str:
    return f"unknown command {name!r}; {did_you_mean(name, COMMANDS)}choose from {', '.join(COMMANDS)}"


def _fail(message: str, code: int = EXIT_USAGE) -> int:
    sys.stderr.write(f"tempovlm: error: {message}\n")
    return code


def _make_streams_usable() -> None:
    """Never fail because of the terminal: tolerate closed streams, unencodable characters and COLUMNS=0."""
    if sys.stdout is None:
        sys.stdout = Path(os.devnull).open("w")  # noqa: SIM115 - open until the process ends
    if sys.stderr is None:
        sys.stderr = Path(os.devnull).open("w")  # noqa: SIM115 - stays open until exit
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")
    if os.environ.get("COLUMNS") == "0":
        del os.environ["COLUMNS"]


def _discard_stdout() -> None:
    """Redirect stdout to nothing, so that the interpreter's last flush does not report the failure again."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


if __name__ == "__main__":
    sys.exit(main())
