"""Tasks that a seed has learned or not: how many seeds of an entry learned, and how that differs between entries.

Where accuracies split into seeds that solve a task and seeds that do not, a mean describes neither, and no interval of
normal scores is right. What is estimated then is the probability that a seed learns. Its interval is Jeffreys' (Brown,
Cai and DasGupta 2001, "Interval estimation for a binomial proportion"). The interval of a difference joins two exact
intervals (Clopper and Pearson 1934) by the method of variance estimates recovery (Newcombe 1998, "Interval estimation
for the difference between independent proportions", method 10 with other intervals); joined from Jeffreys', eight
entries of five seeds would be told apart wrongly in 11 % of the families. Families are corrected by Bonferroni's
method.

The steps that learning took are compared by the log-rank test, in which a seed that did not learn counts as one that
would have taken longer than its run.
"""

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from .comparison import Difference, Verdict, ranks_of
from .multiplicity import CONFIDENCE
from .variance import Scores

LEARNED = 0.9
"""Accuracy from which a seed has learned a task, by default."""
SPLIT = 0.3
"""Distance below `LEARNED` at which another seed of the same entry has not: the entry's scores are split."""


@dataclass(frozen=True)
class LearnedSeeds:
    """How many seeds of an entry learned the task, and the interval of the probability that a seed does."""

    learned: int
    seeds: int
    low: float
    """Lower end of Jeffreys' 95 % interval."""
    high: float
    """Upper end of Jeffreys' 95 % interval."""


@dataclass(frozen=True)
class LearnedComparison:
    """Comparison of entries by how many of their seeds learned a task."""

    counts: Mapping[str, LearnedSeeds]
    differences: Mapping[str, Difference]
    """Share of an entry's seeds minus that of the subject's; empty without a subject."""
    pairs: Mapping[tuple[str, str], Difference]
    """Difference of the first entry of each pair from the second, both ways round."""
    ranks: Mapping[str, tuple[int, int]]
    """Lowest and highest rank that each entry can have, 1 for the best."""


def is_split(accuracies: Scores, learned: float = LEARNED) -> bool:
    """True if some entry has a seed that learned the task and one that is far from it."""
    return any(max(each) >= learned > min(each) + SPLIT for each in accuracies.values() if each)


def jeffreys(learned: int, seeds: int, confidence: float = CONFIDENCE) -> tuple[float, float]:
    """Return Jeffreys' interval of the probability that a seed learns; its end is 0 or 1 where no or all seeds did."""
    from scipy.special import betaincinv

    tail = (1 - confidence) / 2
    shape = learned + 0.5, seeds - learned + 0.5
    low = 0.0 if learned == 0 else float(betaincinv(*shape, tail))
    high = 1.0 if learned == seeds else float(betaincinv(*shape, 1 - tail))
    return low, high


def compare_learned(
    accuracies: Scores, *, learned: float = LEARNED, subject: str | None = None, incomplete: Collection[str] = ()
) -> LearnedComparison:
    """Compare entries by how many of their seeds learned a task.

    Args:
        accuracies: accuracies by entry, one for each seed.
        learned: the accuracy from which a seed has learned the task.
        subject: the entry with which the others are compared; None for none.
        incomplete: entries of which some seeds failed; they have counts, but neither a difference nor a rank.
    """
    pairs = {name: (sum(x >= learned for x in each), len(each)) for name, each in accuracies.items() if each}
    counts = {name: LearnedSeeds(*pair, *jeffreys(*pair)) for name, pair in pairs.items()}
    judged = [name for name in pairs if name not in incomplete]
    differences = {}
    if subject in judged:
        others = [name for name in judged if name != subject]
        differences = {name: _difference(pairs[name], pairs[subject], len(others)) for name in others}
    number = math.comb(len(judged), 2)
    each_pair = {
        (one, other): _difference(pairs[one], pairs[other], number)
        for one in judged
        for other in judged
        if one != other
    }
    return LearnedComparison(counts, differences, each_pair, ranks_of(judged, each_pair))


def _difference(one: tuple[int, int], other: tuple[int, int], comparisons: int) -> Difference:
    """Compare two entries, as one of a number of comparisons."""
    confidence = 1 - (1 - CONFIDENCE) / comparisons
    p, q = (learned / seeds for learned, seeds in (one, other))
    (p_low, p_high), (q_low, q_high) = (_exact(*pair, confidence) for pair in (one, other))
    mean = p - q
    low = mean - math.hypot(p - p_low, q_high - q)
    high = mean + math.hypot(p_high - p, q - q_low)
    verdict: Verdict = "better" if low > 0 else "worse" if high < 0 else "not separated"
    return Difference(mean, low, high, verdict)


def _exact(learned: int, seeds: int, confidence: float) -> tuple[float, float]:
    """Return the interval of Clopper and Pearson."""
    from scipy.special import betaincinv

    tail = (1 - confidence) / 2
    low = 0.0 if learned == 0 else float(betaincinv(learned, seeds - learned + 1, tail))
    high = 1.0 if learned == seeds else float(betaincinv(learned + 1, seeds - learned, 1 - tail))
    return low, high


def learning_steps(accuracies: Sequence[tuple[int, float]], learned: float = LEARNED) -> int | None:
    """Return the first evaluated step from which a run's accuracy stays learned; None if it did not learn.

    Args:
        accuracies: steps and accuracies of a run's evaluations, ascending.
        learned: the accuracy from which the task is learned.
    """
    first = None
    for step, accuracy in accuracies:
        if accuracy < learned:
            first = None
        elif first is None:
            first = step
    return first


def compare_steps(steps: Mapping[str, Sequence[int | None]], last: int, subject: str) -> dict[str, float]:
    """Return the p-value of each other entry's steps to learn against the subject's, corrected for their number.

    Args:
        steps: steps that learning took by entry, one for each seed; None for a seed that did not learn.
        last: the last step of the runs.
        subject: the entry with which the others are compared.
    """
    from scipy.stats import CensoredData, logrank

    others = [name for name in steps if name != subject]

    def sample(name: str) -> CensoredData:
        known = [step for step in steps[name] if step is not None]
        return CensoredData(uncensored=known, right=[last] * (len(steps[name]) - len(known)))

    def p_value(name: str) -> float:
        if not any(step is not None for each in (name, subject) for step in steps[each]):
            return 1.0  # no seed of either learned: nothing tells them apart
        return min(1.0, len(others) * float(logrank(sample(name), sample(subject)).pvalue))

    return {name: p_value(name) for name in others}
