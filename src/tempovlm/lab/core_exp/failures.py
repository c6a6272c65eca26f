"""Report how much of a run failed, and fail the run if nothing was answered."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from tempovlm.core.errors import AllFailedError

_log = logging.getLogger("tempovlm")


AGAIN = "run the same command again to ask them again"
"""The remedy if answers are kept and failures are not."""


ANEW = "correct that and run the same command again, which asks everything again"
"""The remedy if nothing is kept for another run."""


def tell_failures(errors: Sequence[str], total: int, what: str, remedy: str) -> None:
    """Log the number of failures, if there are any.

    Args:
        errors: one line for each failure.
        total: number of attempts.
        what: name of the attempts, in the plural.
        remedy: advice to the user.

    Raises:
        AllFailedError: all of them failed.
    """
    if not errors:
        return
    if len(errors) == total:
        raise AllFailedError(f"all {total} {what} failed, the first with: {errors[0]}; {remedy}")
    _log.warning("%d of %d %s failed, the first with: %s; %s", len(errors), total, what, errors[0], remedy)
