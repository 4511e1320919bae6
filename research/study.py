"""Write the table of a study into its page: `python research/study.py studies/depth`, or `studies/choice`.

The argument is the folder of the study, after `seqmix compare NAME`. Beside the score of an entry stands its difference
from one of them at equal seeds, which says what helped and how sure that is.
"""

import sys

from seqmix.lab.markdown import fill, table
from seqmix.lab.study.conclusion import format_statistic, has_accuracy, score, variant_text
from seqmix.lab.study.results import Results, Statistic, SummaryRow, read_results
from seqmix.lab.study.summary import best_first, beyond_noise, difference
from seqmix.lab.study.tables import notes
from seqmix.registry import SeqmixError, write_file
from seqmix.research import DOCS

HERE = DOCS
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
    without_column = ("tokens/s", "rank:")  # notes on columns that these tables do not have
    return [*made, *(f"- {sentence}" for sentence in notes(results) if not sentence.startswith(without_column))]


def _cells(results: Results, row: SummaryRow, reference: SummaryRow) -> list[str]:
    as_percent = has_accuracy(results)
    found = None
    if row is not reference:
        field = "accuracy" if as_percent else "validation_loss"
        found = difference(results.runs_of(row), results.runs_of(reference), field)
    return [
        f"`{row.entry}`",
        format_statistic(score(results, row), as_percent=as_percent),
        format_statistic(found, as_percent=as_percent),
        "" if found is None else _verdict(found, more_is_better=as_percent),
        f"{row.learning_rate:g}",
        f"{results.entry_of(row).parameters:,}",
    ]


def _verdict(found: Statistic, *, more_is_better: bool) -> str:
    """Return a difference in a word or two."""
    if not beyond_noise(found):
        return "not distinguishable"
    return "better" if (found.mean > 0) == more_is_better else "worse"


def main() -> None:
    """Write the table of the study in the folder that is named."""
    if len(sys.argv) != 2:
        sys.exit("expected the folder of a study, as in: python research/study.py studies/depth")
    try:
        results = read_results(sys.argv[1])
    except SeqmixError as error:
        sys.exit(str(error))
    if results.name not in PAGES:
        sys.exit(f"expected results of one of the studies {', '.join(PAGES)}, got those of {results.name}")
    page, reference = PAGES[results.name]
    write_file(fill(HERE / page, {"results": lines(results, reference)}), HERE / page)


if __name__ == "__main__":
    main()
