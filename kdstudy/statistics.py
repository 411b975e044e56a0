"""Means with Student-t intervals, paired differences between methods, and Holm's correction for many comparisons."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike
from scipy import stats


class Interval(NamedTuple):
    """A mean with its confidence limits, in the unit of the data, and the number of values behind it."""

    mean: float
    low: float
    high: float
    n: int


def mean_interval(values: ArrayLike, level: float = 0.95) -> Interval:
    """Student-t confidence interval of the mean of `values`, a sequence of numbers.

    NaN (a run without a result) is left out and not counted. One value has a mean but no limits (NaN); none, neither.
    Raises ValueError unless 0 < `level` < 1.
    """
    if not 0 < level < 1:
        raise ValueError(f"level must lie between 0 and 1, not {level!r}")
    values = np.asarray(values, dtype=np.float64).ravel()
    values = values[~np.isnan(values)]
    n = len(values)
    if n == 0:
        return Interval(np.nan, np.nan, np.nan, 0)
    mean = float(values.mean())
    if n == 1:
        return Interval(mean, np.nan, np.nan, 1)
    half = float(stats.t.ppf((1 + level) / 2, n - 1)) * _standard_error(values)
    return Interval(mean, mean - half, mean + half, n)


def paired_difference(a: pd.Series, b: pd.Series, level: float = 0.95) -> tuple[Interval, float]:
    """The mean of `a - b` over the seeds that both have, and the p value of the two-sided paired t test.

    `a` and `b` are indexed by seed; a seed whose value is NaN in either is left out. p is 1 if all pairs are equal, NaN
    with fewer than two pairs, and NaN if all pairs differ by the same amount: without spread there is no t test, and a
    few rounded accuracies agree too easily by chance to call that certainty.
    Raises ValueError if a seed occurs twice in `a` or in `b`.
    """
    for series in (a, b):
        if not series.index.is_unique:
            raise ValueError(f"a seed must occur once, not {series.index[series.index.duplicated()][0]} twice")
    a, b = a.astype(np.float64).dropna(), b.astype(np.float64).dropna()
    seeds = a.index.intersection(b.index)
    first, second = a[seeds].to_numpy(), b[seeds].to_numpy()
    difference = first - second
    interval = mean_interval(difference, level)
    if interval.n < 2:
        return interval, np.nan
    # equal steps of a rounded accuracy differ in their last bits once subtracted
    round_off = 1e-12 * max(np.abs(first).max(), np.abs(second).max())
    if np.ptp(difference) <= round_off:
        return interval, 1.0 if abs(interval.mean) <= round_off else np.nan
    t = interval.mean / _standard_error(difference)
    return interval, float(2 * stats.t.sf(abs(t), interval.n - 1))


def _standard_error(values: np.ndarray) -> float:
    return float(values.std(ddof=1)) / len(values) ** 0.5


def holm(p_values: Sequence[float] | np.ndarray | pd.Series) -> np.ndarray:
    """Adjusted p values of Holm's step-down procedure (Scandinavian Journal of Statistics, 1979), in the order given.

    The k-th smallest of m is multiplied by m - k + 1, capped at 1 and kept at or above its predecessor. NaN stays NaN
    and does not count as a comparison. Raises ValueError for a value outside 0 to 1.
    """
    p_values = np.array(p_values, dtype=np.float64)
    outside = p_values[(p_values < 0) | (p_values > 1)]
    if outside.size:
        raise ValueError(f"a p value must lie in 0 to 1, not {float(outside[0])!r}")
    known = np.flatnonzero(~np.isnan(p_values))
    ascending = known[np.argsort(p_values[known], kind="stable")]
    factors = np.arange(len(ascending), 0, -1)
    p_values[ascending] = np.minimum(np.maximum.accumulate(factors * p_values[ascending]), 1.0)
    return p_values
