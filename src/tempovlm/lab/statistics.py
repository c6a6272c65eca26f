"""Statistics that the experiments share: intervals of shares, quantiles, a clustered bootstrap, tests."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from tempovlm.core.knobs import KNOBS

Floats = NDArray[np.float64]

DRAWS = 2000
"""Resamples of a bootstrap."""

Z_95 = 1.959963984540054
"""Two-sided 95 % quantile of the standard normal distribution."""


def wilson_interval(successes: float, trials: float, z: float = Z_95) -> tuple[float, float]:
    """Score interval of a share.

    Source: E. B. Wilson, Probable inference, the law of succession, and statistical inference, JASA 22 (1927).

    Args:
        successes: how often it happened; may be a fraction, as may the trials, where they are effective numbers.
        trials: out of how many, at least 1.
        z: normal quantile of the wished confidence.

    Returns:
        The lower and the upper end, within 0 and 1.
    """
    if trials < 1 or not 0 <= successes <= trials:
        raise ValueError(f"{successes} of {trials}: not a share")
    share = successes / trials
    middle = share + z * z / (2 * trials)
    half = z * math.sqrt(share * (1 - share) / trials + z * z / (4 * trials * trials))
    scale = 1 + z * z / trials
    return max(0.0, (middle - half) / scale), min(1.0, (middle + half) / scale)


def quantile(values: Sequence[float], level: float) -> float:
    """Sample quantile with linear interpolation between order statistics.

    Source: R. J. Hyndman and Y. Fan, Sample quantiles in statistical packages, 1996, definition 7.
    """
    return float(np.quantile(np.asarray(values, dtype=np.float64), level))


def mean(values: Iterable[float]) -> float | None:
    """Arithmetic mean; None of nothing."""
    items = list(values)
    return math.fsum(items) / len(items) if items else None


def spread(values: Sequence[float]) -> dict[str, Any]:
    """Mean, standard deviation of a sample, and the mean's 95 % interval by Student's t; None of one value."""
    mean = float(np.mean(values))
    if len(values) < 2:
        return {"mean": mean, "std": None, "interval": None}
    from scipy.stats import t

    std = float(np.std(values, ddof=1))
    half = float(t.ppf(0.975, len(values) - 1)) * std / math.sqrt(len(values))
    return {"mean": mean, "std": std, "interval": [mean - half, mean + half]}


def utilisation(totals_ms: Sequence[float], budgets_ms: Sequence[float], slower: Sequence[bool]) -> float | None:
    """Mean of total / budget over the requests for which a slower setting existed.

    It exposes a policy that is on time because it never uses its time. Where the slowest setting ran, nothing
    could have used more of the budget, so the request does not count.

    Args:
        totals_ms: measured totals.
        budgets_ms: their budgets.
        slower: whether a setting slower than the one that ran existed.

    Returns:
        The mean, or None when no request counts.
    """
    rows = zip(totals_ms, budgets_ms, slower, strict=True)
    return mean(total_ms / budget_ms for total_ms, budget_ms, counts in rows if counts)


class Resamples:
    """Bootstrap samples of whole clusters (the questions of one picture), drawn once for any number of values.

    As many clusters are drawn with replacement as there are; the mean of a draw is the ratio of the summed values
    to the summed counts. Shapes: `N` values, `M` columns, `C` clusters, `R` draws.

    Source: A. C. Davison and D. V. Hinkley, Bootstrap Methods and their Application, 1997, section 3.8.

    Args:
        clusters: (N,) the cluster of each value.
        draws: R.
        seed: of the draws, so that a report repeats exactly; or a generator.
        by: draw one cluster after the other, or at once how often each occurs. Both have the same distribution;
            published intervals of block importances and of profiles were drawn by counts, all others by picks.
    """

    def __init__(
        self,
        clusters: Sequence[str],
        draws: int = DRAWS,
        seed: int | np.random.Generator = 0,
        *,
        by: Literal["picks", "counts"] = "picks",
    ) -> None:
        places = {name: i for i, name in enumerate(dict.fromkeys(clusters))}
        self._place = np.array([places[name] for name in clusters])
        count, rng = len(places), np.random.default_rng(seed)
        if by == "counts":
            drawn = rng.multinomial(count, np.full(count, 1 / count), size=draws)
        else:
            picks = rng.integers(count, size=(draws, count))
            drawn = np.stack([np.bincount(row, minlength=count) for row in picks])
        self._times = np.concatenate([np.ones((1, count)), drawn])

    def sums(self, values: NDArray[Any]) -> Floats:
        """Sum the columns of (N, M) over each cluster: (C, M)."""
        sums = np.zeros((self._times.shape[1], values.shape[1]))
        np.add.at(sums, self._place, values)
        return sums

    def means(self, values: Floats) -> Floats:
        """Average the columns of (N, M) in each draw: (R + 1, M), the sample itself first.

        NaN values are left out; the mean of none is NaN.
        """
        known = ~np.isnan(values)
        sums, counts = self._times @ self.sums(np.where(known, values, 0.0)), self._times @ self.sums(known)
        return np.divide(sums, counts, out=np.full_like(sums, np.nan), where=counts > 0)


def percentile_interval(draws: Floats, level: float = 0.95) -> tuple[Floats, Floats]:
    """Compute the ends (...) of the percentile intervals of draws (R, ...); NaN is left out.

    Source: B. Efron, Better bootstrap confidence intervals, JASA 82 (1987).
    """
    tail = (1 - level) / 2
    low, high = np.nanquantile(draws, (tail, 1 - tail), axis=0)
    return low, high


def clustered_bootstrap(
    values: Sequence[float], clusters: Sequence[str], *, level: float = 0.95, draws: int = DRAWS, seed: int = 0
) -> tuple[float, float]:
    """Compute the percentile interval of a mean whose values are correlated within clusters.

    Args:
        values: one a request.
        clusters: the cluster of each.
        level: confidence.
        draws: resamples.
        seed: of the resampling.
    """
    if len(values) != len(clusters) or not values:
        raise ValueError(f"{len(values)} values for {len(clusters)} clusters")
    means = Resamples(clusters, draws, seed).means(np.asarray(values, dtype=np.float64)[:, None])
    low, high = percentile_interval(means[1:, 0], level)
    return float(low), float(high)


def clustered_mean(values: Floats, clusters: NDArray[Any]) -> tuple[float | None, float | None]:
    """Compute a mean and its standard error where values are correlated within clusters; None of too few.

    Source: W. G. Cochran, Sampling Techniques, 1977, section 2.11: the ratio of cluster sums to cluster sizes.
    """
    if len(values) == 0:
        return None, None
    mean = float(np.mean(values))
    _, place = np.unique(clusters.astype(str), return_inverse=True)
    sums = np.bincount(place, weights=values - mean)
    count = len(sums)
    if count < 2:
        return mean, None
    return mean, math.sqrt(count / (count - 1) * float(sums @ sums)) / len(values)


def bootstrap_p_value(differences: NDArray[np.float64]) -> float:
    """Two-sided p-value of a difference of zero, by the percentile bootstrap.

    p = min(1, 2 · min(1 + #{d ≤ 0}, 1 + #{d ≥ 0}) / (R + 1)): about the largest p for which the percentile
    interval of confidence 1 - p holds zero. The resample that is added on each side keeps it above zero: R
    resamples cannot show less than 2 / (R + 1).

    Source: B. Efron and R. J. Tibshirani, An Introduction to the Bootstrap, 1993, section 15.4 (tests from
    intervals); A. C. Davison and D. V. Hinkley, Bootstrap Methods and their Application, 1997, section 4.2 (the
    one that is added).

    Args:
        differences: (R,) of the resamples.
    """
    below, above = int((differences <= 0).sum()), int((differences >= 0).sum())
    return min(1.0, 2 * (1 + min(below, above)) / (len(differences) + 1))


def holm(p_values: Sequence[float]) -> list[float]:
    """P-values corrected for several tests, so that the chance of any false rejection stays below the threshold.

    Holm and Bonferroni: the i-th smallest of m is multiplied by m - i + 1, and none ends below one that was
    smaller before.

    Source: S. Holm, A simple sequentially rejective multiple test procedure, Scandinavian Journal of Statistics 6
    (1979).

    Args:
        p_values: of the tests of one family.

    Returns:
        Corrected, at most 1, in the order given.
    """
    corrected, largest = [0.0] * len(p_values), 0.0
    for rank, i in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[i]))
        corrected[i] = largest
    return corrected


def shares(names: Iterable[str]) -> dict[str, float]:
    """Return how often each name occurs, as a share of all, the most common first, ties by name."""
    counts: dict[str, int] = {}
    for name in names:
        counts[name] = counts.get(name, 0) + 1
    total = sum(counts.values())
    ordered = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    return {name: count / total for name, count in ordered}


def marginals(settings: Mapping[str, float]) -> tuple[dict[str, float], ...]:
    """Shares of each value, knob by knob, from the shares of whole settings such as `low/k4/b8`."""
    parts: tuple[dict[str, float], ...] = tuple({} for _ in KNOBS)
    for setting, share in settings.items():
        for known, name in zip(parts, setting.split("/"), strict=True):
            known[name] = known.get(name, 0.0) + share
    return parts
