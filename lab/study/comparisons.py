"""Entries of a study compared with its subject: the score that counts, differences, and verdicts in words."""

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from statistics import fmean
from typing import Any, Literal, TypeAlias

from ..statistics.comparison import Comparison, Difference, Verdict, compare_scores
from ..statistics.learned import LEARNED, LearnedComparison, compare_learned, is_split
from ..statistics.variance import Scores
from .results import Results, RunResult

Measure: TypeAlias = Literal["accuracy", "validation_loss", "learned"]
"""Score by which entries are compared. `learned`: the share of seeds that learned the task, where accuracies split."""
ACCURACY_FLOOR = 0.005
"""Smallest standard deviation of a seed's accuracy: half a point, which is a few answers of a final evaluation."""
LOSS_FLOOR = 1e-4
"""Smallest standard deviation of a seed's loss, in nats per token."""
MINUS = "\N{MINUS SIGN}"


@dataclass(frozen=True)
class EntryComparison:
    """Score of an entry compared with that of the subject, in one variant."""

    entry: str
    variant: dict[str, Any]
    measure: Measure
    difference: float
    """Mean of the entry's score minus the subject's."""
    low: float | None
    """Lower end of the simultaneous 95 % interval of the difference; None with one seed each, or if a seed failed."""
    high: float | None
    """Upper end of the simultaneous 95 % interval of the difference."""
    verdict: Verdict | None
    """None without an interval."""
    words: str
    """The verdict in words, with the difference and its interval."""


@dataclass(frozen=True)
class VariantComparison:
    """All entries of one variant, compared."""

    measure: Measure
    scores: Scores
    """Accuracies or losses by entry, one for each seed."""
    failed: Mapping[str, int]
    """Number of seeds that failed, by entry; entries without one are left out."""
    found: Comparison | LearnedComparison

    @property
    def differences(self) -> Mapping[str, Difference]:
        """Difference of each other entry from the subject."""
        return self.found.differences

    @property
    def ranks(self) -> Mapping[str, tuple[int, int]]:
        """Lowest and highest rank that each entry can have."""
        return self.found.ranks

    def words(self, entry: str, subject: str, margin: float | None) -> str:
        """Return the verdict on an entry in words."""
        for name, whose in ((entry, ""), (subject, f" of {subject}")):
            if count := self.failed.get(name):
                return f"not compared: {count} of {count + len(self.scores[name])} seeds{whose} failed"
        if (found := self.differences.get(entry)) is None:
            return f"one seed, so no interval: {self.format(self.gap(entry, subject))}"
        if isinstance(self.found, LearnedComparison):
            ours, theirs = (self.found.counts[name] for name in (entry, subject))
            counts = f"{ours.learned} of {ours.seeds} seeds learned the task"
            return f"{found.verdict}: {counts}, {theirs.learned} of {theirs.seeds} of {subject}"
        interval = f"{self.format(found.low)} to {self.format(found.high)}"
        match found.verdict:
            case "better" | "worse":
                low, high = sorted((abs(found.low), abs(found.high)))
                return f"{found.verdict} by {self.amount(found.mean)} ({self.number(low)} to {self.number(high)})"
            case "equivalent":
                return f"equivalent within {self.amount(margin or 0.0)}: {self.format(found.mean)} ({interval})"
            case _:
                return f"not separated: {self.format(found.mean)} {self.unit} ({interval})"

    def gap(self, entry: str, subject: str) -> float:
        """Return the difference of an entry's mean score from the subject's."""
        return fmean(self.scores[entry]) - fmean(self.scores[subject])

    @property
    def unit(self) -> str:
        """Unit of differences: points of an accuracy, nats of a loss."""
        return "points" if self.measure == "accuracy" else "nats"

    def number(self, value: float) -> str:
        """Return the size of a difference as text without a unit."""
        return f"{abs(100 * value):.1f}" if self.measure == "accuracy" else f"{abs(value):.3f}"

    def amount(self, value: float) -> str:
        """Return the size of a difference as text."""
        return f"{self.number(value)} {self.unit}"

    def format(self, value: float) -> str:
        """Return a difference with its sign as text."""
        return f"{'+' if value > 0 else MINUS if value < 0 else ''}{self.number(value)}"

    @property
    def note(self) -> str:
        """Sentence on the model behind the intervals; empty without intervals."""
        if isinstance(self.found, LearnedComparison) or self.found.variance is None:
            return ""
        return self.found.variance.sentence(self.unit, 100.0 if self.measure == "accuracy" else 1.0)


