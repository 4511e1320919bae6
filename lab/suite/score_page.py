"""Tables and pages of the suite's scores: accuracies with intervals, stars for the best, accessories and conditions."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean

from ...registry import write_file
from ..markdown import table
from ..statistics.comparison import Comparison
from ..statistics.learned import LEARNED, LearnedComparison
from ..study.comparisons import compare_accuracies
from ..study.confounders import ACCESSORIES
from ..study.report import REPORT_FILE
from .scores import PAGE_FILE, SCORES_FILE, ScoreRow, Scores, TaskScores

ROUGH = 0.1
"""Half the width of the interval of a difference from the best above which a question mark stands in place of a star:
such an entry may be the best only because little is known of it."""
ORDER = (
    "Entries stand in the order of their mean over tasks of the share of what is above guessing, which is no ranking: "
    "only stars tell entries apart."
)


def score_table(scores: Scores) -> tuple[list[str], list[tuple[str, ...]]]:
    """Return heads and rows of the score table: accuracies in percent, chance level last.

    A task with variations is one column, the mean over all of them; an entry needs a score in each. Entries with all
    tasks come first, in the order of `above_chance`. A star marks entries that are not separated from the best.
    """
    columns = {name: column(scores, name) for name, task in scores.tasks.items() if _is_column(task)}
    entries = dict.fromkeys(entry for column in columns.values() for entry in column.means)
    chances = [scores.tasks[name].task.chance for name in columns]
    means = {entry: [column.means.get(entry) for column in columns.values()] for entry in entries}
    ranked = sorted(entries, key=lambda entry: -above_chance(means[entry], chances))
    rows = [(entry, *(column.text(entry) for column in columns.values())) for entry in ranked]
    return ["entry", *columns], [*rows, ("(guessing)", *map(_percent, chances))]


def above_chance(means: Sequence[float | None], chances: Sequence[float | None]) -> float:
    """Return the mean over tasks of an accuracy's share of what is above guessing; -inf unless all are measured.

    It weighs tasks equally, each from guessing (0) to all right (1), and only orders tables: it is no score.
    """
    known = [
        (mean - (chance or 0.0)) / (1 - (chance or 0.0))
        for mean, chance in zip(means, chances, strict=True)
        if mean is not None
    ]
    return mean(known) if known and len(known) == len(means) else -math.inf


def _is_column(task: TaskScores) -> bool:
    return bool(task.rows) and task.task.varies is None


class Column:
    """The scores of all entries in a column, and their comparison."""

    def __init__(
        self, means: Mapping[str, float], by_seed: Mapping[str, Sequence[float]], failed: Mapping[str, int]
    ) -> None:
        self.means = means
        self.failed = failed
        self.found: Comparison | LearnedComparison | None = None
        if all(by_seed.values()):  # files of older versions may lack them
            self.found = compare_accuracies(by_seed, incomplete=failed)
        self.marks = _marks(self.found)

    def text(self, entry: str) -> str:
        """Return an entry's score as text; empty without one."""
        if entry not in self.means:
            return ""
        parts = [_percent(self.means[entry]), *filter(None, [self.certainty(entry)])]
        if entry in self.marks:
            parts.append(self.marks[entry])
        if entry in self.failed:
            parts.append(f"({self.failed[entry]} failed)")
        return " ".join(parts)

    def certainty(self, entry: str, decimals: int = 1) -> str:
        """Return half the width of the interval of an entry's score, or how many of its seeds learned, as text."""
        if isinstance(self.found, LearnedComparison):
            count = self.found.counts[entry]
            return f"({count.learned} of {count.seeds})"
        if self.found is not None and entry in self.found.margins:
            return f"± {100 * self.found.margins[entry]:.{decimals}f}"
        return ""

    @property
    def note(self) -> str:
        """Sentence on the model behind the intervals; empty without intervals."""
        if not isinstance(self.found, Comparison) or self.found.variance is None:
            return ""
        return self.found.variance.sentence("points", 100)


def _marks(found: Comparison | LearnedComparison | None) -> dict[str, str]:
    """Return a mark for each entry that is not separated from the best; none if that is every entry."""
    ranks = {} if found is None else found.ranks
    first = [entry for entry, (low, _) in ranks.items() if low == 1]
    if not isinstance(found, Comparison):
        return dict.fromkeys(first, "*") if len(first) < len(ranks) else {}
    if not first or len(first) == len(ranks):
        return {}
    best = max(ranks, key=lambda entry: found.means[entry])

    def known(entry: str) -> bool:
        half = found.margins[best] if entry == best else found.pairs[entry, best].high - found.pairs[entry, best].mean
        return half <= ROUGH

    return {entry: "*" if known(entry) else "?" for entry in first}


def column(scores: Scores, name: str) -> Column:
    """Return the column of a task: its scores, or the means over it and its variations, where an entry has all."""
    parts = [task for key, task in scores.tasks.items() if name in (key, task.task.varies)]
    rows: dict[str, list[ScoreRow]] = {}
    for row in (row for part in parts for row in part.rows):
        rows.setdefault(row.entry, []).append(row)
    whole = {entry: each for entry, each in rows.items() if len(each) == len(parts)}
    by_seed, failed = {}, {}
    for entry, each in whole.items():
        shared = [seed for seed in each[0].scores if all(seed in row.scores for row in each)]
        by_seed[entry] = [mean(row.scores[seed] for row in each) for seed in shared]
        if shared and (missing := len(parts[0].conditions.seeds) - len(shared)) > 0:
            failed[entry] = missing
    means = {entry: mean(row.score.mean for row in each) for entry, each in whole.items()}
    return Column(means, by_seed, failed)


