"""Write the table of a study into its page: `python docs/study.py studies/depth`, or `studies/choice`.

The argument is the folder of the study, after `seqmix compare NAME`. Beside the score of an entry stands its difference
from one of them at equal seeds, which says what helped and how sure that is.
"""

import sys
from pathlib import Path

from seqmix.experiments.answer import format_statistic, has_accuracy, score, variant_text
from seqmix.experiments.pages import fill, table
from seqmix.experiments.results import Results, SummaryRow, read_results
from seqmix.experiments.summary import best_first, beyond_noise, difference
from seqmix.experiments.tables import notes
from seqmix.registry import write_file

HERE = Path(__file__).parent
PAGES = {"depth": ("explanation/depth.md", "plain"), "choice": ("explanation/choice.md", "full")}
"""Page, and the entry with which the others are compared, by name of the study."""


def lines(results: Results, reference: str) -> list[str]:
    """Return a table for each variant, and notes."""
    variants: list[dict[str, object]] = []
    variants += (row.variant for row in results.summary if row.variant not in variants)
    measure = "accuracy" if has_accuracy(results) else "loss"
    made: list[str] = []
    for variant in variants:
        rows = [row for row in best_first(results) if row.variant == variant]
        one = next(row for row in rows if row.entry == reference)
        heads = ["entry", f"{measure}:", f"against {reference}:", "verdict", "learning rate:", "parameters:"]
        made += [f"### {variant_text(variant)}", ""] if variant else []
        made += [*table(heads, [_cells(results, row, one) for row in rows]), ""]
    told = ("tokens/s", "rank:")  # of what the tables do not show
    return [*made, *(f"- {sentence}" for sentence in notes(results) if not sentence.startswith(told))]


def _cells(results: Results, row: SummaryRow, reference: SummaryRow) -> list[str]:
    as_percent = has_accuracy(results)
    found = None
    if row is not reference:
        field = "accuracy" if as_percent else "validation_loss"
        found = difference(results.runs_of(row), results.runs_of(reference), field)
    better = found is not None and (found.mean > 0) == as_percent
    verdict = (
        "" if found is None else ("better" if better else "worse") if beyond_noise(found) else "not distinguishable"
    )
    return [
        f"`{row.entry}`",
        format_statistic(score(results, row), as_percent=as_percent),
        "" if found is None else format_statistic(found, as_percent=as_percent),
        verdict,
        f"{row.learning_rate:g}",
        f"{results.entry_of(row).parameters:,}",
    ]


if __name__ == "__main__":
    found = read_results(sys.argv[1])
    page, reference = PAGES[found.name]
    write_file(fill(HERE / page, {"results": lines(found, reference)}), HERE / page)
