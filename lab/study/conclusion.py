"""The answer to a study's question in sentences: where its subject stands, and what that can be attributed to."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from ..units import plus_minus
from .comparisons import VariantComparison, compare_variant, distinct
from .config_differences import format_value
from .results import Results, Statistic, SummaryRow
from .summary import best_first

MAX_VARIANTS = 4
"""Maximum number of variants that each get an answer; of more variants, only the first and the last get one."""
MAX_NAMES = 5
"""Maximum number of names in a list; for the others, only their number is given."""


def conclusion(results: Results) -> str:
    """Return the answer, beginning with the study's subject; one answer for each variant."""
    if not results.summary:
        tuning = [run for run in results.runs if run.tunes]
        if ended := sum(run.status == "finished" for run in tuning):
            return (
                f"Only runs that choose the learning rates have finished ({ended} of {len(tuning)}), so there is "
                "nothing to compare yet."
            )
        return "No run has finished, so there is nothing to compare."
    variants = distinct(row.variant for row in results.summary)
    if len(variants) > MAX_VARIANTS:
        variants = [variants[0], variants[-1]]
    standings = [" ".join(_standing(results, variant)) for variant in variants]
    differences = [" ".join(_attribution(results, variant)) for variant in variants]
    same_everywhere = len(set(differences)) == 1  # if all variants differ in the same way, say so once, at the end
    parts = [
        f"At {variant_text(variant)}: {standing} {'' if same_everywhere else difference}" if variant else standing
        for variant, standing, difference in zip(variants, standings, differences, strict=True)
    ]
    ends = [differences[0] if same_everywhere else "", _untuned(results)]
    return " ".join(filter(None, [*map(str.strip, parts), *ends]))


def variant_text(variant: Mapping[str, Any]) -> str:
    """Return a variant as text: the last part of each key, and the value in YAML."""
    return ", ".join(f"{key_text(key)} {format_value(value)}" for key, value in variant.items())


def key_text(key: str) -> str:
    """Return the last part of a dotted path, with spaces for underscores."""
    return key.rpartition(".")[2].replace("_", " ")


def score(results: Results, row: SummaryRow) -> Statistic | None:
    """Return the score by which the study compares entries: accuracy for tasks, validation loss for text."""
    return row.accuracy if has_accuracy(results) else row.validation_loss


def has_accuracy(results: Results) -> bool:
    """True if entries are compared by accuracy."""
    return any(row.accuracy is not None for row in results.summary)


def _standing(results: Results, variant: Mapping[str, Any]) -> Iterator[str]:
    """Yield sentences on the subject's score in a variant, on which entries are better or worse, and on the best."""
    rows = [row for row in best_first(results) if row.variant == variant and score(results, row) is not None]
    subject = next((row for row in rows if row.entry == results.about), None)
    if not rows:
        yield "no run has finished."
        return
    as_percent = has_accuracy(results)
    if subject is None:
        best = format_statistic(score(results, rows[0]), as_percent=as_percent)
        yield f"{results.about} has not finished, so there is no answer about it; {rows[0].entry} reaches {best}."
        return
    others = [row for row in rows if row is not subject]
    measure = "an accuracy" if as_percent else "a validation loss"
    text = f"{subject.entry} reaches {measure} of {format_statistic(score(results, subject), as_percent=as_percent)}"
    if subject.learned is not None:
        text = f"{subject.learned} of {subject.seeds} seeds of {subject.entry} learn the task"
    if not others:
        yield f"{text}."
        return
    compared = compare_variant(results, variant)
    if not compared.differences:
        best = format_statistic(score(results, others[0]), as_percent=as_percent)
        yield f"{text}; the best of the others is {others[0].entry} with {best}."
        if max(row.seeds for row in rows) < 2:
            yield "With only one seed there is no interval, so differences may be chance."
        for row in rows:
            if row.failed:
                yield f"{row.entry} is not compared: {row.failed} of {row.failed + row.seeds} seeds failed."
        return
    about = f"mean and 95 % interval of {subject.seeds} seeds"
    yield f"{text}." if subject.learned is not None else f"{text} ({about})."
    verdicts: dict[str, list[str]] = {"better": [], "equivalent": [], "not separated": [], "worse": []}
    for row in others:
        if row.entry in compared.differences:
            verdicts[compared.differences[row.entry].verdict].append(row.entry)
    if len(compared.differences) <= MAX_NAMES:
        each = [
            f"{entry} is {compared.words(entry, results.about, results.margin)}"
            for of in verdicts.values()
            for entry in of
        ]
        yield f"Against it, {'; '.join(each)}."
    else:
        counts = [_counted(kind, entries, compared, results) for kind, entries in verdicts.items() if entries]
        yield f"Against it, {'; '.join(counts)}."
    for row in others:
        if row.failed:
            yield f"{row.entry} is {compared.words(row.entry, results.about, results.margin)}."