def _percent(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.1f}"


def accessory_table(scores: Scores) -> tuple[list[str], list[tuple[str, ...]]]:
    """Return heads and rows of a table of the mixers' accessories; no rows if all have the same ones."""
    known = {row.entry: row.accessories for task in scores.tasks.values() for row in task.rows if row.accessories}
    differing = [name for name in ACCESSORIES if len({each.get(name) for each in known.values()}) > 1]
    if not differing:
        return [], []
    return ["entry", *differing], [
        (entry, *(each.get(name, "") for name in differing)) for entry, each in known.items()
    ]


def uncertainty(scores: Scores) -> str:
    """Return sentences on what intervals, counts and stars mean."""
    columns = [column(scores, name) for name, task in scores.tasks.items() if _is_column(task)]
    found = [column.found for column in columns if column.found is not None]
    several = any(len(row.scores) > 1 for task in scores.tasks.values() for row in task.rows)
    if not several:
        return "There is one seed, so there are no intervals and no ranking: differences may be chance."
    sentences = []
    if any(isinstance(each, Comparison) and each.margins for each in found):
        sentences.append(
            "± is half the width of a mean's 95 % interval; the standard deviation of a seed's score is estimated from "
            "all entries of the column."
        )
    if any(isinstance(each, LearnedComparison) for each in found):
        sentences.append(
            f"Where some seeds of an entry learned a task ({100 * LEARNED:g} % of the answers) and others did not, the "
            "column says how many did, in place of an interval."
        )
    if any(column.marks for column in columns):
        sentences.append(
            "A star marks the entries that are not separated from the best of a column, by simultaneous 95 % intervals "
            "of all pairs (Tukey's; of shares of seeds, exact ones with Bonferroni's correction); a question mark, "
            f"those of which this interval is wider than ± {100 * ROUGH:g} points."
        )
    if any(len(column.means) > 1 and not column.marks for column in columns):
        sentences.append("A column without marks separates no entry from the best.")
    if any(column.failed for column in columns):
        sentences.append("An entry of which seeds failed has no star: seeds that diverge are not missing by chance.")
    return " ".join(sentences)


def markdown(scores: Scores) -> list[str]:
    """Return the lines of a page: the table, the tasks, the parts left out, and the commands to reproduce it."""
    lines = [*score_lines(scores), ""]
    about = f"Accuracy in percent at equal {scores.match}. {ORDER} {uncertainty(scores)}"
    lines += [about, ""]
    heads, rows = accessory_table(scores)
    if rows:
        lines += ["The mixers also differ in their accessories, so no score is that of a mixer's equations alone:", ""]
        lines += [*table(heads, rows), ""]
    return [*lines, *condition_lines(scores)]


def score_lines(scores: Scores) -> list[str]:
    """Return the lines of the score table."""
    head, rows = score_table(scores)
    return table([head[0], *(f"{name}:" for name in head[1:])], rows)


def condition_lines(scores: Scores, *, reports: bool = True) -> list[str]:
    """Return the lines of the tasks with their conditions, the parts left out, and what computed them.

    Args:
        scores: the scores to describe.
        reports: True to link the reports of the tasks' studies, which must lie beside the page, and to show the
            commands that made them.
    """
    lines: list[str] = []
    for name, task in scores.tasks.items():
        at = f", at {' and '.join(task.task.score_at)}" if task.task.score_at else ""
        link = f"[**{name}**]({name}/{REPORT_FILE})" if reports else f"**{name}**"
        conditions = task.conditions
        seeds = ", ".join(f"{seed:g}" for seed in conditions.seeds)
        rates = ", ".join(f"{rate:g}" for rate in conditions.learning_rates)
        tuned = f"learning rate {rates}"
        if conditions.tuning_seeds:
            tuned = f"learning rate tuned ({rates}; seeds {', '.join(map(str, conditions.tuning_seeds))})"
        equal = f"; equal in all mixers: {conditions.equal}" if conditions.equal else ""
        lines.append(
            f"- {link}: {task.task.measures}{at} ({task.task.source}). Seeds {seeds}; {tuned}; "
            f"{conditions.matched}{equal}."
        )
        note = column(scores, name).note if _is_column(task) else ""
        lines += [f"  {note}"] if note else []
        lines += [f"  Differs from the published settings: {task.task.differs}."] if task.task.differs else []
        for entry, why in task.left_out.items():
            lines.append(f"  No score: {why if why.startswith(entry) else f'{entry}: {why}'}.")
    lines += ["", *scores.notes, ""] if scores.notes else [""]
    machines = dict.fromkeys(
        f"seqmix {row.machine.seqmix}{f' ({row.machine.commit[:7]})' if row.machine.commit else ''}, "
        f"torch {row.machine.torch}, {row.machine.processor}"
        for task in scores.tasks.values()
        for row in task.rows
    )
    computed = f"Computed with {'; '.join(machines)}, {scores.created[:10]}"
    return [*lines, *([f"{computed}:", "", "```text", *scores.commands, "```"] if reports else [f"{computed}."])]


def write_scores(scores: Scores, folder: Path) -> None:
    """Write suite.json and suite.md into a folder."""
    write_file(scores.model_dump_json(indent=1) + "\n", folder / SCORES_FILE)
    write_file("\n".join([f"# The suite, {scores.size} settings", "", *markdown(scores)]) + "\n", folder / PAGE_FILE)
