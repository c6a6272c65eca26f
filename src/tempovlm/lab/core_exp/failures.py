"""Reports how much of a run failed, and fails the run where nothing was answered."""

from __future__ import annotations

import logging

from tempovlm.core.errors import AllFailedError

_log = logging.getLogger("tempovlm")


def tell_failures(failed: int, total: int, first: str | None, *, what: str = "rows") -> None:
    """Log how many failed, if any did.

    Args:
        failed: how many.
        total: of how many.
        first: the first error, in one line.
        what: was asked for.

    Raises:
        AllFailedError: all of them failed.
    """
    if not failed:
        return
    again = "run the same command again to ask them again"
    if failed == total:
        raise AllFailedError(f"all {total} {what} failed, the first with: {first}; {again}")
    _log.warning("%d of %d %s failed, the first with: %s; %s", failed, total, what, first, again)
