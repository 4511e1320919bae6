"""The leaderboard of docs/leaderboard.md: a heatmap, tables by short convolution, what it changes, and its commands."""

import shlex
from collections.abc import Callable, Mapping, Sequence
from html import escape
from statistics import mean

from ..lab.markdown import table
from ..lab.statistics.comparison import compare_pairs
from ..lab.statistics.learned import LEARNED, is_split
from ..lab.study.comparisons import ACCURACY_FLOOR
from ..lab.study.results import ABSENT
from ..lab.suite.leaderboard import LeaderboardEntry, arguments
from ..lab.suite.score_page import Column, above_chance, column, condition_lines, score_lines, uncertainty
from ..lab.suite.scores import ScoreRow, Scores
from ..lab.suite.tasks import load_settings
from ..lab.units import quantity

CONVOLUTION = "short_conv"
WITHOUT = ("null", "none", "0")
"""Values of `short_conv` that turn it off."""
PAIRS = {"-conv": ("-conv", ""), "-plain": ("", "-plain")}
"""Endings of an entry that differs from another by its short convolution: those of the two, with and without it."""

CHANGES = (
    "Points of accuracy with the convolution minus without it, with simultaneous 95 % intervals (Bonferroni's, over "
    "the differences of a column; the standard deviation of a seed's score is estimated from all its entries). "
    "Bold: the interval does not contain 0. Where seeds are split, two counts stand in place of an interval: the "
    f"seeds that learned the task ({100 * LEARNED:g} % of the answers) with and without it. The learning rate is tuned "
    "in both."
)
HEATMAP = (
    "The heatmap has the order of the mean over tasks of the share of what is above guessing, which is no ranking: "
    "only the tables have stars. It shows the size of the state of one sequence after the training length of the first "
    "task. A click on a head sorts."
)


def commands(entries: Mapping[str, LeaderboardEntry], scores: Scores | None) -> list[str]:
    """Return the commands of `seqmix suite` that measure what is missing in `scores`, one for each task."""
    lines = []
    for task in load_settings("small").default_tasks:
        found = scores.tasks.get(task) if scores else None
        known = {row.entry for row in found.rows} | set(found.left_out) if found else set()
        missing = {name: entry for name, entry in entries.items() if name not in known}
        if missing:
            lines.append(shlex.join(["seqmix", "suite", *arguments(missing), "--no-references", "--tasks", task]))
    return lines


def lines(scores: Scores, entries: Mapping[str, LeaderboardEntry]) -> list[str]:
    """Return the lines of the page: heatmap, two tables and their differences, conditions."""
    parts = {
        "Without a short convolution": [_without(scores), "Entries without the option are in both tables."],
        "With a short convolution": [_with(scores), "Of four tokens, or as wide as the mixer has it by default."],
    }
    result = [*heatmap(scores, entries), ""]
    result += [f"Accuracy in percent at equal {scores.match}. {uncertainty(scores)}", "", HEATMAP, ""]
    for title, (part, remark) in parts.items():
        result += [f"### {title}", "", *score_lines(part), "", remark, ""]
    result += ["### What a short convolution changes", "", *changes(scores), "", CHANGES, ""]
    return [*result, "### Tasks and conditions", "", *condition_lines(scores, reports=False)]


def _without(scores: Scores) -> Scores:
    return _only(scores, lambda value: value in (*WITHOUT, ABSENT))


def _with(scores: Scores) -> Scores:
    return _only(scores, lambda value: value not in WITHOUT)


def _only(scores: Scores, holds: Callable[[str], bool]) -> Scores:
    """Return the scores of the entries whose `short_conv` has a property."""
    tasks = {
        name: task.model_copy(
            update={"rows": tuple(row for row in task.rows if holds(row.accessories.get(CONVOLUTION, ABSENT)))}
        )
        for name, task in scores.tasks.items()
    }
    return scores.model_copy(update={"tasks": tasks})