def _counted(kind: str, entries: Sequence[str], compared: VariantComparison, results: Results) -> str:
    """Return the entries of one verdict as text, with the one that differs most."""
    verb = "is" if len(entries) == 1 else "are"
    text = f"{names(entries)} {verb} {kind}"
    if kind == "equivalent":
        return f"{text} within {compared.amount(results.margin or 0.0)}"
    if kind == "not separated" or compared.measure == "learned":
        return text
    largest = max(entries, key=lambda entry: abs(compared.differences[entry].mean))
    amount = compared.amount(compared.differences[largest].mean)
    return f"{text} by up to {amount} ({largest})" if len(entries) > 1 else f"{text} by {amount}"


def _attribution(results: Results, variant: Mapping[str, Any]) -> Iterator[str]:
    """Yield sentences on what differs between the entries of a variant besides what the study compares."""
    entries = [row.entry for row in results.summary if row.variant == variant]
    others = [
        each
        for each in results.differences
        if each.variant == variant and each.entry in entries and each.entry != results.about
    ]
    if not others:
        return
    compared = names(list(dict.fromkeys(part for each in others for part in each.compared)) or ["nothing"])
    groups: dict[tuple[str, ...], list[str]] = {}
    for each in others:
        groups.setdefault(each.also, []).append(each.entry)
    otherwise_equal = groups.pop((), [])
    if not groups:
        yield f"The entries differ only in {compared}."
        return
    rest = f", so what separates them cannot be attributed to {compared} alone"
    if len(groups) == 1:
        ((fields, differing),) = groups.items()
        verb = "differs" if len(differing) == 1 else "differ"
        who = "The other entries" if len(differing) == len(others) > 1 else names(differing)
        yield f"{who} {verb} from {results.about} also in {names(fields)}{rest}."
    else:
        fields = accessories_first(field for each in groups for field in each)
        yield f"The entries differ from {results.about} also in some of {names(fields)}{rest}."
    if otherwise_equal:
        verb = "is" if len(otherwise_equal) == 1 else "are"
        yield f"Only {names(otherwise_equal)} {verb} equal to {results.about} in everything else."


def _untuned(results: Results) -> str:
    """Return a sentence if entries are compared at learning rates that were not tuned, and not for their rates."""
    several = len({row.entry for row in results.summary}) > 1
    compares_rates = any("training.learning_rate" in each.compared for each in results.differences)
    if not several or compares_rates or any(run.tunes for run in results.runs):
        return ""
    return "The learning rate was not tuned for each entry, so another one may change the order."


def accessories_first(fields: Iterable[str]) -> list[str]:
    """Return the distinct names of fields, those of other options of mixers (`mixer.`) last."""
    return sorted(dict.fromkeys(fields), key=lambda field: field.startswith("mixer."))


def names(words: Sequence[str]) -> str:
    """Return a list as text; a long one is cut."""
    shown = list(words) if len(words) <= MAX_NAMES + 1 else [*words[:MAX_NAMES], f"{len(words) - MAX_NAMES} more"]
    return " and ".join(filter(None, [", ".join(shown[:-1]), shown[-1]]))


def format_statistic(value: Statistic | None, *, as_percent: bool = False) -> str:
    """Format a mean and its margin, in percent if `as_percent`; empty for None."""
    if value is None:
        return ""
    digits = 1 if as_percent else 3 if abs(value.mean) < 10 else 2
    # no-break spaces keep a number on one line
    return plus_minus(value.mean, value.margin, digits, as_percent=as_percent).replace(" ", "\N{NO-BREAK SPACE}")
