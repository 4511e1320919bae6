"""Tables of evaluations: one run by length, position and context; several runs side by side; scores of tasks."""

from collections.abc import Iterable, Mapping
from typing import Any

from rich.console import Console
from rich.table import Table

from ..training.length_eval import Evaluation
from .console import plain_table


def show_evaluation(evaluation: Evaluation, console: Console) -> None:
    """Print what was measured of one run."""
    if evaluation.lengths:
        console.print("Validation loss in nats/token; every sequence starts without a state.")
        console.print(_lengths(evaluation))
        differing = [found for found in evaluation.lengths if len(found.losses) > 1]
        if differing:
            paradigms = listed(max((found.losses for found in differing), key=len))
            difference = max(found.difference for found in differing)
            console.print(f"Between {paradigms}, the loss of a token differs by at most {difference:.1e} nats.\n")
        console.print("By position in the sequence:")
        console.print(_positions(evaluation))
    if evaluation.contexts:
        scored = f"the last {evaluation.scored:,} tokens of a sequence"
        console.print(f"Validation loss in nats/token of {scored}, by context length:")
        rows = [(f"{found.context:,}", _number(found.loss), f"{found.tokens:,}") for found in evaluation.contexts]
        console.print(plain_table("context", "loss", "tokens scored", rows=rows, justify="right"))


def show_side_by_side(evaluations: Mapping[str, Evaluation], console: Console) -> None:
    """Print the losses of several runs, one per column; by length, those of each run's first paradigm."""
    lengths = [{at.length: next(iter(at.losses.values())) for at in found.lengths} for found in evaluations.values()]
    contexts = [{at.context: at.loss for at in found.contexts} for found in evaluations.values()]
    for what, columns in (("length", lengths), ("context", contexts)):
        if rows := sorted({row for column in columns for row in column}):
            console.print(f"Validation loss in nats/token, by {what} in tokens:")
            cells = [(f"{row:,}", *(_number(column.get(row)) for column in columns)) for row in rows]
            console.print(plain_table(what, *evaluations, rows=cells, justify="right"))


def show_scores(runs: Mapping[str, Mapping[str, Any]], console: Console) -> None:
    """Print the scores of tasks, a column per run."""
    first = next(iter(runs.values()))["tasks"]
    rows = []
    for task, metric in ((task, name) for task, metrics in first.items() for name in metrics):
        if not metric.endswith("_stderr"):
            found = [scores["tasks"][task] for scores in runs.values()]
            rows.append((task, metric, *(_score(metrics, metric) for metrics in found)))
    console.print(plain_table("task", "metric", *runs, rows=rows, justify="right"))


def _score(metrics: Mapping[str, float], metric: str) -> str:
    error = metrics.get(f"{metric}_stderr")
    return f"{metrics[metric]:.4f}" + ("" if error is None else f" ± {error:.4f}")


def _lengths(evaluation: Evaluation) -> Table:
    paradigms = list(max((found.losses for found in evaluation.lengths), key=len))
    rows = []
    for found in evaluation.lengths:
        times = f"{round(found.length / evaluation.trained_length, 3):g} x"
        losses = [_number(found.losses.get(paradigm)) for paradigm in paradigms]
        rows.append((f"{found.length:,}", times, *losses, f"{found.tokens:,}"))
    return plain_table("tokens", "of training", *paradigms, "tokens measured", rows=rows, justify="right")


def _positions(evaluation: Evaluation) -> Table:
    """A row per range of positions, a column per length; in the first paradigm."""
    table = plain_table("positions", *(f"{found.length:,}" for found in evaluation.lengths), justify="right")
    columns = [{place.start: place for place in found.positions} for found in evaluation.lengths]
    for start in sorted({start for column in columns for start in column}):
        places = [column.get(start) for column in columns]
        stop = max(place.stop for place in places if place is not None)
        losses = [None if place is None else next(iter(place.losses.values())) for place in places]
        table.add_row(f"{start:,} to {stop - 1:,}", *map(_number, losses))
    return table


def _number(loss: float | None) -> str:
    return "" if loss is None else f"{loss:.4f}"


def listed(items: Iterable[object]) -> str:
    """Items as a sentence has them."""
    *first, last = (f"{item:,}" if isinstance(item, int) else str(item) for item in items)
    return f"{', '.join(first)} and {last}" if first else last
