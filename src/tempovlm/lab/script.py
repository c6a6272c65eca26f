"""Runs an experiment script: flags spelled with underscores, failures as one line and an exit code."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping
from dataclasses import MISSING, field, fields
from typing import Any, NoReturn, Self, TypeVar

from tempovlm.core.errors import EXIT_INTERRUPTED, UserError, explained
from tempovlm.data.registry import check_datasets as check_datasets

Options = TypeVar("Options")


def flag(default: Any, text: str, *names: str) -> Any:
    """Declare a dataclass's field that `FlagParser.add_options` makes a flag, with its help and its spellings."""
    return field(default=default, metadata={"help": text, "names": names})


def options_from(kind: type[Options], flags: Mapping[str, Any]) -> Options:
    """Make options, a dataclass, of the flags that have its fields' names."""
    return kind(**{one.name: flags[one.name] for one in fields(kind) if one.name in flags})  # type: ignore[arg-type]


class FlagParser(argparse.ArgumentParser):
    """A parser that takes flags in full only; a wrong one raises a `UserError`."""

    def __init__(self, description: str) -> None:
        super().__init__(
            description=description,
            allow_abbrev=False,
            formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        )

    def with_defaults(self, kind: type[Any]) -> Self:
        """Give every flag that has no default that of the dataclass's field of its name."""
        for one in fields(kind):
            if one.default is not MISSING and self.get_default(one.name) is None:
                value = list(one.default) if isinstance(one.default, tuple) else one.default
                self.set_defaults(**{one.name: value})
        return self

    def add_options(self, kind: type[Any]) -> Self:
        """Add a flag for each of a dataclass's fields that were declared with `flag`."""
        for one in (one for one in fields(kind) if "help" in one.metadata):
            names = one.metadata["names"] or (f"--{one.name}",)
            more: dict[str, Any] = {"dest": one.name, "default": one.default, "help": one.metadata["help"]}
            if isinstance(one.default, bool):
                more["action"] = argparse.BooleanOptionalAction
            else:
                more |= {"type": type(one.default), "metavar": names[0].removeprefix("--").upper()}
            self.add_argument(*names, **more)
        return self

    def error(self, message: str) -> NoReturn:
        """Raise instead of printing the usage, which would not be one line."""
        raise UserError(f"{message} (--help lists the flags)")


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
