"""Write the tables of docs/leaderboard.md from the results of the suite: `python docs/leaderboard.py`.

The results are in experiments/suite/results, one suite.json for each size and each quantity that is held equal.
"""

from pathlib import Path

from seqmix.experiments.pages import fill
from seqmix.experiments.suite.scores import PUBLISHED, markdown, read_scores
from seqmix.registry import write_file

TARGET = Path(__file__).with_suffix(".md")


def files() -> dict[Path, str]:
    """Return the text of the page."""
    lines: list[str] = []
    for file in sorted(PUBLISHED.glob("*.json")):
        scores = read_scores(file)
        title = f"## {scores.size.capitalize()} settings, equal {scores.match}"
        lines += [title, "", *markdown(scores, reports=False), ""]
    return {TARGET: fill(TARGET, {"scores": lines[:-1]})}


if __name__ == "__main__":
    for file, text in files().items():
        write_file(text, file)
