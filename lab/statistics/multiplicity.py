"""Critical values for many comparisons at once: Dunnett's, of several entries with one, and Tukey's, of all pairs."""

from collections.abc import Sequence
from functools import cache

CONFIDENCE = 0.95
"""Coverage of intervals; of a family of comparisons, the probability that all its intervals cover."""
NODES = 80
"""Nodes of each of two quadratures; with them, critical values are right to 5 digits."""


def t_quantile(degrees: float, probability: float = (1 + CONFIDENCE) / 2) -> float:
    """Return a quantile of Student's t distribution; by default, that of a two-sided 95 % interval."""
    from scipy.special import stdtrit

    return float(stdtrit(degrees, probability))


def dunnett(loadings: Sequence[float], degrees: float) -> float:
    """Return Dunnett's two-sided critical value for comparisons of several entries with one (Dunnett 1955).

    It is the c with P(all |T_i| <= c) = `CONFIDENCE` for t variables T_i with the correlations
    `loadings[i] * loadings[j]`, by quadrature over what they share: the subject's mean and the standard deviation.
    scipy.stats.dunnett has the same by random numbers, and only for equal variances.

    Args:
        loadings: for each comparison, the root of the subject's share in the variance of the difference; sqrt(1/2) for
            equal variances and numbers of seeds.
        degrees: degrees of freedom of the standard deviation.
    """
    return _dunnett(tuple(sorted(round(each, 4) for each in loadings)), round(degrees, 2))


@cache
def _dunnett(loadings: tuple[float, ...], degrees: float) -> float:
    import numpy as np
    from scipy.optimize import root_scalar
    from scipy.special import chdtri, ndtr

    nodes, weights = np.polynomial.legendre.leggauss(NODES)
    shared, density = np.polynomial.hermite_e.hermegauss(NODES)
    share = weights / 2
    # standard deviations at equally likely levels, and the shared normal variable
    scale = np.sqrt(chdtri(degrees, (1 - nodes) / 2) / degrees)[:, None, None]
    load = np.array(loadings)
    rest = np.sqrt(1 - load**2)
    centre = shared[None, :, None] * load

    def excess(critical: float) -> float:
        bound = critical * scale
        inside = ndtr((bound - centre) / rest) - ndtr((-bound - centre) / rest)
        return float(share @ inside.prod(-1) @ density / density.sum()) - CONFIDENCE

    single = t_quantile(degrees)
    bonferroni = t_quantile(degrees, 1 - (1 - CONFIDENCE) / 2 / len(loadings))
    if len(loadings) == 1:
        return single
    return root_scalar(excess, bracket=(0.9 * single, 1.1 * bonferroni), xtol=1e-6).root


@cache
def tukey(entries: int, degrees: float) -> float:
    """Return Tukey's critical value of |t| for all pairs of entries: the studentized range's quantile over sqrt(2)."""
    from scipy.stats import studentized_range

    return float(studentized_range.ppf(CONFIDENCE, entries, degrees)) / 2**0.5
