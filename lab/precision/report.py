"""Report of a state's precision: the answer, a table, figures, and the page that has them."""

import math
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path

from ..figures import page
from ..figures.figure import Axis, Figure, Point, Series, drawable
from ..units import quantity
from .measure import TOLERANCE, FormatResult, Precision

TEMPLATE = Path(__file__).with_name("report.html")
COLUMNS = (
    "tokens", "state stored as", "size", "loss", "nats lost", "accuracy", "same prediction", "state error",
    "predicted", "bound", "rank correlation",
)  # fmt: skip
FIGURES = ("lost", "state-error", "predicted")
"""Names of the figures."""
MAX_HEADS = 64
"""Maximum number of heads or channels of a tensor that are drawn, spread evenly."""


def conclusion(result: Precision) -> str:
    """Return one sentence: the fewest bits that lose less than `TOLERANCE`, at each length."""
    parts = []
    for name, exact in groupby(result.exact, key=lambda each: _fitting(result, each.length)):
        *lengths, last = (f"{each.length:,}" for each in exact)
        parts.append(f"{name} at {' and '.join(filter(None, [', '.join(lengths), last]))} tokens")
    return f"Fewest bits per number with less than {TOLERANCE} nats per token lost: {'; '.join(parts)}."


def _fitting(result: Precision, length: int) -> str:
    best = result.fewest_bits(length)
    return "32 (every other format loses more)" if best is None else f"{best.bits} ({best.name})"


def notes(result: Precision) -> str:
    """Return what the numbers of the table are."""
    rounded = "after every token" if result.every == 1 else f"after every {result.every} tokens"
    kept = f" Kept exact: {', '.join(result.kept_exact)}." if result.kept_exact else ""
    if any(each.rounding == "compensated" for each in result.results):
        kept += " Compensated: the error of the last rounding is stored too, as a second number of the same format."
    return (
        f"{result.sequences} sequences read token by token; states are rounded {rounded}, integers with one scale per "
        f"{result.scales}, and computed with in float32.{kept} Losses are in nats per token, over all tokens up to "
        "this length; ± is the standard error over sequences. State errors are relative; the prediction is for "
        "independent errors, the bound for errors in the same direction."
    )


def rows_of(result: Precision) -> list[tuple[str, ...]]:
    """Return the rows of the table, with the columns `COLUMNS`."""
    rows = []
    for exact in result.exact:
        tokens = f"{exact.length:,}"
        size = quantity(exact.state_bytes, "bytes")
        rows.append((tokens, "exact", size, f"{exact.loss:.4f}", "", f"{exact.accuracy:.1%}", *[""] * 5))
        rows += [(tokens, *_cells(each)) for each in result.results if each.length == exact.length]
    return rows


def _cells(each: FormatResult) -> tuple[str, ...]:
    error = "" if math.isnan(each.lost_error) else f" ± {each.lost_error:.4f}"
    return (
        each.name,
        quantity(each.state_bytes, "bytes"),
        f"{each.loss:.4f}",
        f"{each.lost:+.4f}{error}" if math.isfinite(each.lost) else "not finite",
        f"{each.accuracy:.1%}",
        f"{each.agreement:.1%}",
        *(f"{value:.1e}" for value in (each.state_error, each.predicted, each.bound)),
        "" if math.isnan(each.correlation) else f"{each.correlation:.2f}",
    )


def figures_of(result: Precision) -> list[Figure]:
    """Return the figures: loss by position, errors of the state by length, predicted against measured errors."""
    lengths = [each.length for each in result.exact]
    formats = [each for each in result.results if each.length == lengths[-1]]
    by_position = [
        Series(each.name, list(map(Point, result.positions, lost)), style)
        for style, (each, lost) in enumerate(zip(formats, result.lost_by_position, strict=True))
    ]
    errors = [
        Series(
            each.name, [Point(one.length, one.state_error) for one in result.results if one.name == each.name], style
        )
        for style, each in enumerate(formats)
    ]
    predicted = [Series(each.name, _predicted_points(result, each), style) for style, each in enumerate(formats)]
    figures = [
        Figure(
            "lost",
            "Loss by position",
            "Loss of rounded states minus that of the exact state, in ranges of positions that end at each point.",
            Axis("tokens", log=True, ticks=result.positions),
            Axis("nats lost per token"),
            by_position,
        ),
        Figure(
            "state-error",
            "Error of the state",
            "Relative error of the state, mean over its tensors.",
            Axis("tokens", log=True, ticks=lengths),
            Axis("relative error", log=True),
            errors,
        ),
        Figure(
            "predicted",
            "Predicted and measured errors",
            f"Each point is a head (or channel) of a tensor after {lengths[-1]:,} tokens. Predicted from the decay of "
            "a single rounding's error, if errors of different roundings are independent.",
            Axis("predicted relative error", log=True),
            Axis("measured relative error", log=True),
            predicted,
            joined=False,
        ),
    ]
    return drawable(figures)


def _predicted_points(result: Precision, wanted: FormatResult) -> list[Point]:
    points: list[Point] = []
    for each in result.tensors:
        if (each.format, each.rounding) == (wanted.format, wanted.rounding):
            pairs = list(zip(each.predicted, each.errors, strict=True))
            step = max(1, len(pairs) // MAX_HEADS)
            points += [Point(x, y) for x, y in pairs[::step] if x > 0 and y > 0]
    return points


def render(result: Precision, title: str, figures: Sequence[Figure]) -> str:
    """Return the report as an HTML page.

    Raises:
        SeqmixError: the library that draws the figures is not installed.
    """
    return page.render(
        figures,
        template=TEMPLATE,
        title=title,
        facts=f"{', '.join(result.mixers)}; {result.sequences} sequences of {result.exact[-1].length:,} tokens",
        answer=conclusion(result),
        heads=COLUMNS,
        rows=rows_of(result),
        notes=notes(result),
        command="seqmix precision RUN",
    )
