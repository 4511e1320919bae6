"""Tables of docs/explanation/rank-transfer.md: grids, power and predictions before measurement, and the results."""

from collections.abc import Mapping, Sequence
from typing import TypeAlias

from ...lab.figures.figure import Axis, Figure, Point, Series
from ...lab.markdown import table
from ...lab.suite.leaderboard import LeaderboardEntry
from ...lab.suite.scores import Scores
from . import ranks
from .analysis import (
    MINIMUM,
    Pooled,
    Predictor,
    Verdict,
    about,
    agreement,
    columns_for,
    date_predictor,
    group_predictors,
    judge,
    minus_date,
    pool,
    reliability,
    same_as,
    task_predictors,
)
from .grids import Grid
from .predictions import Predictions
from .ranks import Interval

SUBJECTS = {"language": "language", "recall": "recall", "tracking": "state tracking", "synthetic": "MAD"}
"""Subjects of the grids, as tables name them."""
HALFWAY = (
    "Accuracies over all difficulties, while the learning rate is still high: exploratory, and added after the results."
)
DATES = (
    "Exploratory, and added after the results. Attention's paper is of 2017; its entry stands for newer Transformers."
)
OLDEST = "softmax attention"
"""Family whose date says least about its entries."""
PICTURE = "![Agreement of each task with published rankings](rank-transfer/rho.svg)"
Pools: TypeAlias = Mapping[str, Mapping[str, Pooled | None]]
"""Agreement of each predictor with the columns of each subject."""
POOLED = ("language", "recall", "tracking")
"""Subjects with which tasks are compared; columns of MAD are compared with the task of the same name."""


def grid_lines(grids: Mapping[str, Grid]) -> list[str]:
    """Return the table of the grids, and the reasons for those that are not used."""
    rows = []
    for name, grid in grids.items():
        if grid.used:
            subjects = dict.fromkeys(SUBJECTS[measure.asks] for measure in grid.measures.values())
            rows.append(
                (
                    f"`{name}`",
                    f"[{grid.title}]({grid.address})",
                    grid.published,
                    grid.size,
                    ", ".join(subjects),
                    len(grid.models),
                )
            )
    unused = [
        f"- `{name}` ({grid.title}): {grid.excluded or grid.how_read}." for name, grid in grids.items() if not grid.used
    ]
    return [
        *table(["grid", "source", "month", "size", "asks for", "models:"], rows),
        "",
        "Not used:",
        "",
        *unused,
    ]


def power_lines(grids: Mapping[str, Grid], entries: Mapping[str, LeaderboardEntry], tests: int) -> list[str]:
    """Return the tables of what can be distinguished from chance, and how well the grids agree with each other.

    `tests` is the number of tested predictions, for which p-values are corrected.
    """
    names = list(entries)
    sizes = range(MINIMUM, 1 + max(len(grid.models) for grid in grids.values()))
    singles = [(n, _number(ranks.critical_rho(n)), _number(ranks.detectable_rho(n))) for n in sizes]
    rows = []
    for subject in POOLED:
        published = columns_for(names, grids, about(subject))
        columns = [each.column for each in published]
        if columns:
            among = agreement(grids, subject)
            spread = "" if among.rho is None else f"{among.rho:.2f} ({among.low:.2f} to {among.high:.2f})"
            rows.append(
                (
                    SUBJECTS[subject],
                    len({column.paper for column in columns}),
                    len(columns),
                    len({i for column in columns for i in column.positions.tolist()}),
                    _number(ranks.critical_pooled(columns)),
                    _number(ranks.critical_pooled(columns, ranks.LEVEL / tests)),
                    among.pairs,
                    spread,
                )
            )
    return [
        *table(["entries:", "smallest rho with p <= 0.05:", "true correlation found in 80 % of the cases:"], singles),
        "",
        *table(
            [
                "asks for",
                "papers:",
                "columns:",
                "entries:",
                "smallest pooled rho with p <= 0.05:",
                f"with p <= {ranks.LEVEL / tests:g}:",
                "pairs of columns:",
                "rho between papers:",
            ],
            rows,
        ),
    ]


def prediction_lines(predictions: Predictions) -> list[str]:
    """Return the table of the predictions, and the tasks of each group."""
    rows = [
        (number, each.predictor, SUBJECTS[each.asks], each.expect, each.because)
        for number, each in enumerate(predictions.predictions, 1)
    ]
    groups = [f"- **{name}**: {', '.join(tasks)}" for name, tasks in predictions.groups.items()]
    return [*table(["", "predictor", "published", "expected", "because"], rows), "", *groups]


