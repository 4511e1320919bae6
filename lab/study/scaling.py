"""Power law of the loss over model size, fitted to a study's runs at three sizes or more.

L(N) = c N^-a (Kaplan et al. 2020, arXiv 2001.08361, equation 1.1), fitted by least squares to log L over log N, with
every finished run as a point. The law has no irreducible loss, which three sizes cannot determine, so it holds between
the sizes that were trained and says little beyond them.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from statistics import LinearRegression, fmean, linear_regression

from .results import Results, RunResult

MIN_SIZES = 3
"""Minimum number of sizes for a fit, because two points always lie on a line."""


@dataclass(frozen=True)
class ScalingLine:
    """Fitted power law of one entry."""

    entry: str
    exponent: float
    """Exponent a of the law L(N) = c N^-a: doubling the parameters multiplies the loss by 2^-a."""
    error: float
    """Standard error of the exponent, from the deviations of the runs from the line."""
    runs: int
    """Number of runs in the fit."""
    sizes: tuple[int, ...]
    """Numbers of parameters, ascending."""
    fitted: LinearRegression

    def loss(self, parameters: float) -> float:
        """Return the fitted loss at a number of parameters, in nats per token."""
        return math.exp(self.fitted.intercept + self.fitted.slope * math.log(parameters))

    def __str__(self) -> str:
        sizes = f"{self.sizes[0]:,} to {self.sizes[-1]:,} parameters"
        return (
            f"{self.entry}: the loss falls as parameters^-{self.exponent:.4f} from {sizes} "
            f"(standard error {self.error:.4f}; {self.runs} runs)"
        )


def scaling_lines(results: Results) -> Iterator[ScalingLine]:
    """Yield the power law of each entry with a text loss at three sizes or more, from runs at the best learning rates.

    Tasks with an accuracy have no power law: they are solved or not.
    """
    if any(row.accuracy is not None for row in results.summary):
        return
    best = {(row.entry, str(row.variant)): row.learning_rate for row in results.summary}
    for entry in results.entries:
        runs = [
            run
            for run in results.runs
            if run.entry == entry.name
            and not run.tunes
            and best.get((run.entry, str(run.variant))) == run.learning_rate
        ]
        if line := fit(entry.name, runs):
            yield line


def fit(entry: str, runs: Sequence[RunResult]) -> ScalingLine | None:
    """Fit the power law to finished runs; None for fewer than three sizes, or if variants differ in more than size."""
    measured = [(run.parameters, run.validation_loss) for run in runs if run.status == "finished"]
    points = [(math.log(size), math.log(loss)) for size, loss in measured if size and loss and loss > 0]
    sizes = sorted({size for size, loss in measured if size and loss and loss > 0})
    # more variants than sizes: variants of equal size differ in something else
    if len(sizes) < MIN_SIZES or len({str(run.variant) for run in runs}) > len(sizes):
        return None
    x, y = zip(*points, strict=True)
    fitted = linear_regression(x, y)
    residual = sum((b - fitted.intercept - fitted.slope * a) ** 2 for a, b in points)
    spread = sum((a - fmean(x)) ** 2 for a in x)
    error = math.sqrt(residual / (len(points) - 2) / spread)
    return ScalingLine(entry, -fitted.slope, error, len(points), tuple(sizes), fitted)
