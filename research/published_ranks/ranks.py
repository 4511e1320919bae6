"""Statistics of ranks: Spearman's rho with ties, bootstrap intervals, permutation tests, and power.

Rankings of mixers are short (4 to 11 entries), so nothing here assumes large samples. Random numbers come from a fixed
seed: the same data give the same page.
"""

import math
from itertools import permutations
from typing import NamedTuple

import numpy as np

Array = np.ndarray
LEVEL = 0.05
"""Level of one-sided tests: rankings are predicted to agree, not just to be related."""
CONFIDENCE = 0.95
"""Coverage of intervals."""
DRAWS = 40_000
"""Random draws of a bootstrap or of a permutation test."""
TIE = 1e-8
"""Correlations that differ by less are equal: the rest is rounding."""
DIGITS = 2
"""Decimals of means over seeds: smaller differences of accuracies are noise, and would rank mixers that are equal."""
EXACT = 7
"""Largest number of entries of which all permutations are listed (5,040)."""


class Interval(NamedTuple):
    """Percentile interval of a bootstrap."""

    low: float
    high: float


def generator() -> np.random.Generator:
    """Return the random number generator that every statistic starts with."""
    return np.random.default_rng(0)


def midranks(values: Array, counts: Array | None = None) -> Array:
    """Return ranks along the last axis, 1 for the lowest; equal values share the mean of their ranks.

    With `counts`, each value counts as that many equal ones, as in a bootstrap that draws an entry so often.
    """
    values = np.asarray(values, dtype=float).round(9)  # sums in another order are equal values
    counts = np.ones(values.shape[-1]) if counts is None else counts
    below = (counts[..., None, :] * (values[..., None, :] < values[..., :, None])).sum(-1)
    equal = (counts[..., None, :] * (values[..., None, :] == values[..., :, None])).sum(-1)
    return below + (equal + 1) / 2


def spearman(x: Array, y: Array, counts: Array | None = None) -> Array:
    """Return Spearman's rho along the last axis: Pearson's correlation of mid-ranks; NaN if one side is constant.

    `counts` are those of `midranks`.
    """
    w = np.ones(np.shape(x)[-1]) if counts is None else counts
    middle = (w.sum(-1, keepdims=True) + 1) / 2
    a, b = midranks(x, w) - middle, midranks(y, w) - middle
    scale = np.sqrt((w * a * a).sum(-1) * (w * b * b).sum(-1))
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(scale > 0, (w * a * b).sum(-1) / scale, np.nan)


def interval(draws: Array) -> Interval | None:
    """Return the percentile interval of bootstrap draws; NaN draws are left out. None if no draw is left."""
    draws = draws[~np.isnan(draws)]
    if not draws.size:
        return None
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(draws, [tail, 1 - tail])
    return Interval(float(low), float(high))


def rho_interval(by_seed: Array, column: "Column", draws: int = DRAWS) -> Interval | None:
    """Return the bootstrap interval of rho between a predictor and one published column.

    A draw resamples the entries, and the seeds of the scores (one choice of seeds for all entries, as they share their
    seeds). Draws in which one side is constant are left out. With fewer than ten entries such an interval is
    rough: it shows how much hangs on single entries.

    Args:
        by_seed: scores, [tasks, seeds, entries].
        column: the published column.
        draws: number of resamples.
    """
    rng = generator()
    seeds, n = by_seed.shape[1], len(column.values)
    drawn = combined(by_seed[:, rng.integers(seeds, size=(draws, seeds))])
    chosen = rng.integers(n, size=(draws, n))
    return interval(spearman(np.take_along_axis(drawn, column.positions[chosen], -1), column.values[chosen]))


def shuffles(n: int, draws: int = DRAWS) -> Array:
    """Return permutations of n positions: all of them if n <= `EXACT`, random ones otherwise, [draws, n]."""
    if n <= EXACT:
        return np.array(list(permutations(range(n))))
    return generator().permuted(np.tile(np.arange(n), (draws, 1)), axis=1)


def share_at_least(null: Array, observed: float, *, exact: bool) -> float:
    """Return the one-sided p-value of a statistic: the share of the null distribution that is at least as large.

    A random null distribution gets the observed value added, so that p is never 0.
    """
    reached = int((np.nan_to_num(null) >= observed - TIE).sum())
    return reached / null.size if exact else (reached + 1) / (null.size + 1)


def permutation_p(x: Array, y: Array, draws: int = DRAWS) -> float:
    """Return the one-sided p-value of rho(x, y) if the values of x belonged to random entries."""
    n = len(x)
    null = spearman(np.asarray(x)[shuffles(n, draws)], y)
    return share_at_least(null, float(spearman(x, y)), exact=n <= EXACT)


def critical_rho(n: int, level: float = LEVEL) -> float | None:
    """Return the smallest rho of n entries without ties whose one-sided p-value is at most `level`; None if none is."""
    null = spearman(shuffles(n, DRAWS), np.arange(n))
    exact = n <= EXACT
    for rho in np.unique(np.round(null, 9)):  # rounded by less than TIE
        if share_at_least(null, float(rho), exact=exact) <= level:
            return float(rho)
    return None


def detectable_rho(n: int, power: float = 0.8, level: float = LEVEL, draws: int = 1000) -> float | None:
    """Return the smallest true correlation that n entries detect with a probability of `power`.

    True means: between two normal variables of which the entries are a random sample. None if no correlation up to
    0.995 is detected so often.
    """
    critical = critical_rho(n, level)
    if critical is None:
        return None
    rng = generator()
    x, noise = rng.standard_normal((2, draws, n))

    def detected(r: float) -> float:
        rho = spearman(x, r * x + math.sqrt(1 - r * r) * noise)
        return float((rho >= critical - TIE).mean())

    low, high = 0.0, 0.995
    if detected(high) < power:
        return None
    while high - low > 0.005:
        middle = (low + high) / 2
        low, high = (middle, high) if detected(middle) < power else (low, middle)
    return high


