"""Runs an experiment script: flags from dataclasses, failures as one line and an exit code."""

from __future__ import annotations

import argparse
import sys
import textwrap
from argparse import BooleanOptionalAction
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, Field, field, fields
from types import NoneType, UnionType
from typing import Any, Literal, NoReturn, TypeVar, Union, get_args, get_origin, get_type_hints

from tempovlm.core.errors import EXIT_INTERRUPTED, UserError, explained

Options = TypeVar("Options")


def flag(default: Any, text: str, *names: str, read: Callable[[str], Any] | None = None) -> Any:
    """Declare a dataclass's field as a flag of `FlagParser`.

    Args:
        default: the field's default, from which the help takes it.
        text: the flag's help.
        names: its spellings; the field's name if there are none.
        read: makes a value of a word; the field's type if it is None.
    """
    return field(default=default, metadata={"help": text, "names": names, "read": read})


def required(text: str, *names: str) -> Any:
    """Declare a dataclass's field as a flag that must be given."""
    return field(metadata={"help": text, "names": names, "read": None})


def options_from(kind: type[Options], flags: Mapping[str, Any]) -> Options:
    """Make a dataclass of the values that have its fields' names; for None, a field keeps its own default."""
    values = {one.name: flags[one.name] for one in fields(kind) if flags.get(one.name) is not None}  # type: ignore[arg-type]
    return kind(**{name: tuple(value) if isinstance(value, list) else value for name, value in values.items()})


class FlagParser(argparse.ArgumentParser):
    """A parser whose flags are fields of dataclasses and are taken in full only; a wrong one is a `UserError`."""

    def __init__(self, description: str | None, *kinds: type[Any]) -> None:
        """Add a flag for each field that `flag` or `required` declares.

        Args:
            description: a script's docstring, of which the help shows the first line and the examples.
            kinds: dataclasses; of fields of one name the first counts, and hides the others if it is no flag.
        """
        head, _, examples = str(description).partition("\n\nExamples:\n")
        epilog = examples and "examples:\n" + textwrap.indent(textwrap.dedent(examples), "  ")
        as_written = argparse.RawDescriptionHelpFormatter  # keeps the lines of the examples
        super().__init__(
            description=head.splitlines()[0], epilog=epilog, formatter_class=as_written, allow_abbrev=False
        )
        declared: dict[str, tuple[Field[Any], Any]] = {}
        for kind in kinds:
            hints = get_type_hints(kind)
            for one in fields(kind):
                declared.setdefault(one.name, (one, hints[one.name]))
        for one, hint in declared.values():
            if "help" in one.metadata:
                self._add(one, hint)

    def _add(self, one: Field[Any], hint: Any) -> None:
        names = one.metadata["names"] or (f"--{one.name}",)
        is_required = one.default is MISSING
        default = None if is_required else one.default
        words: dict[str, Any] = {"dest": one.name, "help": _help(one.metadata["help"], default)}
        if get_origin(hint) in (Union, UnionType):
            hint = next(kind for kind in get_args(hint) if kind is not NoneType)
        if hint is bool:
            words["action"] = BooleanOptionalAction if default else "store_true"
        else:
            if get_origin(hint) in (tuple, Sequence):
                words["nargs"], hint = "+", get_args(hint)[0]
            if get_origin(hint) is Literal:
                words["choices"], hint = get_args(hint), str
            else:
                words["metavar"] = names[0].removeprefix("--").upper()
            words |= {"type": one.metadata["read"] or hint, "required": is_required}
        self.add_argument(*names, **words, default=argparse.SUPPRESS)  # else some actions tell it a second time
        self.set_defaults(**{one.name: default})

    def error(self, message: str) -> NoReturn:
        """Raise instead of printing the usage, which would not be one line."""
        raise UserError(f"{message} (--help lists the flags)")


def _help(text: str, default: Any) -> str:
    if default is None or default is False or default == () or "default" in text:
        return text
    return f"{text} (default: {' '.join(map(str, default)) if isinstance(default, tuple) else default})"


def run(main: Callable[[list[str]], None]) -> NoReturn:
    """Run a script's main function on the command line's words and end the process.

    Exit codes: 0, 1 where every question failed, 2 for wrong input or a package that is not installed (each one
    line on stderr), 130 after Ctrl-C.
    """
    try:
        main(sys.argv[1:])
    except (UserError, ModuleNotFoundError) as error:
        _fail(*explained(error))
    except KeyboardInterrupt:
        _fail("interrupted; run the same command again to resume", EXIT_INTERRUPTED)
    sys.exit(0)


def _fail(message: str, code: int) -> NoReturn:
    sys.stderr.write(f"error: {message}\n")
    sys.exit(code)


def seed(text: str) -> int:
    """Read a flag as a seed that every random number generator takes."""
    value = int(text)
    if not 0 <= value < 2**32:
        raise argparse.ArgumentTypeError(f"{value}: must be from 0 to {2**32 - 1}")
    return value


def positive(flag: str, value: int) -> int:
    """Return the value of a flag that must be at least 1.

    Raises:
        UserError: it is less.
    """
    if value < 1:
        raise UserError(f"--{flag} {value}: must be at least 1")
    return value
