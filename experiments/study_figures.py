"""The figures of a study: only those for which it has data."""

import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from operator import attrgetter
from statistics import fmean
from typing import Any

from .benchmark_figures import NOISE
from .figures.figure import ACCURACY, LOSS, Axis, Figure, Point, Series, drawable
from .results import Results, RunResult, Statistic, SummaryRow
from .scaling import scaling_lines
from .summary import statistic

VALIDATION = Axis(f"validation {LOSS.label}", log=False)
TRAINING = Axis(f"training {LOSS.label}", log=False)
MEASURED = {"accuracy": ACCURACY, "validation_loss": VALIDATION, "loss": TRAINING}
"""The axis of each field of a point."""
RATE = Axis("tokens per second", zero=True, log=False)
STATE = Axis("state", unit="bytes")
MEMORY = Axis("peak memory", unit="bytes", zero=True, log=False, noise=NOISE)
TIME = Axis("time per token", unit="seconds", zero=True, log=False)
COSTS = {
    "train-speed": ("Training speed", "tokens_per_second", RATE, "Higher is faster."),
    "train-memory": ("Memory of training", "memory_bytes", MEMORY, "Of a step, beyond parameters and optimizer."),
    "decode-time": ("Time per decoded token", "seconds", TIME, "Lower is faster; flat is a constant cost."),
    "decode-memory": ("Memory of decoding", "memory_bytes", MEMORY, "For a token, beyond parameters and state."),
    "decode-state": ("State of one sequence", "state_bytes", STATE, "Flat is a constant size."),
}
"""Title, field, axis and caption of the figures of what was timed."""
MOST_VARIANTS = 4
"""Variants whose curves are drawn, a figure each; of more, the ends are compared."""


