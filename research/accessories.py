"""Write the tables of docs/explanation/equal-accessories.md: `python research/accessories.py [FOLDER]`.

FOLDER is that of the study `recall-accessories` or `text-accessories`, after `seqmix compare NAME`. Results of text are
kept in docs/explanation/equal-accessories.json; without a folder, the tables of text are regenerated from that file.
"""

import math
import runpy
import sys
from pathlib import Path
from types import SimpleNamespace

from seqmix.lab.markdown import fill, table
from seqmix.lab.statistics.comparison import compare_pairs
from seqmix.lab.study.columns import rank_text
from seqmix.lab.study.comparisons import LOSS_FLOOR
from seqmix.lab.study.conclusion import conclusion, format_statistic, has_accuracy
from seqmix.lab.study.results import ABSENT, Results, SummaryRow
from seqmix.lab.study.results_file import read_results
from seqmix.lab.study.tables import notes
from seqmix.registry import SeqmixError, write_file
from seqmix.research import DOCS
from seqmix.research.language_results import REFERENCE, Measured, Size, read_measured, size_of

TARGET = DOCS / "explanation" / "equal-accessories.md"
OPTION = "equal.short_conv"
VALUES = {"without": None, "with": 4}
"""Values of the varied option, by the word for them in the table."""
STEPS = 360
"""Steps of the runs of text."""
TEXT = TARGET.with_suffix(".json")
"""Results of text: a size for each word of `VALUES`."""
LANGUAGE = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("language.py"))))
"""Program of the page of all mixers on text, and its results."""


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
        conclusion(results),
        "",
        *(f"- {sentence}" for sentence in notes(results) if not sentence.startswith("tokens/s")),
    ]


def _accuracy(row: SummaryRow | None) -> float:
    return 0.0 if row is None or row.accuracy is None else row.accuracy.mean


def _cells(row: SummaryRow | None) -> list[str]:
    if row is None:
        return [ABSENT, "", ""]
    return [
        format_statistic(row.accuracy, as_percent=True),
        "" if row.ranks is None else rank_text(row.ranks),
        f"{row.learning_rate:g}",
    ]


def read_study(folder: str) -> Results:
    """Read the results of a study that varies the short convolution.

    Raises:
        SeqmixError: the folder cannot be read, or its study varies something else.
    """
    results = read_results(folder)
    if not results.summary or any(OPTION not in row.variant for row in results.summary):
        raise SeqmixError(f"expected finished runs of a study that varies {OPTION}, got {results.name} in {folder}")
    return results


def read_text(results: Results) -> Measured:
    """Return the losses of a study of text without and with a short convolution."""
    sizes = {}
    for word, value in VALUES.items():
        rows = tuple(row for row in results.summary if row.variant[OPTION] == value)
        sizes[word] = size_of(results.model_copy(update={"summary": rows}))[1]
    return Measured(sizes=sizes)


def text(measured: Measured) -> list[str]:
    """Return the table of losses in bits per byte without and with a short convolution, best first with one.

    Beside them stand a mixer minus attention, and what the convolution changes in a mixer.
    """
    compared = {word: LANGUAGE.at_length(size, STEPS) for word, size in measured.sizes.items()}
    scores = {f"{name} {word}": each.scores[name] for word, each in compared.items() for name in each.scores}
    pairs = {name: (f"{name} with", f"{name} without") for name in compared["with"].best_first()}
    changes = compare_pairs(scores, list(pairs.values()), higher_is_better=False, floor=LOSS_FLOOR / math.log(2))
    rows = []
    for name, pair in pairs.items():
        cells = [f"`{name}`"]
        for word, each in compared.items():
            rate = measured.sizes[word].models[name].runs[str(STEPS)].learning_rate
            cells += [each.mean_text(name), LANGUAGE.change_text(each.found.differences.get(name)), f"{rate:g}"]
        rows.append([*cells, LANGUAGE.change_text(changes.get(pair))])
    heads = [head for word in VALUES for head in (f"{word}, bits per byte:", f"minus {REFERENCE}:", "learning rate:")]
    return table(["mixer", *heads, "with minus without:"], rows)


def against(measured: Measured, size: Size) -> list[str]:
    """Return a verdict and a table: every mixer of `size`, with default options, minus attention with a convolution.

    Raises:
        SeqmixError: the two were not trained under the same conditions.
    """
    attention = measured.sizes["with"]
    if attention.conditions != size.conditions:
        raise SeqmixError(f"expected results under the conditions {size.conditions}; got {attention.conditions}")
    models = size.models | {REFERENCE: attention.models[REFERENCE]}
    compared = LANGUAGE.at_length(size.model_copy(update={"models": models}), STEPS)
    rows = []
    for name in compared.best_first():
        if name != REFERENCE:
            convolution = models[name].short_conv.replace("null", "none")
            change = LANGUAGE.change_text(compared.found.differences.get(name))
            rows.append([f"`{name}`", LANGUAGE.family(models[name].mixer), convolution, change])
    reference = f"{REFERENCE} with a convolution"
    heads = ["mixer", "family", "convolution:", f"minus {reference}:"]
    return [compared.verdict(reference=reference), "", *table(heads, rows)]


def files() -> dict[Path, str]:
    """Return the text of the page with the tables of text, from the results in the repository."""
    measured = read_measured(TEXT)
    size = read_measured(LANGUAGE.RESULTS).sizes["1M"]
    return {TARGET: fill(TARGET, {"text": text(measured), "all mixers": against(measured, size)})}


if __name__ == "__main__":
    try:
        for results in map(read_study, sys.argv[1:]):
            if has_accuracy(results):
                write_file(fill(TARGET, {"recall": recall(results)}), TARGET)
            else:
                write_file(read_text(results).model_dump_json(indent=1, exclude_defaults=True) + "\n", TEXT)
        for file, page in files().items():
            write_file(page, file)
    except SeqmixError as error:
        sys.exit(str(error))
