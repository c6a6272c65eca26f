"""Shares of requests with intervals: neighbours share a burst, so whole blocks of them are drawn.

Shapes: `n` requests, `R` resamples, the first of them the sample itself.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from tempovlm.control.select import Mask
from tempovlm.lab.judge.judge import share_closed
from tempovlm.lab.queueing.simulate import Outcome
from tempovlm.lab.statistics import Resamples, percentile_interval
from tempovlm.lab.table import Floats

BLOCK = 100
"""Consecutive requests of a block; a shorter run has ten blocks at least."""

_LEAST_BLOCKS = 10

SHARES = ("right_on_time", "on_time", "refused", "late", "refused_late")
"""Shares of requests in a row."""


def blocks_of(count: int) -> Resamples:
    """Draw resamples of blocks of consecutive requests, of `count` in all.

    Source: H. R. Künsch, The jackknife and the bootstrap for general stationary observations, Annals of Statistics
    17 (1989); here the blocks do not overlap (E. Carlstein, Annals of Statistics 14, 1986).
    """
    length = max(1, min(BLOCK, count // _LEAST_BLOCKS))
    return Resamples([str(block) for block in np.arange(count) // length])


def share_row(outcome: Outcome, blocks: Resamples, chosen: Mask | None = None) -> dict[str, Any]:
    """Return the shares of all requests, or of the chosen ones (n,): right and on time, on time, refused, late.

    The last three add up to 1. A refusal that is told late counts as late, and `refused_late` is that part of
    `late`. `interval` is that of the first share.
    """
    mask = np.ones(len(outcome.setting), dtype=bool) if chosen is None else chosen
    right = np.where(mask, outcome.right_on_time, np.nan)
    low, high = percentile_interval(blocks.means(right[:, None])[1:, 0])
    shares = {name: float(getattr(outcome, name)[mask].mean()) for name in SHARES}
    return {"requests": int(mask.sum()), **shares, "interval": [float(low), float(high)]}


def difference_interval(
    one: Outcome, other: Outcome, blocks: Resamples, chosen: Mask | None = None
) -> list[float]:
    """Return the ends of the interval, at 95 %, of how many more are right and on time in one outcome, as a share.

    Args:
        one: how the requests ended.
        other: how the same ones ended otherwise.
        blocks: resamples of the requests.
        chosen: (n,) those that count; None takes all.
    """
    mask = np.ones(len(one.setting), dtype=bool) if chosen is None else chosen
    more = np.where(mask, one.right_on_time - other.right_on_time, np.nan)
    low, high = percentile_interval(blocks.means(more[:, None])[1:, 0])
    return [float(low), float(high)]


def gap_closed(one: Floats, greedy: Floats, bound: Floats, blocks: Resamples) -> dict[str, Any] | None:
    """Return the share of the way from a greedy policy to a bound that another goes; None if there may be none.

    Args:
        one: (n,) right and on time under the policy.
        greedy: (n,) under the greedy one.
        bound: (n,) under the bound.
        blocks: resamples of the requests.
    """
    means = blocks.means(np.stack([one, greedy, bound], axis=1))
    return share_closed(means[:, 0] - means[:, 1], means[:, 2] - means[:, 1])
