"""Write the tables and the picture of docs/explanation/rank-transfer.md: `python research/rank_transfer.py [SCORES]`.

SCORES is a suite.json, a folder with one, or the name of published scores; `small-parameters` by default.
"""

import sys
from pathlib import Path

from seqmix.lab.figures.figure import drawable
from seqmix.lab.figures.writer import adaptive
from seqmix.lab.markdown import fill
from seqmix.lab.suite.scores import read_scores
from seqmix.registry import SeqmixError, write_file
from seqmix.research import DOCS
from seqmix.research.published_ranks import page
from seqmix.research.published_ranks.grids import entries_of, load_grids
from seqmix.research.published_ranks.predictions import load_predictions

TARGET = DOCS / "explanation" / "rank-transfer.md"
PICTURE = "rho.svg"
DEFAULT = "small-parameters"
"""Scores from which the results of the page are computed."""


def files(scores: Path | None = None) -> dict[Path, str]:
    """Return the text of the page, and new results and their picture; without `scores`, the results stay."""
    grids = load_grids()
    entries, predictions = entries_of(grids), load_predictions()
    parts = {
        "grids": page.grid_lines(grids),
        "power": page.power_lines(grids, entries, predictions.tested),
        "predictions": page.prediction_lines(predictions),
    }
    pictures = {}
    if scores is not None:
        parts["results"], figure = page.results(read_scores(scores), grids, entries, predictions)
        if figures := drawable([figure]):
            pictures = {TARGET.with_suffix("") / PICTURE: adaptive(figures, 6.0)}
    return {TARGET: fill(TARGET, parts), **pictures}


if __name__ == "__main__":
    try:
        written = files(Path(sys.argv[1] if sys.argv[1:] else DEFAULT))
    except SeqmixError as error:
        sys.exit(str(error))
    for file, text in written.items():
        write_file(text, file)
