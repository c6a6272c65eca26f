"""Errors for users: a single line that says what is wrong and what to do about it."""

from __future__ import annotations

EXIT_NOTHING, EXIT_USAGE, EXIT_INTERRUPTED = 1, 2, 130

_EXTRA_OF_PACKAGE = {
    **dict.fromkeys(
        ("scipy", "sklearn", "pandas", "pyarrow", "jinja2", "matplotlib", "tensorboard"), "experiments"
    ),
    "pycocoevalcap": "captions",
}


class UserError(ValueError):
    """Invalid input from outside (a file, a flag, a budget). The CLI prints it on one line and exits with 2."""


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
        return " ".join(str(error).splitlines()), EXIT_NOTHING if isinstance(error, AllFailedError) else EXIT_USAGE
    package = (error.name or "").partition(".")[0]
    if package not in _EXTRA_OF_PACKAGE:
        raise error
    extra = _EXTRA_OF_PACKAGE[package]
    return f"{name} needs {package}, which is not installed: pip install 'tempovlm[{extra}]'".lstrip(), EXIT_USAGE