def results(
    scores: Scores,
    grids: Mapping[str, Grid],
    entries: Mapping[str, LeaderboardEntry],
    predictions: Predictions,
    draws: int = ranks.DRAWS,
) -> tuple[list[str], Figure]:
    """Return the lines of all results, and the figure that they show.

    The lines are verdicts, pooled agreement, controls, and what is left without a family or papers' own mixers.

    Args:
        scores: scores of the suite.
        grids: published rankings.
        entries: entries of the suite that stand for models of the grids.
        predictions: what was expected.
        draws: number of random draws of each interval and p-value.
    """
    tasks = task_predictors(scores, entries)
    groups = group_predictors(tasks, predictions.groups)
    names = list(dict.fromkeys(entry for task in tasks.values() for entry in task.entries))
    date = date_predictor(entries, names)
    primary = {each.predictor: groups[each.predictor] for each in predictions.predictions if each.predictor in groups}
    lines = [_conditions(scores, names, entries), "", PICTURE, ""]
    lines += ["### Predictions", "", *_verdicts(judge(predictions, groups, grids, entries, draws)), ""]
    everything = {**tasks, **groups, date.name: date}
    pools: Pools = {
        name: {each: pool(one, columns_for(one.entries, grids, about(each)), draws) for each in POOLED}
        for name, one in everything.items()
    }
    lines += ["### All tasks, pooled over papers", "", *_pooled(everything, pools, grids, draws), ""]
    lines += ["### The same task at published size", "", *_controls(tasks, grids, draws), ""]
    if half := task_predictors(scores, entries, halfway=True):
        lines += ["### After half of the training", "", *_halfway(half, names, grids, draws), ""]
    lines += ["### One family left out", "", *_families({**primary, date.name: date}, grids, entries, draws), ""]
    lines += ["### Against the date", "", *_dates(primary, grids, entries, predictions, draws), ""]
    lines += ["### Single columns", "", *_columns({**primary, date.name: date}, grids, draws), ""]
    lines += ["With four or five mixers, an interval says nothing, even if it is narrow."]
    return lines, _figure(pools)


def _figure(pools: Pools) -> Figure:
    """Return the figure of the pooled rhos with their intervals, by predictor and subject."""
    series = []
    for style, subject in enumerate(POOLED):
        found = {name: by_subject[subject] for name, by_subject in pools.items()}
        points = [Point(name, each.rho, *each.interval) for name, each in found.items() if each is not None]
        series.append(Series(SUBJECTS[subject], points, style))
    caption = "Pooled rho with its 95 % bootstrap interval over mixers and seeds."
    x, y = Axis("", names=list(pools)), Axis("Spearman's rho", log=False)
    return Figure("transfer", "Agreement with published rankings", caption, x, y, series, joined=False)


def _conditions(scores: Scores, names: Sequence[str], entries: Mapping[str, LeaderboardEntry]) -> str:
    """Return a sentence on the scores: size, matching, seeds, entries, and options that were made equal."""
    conditions = [task.conditions for task in scores.tasks.values()]
    seeds = sorted({len(each.seeds) for each in conditions})
    tuned = "tuned learning rates" if any(each.tuning_seeds for each in conditions) else "one learning rate"
    equal = dict.fromkeys(each.equal for each in conditions if each.equal)
    missing = [name for name in entries if name not in names]
    return (
        f"Scores of {scores.created[:10]}: {scores.size} settings at equal {scores.match}, {tuned}, "
        f"{' or '.join(map(str, seeds))} seed{'' if seeds == [1] else 's'}, {len(names)} entries"
        + (f", without {', '.join(missing)}" if missing else "")
        + (f"; equal in all mixers, against the mapping: {'; '.join(equal)}" if equal else "")
        + "."
    )


def _verdicts(verdicts: Sequence[Verdict]) -> list[str]:
    rows = []
    for number, verdict in enumerate(verdicts, 1):
        prediction = verdict.prediction
        p = "" if verdict.corrected is None or verdict.pooled is None else _probability(verdict.corrected)
        difference = "" if verdict.difference is None else _interval(verdict.difference)
        rows.append(
            (
                number,
                prediction.predictor,
                SUBJECTS[prediction.asks],
                prediction.expect,
                _rho(verdict.pooled),
                p,
                difference,
                verdict.text,
            )
        )
    heads = [
        "",
        "predictor",
        "published",
        "expected",
        "pooled rho:",
        "corrected p:",
        "rho minus the date's:",
        "verdict",
    ]
    return table(heads, rows)


def _pooled(predictors: Mapping[str, Predictor], pools: Pools, grids: Mapping[str, Grid], draws: int) -> list[str]:
    rows = []
    for name, predictor in predictors.items():
        cells = [name]
        for subject in POOLED:
            result = pools[name][subject]
            others = pool(predictor, columns_for(predictor.entries, grids, about(subject), without_own=True), draws)
            cells += [_rho(result), _p(result), _rho(others)]
        rows.append(cells)
    heads = [head for subject in POOLED for head in (f"{SUBJECTS[subject]}:", "p:", "without own:")]
    return table(["predictor", *heads], rows)


