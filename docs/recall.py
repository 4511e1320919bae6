"""Write the table of docs/explanation/equal-accessories.md: `python docs/recall.py studies/recall-accessories`.

The argument is the folder of the study `recall-accessories`, after `seqmix compare recall-accessories`.
"""

import sys
from pathlib import Path

from seqmix.experiments.answer import answer, format_statistic
from seqmix.experiments.pages import fill, table
from seqmix.experiments.results import ABSENT, Results, SummaryRow, read_results
from seqmix.experiments.tables import notes
from seqmix.registry import write_file

TARGET = Path(__file__).with_name("explanation") / "equal-accessories.md"
OPTION = "equal.short_conv"
VALUES = {"without": None, "with": 4}
"""Values of the varied option, by the word for them in the table."""


def recall(results: Results) -> list[str]:
    """Return the table of accuracies without and with a short convolution, the answer, and notes.

    An entry without the option has no result with a short convolution: its models are those without.
    """
    lacking = {each.entry for each in results.differences if each.values.get("short_conv") == ABSENT}
    rows = {
        (row.entry, value): row
        for row in results.summary
        if (value := row.variant[OPTION]) is None or row.entry not in lacking
    }
    words = [f"{word} short convolution" for word in VALUES]
    heads = ["mixer", *(head for word in words for head in (f"{word}:", "rank:", "learning rate:"))]
    order = sorted((entry.name for entry in results.entries), key=lambda name: -_accuracy(rows.get((name, 4))))
    cells = [
        [f"`{name}`", *(cell for value in VALUES.values() for cell in _cells(rows.get((name, value))))]
        for name in order
    ]
    return [
        *table(heads, cells),
        "",
        answer(results),
        "",
        *(f"- {sentence}" for sentence in notes(results) if not sentence.startswith("tokens/s")),
    ]


def _accuracy(row: SummaryRow | None) -> float:
    return 0.0 if row is None or row.accuracy is None else row.accuracy.mean


def _cells(row: SummaryRow | None) -> list[str]:
    if row is None:
        return [ABSENT, "", ""]
    return [format_statistic(row.accuracy, as_percent=True), f"{row.rank or ''}", f"{row.learning_rate:g}"]


if __name__ == "__main__":
    write_file(fill(TARGET, {"recall": recall(read_results(sys.argv[1]))}), TARGET)
