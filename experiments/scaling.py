"""How the loss of text falls with the size of a model: a power law through a study's runs at three sizes or more.

L(N) = c N^-a (Kaplan et al. 2020, arXiv 2001.08361, equation 1.1), fitted by least squares to log L over log N, every
finished run a point. It has no floor that the loss cannot fall below: three sizes do not show one. So the line holds
between the sizes that were trained, and says little beyond them.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from statistics import LinearRegression, fmean, linear_regression

from .results import Results, RunResult

LEAST = 3
"""Sizes; two always lie on a line."""


@dataclass(frozen=True)
class ScalingLine:
    """What one entry's loss does over its sizes."""

    entry: str
    exponent: float
    """a: the loss falls by 1 - 2^-a when parameters double."""
    error: float
    """The standard error of a, by the deviations of runs from the line."""
    runs: int
    """How many it was fitted to."""
    sizes: tuple[int, ...]
    """Parameters, ascending."""
    fitted: LinearRegression

    def loss(self, parameters: float) -> float:
        """Nats per token at a size."""
        return math.exp(self.fitted.intercept + self.fitted.slope * math.log(parameters))

    def __str__(self) -> str:
        sizes = f"{self.sizes[0]:,} to {self.sizes[-1]:,} parameters"
        return (
            f"{self.entry}: the loss falls as parameters^-{self.exponent:.4f} from {sizes} "
            f"(standard error {self.error:.4f}; {self.runs} runs)"
        )


def scaling_lines(results: Results) -> Iterator[ScalingLine]:
    """The line of each entry that has a loss of text at three sizes or more, at the best learning rate of each."""
    if any(row.accuracy is not None for row in results.summary):
        return  # of a task, which is solved or not
    best = {(row.entry, str(row.variant)): row.learning_rate for row in results.summary}
    for entry in results.entries:
        runs = [
            run
            for run in results.runs
            if run.entry == entry.name and best.get((run.entry, str(run.variant))) == run.learning_rate
        ]
        if line := fit(entry.name, runs):
            yield line


def fit(entry: str, runs: Sequence[RunResult]) -> ScalingLine | None:
    """The line through runs that have finished; None of fewer than three sizes, or of variants beside them."""
    found = [(run.parameters, run.validation_loss) for run in runs if run.status == "finished"]
    points = [(math.log(size), math.log(loss)) for size, loss in found if size and loss and loss > 0]
    sizes = sorted({size for size, loss in found if size and loss and loss > 0})
    # two variants of one size differ in something else, which is no line of sizes
    if len(sizes) < LEAST or len({str(run.variant) for run in runs}) > len(sizes):
        return None
    x, y = zip(*points, strict=True)
    fitted = linear_regression(x, y)
    residual = sum((b - fitted.intercept - fitted.slope * a) ** 2 for a, b in points)
    spread = sum((a - fmean(x)) ** 2 for a in x)
    error = math.sqrt(residual / (len(points) - 2) / spread)
    return ScalingLine(entry, -fitted.slope, error, len(points), tuple(sizes), fitted)