def _controls(tasks: Mapping[str, Predictor], grids: Mapping[str, Grid], draws: int) -> list[str]:
    rows = []
    for name, predictor in tasks.items():
        result = pool(predictor, columns_for(predictor.entries, grids, same_as(name)), draws)
        between_seeds = reliability(predictor)
        if result is not None or between_seeds is not None:
            rows.append(
                (
                    name,
                    _number(between_seeds),
                    "" if result is None else result.papers,
                    "" if result is None else result.entries,
                    _rho(result),
                    _p(result),
                )
            )
    heads = ["task", "rho between its seeds:", "papers:", "entries:", "rho with the published task:", "p:"]
    return table(heads, rows)


def _halfway(tasks: Mapping[str, Predictor], names: Sequence[str], grids: Mapping[str, Grid], draws: int) -> list[str]:
    rows = []
    for name, predictor in tasks.items():
        selections = [*map(about, POOLED), same_as(name)]
        pools = [pool(predictor, columns_for(predictor.entries, grids, each), draws) for each in selections]
        rows.append((name, *(cell for each in pools for cell in (_rho(each), _p(each)))))
    subjects = [*(SUBJECTS[subject] for subject in POOLED), "the published task"]
    heads = [head for subject in subjects for head in (f"{subject}:", "p:")]
    missing = [name for name in names if any(name not in predictor.entries for predictor in tasks.values())]
    without = f" Not known for all tasks: {', '.join(missing)}." if missing else ""
    return [HALFWAY + without, "", *table(["task", *heads], rows)]


def _families(
    predictors: Mapping[str, Predictor], grids: Mapping[str, Grid], entries: Mapping[str, LeaderboardEntry], draws: int
) -> list[str]:
    families = list(dict.fromkeys(entries[e].family for p in predictors.values() for e in p.entries))
    rows = []
    for name, predictor in predictors.items():
        for subject in POOLED:
            cells = []
            for family in (None, *families):
                kept = predictor.without({entry for entry in predictor.entries if entries[entry].family == family})
                cells.append(_rho(pool(kept, columns_for(kept.entries, grids, about(subject)), draws)))
            rows.append((name, SUBJECTS[subject], *cells))
    return table(["predictor", "published", "all:", *(f"without {family}:" for family in families)], rows)


def _dates(
    predictors: Mapping[str, Predictor],
    grids: Mapping[str, Grid],
    entries: Mapping[str, LeaderboardEntry],
    predictions: Predictions,
    draws: int,
) -> list[str]:
    rows = []
    for name, predictor in predictors.items():
        newer = predictor.without({entry for entry in predictor.entries if entries[entry].family == OLDEST})
        for subject in POOLED:
            cells = []
            for one in (predictor, newer):
                found = minus_date(one, columns_for(one.entries, grids, about(subject)), entries, draws)
                cells.append("" if found is None else f"{found[0]:.2f} {_interval(found[1])}")
            asked = columns_for(predictor.entries, grids, about(subject))
            tasks = predictions.groups[name]
            others = [each for each in asked if grids[each.grid].measures[each.measure].task not in tasks]
            cells.append("" if len(others) == len(asked) else _rho(pool(predictor, others, draws)))
            rows.append((name, SUBJECTS[subject], *cells))
    heads = ["rho minus the date's:", f"without {OLDEST}:", "rho without columns of the same task:"]
    return [*table(["predictor", "published", *heads], rows), "", DATES]


def _columns(predictors: Mapping[str, Predictor], grids: Mapping[str, Grid], draws: int) -> list[str]:
    rows = []
    for subject in POOLED:
        for grid_name, grid in grids.items():
            for measure in grid.measures:
                if not grid.used or grid.measures[measure].asks != subject:
                    continue
                cells = []
                for predictor in predictors.values():
                    selected = [
                        each
                        for each in columns_for(predictor.entries, {grid_name: grid}, about(subject))
                        if each.measure == measure
                    ]
                    if not selected:
                        cells += ["", ""]
                        continue
                    column = selected[0].column
                    rho = float(ranks.spearman(predictor.values[column.positions], column.values))
                    spread = ranks.rho_interval(predictor.by_seed, column, draws)
                    cells += [len(column.values), f"{_number(rho)} {_interval(spread)}".strip()]
                rows.append((SUBJECTS[subject], f"`{grid_name}`", measure, *cells))
    heads = [head for name in predictors for head in ("n:", f"{name}:")]
    return table(["published", "grid", "column", *heads], rows)


def _rho(result: Pooled | None) -> str:
    return "" if result is None else f"{_number(result.rho)} {_interval(result.interval)}".strip()


def _p(result: Pooled | None) -> str:
    return "" if result is None else _probability(result.p)


def _probability(p: float) -> str:
    return "< 0.001" if p < 0.001 else f"{p:.3f}"


def _interval(interval: Interval | None) -> str:
    return "" if interval is None else f"[{interval.low:.2f}, {interval.high:.2f}]"


def _number(value: float | None) -> str:
    return "none" if value is None or value != value else f"{value:.2f}"
