"""Shared by the commands: parsing flags, and rich output on stdout or stderr."""

from __future__ import annotations

import ast
import inspect
import json
import os
import shlex
import sys
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import is_dataclass
from functools import cache
from itertools import pairwise
from pathlib import Path
from types import NoneType, UnionType
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import tyro

from tempovlm.core.errors import UserError

if TYPE_CHECKING:
    from rich.console import Console

Flags = TypeVar("Flags")

_NO_FOLD = 10_000
"""Columns of an output that nobody looks at while it is written."""

Json = tyro.conf.FlagCreatePairsOff[bool]
"""Type of every command's flag `--json`: one JSON object on one line of stdout, and all else on stderr."""


def parse(
    flags: type[Flags],
    argv: Sequence[str],
    command: str,
    description: str,
    examples: Sequence[str],
    surplus: str = "",
) -> Flags:
    """Parse a dataclass from the words after a command.

    Flags are spelled with underscores in the help and accept dashes too. Invalid flags end the process with exit
    code 2 and the parser's message.

    Args:
        flags: the dataclass.
        argv: the words.
        command: its name.
        description: for the help.
        examples: for the help.
        surplus: remedy where there are more words than the command takes and none of them is a flag.

    Raises:
        UserError: there are more words, and a remedy.
    """
    text = description + "\n\nexamples:\n" + "\n".join(f"  {example}" for example in examples)
    program = f"tempovlm {command}"
    about: dict[str, Any] = {"prog": program, "description": text, "use_underscores": True}
    if surplus:
        found, unknown = tyro.cli(_described(flags), args=list(argv), return_unknown_args=True, **about)
        if not unknown:
            return found
        if not any(word.startswith("-") for word in unknown):
            raise UserError(f"unexpected {shlex.join(unknown)}: {surplus}")
    return tyro.cli(_described(flags), args=list(argv), **about)


def _described(flags: type[Flags]) -> type[Flags]:
    """Return the same flags, whose help names values (IMAGE, N) instead of types (STR, {None}|INT)."""
    shown, texts = {}, _texts(flags)
    for name, hint in get_type_hints(flags, include_extras=True).items():
        extras = getattr(hint, "__metadata__", ())
        given = {key: value for one in extras for key in ("metavar", "help") if (value := getattr(one, key, None))}
        plain = hint.__origin__ if extras else hint
        about = {"metavar": _metavar(name, plain), "help": texts.get(name), **given}
        shown[name] = Annotated[hint, tyro.conf.arg(help_behavior_hint=_default_shown, **about)]
    return type(flags.__name__, (flags,), {"__annotations__": shown, "__doc__": flags.__doc__})


def _texts(flags: type[Any]) -> dict[str, str]:
    """Return the text below each field, which the parser itself would break where the source is broken."""
    kinds = filter(is_dataclass, reversed(flags.__mro__))
    return {name: text for kind in kinds for name, text in _own_texts(kind).items()}


@cache
def _own_texts(kind: type) -> dict[str, str]:
    """Return the texts of the fields that a dataclass declares itself."""
    found = {}
    (declared,) = ast.parse(textwrap.dedent(inspect.getsource(kind))).body
    assert isinstance(declared, ast.ClassDef)
    for one, below in pairwise(declared.body):
        if isinstance(one, ast.AnnAssign) and isinstance(below, ast.Expr):
            found[ast.unparse(one.target)] = " ".join(ast.literal_eval(below.value).split())
    return found


def _metavar(name: str, hint: Any) -> str | None:
    """Return a value's word in the help: its choices, N for a number, or the last word of the flag's name."""
    if get_origin(hint) in (Union, UnionType):
        (hint,) = (one for one in get_args(hint) if one is not NoneType)
    if get_origin(hint) is Literal:
        return f"{{{','.join(map(str, get_args(hint)))}}}"
    if get_origin(hint) is tuple:
        one = _metavar(name.removesuffix("s"), get_args(hint)[0])
        return f"{one} [{one} ...]"
    if hint is bool:
        return None
    return {int: "N", float: "NUMBER", Path: "PATH"}.get(hint, name.rpartition("_")[2].upper())


def _default_shown(label: str) -> str:
    return "" if label in ("None", "False", "") else f"(default: {label})"


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

    stream = sys.stderr if stderr else sys.stdout
    is_seen = stream.isatty() or "COLUMNS" in os.environ

    class Plain(Console):
        """Console that leaves a closed pipe to `main`; the library would end the process."""

        def on_broken_pipe(self) -> None:
            raise BrokenPipeError

    # Into a file or a pipe a row of a table is a line, however long: the library would fold it to 80 columns.
    return Plain(stderr=stderr, highlight=False, soft_wrap=True, width=None if is_seen else _NO_FOLD)


def print_json(record: Mapping[str, Any]) -> None:
    """Print one object on one line of stdout; letters that stdout cannot encode are escaped."""
    is_utf8 = (sys.stdout.encoding or "").lower().replace("-", "") == "utf8"
    sys.stdout.write(json.dumps(record, ensure_ascii=not is_utf8) + "\n")
