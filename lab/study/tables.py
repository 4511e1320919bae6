"""Tables of a study's results for the terminal, for a page (summary.md) and for other programs (CSV)."""

import csv
from collections.abc import Iterator, Sequence
from io import StringIO
from pathlib import Path
from typing import Any

from ...registry import write_file
from ..markdown import table
from .columns import summary_table
from .conclusion import accessories_first, conclusion, names
from .config_differences import leaves
from .results import Difference, Results, RunResult, SummaryRow, where
from .scaling import scaling_lines
from .summary import timed_length, with_timed_speeds


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
    """Yield sentences on what intervals and ranks mean in these results."""
    if not results.summary:
        return
    if any(row.seeds > 1 for row in results.summary):
        yield "± is half the width of the 95 % t interval over seeds, which are all evaluated on the same data."
    if any(map(_beyond_what_is_possible, results.summary)):
        yield (
            "An interval that reaches beyond possible values (a loss below 0, an accuracy above 100 %) is not to "
            "be read literally: t intervals assume normally distributed results."
        )
    if any(row.seeds < 2 for row in results.summary):
        one = "There is one seed" if all(row.seeds < 2 for row in results.summary) else "Some entries have one seed"
        yield f"{one}, so there is no interval and no rank: differences may be chance."
    if any(row.rank is not None for row in results.summary):
        yield (
            "rank: 1 + the number of entries that are significantly better (the 95 % t interval of the difference at "
            "equal seeds does not contain 0; not corrected for the number of comparisons). Entries of different rank "
            "may be tied too, and one with a wide interval can have a lower rank number than one with a better mean."
        )


def _beyond_what_is_possible(row: SummaryRow) -> bool:
    loss, accuracy = row.validation_loss, row.accuracy
    if (loss.margin or 0) > loss.mean:
        return True
    return accuracy is not None and (accuracy.margin or 0) > min(accuracy.mean, 1 - accuracy.mean)


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
    variants: list[dict[str, Any]] = []
    variants += (each.variant for each in differences if each.variant not in variants)
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
