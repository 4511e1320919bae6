"""Write the table of a study into its page: `python research/study.py studies/depth`, or `studies/choice`.

The argument is the folder of the study, after `seqmix compare NAME`. Beside the score of an entry stands its difference
from one of them, with a simultaneous interval, which says what helped and how sure that is.
"""

import sys

from seqmix.lab.markdown import fill, table
from seqmix.lab.study.comparisons import compare_variant, distinct
from seqmix.lab.study.conclusion import format_statistic, has_accuracy, score, variant_text
from seqmix.lab.study.results import Results
from seqmix.lab.study.results_file import read_results
from seqmix.lab.study.summary import best_first
from seqmix.lab.study.tables import notes
from seqmix.registry import SeqmixError, write_file
from seqmix.research import DOCS

PAGES = {"depth": ("explanation/depth.md", "plain"), "choice": ("explanation/choice.md", "full")}
"""Page, and the entry with which the others are compared, by name of the study."""


def lines(results: Results, reference: str) -> list[str]:
    """Return a table for each variant, and notes."""
    as_percent = has_accuracy(results)
    heads = [
        "entry",
        f"{'accuracy' if as_percent else 'loss'}:",
        f"against {reference}",
        "learning rate:",
        "parameters:",
    ]
    made: list[str] = []
    for variant in distinct(row.variant for row in results.summary):
        compared = compare_variant(results, variant, reference)
        cells = [
            [
                f"`{row.entry}`",
                format_statistic(score(results, row), as_percent=as_percent),
                "" if row.entry == reference else compared.words(row.entry, reference, results.margin),
                f"{row.learning_rate:g}",
                f"{results.entry_of(row).parameters:,}",
            ]
            for row in best_first(results)
            if row.variant == variant
        ]
        made += [f"### {variant_text(variant)}", ""] if variant else []
        made += [*table(heads, cells), ""]
    without_column = ("tokens/s", "rank:")  # notes on columns that these tables do not have
    return [*made, *(f"- {sentence}" for sentence in notes(results) if not sentence.startswith(without_column))]


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
    write_file(fill(DOCS / page, {"results": lines(results, reference)}), DOCS / page)


if __name__ == "__main__":
    main()
