"""The charts of a study: only those for which it has data."""

import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from operator import attrgetter
from statistics import fmean
from typing import Any

from .chart import ACCURACY, LOSS, Axis, Chart, Line, Point, drawable
from .results import Results, RunResult, Statistic, SummaryRow
from .summary import best_first, statistic

VALIDATION, TRAINING = Axis(f"validation {LOSS.label}"), Axis(f"training {LOSS.label}")
MEASURED = {"accuracy": ACCURACY, "validation_loss": VALIDATION, "loss": TRAINING}
"""The axis of each field of a point."""
MOST_VARIANTS = 4
"""Variants whose curves are drawn, a chart each; of more, the ends are compared."""


class Plots:
    """The charts of one study's results.

    Every entry has one style throughout: its place among the entries. Curves and ends are those of each entry's best
    learning rate, as in the summary.
    """

    def __init__(self, results: Results) -> None:
        self.results = results
        self.styles = {entry.name: i for i, entry in enumerate(results.entries)}
        self.variants = _distinct(row.variant for row in results.summary)
        evaluated = all(len(run.evaluations) > 1 for run in results.runs if run.status == "finished")
        self.course = "validation_loss" if evaluated else "loss"
        """What curves show: of runs with one evaluation at the end, the training loss."""
        self.has_accuracy = any(row.accuracy is not None for row in results.summary)
        self.axis, self.measured = (ACCURACY, "Accuracy") if self.has_accuracy else (VALIDATION, "Validation loss")
        """What the study compares by."""

    def score(self, row: SummaryRow) -> Statistic | None:
        """What a study compares by: accuracy of tasks, validation loss of text."""
        return row.accuracy if self.has_accuracy else row.validation_loss

    def ranked(self) -> list[SummaryRow]:
        """The summary, best first, variant by variant."""
        return best_first(self.results)

    # ---- charts, section by section

    def curves(self) -> list[Chart]:
        """How training went."""
        tokens = partial(self._curve, "Loss over tokens", Axis("tokens"), "tokens", self.course)
        if 1 < len(self.variants) <= MOST_VARIANTS:
            return drawable(tokens(variant) for variant in self.variants)
        if self.variants[1:]:
            return []
        return drawable(
            [
                tokens(),
                self._curve("Loss over computation", Axis("training FLOPs"), "flops", self.course),
                self._curve("Loss over time", Axis("time", unit="seconds"), "seconds", self.course),
                self._curve("Accuracy over tokens", Axis("tokens"), "tokens", "accuracy"),
            ]
        )

    def outcomes(self) -> list[Chart]:
        """What came out: by difficulty, by length, by what was varied, over the state and the learning rate."""
        names = dict.fromkeys(name for row in self.results.summary for name in row.accuracy_by)
        found = [self._difficulty(name) for name in names]
        return drawable([*found, self._lengths(), *self._variants(), *self._states(), *self._learning_rates()])

    def speed(self) -> list[Chart]:
        """What training and decoding cost."""
        speed = self.results.speed
        long = Axis("tokens of a sequence", ticks=sorted({row.length for row in speed.train}))
        read = Axis("tokens read before", ticks=sorted({row.context for row in speed.decode}))
        train = partial(self._cost, speed.train, "length", long)
        decode = partial(self._cost, speed.decode, "context", read)
        rate, memory = Axis("tokens per second", zero=True), Axis("peak memory", unit="bytes", zero=True)
        time, state = Axis("time per token", unit="seconds", zero=True), Axis("state", unit="bytes")
        return drawable(
            [
                train("Training speed", "tokens_per_second", rate, "Of training steps. Higher is faster."),
                train("Memory of training", "memory_bytes", memory, "Beyond parameters and optimizer, in a step."),
                decode("Time of one token", "seconds", time, "Decoding after a context. Flat is a constant cost."),
                decode("Memory of decoding", "memory_bytes", memory, "Beyond parameters and state, for a token."),
                decode("State of one sequence", "state_bytes", state, "After a context. Flat is a constant size."),
            ]
        )

    # ---- one chart each

    def _curve(self, title: str, x: Axis, over: str, measure: str, variant: Mapping[str, Any] | None = None) -> Chart:
        """The mean over seeds of a measure, and the lowest and highest of them."""
        rows = [row for row in self.results.summary if variant is None or row.variant == variant]
        runs = {row.entry: found for row in rows if (found := self._runs(row))}
        points = {entry: list(_mean_course(found, over, measure)) for entry, found in runs.items()}
        many = any(len(found) > 1 for found in runs.values())
        y = MEASURED[measure]
        band = ": mean of the seeds, in a band from the lowest to the highest of them." if many else "."
        caption = f"{y.label.partition(' (')[0].capitalize()} as training went on{band}"
        return Chart(title if variant is None else f"{title}: {said(variant)}", caption, x, y, self._lines(points))

    def _difficulty(self, name: str) -> Chart:
        rows = self._of_best_variant(row for row in self.results.summary if name in row.accuracy_by)
        keys = dict.fromkeys(key for row in self.results.summary for key in row.accuracy_by.get(name, ()))
        said_name = name.replace("_", " ")
        axis, place = _axis_of(self.results.x_label or said_name, keys)
        points = {
            row.entry: _course({place[repr(key)]: value for key, value in row.accuracy_by[name].items()}, ACCURACY)
            for row in rows
        }
        caption = "The share of asked tokens that are right, "
        caption += "in each slice." if axis.names else "at each difficulty; harder is to the right."
        return Chart(f"Accuracy by {said_name}", caption, axis, ACCURACY, self._lines(points))

    def _lengths(self) -> Chart:
        points = {
            row.entry: _course({float(key): value for key, value in row.validation_loss_by_length.items()}, VALIDATION)
            for row in self._of_best_variant(self.results.summary)
        }
        caption = (
            "Validation loss at sequences of each length: flat or falling is a model that works beyond what it was "
            "trained on."
        )
        axis = Axis("tokens of a sequence", ticks=sorted({point.x for found in points.values() for point in found}))
        return Chart("Loss over length", caption, axis, VALIDATION, self._lines(points))

    def _variants(self) -> Iterator[Chart]:
        """The score over what was varied, if that is one field."""
        keys = {key for variant in self.variants for key in variant}
        if len(self.variants) < 2 or len(keys) != 1:
            return
        (key,) = keys
        label = said_key(key)
        axis, place = _axis_of(label, [variant.get(key) for variant in self.variants])
        scores: dict[str, dict[float, Statistic | None]] = {entry: {} for entry in self.styles}
        for row in self.results.summary:
            scores[row.entry][place[repr(row.variant[key])]] = self.score(row)
        points = {entry: _course(found, self.axis) for entry, found in scores.items()}
        caption = f"Each entry at each value of {label}."
        yield Chart(f"{self.measured} over {label}", caption, axis, self.axis, self._lines(points))

    def _states(self) -> Iterator[Chart]:
        rows = self._of_best_variant(self.results.summary)
        if len(rows) < 2:
            return
        entries = {row.entry: self.results.entry_of(row) for row in rows}
        better = "up" if self.has_accuracy else "down"
        caption = f"What was reached with a state of that size; {better} and to the left is better."
        if growing := " and ".join(name for name, entry in entries.items() if entry.state_grows):
            caption += f" The state of {growing} grows with the text: its size is that at the trained length."
        points = {row.entry: _course({entries[row.entry].state_bytes: self.score(row)}, self.axis) for row in rows}
        axis = Axis("state of one sequence", unit="bytes", log=True)
        yield Chart(f"{self.measured} and state", caption, axis, self.axis, self._lines(points), joined=False)

    def _learning_rates(self) -> Iterator[Chart]:
        rates = sorted({run.learning_rate for run in self.results.runs})
        if len(rates) < 2:
            return
        points: dict[str, list[Point]] = {}
        for row in self._of_best_variant(self.results.summary):
            ends: dict[float, list[float]] = {rate: [] for rate in rates}
            for run in self.results.runs:
                end = run.accuracy if self.has_accuracy else run.validation_loss
                if (run.entry, run.variant) == (row.entry, row.variant) and end is not None:
                    ends[run.learning_rate].append(end)
            points[row.entry] = _course({rate: statistic(found) for rate, found in ends.items() if found}, self.axis)
        caption = "The end of every run. An entry whose best is at the edge may be better beyond it."
        axis = Axis("learning rate", log=True, ticks=rates)
        yield Chart(f"{self.measured} over learning rate", caption, axis, self.axis, self._lines(points))

    def _cost(self, rows: Sequence[Any], over: str, x: Axis, title: str, measure: str, y: Axis, caption: str) -> Chart:
        points: dict[str, list[Point]] = {entry: [] for entry in self.styles}
        for row in sorted(rows, key=attrgetter(over)):
            if (value := getattr(row, measure)) is not None:
                points[row.entry].append(Point(getattr(row, over), value))
        return Chart(title, caption, x, y, self._lines(points))

    # ---- what they share

    def _lines(self, points: Mapping[str, Sequence[Point]]) -> list[Line]:
        return [Line(entry, found, self.styles[entry]) for entry, found in points.items()]

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


def _course(values: Mapping[float, Statistic | None], y: Axis) -> list[Point]:
    """Means and, if any deviate, their deviations, in order; no accuracy is above 1, and none below 0."""
    found, most = [], 1.0 if y is ACCURACY else math.inf
    for x, value in sorted(values.items()):
        if value is not None:
            spread = value.spread or 0.0
            found.append(Point(x, value.mean, max(value.mean - spread, 0.0), min(value.mean + spread, most)))
    return found if any(point.low < point.high for point in found) else [Point(point.x, point.y) for point in found]


def _axis_of(label: str, values: Iterable[Any]) -> tuple[Axis, dict[str, float]]:
    """An axis for values, and where each lies, by its `repr`: numbers in their place, others in their order."""
    values = _distinct(values)
    if all(map(_is_number, values)):
        place = {repr(value): float(value) for value in values}
        return Axis(label, ticks=sorted(place.values())), place
    return Axis(label, names=list(map(str, values))), {repr(value): float(i) for i, value in enumerate(values)}


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
