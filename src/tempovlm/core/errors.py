"""Errors for users: a single line that says what is wrong and what to do about it."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

EXIT_NOTHING, EXIT_USAGE, EXIT_INTERRUPTED = 1, 2, 130

_EXTRA_OF_PACKAGE = {
    **dict.fromkeys(
        ("scipy", "sklearn", "pandas", "pyarrow", "jinja2", "matplotlib", "tensorboard"), "experiments"
    ),
    "pycocoevalcap": "captions",
    "ray": "ray",
    **dict.fromkeys(("fastapi", "starlette", "pydantic", "uvicorn", "h11", "prometheus_client"), "serve"),
}


class UserError(ValueError):
    """Invalid input from outside (a file, a flag, a budget). The CLI prints it on one line and exits with 2.

    Attributes:
        flagged: the message for the command line, where an argument is a flag: `--tier ultra` for `tier='ultra'`.
    """

    def __init__(self, message: str, flagged: str | None = None) -> None:
        super().__init__(message)
        self.flagged = message if flagged is None else flagged


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return a hint at the nearest of the known names, to stand before a list of them; empty if none is near."""
    close = difflib.get_close_matches(name, known, n=1)
    return f"did you mean {close[0]}? " if close else ""


class AllFailedError(UserError):
    """Every question of a run failed. The CLI prints it on one line and exits with 1."""


class PolicyError(UserError):
    """The scores of a policy cannot be used, whatever the question: a run of many questions ends."""


def explained(error: UserError | ModuleNotFoundError, name: str = "") -> tuple[str, int]:
    """Turn an error for users into one line and an exit code.

    Args:
        error: raised again if it is a missing module that belongs to no extra of this package.
        name: name of the command, to begin the line with.
    """
    if isinstance(error, UserError):
        code = EXIT_NOTHING if isinstance(error, AllFailedError) else EXIT_USAGE
        return " ".join(error.flagged.splitlines()), code
    package = (error.name or "").partition(".")[0]
    if package not in _EXTRA_OF_PACKAGE:
        raise error
    extra = _EXTRA_OF_PACKAGE[package]
    return f"{name} needs {package}, which is not installed: pip install 'tempovlm[{extra}]'".lstrip(), EXIT_USAGE
