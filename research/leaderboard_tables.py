"""The leaderboard of docs/leaderboard.md: a heatmap, tables by short convolution, what it changes, and its commands."""

import shlex
from collections.abc import Callable, Mapping, Sequence
from html import escape
from statistics import mean

from ..lab.markdown import table
from ..lab.study.results import ABSENT
from ..lab.study.summary import beyond_noise
from ..lab.suite.leaderboard import LeaderboardEntry, arguments
from ..lab.suite.scores import TIE, ScoreRow, Scores, condition_lines, paired_difference, score_lines, uncertainty
from ..lab.suite.tasks import load_settings
from ..lab.units import quantity

CONVOLUTION = "short_conv"
WITHOUT = ("null", "none", "0")
"""Values of `short_conv` that turn it off."""
PAIRS = {"-conv": ("-conv", ""), "-plain": ("", "-plain")}
"""Endings of an entry that differs from another by its short convolution: those of the two, with and without it."""

CHANGES = (
    "Points of accuracy with the convolution minus without it: mean of the differences at equal seeds, and half the "
    "width of their 95 % t interval. Bold: at least 1 point, with an interval that does not contain 0 (not corrected "
    "for the number of differences). The learning rate is tuned in both."
)
HEATMAP = (
    "The heatmap is ordered by mean, which is no ranking: only the tables have stars. It shows the size of the state "
    "of one sequence after the training length of the first task. A click on a head sorts."
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
    by_task = {name: {row.entry: row.scores for row in task.rows} for name, task in scores.tasks.items()}
    entries = dict.fromkeys(entry for column in by_task.values() for entry in column)
    whole = [entry for entry in entries if all(entry in column for column in by_task.values())]
    by_task["mean"] = {entry: _mean([column[entry] for column in by_task.values()]) for entry in whole}
    cells: dict[str, list[str]] = {}
    for entry in entries:
        for ending, (with_it, without) in PAIRS.items():
            if entry.endswith(ending):
                base = entry.removesuffix(ending)
                cells[base] = [_change(column, base + with_it, base + without) for column in by_task.values()]
    return table(["mixer", *(f"{name}:" for name in by_task)], [[f"`{name}`", *cells[name]] for name in sorted(cells)])


def _mean(columns: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Return the mean over tasks at each seed that all of them have."""
    return {seed: mean(each[seed] for each in columns) for seed in columns[0] if all(seed in each for each in columns)}


def _change(column: Mapping[str, Mapping[str, float]], with_it: str, without: str) -> str:
    """Return the difference of two entries' scores in points; empty without a common seed."""
    apart = paired_difference(column.get(with_it, {}), column.get(without, {}))
    if apart is None:
        return ""
    text = f"{100 * apart.mean:+.1f}" + ("" if apart.margin is None else f" ± {100 * apart.margin:.1f}")
    return f"**{text}**" if abs(apart.mean) >= TIE and beyond_noise(apart) else text


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
    for entry, by_task in sorted(rows.items(), key=_place):
        one = next(iter(by_task.values()))
        family = entries[entry].family if entry in entries else ""
        state = quantity(one.state_bytes, "bytes") + (", grows" if one.state_grows else "")
        cells = [f"<td>{escape(entry)}</td><td>{family}</td>", f'<td data-value="{one.state_bytes}">{state}</td>']
        cells += [_cell(by_task.get(name), task.task.chance) for name, task in scores.tasks.items()]
        result.append(f"<tr>{''.join(cells)}</tr>")
    return [*result, "</tbody>", "</table>"]


def _place(item: tuple[str, Mapping[str, ScoreRow]]) -> tuple[int, float]:
    """Return the key of a row's place; means over different tasks cannot be compared."""
    scores = [row.score.mean for row in item[1].values()]
    return -len(scores), -mean(scores)


def _cell(row: ScoreRow | None, chance: float) -> str:
    """Return a score's cell, coloured by the share of what is above guessing."""
    if row is None:
        return '<td data-value="-1"></td>'
    score = row.score.mean
    share = max(0.0, (score - chance) / (1 - chance))
    margin = "" if row.score.margin is None else f" <small>± {100 * row.score.margin:.0f}</small>"
    return f'<td data-value="{score:.4f}" style="--share:{share:.2f}">{100 * score:.0f}{margin}</td>'
