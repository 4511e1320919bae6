"""Write a table of docs/explanation/equal-accessories.md: `python docs/accessories.py FOLDER`.

FOLDER is that of the study `recall-accessories` or `text-accessories`, after `seqmix compare NAME`.
"""

import math
import sys
from collections.abc import Sequence
from pathlib import Path

from seqmix.experiments.answer import answer, format_statistic, has_accuracy
from seqmix.experiments.pages import fill, table
from seqmix.experiments.results import ABSENT, Results, RunResult, SummaryRow, read_results
from seqmix.experiments.summary import difference, statistic, values_of
from seqmix.experiments.tables import notes
from seqmix.registry import write_file

TARGET = Path(__file__).with_name("explanation") / "equal-accessories.md"
OPTION = "equal.short_conv"
VALUES = {"without": None, "with": 4}
"""Values of the varied option, by the word for them in the table."""
REFERENCE = "attention"
"""Entry with which the others are compared on text."""

Place = tuple[str, int | None]
"""An entry, and the tokens of its short convolution."""


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


def text(results: Results) -> list[str]:
    """Return the table of losses in bits per byte without and with a short convolution, best first with one.

    Differences are at equal seeds: a mixer minus attention, and what the convolution changes in a mixer.
    """
    runs = {(row.entry, row.variant[OPTION]): _in_bits(results.runs_of(row)) for row in results.summary}
    losses = {place: statistic(values_of(each, "validation_loss")) for place, each in runs.items()}
    rates = {(row.entry, row.variant[OPTION]): f"{row.learning_rate:g}" for row in results.summary}

    def minus(one: Place, other: Place) -> str:
        known = one != other and {one, other} <= runs.keys()
        value = difference(runs[one], runs[other], "validation_loss") if known else None
        return "" if value is None else f"{'+' if value.mean > 0 else ''}{format_statistic(value)}"

    def loss_with(name: str) -> float:
        return losses[name, 4].mean if (name, 4) in losses else math.inf

    rows = []
    for name in sorted({entry for entry, _ in runs}, key=loss_with):
        places = [(name, value) for value in VALUES.values()]
        of_value = [
            (format_statistic(losses.get(place)), minus(place, (REFERENCE, place[1])), rates.get(place, ""))
            for place in places
        ]
        rows.append([f"`{name}`", *(cell for cells in of_value for cell in cells), minus(*reversed(places))])
    heads = [head for word in VALUES for head in (f"{word}, bits per byte:", f"minus {REFERENCE}:", "learning rate:")]
    return table(["mixer", *heads, "with minus without:"], rows)


def _in_bits(runs: Sequence[RunResult]) -> list[RunResult]:
    """Return the runs that have a loss, with losses in bits."""
    bits = {run.name: run.validation_loss / math.log(2) for run in runs if run.validation_loss is not None}
    return [run.model_copy(update={"validation_loss": bits[run.name]}) for run in runs if run.name in bits]


if __name__ == "__main__":
    results = read_results(sys.argv[1])
    lines = {"recall": recall(results)} if has_accuracy(results) else {"text": text(results)}
    write_file(fill(TARGET, lines), TARGET)
