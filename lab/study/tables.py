"""Tables of a study's results for the terminal, for a page (summary.md) and for other programs (CSV)."""

import csv
from collections.abc import Iterator, Mapping, Sequence
from io import StringIO
from pathlib import Path
from typing import Any

from ...registry import write_file
from ..markdown import table
from ..statistics.learned import LearnedComparison, compare_steps
from ..statistics.variance import format_p
from .columns import summary_table
from .comparisons import compare_variant, distinct
from .conclusion import MAX_VARIANTS, accessories_first, conclusion, names, variant_text
from .config_differences import leaves
from .results import Difference, Results, RunResult, SummaryRow, where
from .scaling import scaling_lines
from .summary import timed_length, with_timed_speeds

FAMILIES = {
    False: "by Dunnett's method",
    True: "of shares of seeds by exact intervals and Bonferroni's correction",
}
"""Method of a family of comparisons, by whether it compares shares of seeds that learned."""


def notes(results: Results) -> Iterator[str]:
    """Yield notes on the results: intervals, ranks, power laws, rates at an edge, failed and missing runs."""
    yield from uncertainty(results)
    yield from cautions(results)
    for line in scaling_lines(results):
        yield f"{line}."
    if note := speed_note(results):
        yield note
    for run in results.runs:
        if run.status == "failed":
            yield f"{run.name} failed: {run.error}"
    if missing := [run.name for run in results.runs if run.status == "missing"]:
        ending = ", ..." if len(missing) > 5 else "."
        yield f"{len(missing)} of {len(results.runs)} runs are not finished: {', '.join(missing[:5])}{ending}"


def uncertainty(results: Results) -> Iterator[str]:
    """Yield sentences on what intervals, ranks and verdicts mean in these results, and on what they rest."""
    if not results.summary:
        return
    if all(row.seeds < 2 for row in results.summary):
        yield "There is one seed, so there is no interval and no rank: differences may be chance."
        return
    variants = distinct(row.variant for row in results.summary)
    compared = [(variant, compare_variant(results, variant)) for variant in variants]
    for variant, each in compared if len(compared) <= MAX_VARIANTS else ():
        if each.note:
            yield f"{f'At {variant_text(variant)}: ' if variant else ''}{each.note}"
    split = any(row.learned is not None for row in results.summary)
    if any(row.validation_loss.margin is not None for row in results.summary):
        yield (
            "± is half the width of a mean's 95 % t interval with that standard deviation; all seeds are evaluated on "
            "the same data."
        )
    if split:
        yield (
            f"learned: seeds that reach {100 * results.learned:g} % of their answers; in brackets, Jeffreys' 95 % "
            "interval of the probability that a seed does. Scores that split so have no mean with an interval."
        )
    for variant in variants if len(variants) <= MAX_VARIANTS else ():
        yield from _steps_compared(results, variant)
    if any(each.differences for _, each in compared):
        kinds = {isinstance(each.found, LearnedComparison) for _, each in compared}
        yield (
            f"against {results.about}: differences with simultaneous 95 % intervals, "
            f"{' or '.join(text for kind, text in FAMILIES.items() if kind in kinds)}; not separated: the interval "
            "contains 0, which does not show that there is no difference."
        )
        if results.margin is not None and False in kinds:
            yield (
                f"equivalent within {compared[0][1].amount(results.margin)}: two one-sided t tests at 5 % each, not "
                "corrected for the number of entries."
            )
    if any(row.ranks is not None for row in results.summary):
        yield (
            "rank: the places that an entry can have, from 1 + the number of entries that are better than it to the "
            "number of all without those that are worse, by simultaneous 95 % intervals of all pairs."
        )
    if any(row.failed for row in results.summary):
        yield (
            "An entry of which seeds failed has neither a rank nor a verdict and stands last: seeds that diverge are "
            "not missing by chance."
        )


def _steps_compared(results: Results, variant: Mapping[str, Any]) -> Iterator[str]:
    """Yield a sentence on how the steps that learning took differ from the subject's, where seeds are split."""
    rows = {row.entry: row for row in results.summary if row.variant == variant and row.learning_steps}
    last = max((e.step for row in rows.values() for run in results.runs_of(row) for e in run.evaluations), default=0)
    if results.about not in rows or len(rows) < 2:
        return
    p_values = compare_steps({name: row.learning_steps for name, row in rows.items()}, last, results.about)
    found = ", ".join(f"{name} {format_p(p)}" for name, p in p_values.items())
    yield (
        f"{f'At {variant_text(variant)}: ' if variant else ''}steps to learn against those of {results.about}, by "
        f"log-rank tests with Bonferroni's correction, where a seed that did not learn would have taken longer than "
        f"its run: {found}."
    )