def combined(by_seed: Array) -> Array:
    """Return the values by which entries are ranked, [..., entries], from scores [tasks, ..., seeds, entries].

    They are means over seeds, rounded to `DIGITS`; then, since tasks have different scales, the mean of the tasks'
    z-scores. The z-scores of a single task have its order.
    """
    return z_scores(np.asarray(by_seed).mean(-2).round(DIGITS)).mean(0)


def z_scores(x: Array) -> Array:
    """Return values minus their mean, over their standard deviation, along the last axis; 0 if they are constant."""
    x = np.asarray(x, dtype=float)
    centred = x - x.mean(-1, keepdims=True)
    spread = x.std(-1, keepdims=True)
    return np.divide(centred, spread, out=np.zeros_like(centred), where=spread > 0)


class Column(NamedTuple):
    """One published column, oriented so that more is better, for pooling."""

    paper: str
    """Columns of one paper count as one paper together."""
    positions: Array
    """Positions of the column's entries among all entries of the predictor."""
    values: Array


def positions(columns: list[Column]) -> Array:
    """Return the positions of the entries that are in at least one column."""
    return np.unique(np.concatenate([column.positions for column in columns]))


def pooled(x: Array, columns: list[Column], counts: Array | None = None) -> Array:
    """Return the mean rho of a predictor over papers, [...].

    Within a paper, columns are averaged with weights n - 1, as the variance of rho under independence is 1 / (n - 1).
    So are papers, with the mean weight of their columns. A rho without spread counts as 0: what is constant predicts
    nothing.

    Args:
        x: values of the predictor, [..., entries].
        columns: published columns.
        counts: how often a bootstrap has drawn each entry, [..., entries]; None for once. A column has as many entries
            as were drawn at least once.
    """
    x = np.asarray(x, dtype=float)
    counts = np.ones(x.shape[-1]) if counts is None else counts
    sums: Array = np.zeros(())
    total: Array = np.zeros(())
    for paper in dict.fromkeys(column.paper for column in columns):
        parts = [column for column in columns if column.paper == paper]
        drawn = [counts[..., part.positions] for part in parts]
        degrees = np.stack([np.maximum((each > 0).sum(-1) - 1.0, 0) for each in drawn], -1)
        rhos = [spearman(x[..., part.positions], part.values, w) for part, w in zip(parts, drawn, strict=True)]
        # the paper's mean weight times its weighted mean
        sums = sums + (np.nan_to_num(np.stack(rhos, -1)) * degrees).sum(-1) / len(parts)
        total = total + degrees.sum(-1) / len(parts)
    return np.divide(sums, total, out=np.zeros(np.broadcast(sums, total).shape), where=total > 0)


def pooled_interval(by_seed: Array, columns: list[Column], draws: int = DRAWS, minus: Array | None = None) -> Interval:
    """Return the bootstrap interval of the pooled rho.

    A draw resamples the mixers, which are the same in all papers, and the seeds of the scores. Papers are not
    resampled: they share most mixers, so an interval over papers excludes 0 for many a random ranking.

    Args:
        by_seed: scores, [tasks, seeds, entries].
        columns: published columns.
        draws: number of resamples.
        minus: values of another predictor, [entries], whose pooled rho in the same draw is subtracted.
    """
    rng = generator()
    _, seeds, entries = by_seed.shape
    drawn = combined(by_seed[:, rng.integers(seeds, size=(draws, seeds))])
    used = positions(columns)
    counts = np.zeros((draws, entries))
    counts[:, used] = rng.multinomial(len(used), np.full(len(used), 1 / len(used)), size=draws)
    rhos = pooled(drawn, columns, counts)
    if minus is not None:
        rhos = rhos - pooled(np.broadcast_to(minus, drawn.shape), columns, counts)
    low, high = np.quantile(rhos, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return Interval(float(low), float(high))


def pooled_null(x: Array, columns: list[Column], draws: int = DRAWS) -> Array:
    """Return pooled rhos of a predictor whose values are shuffled among the entries of the columns, [draws].

    One shuffle holds for all columns, so the columns' common entries are accounted for. Entries that are in no column
    keep their values: they could only bring ties into the columns, or take them out.
    """
    used = positions(columns)
    shuffled = np.tile(np.asarray(x, dtype=float), (draws, 1))
    shuffled[:, used] = generator().permuted(shuffled[:, used], axis=1)
    return pooled(shuffled, columns)


def pooled_p(x: Array, columns: list[Column], draws: int = DRAWS) -> float:
    """Return the one-sided p-value of the pooled rho by shuffling the predictor's values."""
    return share_at_least(pooled_null(x, columns, draws), float(pooled(x, columns)), exact=False)


def holm(p_values: list[float]) -> list[float]:
    """Return p-values corrected for their number by Holm's method."""
    order = np.argsort(p_values)
    corrected = [0.0] * len(p_values)
    highest = 0.0
    for rank, position in enumerate(order):
        highest = max(highest, min(1.0, (len(p_values) - rank) * p_values[position]))
        corrected[position] = highest
    return corrected


def critical_pooled(columns: list[Column], level: float = LEVEL) -> float:
    """Return the smallest pooled rho whose one-sided p-value is at most `level`, for a predictor without ties."""
    return float(np.quantile(pooled_null(np.arange(1 + positions(columns).max()), columns, DRAWS), 1 - level))