class Plots:
    """The figures of one study's results.

    Every entry has one style throughout: its place among the entries. Curves and ends are those of each entry's best
    learning rate, as in the summary.
    """

    def __init__(self, results: Results) -> None:
        self.results = results
        self.styles = {entry.name: i for i, entry in enumerate(results.entries)}
        self.variants = _distinct(row.variant for row in results.summary)
        finished = [run for run in results.runs if run.status == "finished"]
        self.course = "validation_loss" if all(len(run.evaluations) > 1 for run in finished) else "loss"
        """What curves show: of runs with one evaluation at the end, the training loss."""
        self.alone = all(run.alone for run in finished)
        """Whether no run shared the machine with another: only then can their times be compared."""
        self.has_accuracy = any(row.accuracy is not None for row in results.summary)
        self.axis, self.measured = (ACCURACY, "accuracy") if self.has_accuracy else (VALIDATION, "validation loss")
        """What the study compares by."""
        lengths = sorted({run.sequence_length for run in results.runs if run.sequence_length is not None})
        self.trained_at = dict.fromkeys(map(float, lengths), "trained")
        """The lengths of sequences in training, to be marked on an axis of lengths."""

    def score(self, row: SummaryRow) -> Statistic | None:
        """What a study compares by: accuracy of tasks, validation loss of text."""
        return row.accuracy if self.has_accuracy else row.validation_loss

    def all(self) -> list[Figure]:
        """Every figure, outcomes first."""
        return [*self.outcomes(), *self.curves(), *self.speed()]

    # ---- figures, section by section

    def curves(self) -> list[Figure]:
        """How training went."""
        if self.variants[MOST_VARIANTS:]:
            return []
        if self.variants[1:]:
            titles = ((f"Loss over tokens: {said(variant)}", variant) for variant in self.variants)
            made = (self._curve(f"loss-{i}", t, "tokens", self.course, v) for i, (t, v) in enumerate(titles, 1))
            return drawable(made)
        made = [
            self._curve("loss", "Loss over tokens", "tokens", self.course),
            self._curve("loss-flops", "Loss over computation", "flops", self.course),
            self._curve("accuracy", "Accuracy over tokens", "tokens", "accuracy"),
        ]
        if self.alone:
            made.insert(2, self._curve("loss-time", "Loss over time", "seconds", self.course))
        return drawable(made)

    def outcomes(self) -> list[Figure]:
        """What came out: by difficulty, by length, by what was varied, over the state and the learning rate."""
        names = dict.fromkeys(name for row in self.results.summary for name in row.accuracy_by)
        found = [self._difficulty(name) for name in names]
        losses = dict.fromkeys(name for row in self.results.summary for name in row.validation_loss_by)
        found += [self._slices(name) for name in losses]
        sizes = [self._lengths(), *self._variants(), *self._scaling()]
        return drawable([*found, *sizes, *self._states(), *self._learning_rates()])

    def speed(self) -> list[Figure]:
        """What training and decoding cost."""
        rows = {"train": self.results.speed.train, "decode": self.results.speed.decode}
        return drawable(self._cost(name, rows[name.partition("-")[0]], *COSTS[name]) for name in COSTS)

    # ---- one figure each

    def _curve(
        self, name: str, title: str, over: str, measure: str, variant: Mapping[str, Any] | None = None
    ) -> Figure:
        """The mean over seeds of a measure, and the lowest and highest of them."""
        rows = [row for row in self.results.summary if variant is None or row.variant == variant]
        runs = {row.entry: found for row in rows if (found := self._runs(row))}
        points = {entry: list(_mean_course(found, over, measure)) for entry, found in runs.items()}
        many = any(len(found) > 1 for found in runs.values())
        band = "; a band from the lowest to the highest seed around the mean." if many else "."
        x = {
            "tokens": Axis("tokens", log=False),
            "flops": Axis("training FLOPs", log=False),
            "seconds": Axis("time of training steps", unit="seconds", log=False),
        }
        caption = f"{MEASURED[measure].label.partition(' (')[0].capitalize()} during training{band}"
        if over == "seconds":
            caption += " Every run had the machine to itself."
        return Figure(name, title, caption, x[over], MEASURED[measure], self._series(points), smooth=True)

    def _difficulty(self, name: str) -> Figure:
        rows = self._of_best_variant(row for row in self.results.summary if name in row.accuracy_by)
        keys = dict.fromkeys(key for row in self.results.summary for key in row.accuracy_by.get(name, ()))
        axis, place = _axis_of(self.results.x_label or name.replace("_", " "), keys)
        values = {row.entry: {place[repr(key)]: value for key, value in row.accuracy_by[name].items()} for row in rows}
        caption = "The share of target tokens that are right, "
        caption += "in each slice." if axis.names else "at each difficulty; harder is to the right."
        return self._scores(f"accuracy by {name.replace('_', ' ')}", caption, axis, ACCURACY, values)

    def _slices(self, name: str) -> Figure:
        rows = self._of_best_variant(row for row in self.results.summary if name in row.validation_loss_by)
        axis, place = _axis_of(name, dict.fromkeys(key for row in rows for key in row.validation_loss_by[name]))
        values = {row.entry: {place[repr(key)]: v for key, v in row.validation_loss_by[name].items()} for row in rows}
        caption = "Validation loss of the targets before each position; the bins begin where the one to the left ends."
        if axis.names:
            caption = (
                "Validation loss of recall hits, rare n-grams that the sequence has shown before, and of the rest."
            )
        return self._scores(f"loss by {name}", caption, axis, VALIDATION, values)

    def _lengths(self) -> Figure:
        rows = self._of_best_variant(self.results.summary)
        found = {row.entry: {float(key): v for key, v in row.validation_loss_by_length.items()} for row in rows}
        axis = Axis("sequence length (tokens)", ticks=sorted({x for values in found.values() for x in values}))
        caption = "Validation loss at each sequence length: flat or falling is a model that extrapolates."
        return replace(self._scores("loss by length", caption, axis, VALIDATION, found), marks=self.trained_at)

    def _variants(self) -> Iterator[Figure]:
        """The score over what was varied, if that is one field."""
        keys = {key for variant in self.variants for key in variant}
        if len(self.variants) < 2 or len(keys) != 1:
            return
        (key,) = keys
        label = said_key(key)
        axis, place = _axis_of(label, [variant.get(key) for variant in self.variants])
        scores: dict[str, dict[Any, Statistic | None]] = {entry: {} for entry in self.styles}
        for row in self.results.summary:
            scores[row.entry][place[repr(row.variant[key])]] = self.score(row)
        yield self._scores(f"{self.measured} over {label}", f"Each entry at each {label}.", axis, self.axis, scores)

    def _scaling(self) -> Iterator[Figure]:
        """The loss over the size, and the power law through it, if there are sizes enough."""
        if not (lines := list(scaling_lines(self.results))):
            return
        scores: dict[str, dict[Any, Statistic | None]] = {line.entry: {} for line in lines}
        for row in self.results.summary:
            if row.entry in scores and row.parameters:
                scores[row.entry][float(row.parameters)] = self.score(row)
        caption = f"Lines are power laws, fitted. {'; '.join(map(str, lines))}."
        axes = Axis("parameters", log=True), replace(VALIDATION, log=True)
        figure = self._scores("validation loss by parameters", caption, *axes, scores)
        ends = [[Point(size, line.loss(size)) for size in (line.sizes[0], line.sizes[-1])] for line in lines]
        fits = [
            Series(line.entry, end, self.styles[line.entry], faint=True) for line, end in zip(lines, ends, strict=True)
        ]
        yield replace(figure, series=[*fits, *figure.series], joined=False)

    def _states(self) -> Iterator[Figure]:
        rows = self._of_best_variant(self.results.summary)
        if len(rows) < 2:
            return
        entries = {row.entry: self.results.entry_of(row) for row in rows}
        better = "up" if self.has_accuracy else "down"
        caption = f"The score against the size of the state; {better} and to the left is better."
        if growing := " and ".join(name for name, entry in entries.items() if entry.state_grows):
            caption += f" The state of {growing} grows with the sequence: its size is that at the training length."
        axis = Axis("state of one sequence", unit="bytes", log=True)
        scores = {row.entry: {float(entries[row.entry].state_bytes): self.score(row)} for row in rows}
        yield replace(self._scores(f"{self.measured} by state", caption, axis, self.axis, scores), joined=False)

    def _learning_rates(self) -> Iterator[Figure]:
        rates = sorted({run.learning_rate for run in self.results.runs})
        if len(rates) < 2:
            return
        scores: dict[str, dict[Any, Statistic | None]] = {}
        for row in self._of_best_variant(self.results.summary):
            ends: dict[float, list[float]] = {}
            for run in self.results.runs:
                end = run.accuracy if self.has_accuracy else run.validation_loss
                if (run.entry, run.variant) == (row.entry, row.variant) and end is not None:
                    ends.setdefault(run.learning_rate, []).append(end)
            scores[row.entry] = {rate: statistic(found) for rate, found in ends.items()}
        caption = "The end of every run. An entry whose best is at the edge may be better beyond it."
        axis = Axis("learning rate", log=True, ticks=rates)
        yield self._scores(f"{self.measured} by learning rate", caption, axis, self.axis, scores)

    def _cost(self, name: str, rows: Sequence[Any], title: str, measure: str, y: Axis, caption: str) -> Figure:
        over = "length" if name.startswith("train") else "context"
        points: dict[str, list[Point]] = {entry: [] for entry in self.styles}
        for row in sorted(rows, key=attrgetter(over)):
            if (value := getattr(row, measure)) is not None:
                spread = getattr(row, f"{measure}_range", None) or ()
                points[row.entry].append(Point(getattr(row, over), value, *spread))
        if any(point.low < point.high for found in points.values() for point in found):
            caption += f" Medians of {self.results.speed.repeat} rounds, from the lowest to the highest."
        label, marks = ("sequence length (tokens)", self.trained_at) if over == "length" else ("context (tokens)", {})
        axis = Axis(label, ticks=sorted({getattr(row, over) for row in rows}))
        return Figure(name, title, caption, axis, y, self._series(points), marks=marks)

    # ---- what they share

    def _series(self, points: Mapping[str, Sequence[Point]]) -> list[Series]:
        return [Series(entry, found, self.styles[entry]) for entry, found in points.items()]

    def _scores(
        self, title: str, caption: str, x: Axis, y: Axis, values: Mapping[str, Mapping[Any, Statistic | None]]
    ) -> Figure:
        """Means and deviations by entry and place, called by its title."""
        series = self._series({entry: _course(found, x, y) for entry, found in values.items()})
        name = re.sub("[ _]", "-", title.removeprefix("validation "))
        return Figure(name, title[:1].upper() + title[1:], caption, x, y, series)

    def _runs(self, row: SummaryRow) -> list[RunResult]:
        """The finished runs that a line of the summary sums up."""
        chosen = (row.entry, row.variant, row.learning_rate, "finished")
        return [run for run in self.results.runs if (run.entry, run.variant, run.learning_rate, run.status) == chosen]

    def _of_best_variant(self, rows: Iterable[SummaryRow]) -> list[SummaryRow]:
        """One line an entry: that of the variant in which it did best."""
        sign = -1 if self.has_accuracy else 1
        scored = [(sign * score.mean, row) for row in rows if (score := self.score(row)) is not None]
        found: dict[str, SummaryRow] = {}
        for _, row in sorted(scored, key=lambda pair: pair[0]):
            found.setdefault(row.entry, row)
        return [found[name] for name in self.styles if name in found]


