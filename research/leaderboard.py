"""Write the tables of docs/leaderboard.md: `python research/leaderboard.py [FOLDER...]`.

Scores of the suite in each FOLDER, as `seqmix suite --out FOLDER` leaves them, are added to the published ones in
lab/suite/results first; without a folder, the page is written from these. `--commands` prints the commands of
the suite that measure what is missing, one for each task.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

from seqmix.lab.markdown import fill
from seqmix.lab.suite.leaderboard import load_entries
from seqmix.lab.suite.scores import PUBLISHED, Scores, merge, read_scores
from seqmix.lab.suite.tasks import load_settings
from seqmix.registry import SeqmixError, write_file
from seqmix.research import DOCS
from seqmix.research import leaderboard_tables as leaderboard

TARGET = DOCS / "leaderboard.md"
RESULTS = PUBLISHED / "small-parameters.json"


def published() -> Scores | None:
    """Return the published scores, if there are any."""
    return read_scores(RESULTS) if RESULTS.is_file() else None


def files() -> dict[Path, str]:
    """Return the text of the page."""
    scores = published()
    parts = ["It is being measured."] if scores is None else leaderboard.lines(scores, load_entries())
    return {TARGET: fill(TARGET, {"scores": parts})}


def add(folders: Sequence[Path]) -> None:
    """Add the scores of folders to the published ones; of an entry in several, the last row counts."""
    scores = published()
    for folder in folders:
        other = read_scores(folder)
        scores = other if scores is None else merge(other, scores)
    if scores is not None:
        order = [name for name in load_settings("small").tasks if name in scores.tasks]
        scores = scores.model_copy(update={"tasks": {name: scores.tasks[name] for name in order}})
        write_file(scores.model_dump_json(indent=1) + "\n", RESULTS)


if __name__ == "__main__":
    if sys.argv[1:] == ["--commands"]:
        sys.stdout.write("\n".join(leaderboard.commands(load_entries(), published())) + "\n")
    else:
        try:
            add([Path(argument) for argument in sys.argv[1:]])
        except SeqmixError as error:
            sys.exit(str(error))
        for file, text in files().items():
            write_file(text, file)
