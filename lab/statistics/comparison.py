"""Comparison of entries by their scores: differences, ranks and equivalence, corrected for their number.

Each entry's score is normal with a mean of its own and a variance by `estimate_variance`. Differences from the subject
have simultaneous 95 % intervals by Dunnett (1955): with a probability of 95 %, all of them cover. All pairs have such
intervals by Tukey and Kramer, from which ranks follow. An entry is equivalent to the subject within a margin if two
one-sided t tests say so at 5 % each (Schuirmann 1987); these are not corrected for their number. Where entries have
variances of their own, a difference has the degrees of freedom of the entry with fewer: Satterthwaite's are too many
for three seeds.
"""

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Literal, TypeAlias, TypeVar

from .multiplicity import CONFIDENCE, dunnett, t_quantile, tukey
from .variance import Scores, Variance, estimate_variance

Key = TypeVar("Key")
Verdict: TypeAlias = Literal["better", "worse", "equivalent", "not separated"]
"""Relation of an entry to the subject. `better` and `worse`: the simultaneous interval of their difference excludes 0;
`equivalent`: the difference lies within the margin, whatever its sign; `not separated`: neither is shown."""


@dataclass(frozen=True)
class Difference:
    """Difference of an entry's mean score from the subject's."""

    mean: float
    low: float
    """Lower end of the simultaneous 95 % interval."""
    high: float
    """Upper end of the simultaneous 95 % interval."""
    verdict: Verdict


@dataclass(frozen=True)
class Comparison:
    """Comparison of the scores of several entries."""

    means: Mapping[str, float]
    variance: Variance | None
    """None if no entry has two seeds: then there are no intervals."""
    margins: Mapping[str, float]
    """Half the width of the 95 % interval of each mean; empty without intervals."""
    differences: Mapping[str, Difference]
    """Difference of each other entry from the subject; empty without a subject or without intervals."""
    pairs: Mapping[tuple[str, str], Difference]
    """Difference of the first entry of each pair from the second, both ways round; empty without intervals."""
    ranks: Mapping[str, tuple[int, int]]
    """Lowest and highest rank that each entry can have, 1 for the best; empty without intervals."""


def compare_scores(
    scores: Scores,
    *,
    subject: str | None = None,
    higher_is_better: bool,
    floor: float,
    margin: float | None = None,
    incomplete: Collection[str] = (),
) -> Comparison:
    """Compare entries by their scores.

    Args:
        scores: finite scores by entry, one for each seed.
        subject: the entry with which the others are compared; None for none.
        higher_is_better: True for accuracies, False for losses.
        floor: smallest standard deviation of a seed's score (`estimate_variance`).
        margin: differences up to this size do not matter; None if no equivalence is to be tested.
        incomplete: entries of which some seeds failed. They have a mean, but neither a difference nor a rank, as seeds
            that diverge are not missing by chance.
    """
    scores = {name: values for name, values in scores.items() if values}
    means = {name: fmean(values) for name, values in scores.items()}
    variance = estimate_variance(scores, floor)
    if variance is None:
        return Comparison(means, None, {}, {}, {}, {})
    model = _Model(scores, variance, 1 if higher_is_better else -1)
    margins = {name: t_quantile(variance.degrees[name]) * error for name, error in model.errors.items()}
    judged = [name for name in scores if name not in incomplete]
    against = model.against(subject, [name for name in judged if name != subject], margin) if subject in judged else {}
    pairs = model.pairs(judged)
    return Comparison(means, variance, margins, against, pairs, ranks_of(judged, pairs))


def compare_contrasts(
    scores: Scores, contrasts: Mapping[Key, Mapping[str, float]], *, higher_is_better: bool, floor: float
) -> dict[Key, Difference]:
    """Estimate weighted sums of entries' means, with simultaneous 95 % intervals by Bonferroni's correction.

    Args:
        scores: finite scores by entry, one for each seed; all of them tell how much a seed's score varies.
        contrasts: weights by entry, which add up to 0: `{"one": 1, "other": -1}` is a difference.
        higher_is_better: True for accuracies, False for losses.
        floor: smallest standard deviation of a seed's score.

    Returns:
        The estimates by the contrasts' keys; none if no entry has two seeds.
    """
    scores = {name: values for name, values in scores.items() if values}
    variance = estimate_variance(scores, floor)
    if variance is None:
        return {}
    model = _Model(scores, variance, 1 if higher_is_better else -1)
    tail = (1 - CONFIDENCE) / 2 / max(1, len(contrasts))
    return {key: model.contrast(weights, lambda df: t_quantile(df, 1 - tail)) for key, weights in contrasts.items()}


def compare_pairs(
    scores: Scores, pairs: Sequence[tuple[str, str]], *, higher_is_better: bool, floor: float
) -> dict[tuple[str, str], Difference]:
    """Compare the entries of some pairs: the first's mean minus the second's, as `compare_contrasts` does."""
    contrasts = {(one, other): {one: 1.0, other: -1.0} for one, other in pairs}
    return compare_contrasts(scores, contrasts, higher_is_better=higher_is_better, floor=floor)


def ranks_of(names: Sequence[str], pairs: Mapping[tuple[str, str], Difference]) -> dict[str, tuple[int, int]]:
    """Return the ranks that each of several entries can have.

    They go from 1 + the number of entries that are better than it to the number of all without those that are worse.
    """
    if len(names) < 2 or not pairs:
        return {}
    found = {name: [pairs[other, name].verdict for other in names if other != name] for name in names}
    return {name: (1 + each.count("better"), len(names) - each.count("worse")) for name, each in found.items()}


class _Model:
    """Entries' means with their standard errors, from which differences follow."""

    def __init__(self, scores: Scores, variance: Variance, sign: int) -> None:
        self.means = {name: fmean(values) for name, values in scores.items()}
        self.variance = variance
        self.sign = sign
        self.errors = {name: variance.standard_error(name, len(values)) for name, values in scores.items()}

    def difference(
        self, one: str, other: str, critical: Callable[[float], float], margin: float | None = None
    ) -> Difference:
        """Return the difference of two entries."""
        return self.contrast({one: 1.0, other: -1.0}, critical, margin)

    def contrast(
        self, weights: Mapping[str, float], critical: Callable[[float], float], margin: float | None = None
    ) -> Difference:
        """Return a weighted sum of means; `critical` is the critical value by degrees of freedom."""
        mean = sum(weight * self.means[name] for name, weight in weights.items())
        error = math.hypot(*(weight * self.errors[name] for name, weight in weights.items()))
        degrees = min(self.variance.degrees[name] for name in weights)
        half = critical(degrees) * error
        verdict: Verdict = "not separated"
        if margin is not None and abs(mean) + t_quantile(degrees, CONFIDENCE) * error < margin:
            verdict = "equivalent"
        elif abs(mean) > half:
            verdict = "better" if self.sign * mean > 0 else "worse"
        return Difference(mean, mean - half, mean + half, verdict)

    def against(self, subject: str, others: Sequence[str], margin: float | None) -> dict[str, Difference]:
        """Return the differences of other entries from the subject."""
        errors = self.errors
        loadings = [errors[subject] / math.hypot(errors[subject], errors[other]) for other in others]
        return {other: self.difference(other, subject, lambda df: dunnett(loadings, df), margin) for other in others}

    def pairs(self, names: Sequence[str]) -> dict[tuple[str, str], Difference]:
        """Return the differences of all pairs, both ways round."""
        return {
            (one, other): self.difference(one, other, lambda df: tukey(len(names), round(df, 1)))
            for one in names
            for other in names
            if one != other
        }