def changes(scores: Scores) -> list[str]:
    """Return a table of what a short convolution changes in each mixer that is measured with and without it."""
    entries = {row.entry for task in scores.tasks.values() for row in task.rows}
    pairs = {
        entry.removesuffix(ending): (entry.removesuffix(ending) + with_it, entry.removesuffix(ending) + without)
        for ending, (with_it, without) in PAIRS.items()
        for entry in entries
        if entry.endswith(ending)
    }
    cells: dict[str, list[str]] = {name: [] for name in pairs}
    for task in scores.tasks.values():
        known = {row.entry: list(row.scores.values()) for row in task.rows if row.scores}
        for name, text in _changes(known, pairs).items():
            cells[name].append(text)
    return table(
        ["mixer", *(f"{name}:" for name in scores.tasks)], [[f"`{name}`", *cells[name]] for name in sorted(cells)]
    )


def _changes(scores: Mapping[str, Sequence[float]], pairs: Mapping[str, tuple[str, str]]) -> dict[str, str]:
    """Return the difference of each pair of entries on one task as text; empty where one of them has no score."""
    both = {name: pair for name, pair in pairs.items() if all(entry in scores for entry in pair)}
    found = compare_pairs(scores, list(both.values()), higher_is_better=True, floor=ACCURACY_FLOOR)
    split = is_split(scores)
    texts = dict.fromkeys(pairs, "")
    for name, pair in both.items():
        with_it, without = (scores[entry] for entry in pair)
        text = f"{100 * (mean(with_it) - mean(without)):+.1f}"
        if split:
            counts = (f"{sum(score >= LEARNED for score in each)} of {len(each)}" for each in (with_it, without))
            text += f" ({', '.join(counts)})"
        elif pair in found:
            text += f" ± {100 * (found[pair].high - found[pair].mean):.1f}"
            text = text if found[pair].verdict == "not separated" else f"**{text}**"
        texts[name] = text
    return texts


def heatmap(scores: Scores, entries: Mapping[str, LeaderboardEntry]) -> list[str]:
    """Return the scores as a table in HTML: a row for each entry, coloured from guessing (0) to all right (1).

    Entries with the most tasks come first, and of these the best mean. A browser sorts the table by any column
    (docs/assets/sort.js).
    """
    rows: dict[str, dict[str, ScoreRow]] = {}
    for name, task in scores.tasks.items():
        for row in task.rows:
            rows.setdefault(row.entry, {})[name] = row
    heads = ["entry", "family", "state", *(name.replace("_", " ") for name in scores.tasks)]
    head = "".join(f"<th>{each}</th>" for each in heads)
    result = ['<table class="heatmap">', f"<thead><tr>{head}</tr></thead>", "<tbody>"]
    columns = {name: column(scores, name) for name in scores.tasks}
    chances = [task.task.chance for task in scores.tasks.values()]

    def place(entry: str) -> tuple[int, float]:
        known = rows[entry]
        means = [known[name].score.mean if name in known else None for name in columns]
        return -len(known), -above_chance(means, chances)

    for entry in sorted(rows, key=place):
        one = next(iter(rows[entry].values()))
        family = entries[entry].family if entry in entries else ""
        state = quantity(one.state_bytes, "bytes") + (", grows" if one.state_grows else "")
        cells = [f"<td>{escape(entry)}</td><td>{family}</td>", f'<td data-value="{one.state_bytes}">{state}</td>']
        cells += [_cell(columns[name], entry, task.task.chance) for name, task in scores.tasks.items()]
        result.append(f"<tr>{''.join(cells)}</tr>")
    return [*result, "</tbody>", "</table>"]


def _cell(of: Column, entry: str, chance: float) -> str:
    """Return a score's cell, coloured by the share of what is above guessing."""
    if entry not in of.means:
        return '<td data-value="-1"></td>'
    score = of.means[entry]
    share = max(0.0, (score - chance) / (1 - chance))
    certainty = of.certainty(entry, decimals=0)
    small = f" <small>{certainty}</small>" if certainty else ""
    return f'<td data-value="{score:.4f}" style="--share:{share:.2f}">{100 * score:.0f}{small}</td>'