def cautions(results: Results) -> Iterator[str]:
    """Yield sentences on runs of different precision, and on entries whose best learning rate is at an edge."""
    if len(precisions := list(dict.fromkeys(run.precision for run in results.runs if run.precision))) > 1:
        yield f"Runs differ in the precision of matrix products ({' and '.join(precisions)}), so do not compare them."
    groups: dict[tuple[float, str], dict[str, list[str]]] = {}
    for row in results.summary:
        if row.at_edge is not None:
            variants = groups.setdefault((row.learning_rate, row.at_edge), {})
            variants.setdefault(where(row.variant), []).append(row.entry)
    for (rate, edge), variants in groups.items():
        yield (
            f"{'; '.join(names(entries) + variant for variant, entries in variants.items())}: "
            f"the best learning rate, {rate:g}, is the {edge} that was tried; "
            f"a {'lower' if edge == 'lowest' else 'higher'} one may be better."
        )


def difference_tables(
    differences: Sequence[Difference], subject: str
) -> list[tuple[dict[str, Any], list[str], list[tuple[str, ...]]]]:
    """Return heads and rows of a table for each variant in which entries differ besides what the study compares.

    The subject's row comes first. If the tables of all variants are the same, only one is returned, with an empty
    variant.
    """
    variants = distinct(each.variant for each in differences)
    tables = []
    for variant in variants:
        of_variant = [each for each in differences if each.variant == variant]
        if fields := accessories_first(field for each in of_variant for field in each.also):
            of_variant.sort(key=lambda each: each.entry != subject)
            rows = [(each.entry, *(each.values.get(field, "") for field in fields)) for each in of_variant]
            tables.append((variant, ["entry", *fields], rows))
    same = len(tables) == len(variants) and all(table[1:] == tables[0][1:] for table in tables)
    return [({}, *tables[0][1:])] if tables and same else tables


def speed_note(results: Results) -> str | None:
    """Return a sentence on what the speeds of the summary measure; None without speeds."""
    if all(row.tokens_per_second is None for row in with_timed_speeds(results).summary):
        return None
    speed = results.speed
    if (at := timed_length(results)) is not None:
        note = f"tokens/s: training steps with sequences of {at:,} tokens"
        note += f", at most {speed.tokens:,} tokens per step" if speed.tokens else ""
        note += f", {speed.threads} thread{'s' * (speed.threads > 1)}" if speed.threads else ""
        note += ", CPU time" if speed.cpu_time else ""
        note += f", medians of {speed.repeat} interleaved rounds" if speed.repeat else ""
        return f"{note}; lowest and highest in brackets."
    alone = all(run.alone for run in results.runs if run.status == "finished" and not run.tunes)
    sharing = "runs went one after another, not interleaved; other programs may have slowed some more than others"
    if not alone:
        sharing = "runs may have shared the machine, so these numbers do not compare speeds"
    return (
        "tokens/s: the median over runs of each run's median over its own logged steps; in brackets, the lowest lower "
        f"and the highest upper quartile of these runs; {sharing}."
    )


def markdown(results: Results) -> str:
    """Return the results as a Markdown page: question, table, conditions, notes, and matching."""
    lines = [f"# {results.name}", ""]
    lines += [results.question, ""] if results.question else []
    lines += [results.setup, ""] if results.setup else []
    lines += [*table(*summary_table(results)), ""] if results.summary else []
    lines += [conclusion(results), ""]
    for variant, heads, rows in difference_tables(results.differences, results.about):
        lines += [f"What else differs{where(variant)}:", "", *table(heads, rows), ""]
    lines += [f"- {sentence}" for sentence in (*results.fairness, *notes(results))]
    matched = [f"- {entry.name}: {entry.matched}" for entry in results.entries if entry.matched]
    lines += ["", f"Matched{where(results.first_variant)}:", "", *matched] if matched else []
    if results.paper:
        figures = [
            (figure.label, figure.entry, f"{figure.theirs:g}", "" if figure.ours is None else f"{figure.ours:.4g}")
            for figure in results.paper
        ]
        lines += ["", *table(["figure", "entry", "paper", "here"], figures)]
    return "\n".join(lines) + "\n"


def write_tables(results: Results, folder: Path) -> None:
    """Write runs.csv, summary.csv and summary.md."""
    for name, values in (("runs.csv", results.runs), ("summary.csv", results.summary)):
        rows = list(map(_cells, values))
        text = StringIO(newline="")
        writer = csv.DictWriter(text, list(dict.fromkeys(column for row in rows for column in row)))
        writer.writeheader()
        writer.writerows(rows)
        write_file(text.getvalue(), folder / name)
    write_file(markdown(results), folder / "summary.md")


COLUMNS = {"variant": "", "mean": "", "accuracy_by": "accuracy"}
COLUMNS |= dict.fromkeys(("validation_loss_by", "validation_loss_by_length"), "validation_loss")
"""Names in CSV columns of the parts of a field's path that are renamed there; a part with an empty name is left out."""


def _cells(value: RunResult | SummaryRow) -> dict[str, Any]:
    """Flatten a row into CSV cells by column name."""
    fields = leaves(value.model_dump(exclude={"history", "evaluations", "at_edge"}))
    return {
        ".".join(filter(None, (COLUMNS.get(key, key) for key in path.split(".")))): leaf
        for path, leaf in fields.items()
    }
