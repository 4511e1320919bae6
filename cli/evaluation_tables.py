"""Tables of evaluations: of one run by length, position and context; of several runs; of task scores."""

from collections.abc import Iterable, Mapping
from typing import Any

from rich.console import Console
from rich.table import Table

from ..training.length_eval import Evaluation, FinalLoss
from .console import plain_table


def show_evaluation(evaluation: Evaluation, console: Console) -> None:
    """Print the tables of one run's evaluation."""
    if evaluation.final:
        console.print(
            f"Validation loss on the sequences of training's final evaluation: {_format_final(evaluation.final)} "
            f"nats/token over {evaluation.final.tokens:,} tokens (mean and standard error over sequences).\n"
        )
    if evaluation.lengths:
        console.print(
            "Validation loss in nats/token by length, of the same text at every length; every sequence starts from an "
            "empty state."
        )
        console.print(_length_table(evaluation))
        differing = [result for result in evaluation.lengths if len(result.losses) > 1]
        if differing:
            paradigms = join_words(max((result.losses for result in differing), key=len))
            difference = max(result.difference for result in differing)
            console.print(f"Between {paradigms}, the loss of a token differs by at most {difference:.1e} nats.\n")
        console.print("By position in the sequence:")
        console.print(_position_table(evaluation))
    if evaluation.contexts:
        scored = f"the last {evaluation.scored:,} tokens of a sequence"
        console.print(f"Validation loss in nats/token of {scored}, by context length:")
        rows = [
            (f"{result.context:,}", _format_loss(result.loss), f"{result.tokens:,}") for result in evaluation.contexts
        ]
        console.print(plain_table("context", "loss", "tokens scored", rows=rows, justify="right"))


def show_side_by_side(evaluations: Mapping[str, Evaluation], console: Console) -> None:
    """Print the losses of several runs, one column per run; losses by length are those of the first paradigm."""
    finals = [evaluation.final for evaluation in evaluations.values() if evaluation.final is not None]
    if finals:
        console.print("Validation loss in nats/token on the sequences of training's final evaluation:")
        rows = [("loss", *map(_format_final, finals)), ("tokens", *(f"{final.tokens:,}" for final in finals))]
        console.print(plain_table("", *evaluations, rows=rows, justify="right"))
    lengths = [
        {result.length: _first(result.losses) for result in evaluation.lengths} for evaluation in evaluations.values()
    ]
    contexts = [{result.context: result.loss for result in each.contexts} for each in evaluations.values()]
    for axis, columns in (("length", lengths), ("context", contexts)):
        if rows := sorted({row for column in columns for row in column}):
            console.print(f"Validation loss in nats/token, by {axis} in tokens:")
            cells = [(f"{row:,}", *(_format_loss(column.get(row)) for column in columns)) for row in rows]
            console.print(plain_table(axis, *evaluations, rows=cells, justify="right"))


def show_quantized(run: str, weights: str, before: Evaluation, after: Evaluation, console: Console) -> None:
    """Print the losses of a run before and after its weights are quantised; by length, those of the first paradigm."""
    by_length = zip(before.lengths, after.lengths, strict=True)
    by_context = zip(before.contexts, after.contexts, strict=True)
    for axis, pairs in (
        ("length", [(x.length, _first(x.losses), _first(y.losses)) for x, y in by_length]),
        ("context", [(x.context, x.loss, y.loss) for x, y in by_context]),
    ):
        if pairs:
            console.print(f"Validation loss of {run} in nats/token, by {axis} in tokens:")
            rows = [(f"{n:,}", f"{x:.5f}", f"{y:.5f}", f"{y / x - 1:+.3%}") for n, x, y in pairs]
            console.print(plain_table(axis, "as trained", weights, "difference", rows=rows, justify="right"))


def show_scores(runs: Mapping[str, Mapping[str, Any]], console: Console) -> None:
    """Print the scores of tasks, one column per run."""
    first = next(iter(runs.values()))["tasks"]
    rows = []
    for task, metric in ((task, name) for task, metrics in first.items() for name in metrics):
        if not metric.endswith("_stderr"):
            by_run = [scores["tasks"][task] for scores in runs.values()]
            rows.append((task, metric, *(_format_score(metrics, metric) for metrics in by_run)))
    console.print(plain_table("task", "metric", *runs, rows=rows, justify="right"))


def _first(losses: Mapping[Any, float]) -> float:
    return next(iter(losses.values()))


def _format_score(metrics: Mapping[str, float], metric: str) -> str:
    error = metrics.get(f"{metric}_stderr")
    return f"{metrics[metric]:.4f}" + ("" if error is None else f" ± {error:.4f}")


def _length_table(evaluation: Evaluation) -> Table:
    paradigms = list(max((result.losses for result in evaluation.lengths), key=len))
    rows = []
    for result in evaluation.lengths:
        times = f"{round(result.length / evaluation.trained_length, 3):g} x"
        losses = [_format_loss(result.losses.get(paradigm)) for paradigm in paradigms]
        rows.append((f"{result.length:,}", times, *losses, _format_loss(result.error), f"{result.tokens:,}"))
    heads = ("tokens", "of training", *paradigms, "standard error", "tokens measured")
    return plain_table(*heads, rows=rows, justify="right")


def _position_table(evaluation: Evaluation) -> Table:
    """Return a table with a row per range of positions and a column per length, in the first paradigm."""
    table = plain_table("positions", *(f"{result.length:,}" for result in evaluation.lengths), justify="right")
    columns = [{place.start: place for place in result.positions} for result in evaluation.lengths]
    for start in sorted({start for column in columns for start in column}):
        places = [column.get(start) for column in columns]
        stop = max(place.stop for place in places if place is not None)
        losses = [None if place is None else _first(place.losses) for place in places]
        table.add_row(f"{start:,} to {stop - 1:,}", *map(_format_loss, losses))
    return table


def _format_final(final: FinalLoss) -> str:
    return f"{final.loss:.4f}" + ("" if final.error is None else f" ± {final.error:.4f}")


def _format_loss(loss: float | None) -> str:
    return "" if loss is None else f"{loss:.4f}"


def join_words(items: Iterable[object]) -> str:
    """Join items with commas and "and"."""
    *first, last = (f"{item:,}" if isinstance(item, int) else str(item) for item in items)
    return f"{', '.join(first)} and {last}" if first else last