def compare_runs(
    runs: Iterable[RunResult], *, subject: str | None = None, margin: float | None = None, learned: float = LEARNED
) -> VariantComparison:
    """Compare the entries of one variant by their runs, of which those that tune are left out.

    They are compared by accuracy if a run has one, and by validation loss otherwise.

    Args:
        runs: runs of one variant, each entry's at its best learning rate.
        subject: the entry with which the others are compared; None for none.
        margin: size up to which a difference of the score does not matter; None if no equivalence is to be tested.
        learned: the accuracy from which a seed has learned a task.
    """
    runs = [run for run in runs if not run.tunes]
    field: Measure = "accuracy" if any(run.accuracy is not None for run in runs) else "validation_loss"
    scores: dict[str, list[float]] = {}
    failed: dict[str, int] = {}
    for run in runs:
        value = getattr(run, field)
        if run.status == "finished" and value is not None:
            scores.setdefault(run.entry, []).append(value)
        elif run.status == "failed":
            failed[run.entry] = failed.get(run.entry, 0) + 1
    if field == "accuracy":
        found = compare_accuracies(scores, subject=subject, margin=margin, incomplete=failed, learned=learned)
        return VariantComparison("learned" if isinstance(found, LearnedComparison) else field, scores, failed, found)
    found = compare_scores(
        scores, subject=subject, higher_is_better=False, floor=LOSS_FLOOR, margin=margin, incomplete=failed
    )
    return VariantComparison(field, scores, failed, found)


def compare_accuracies(
    accuracies: Scores,
    *,
    subject: str | None = None,
    margin: float | None = None,
    incomplete: Collection[str] = (),
    learned: float = LEARNED,
) -> Comparison | LearnedComparison:
    """Compare entries by their mean accuracy, or by the seeds that learned the task where seeds are split.

    Args:
        accuracies: accuracies by entry, one for each seed.
        subject: the entry with which the others are compared; None for none.
        margin: size up to which a difference does not matter; None if no equivalence is to be tested.
        incomplete: entries of which some seeds failed.
        learned: the accuracy from which a seed has learned the task.
    """
    if is_split(accuracies, learned):
        return compare_learned(accuracies, learned=learned, subject=subject, incomplete=incomplete)
    return compare_scores(
        accuracies,
        subject=subject,
        higher_is_better=True,
        floor=ACCURACY_FLOOR,
        margin=margin,
        incomplete=incomplete,
    )


def compare_variant(results: Results, variant: Mapping[str, Any], subject: str | None = None) -> VariantComparison:
    """Compare the entries of a variant of a study with its subject or another entry, at their best learning rates."""
    rates = {row.entry: row.learning_rate for row in results.summary if row.variant == variant}
    runs = [
        run
        for run in results.runs
        if run.variant == variant and (run.status == "failed" or run.learning_rate == rates.get(run.entry))
    ]
    return compare_runs(runs, subject=subject or results.about, margin=results.margin, learned=results.learned)


def comparisons(results: Results) -> list[EntryComparison]:
    """Compare every other entry of each variant with the subject, in the order of the summary."""
    found = []
    for variant in distinct(row.variant for row in results.summary):
        rows = [row.entry for row in results.summary if row.variant == variant]
        if results.about not in rows:
            continue
        compared = compare_variant(results, variant)
        for entry in rows:
            if entry == results.about or entry not in compared.scores:
                continue
            one = compared.differences.get(entry)
            found.append(
                EntryComparison(
                    entry,
                    variant,
                    compared.measure,
                    difference=compared.gap(entry, results.about) if one is None else one.mean,
                    low=one and one.low,
                    high=one and one.high,
                    verdict=one and one.verdict,
                    words=compared.words(entry, results.about, results.margin),
                )
            )
    return found


def distinct(variants: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the distinct variants, in their order."""
    found: list[dict[str, Any]] = []
    found += (variant for variant in variants if variant not in found)
    return found
