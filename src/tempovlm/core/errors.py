"""The errors a user is meant to see: a single line that names what was wrong and what to do about it."""

from __future__ import annotations


class UserError(ValueError):
    """Wrong input from outside (a file, a flag, a budget). The CLI prints it on one line and exits with 2."""


class AllFailedError(UserError):
    """Every question of a run failed. The CLI prints it on one line and exits with 1."""
