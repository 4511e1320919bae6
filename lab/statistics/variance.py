"""Standard deviation of a score over seeds, estimated from all entries of a comparison together.

Three seeds of one entry say next to nothing about their spread; those of all entries do. If Bartlett's test (1937)
finds no difference between the entries' variances, they have one, pooled. Otherwise each entry has its own, moderated
by empirical Bayes towards a prior that is fitted to all entries' variances (Smyth 2004, "Linear models and empirical
Bayes methods for assessing differential expression", equations 7 to 11, as in limma). Moderation only raises a variance
here: an entry that varies more than its moderated variance says keeps its own, with its own degrees of freedom.
Otherwise, with eight entries of three seeds whose deviations differ by up to a factor of ten, a family of comparisons
is wrong in 13 % to 18 % of the cases rather than in 6 % to 7 % (tests/lab/test_statistics.py repeats the simulation).
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import variance
from typing import Literal, TypeAlias

Scores: TypeAlias = Mapping[str, Sequence[float]]
"""Scores by entry, one for each seed; no entry is empty."""
HOMOGENEOUS = 0.2
"""p-value of Bartlett's test from which variances count as equal; large, as the test of three seeds overlooks much."""
ALIKE = 1e-4
"""Variance of the logarithm of the entries' true variances below which they count as equal."""


@dataclass(frozen=True)
class Variance:
    """Standard deviation of a seed's score, by entry, and how it was estimated."""

    estimator: Literal["pooled", "moderated"]
    deviations: Mapping[str, float]
    """Standard deviation of the score of one seed, by entry."""
    degrees: Mapping[str, float]
    """Degrees of freedom of each estimate."""
    bartlett: float | None
    """p-value of Bartlett's test that all entries have one variance; None if it cannot be made: with fewer than two
    entries that vary, or with some that vary and some that do not."""

    def standard_error(self, entry: str, seeds: int) -> float:
        """Return the standard error of an entry's mean over a number of seeds."""
        return self.deviations[entry] / math.sqrt(seeds)

    def sentence(self, unit: str, scale: float = 1.0) -> str:
        """Return the estimator, its size, degrees of freedom and check as a sentence.

        Args:
            unit: unit of the deviation, such as "nats".
            scale: factor of the unit, 100 for points of a share.
        """
        check = "" if self.bartlett is None else f"; Bartlett's test of equal variances: {format_p(self.bartlett)}"
        entries = f"{len(self.deviations)} {'entry' if len(self.deviations) == 1 else 'entries'}"
        low, high = (scale * pick(self.deviations.values()) for pick in (min, max))
        if self.estimator == "pooled":
            degrees = next(iter(self.degrees.values()))
            return (
                f"A seed's score has a standard deviation of {low:.2g} {unit}, pooled over {entries} "
                f"({degrees:.0f} degrees of freedom{check})."
            )
        degrees = min(self.degrees.values())
        return (
            f"A seed's score has a standard deviation of {low:.2g} to {high:.2g} {unit}, each entry's moderated by "
            f"those of all {entries} (empirical Bayes, {degrees:.1f} degrees of freedom or more{check})."
        )


def estimate_variance(scores: Scores, floor: float) -> Variance | None:
    """Estimate the standard deviation of a seed's score for every entry.

    Args:
        scores: finite scores by entry.
        floor: smallest standard deviation that a score can have: seeds that agree more closely than the score is
            measured are no evidence of a smaller one.

    Returns:
        None if no entry has two seeds.
    """
    sizes = {name: len(values) - 1 for name, values in scores.items()}
    total = sum(sizes.values())
    if not total:
        return None
    own = {name: variance(values) for name, values in scores.items() if len(values) > 1}
    varying = [scores[name] for name, each in own.items() if each > floor**2]
    # Bartlett's test cannot take a variance of 0; entries that agree exactly, such as those that have solved a task,
    # have another variance than those that vary
    some_agree = bool(varying) and len(varying) < len(own)
    bartlett = None if some_agree or len(varying) < 2 else _bartlett(varying)
    differ = some_agree or (bartlett is not None and bartlett < HOMOGENEOUS)
    prior = _prior(own, sizes, floor) if differ else None
    if prior is None:
        pooled = sum(sizes[name] * each for name, each in own.items()) / total
        deviation = max(math.sqrt(pooled), floor)
        return Variance("pooled", dict.fromkeys(scores, deviation), dict.fromkeys(scores, float(total)), bartlett)
    degrees, location = prior
    deviations, freedom = {}, {}
    for name, size in sizes.items():
        alone = own.get(name, 0.0)
        moderated = (degrees * location + size * alone) / (degrees + size)
        deviations[name] = max(math.sqrt(max(moderated, alone)), floor)
        freedom[name] = float(size) if alone > moderated else min(degrees + size, float(total))
    return Variance("moderated", deviations, freedom, bartlett)


def _bartlett(samples: Sequence[Sequence[float]]) -> float:
    from scipy.stats import bartlett

    return float(bartlett(*samples).pvalue)


def _prior(own: Mapping[str, float], sizes: Mapping[str, int], floor: float) -> tuple[float, float] | None:
    """Return degrees of freedom and location (a variance) of the prior.

    None if the variances differ no more than those of samples from one distribution do, so that pooling is right.
    """
    import numpy as np
    from scipy.optimize import root_scalar
    from scipy.special import digamma, polygamma

    variances = np.maximum([own[name] for name in own], floor**2)
    half = np.array([sizes[name] for name in own]) / 2
    logs = np.log(variances) - digamma(half) + np.log(half)
    excess = float(logs.var(ddof=1) - polygamma(1, half).mean()) if len(logs) > 1 else 0.0
    if excess <= ALIKE:
        return None
    # the trigamma function falls from infinity to 0
    half_degrees = root_scalar(lambda x: float(polygamma(1, x)) - excess, bracket=(1e-6, 2 / ALIKE)).root
    location = math.exp(float(logs.mean()) + float(digamma(half_degrees)) - math.log(half_degrees))
    return 2 * half_degrees, location


def format_p(value: float) -> str:
    """Return a p-value as text."""
    return "p < 0.001" if value < 0.001 else f"p = {value:.2g}"
