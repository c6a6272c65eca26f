"""Shared by the commands: parsing flags, and rich output on stdout or stderr."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import tyro

from tempovlm.core.errors import UserError

if TYPE_CHECKING:
    from rich.console import Console

Flags = TypeVar("Flags")

Json = tyro.conf.FlagCreatePairsOff[bool]
"""Type of every command's flag `--json`: one JSON object on one line of stdout, and all else on stderr."""


def parse(
    flags: type[Flags], argv: Sequence[str], command: str, description: str, examples: Sequence[str]
) -> Flags:
    """Parse a dataclass from the words after a command.

    Flags are spelled with underscores in the help and accept dashes too. Invalid flags end the process with exit
    code 2 and the parser's message.
    """
    text = description + "\n\nexamples:\n" + "\n".join(f"  {example}" for example in examples)
    return tyro.cli(flags, prog=f"tempovlm {command}", description=text, args=list(argv), use_underscores=True)


def number(flag: str, text: str | None) -> float | None:
    """Return a flag's text as a number; None stays None.

    Raises:
        UserError: it is not a number; names flag and text.
    """
    if text is None:
        return None
    try:
        return float(text)
    except ValueError:
        raise UserError(f"--{flag} {text}: not a number") from None


def stdout() -> Console:
    """Return a console for results."""
    return _console(stderr=False)


def stderr() -> Console:
    """Return a console for everything else."""
    return _console(stderr=True)


def _console(*, stderr: bool) -> Console:
    from rich.console import Console

    class Plain(Console):
        """Console that leaves a closed pipe to `main`; the library would end the process."""

        def on_broken_pipe(self) -> None:
            raise BrokenPipeError

    return Plain(stderr=stderr, highlight=False, soft_wrap=True)


def print_json(record: Mapping[str, Any]) -> None:
    """Print one object on one line of stdout; letters that stdout cannot encode are escaped."""
    is_utf8 = (sys.stdout.encoding or "").lower().replace("-", "") == "utf8"
    sys.stdout.write(json.dumps(record, ensure_ascii=not is_utf8) + "\n")