def _mean_course(runs: Sequence[RunResult], over: str, measure: str) -> Iterator[Point]:
    """Means at each evaluation that all runs have, or at each logged step, and the lowest and highest of them."""
    steps: dict[int, list[tuple[float, float]]] = {}
    for run in runs:
        for point in run.history if measure == "loss" else run.evaluations:
            if (y := getattr(point, measure)) is not None:
                steps.setdefault(point.step, []).append((getattr(point, over), y))
    for _, found in sorted(steps.items()):
        # a mean of other runs than those beside it would make a step in the line
        if len(found) == len(runs):
            ys = [y for _, y in found]
            yield Point(fmean(x for x, _ in found), fmean(ys), *((min(ys), max(ys)) if len(runs) > 1 else ()))


def _course(values: Mapping[Any, Statistic | None], x: Axis, y: Axis) -> list[Point]:
    """Means and, if any deviate, their deviations, in order; no accuracy is above 1, and none below 0."""
    found = []
    most = 1.0 if y is ACCURACY else math.inf
    for place in x.names or sorted(values):
        if (value := values.get(place)) is not None:
            spread = value.spread or 0.0
            found.append(Point(place, value.mean, max(value.mean - spread, 0.0), min(value.mean + spread, most)))
    return found if any(point.low < point.high for point in found) else [Point(point.x, point.y) for point in found]


def _axis_of(label: str, values: Iterable[Any]) -> tuple[Axis, dict[str, float | str]]:
    """An axis for values, and where each lies, by its `repr`: numbers in their place, others in their order."""
    values = _distinct(values)
    if all(map(_is_number, values)):
        numbers = {repr(value): float(value) for value in values}
        return Axis(label, ticks=sorted(numbers.values())), dict(numbers)
    return Axis(label, names=list(map(str, values))), {repr(value): str(value) for value in values}


def said(variant: Mapping[str, Any]) -> str:
    """A variant in words: the last part of each key, and the value."""
    return ", ".join(f"{said_key(key)} {value}" for key, value in variant.items())


def said_key(key: str) -> str:
    """The last part of a dotted path, in words."""
    return key.rpartition(".")[2].replace("_", " ")


def _distinct(values: Iterable[Any]) -> list[Any]:
    return list({json.dumps(value, sort_keys=True): value for value in values}.values())


def _is_number(value: Any) -> bool:
    try:
        float(value)
    except (TypeError, ValueError):
        return False
    return not isinstance(value, bool)
