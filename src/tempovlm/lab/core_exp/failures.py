"""Reports how much of a run failed, and fails the run where nothing was answered."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from tempovlm.core.errors import AllFailedError

_log = logging.getLogger("tempovlm")


AGAIN = "run the same command again to ask them again"
"""The remedy where answers are kept, and what failed is not among them."""


ANEW = "mend that and run the same command again, which asks everything anew"
"""The remedy where nothing is kept for another run."""


def tell_failures(errors: Sequence[str], total: int, what: str, remedy: str) -> None:
    """Log how many failed, if any did.

    Args:
        errors: of those that failed, one line each.
        total: how many were tried.
        what: was tried, in the plural.
        remedy: what to do about it.

    Raises:
        AllFailedError: all of them failed.
    """
    if not errors:
        return
    if len(errors) == total:
        raise AllFailedError(f"all {total} {what} failed, the first with: {errors[0]}; {remedy}")
    _log.warning("%d of %d %s failed, the first with: %s; %s", len(errors), total, what, errors[0], remedy)
