"""The charts of a study: only those for which it has data."""

import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from statistics import fmean
from typing import Any

from .chart import ACCURACY, LOSS, Axis, Chart, Line
from .results import EvaluationPoint, Results, RunResult, Statistic, SummaryRow
from .summary import best_first, statistic

VALIDATION, TRAINING = Axis(f"validation {LOSS.label}"), Axis(f"training {LOSS.label}")
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
        self.evaluated = all(len(run.evaluations) > 1 for run in results.runs if run.status == "finished")
        """Whether curves are those of evaluations: runs with one at the end have those of training."""
        self.has_accuracy = any(row.accuracy is not None for row in results.summary)

    def score(self, row: SummaryRow) -> Statistic | None:
        """What a study compares by: accuracy of tasks, validation loss of text."""
        return row.accuracy if self.has_accuracy else row.validation_loss

    def ranked(self) -> list[SummaryRow]:
        """The summary, best first, variant by variant."""
        return best_first(self.results)

    # ---- charts, section by section

    def curves(self) -> list[Chart]:
        """How training went."""
        found: list[Chart | None] = []
        if len(self.variants) <= 1:
            found += [
                self._curve("Loss over tokens", Axis("tokens"), lambda e: e.tokens),
                self._curve("Loss over computation", Axis("training FLOPs"), lambda e: e.flops),
                self._curve("Loss over time", Axis("time", unit="seconds"), lambda e: e.seconds),
                self._curve("Accuracy over tokens", Axis("tokens"), lambda e: e.tokens, accuracy=True),
            ]
        elif len(self.variants) <= MOST_VARIANTS:
            for variant in self.variants:
                found.append(self._curve("Loss over tokens", Axis("tokens"), lambda e: e.tokens, variant=variant))
        return _drawable(found)

    def outcomes(self) -> list[Chart]:
        """What came out: by difficulty, by length, by what was varied, over the state and the learning rate."""
        names = dict.fromkeys(name for row in self.results.summary for name in row.accuracy_by)
        found = [self._difficulty(name) for name in names]
        return _drawable([*found, self._lengths(), self._variants(), self._states(), self._learning_rates()])

    def speed(self) -> list[Chart]:
        """What training and decoding cost."""
        speed = self.results.speed
        long = Axis("tokens of a sequence", ticks=sorted({row.length for row in speed.train}))
        read = Axis("tokens read before", ticks=sorted({row.context for row in speed.decode}))
        train = partial(self._cost, speed.train, "length", long)
        decode = partial(self._cost, speed.decode, "context", read)
        rate, memory = Axis("tokens per second", zero=True), Axis("peak memory", unit="bytes", zero=True)
        time, state = Axis("time per token", unit="seconds", zero=True), Axis("state", unit="bytes")
        return _drawable(
            [
                train("Training speed", "tokens_per_second", rate, "Of training steps. Higher is faster."),
                train("Memory of training", "memory_bytes", memory, "Beyond parameters and optimizer, in a step."),
                decode("Time of one token", "seconds", time, "Decoding behind a context. Flat is a constant cost."),
                decode("Memory of decoding", "memory_bytes", memory, "Beyond parameters and state, for a token."),
                decode("State of one sequence", "state_bytes", state, "Behind a context. Flat is a constant size."),
            ]
        )

    # ---- one chart each

    def _curve(
        self,
        title: str,
        x: Axis,
        place: Callable[[Any], float | None],
        *,
        accuracy: bool = False,
        variant: Mapping[str, Any] | None = None,
    ) -> Chart:
        lines = []
        many = False
        for row in self.results.summary:
            runs = self._runs(row)
            if (variant is not None and row.variant != variant) or not runs:
                continue
            many |= len(runs) > 1
            lines.append(self._mean_line(row.entry, runs, place, accuracy=accuracy))
        band = ": mean of the seeds, in a band from the lowest to the highest of them." if many else "."
        y = ACCURACY if accuracy else VALIDATION if self.evaluated else TRAINING
        caption = f"{y.label.partition(' (')[0].capitalize()} as training went on{band}"
        return Chart(title if variant is None else f"{title}: {said(variant)}", caption, x, y, lines)

    def _difficulty(self, name: str) -> Chart:
        rows = [row for row in self.results.summary if name in row.accuracy_by]
        keys = list(dict.fromkeys(key for row in rows for key in row.accuracy_by[name]))
        numeric = all(_is_number(key) for key in keys)
        keys = sorted(keys, key=float) if numeric else keys
        place = {key: float(key) if numeric else float(i) for i, key in enumerate(keys)}
        lines = []
        for row in self._of_best_variant(rows):
            slices = row.accuracy_by[name]
            points = [(place[key], slices[key]) for key in keys if key in slices]
            lines.append(self._line(row.entry, points, y=ACCURACY))
        said_name = name.replace("_", " ")
        label = self.results.x_label or said_name
        axis = Axis(label, ticks=[place[key] for key in keys]) if numeric else Axis(label, names=keys)
        return Chart(
            f"Accuracy by {said_name}",
            "The share of asked tokens that are right, at each difficulty; harder is to the right."
            if numeric
            else "The share of asked tokens that are right, in each slice.",
            axis,
            ACCURACY,
            lines,
        )

    def _lengths(self) -> Chart:
        lines = []
        rows = self._of_best_variant(self.results.summary)
        for row in rows:
            points = sorted((float(length), loss) for length, loss in row.validation_loss_by_length.items())
            lines.append(self._line(row.entry, points, y=VALIDATION))
        lengths = {float(length) for row in rows for length in row.validation_loss_by_length}
        return Chart(
            "Loss over length",
            "Validation loss at sequences of each length: flat or falling is a model that works beyond what it was "
            "trained on.",
            Axis("tokens of a sequence", ticks=sorted(lengths)),
            VALIDATION,
            lines,
        )

    def _variants(self) -> Chart | None:
        """The score over what was varied, if that is one field."""
        keys = {key for variant in self.variants for key in variant}
        if len(self.variants) < 2 or len(keys) != 1:
            return None
        (key,) = keys
        values = list(dict.fromkeys(variant.get(key) for variant in self.variants))
        numeric = all(isinstance(value, int | float) and not isinstance(value, bool) for value in values)
        label = said_key(key)
        axis = Axis(label, ticks=sorted(values)) if numeric else Axis(label, names=[str(value) for value in values])
        place = {repr(value): value if numeric else float(i) for i, value in enumerate(values)}
        lines = []
        for entry in self.styles:
            rows = [row for row in self.results.summary if row.entry == entry]
            points = [(place[repr(row.variant[key])], score) for row in rows if (score := self.score(row)) is not None]
            lines.append(self._line(entry, sorted(points, key=lambda point: point[0]), y=self._axis))
        return Chart(f"{self._measured} over {label}", f"Each entry at each value of {label}.", axis, self._axis, lines)

    def _states(self) -> Chart | None:
        rows = self._of_best_variant(self.results.summary)
        if len(rows) < 2:
            return None
        lines = [
            self._line(row.entry, [(self.results.entry_of(row).state_bytes, score)], y=self._axis)
            for row in rows
            if (score := self.score(row)) is not None
        ]
        growing = [row.entry for row in rows if self.results.entry_of(row).state_grows]
        better = "up" if self.has_accuracy else "down"
        caption = f"What was reached with a state of that size; {better} and to the left is better."
        if growing:
            caption += (
                f" The state of {' and '.join(growing)} grows with the text: its size is that at the trained length."
            )
        axis = Axis("state of one sequence", unit="bytes", log=True)
        return Chart(f"{self._measured} and state", caption, axis, self._axis, lines, joined=False)

    def _learning_rates(self) -> Chart | None:
        rates = _distinct(run.learning_rate for run in self.results.runs)
        if len(rates) < 2:
            return None
        lines = []
        for row in self._of_best_variant(self.results.summary):
            runs = [run for run in self.results.runs if (run.entry, run.variant) == (row.entry, row.variant)]
            points = []
            for rate in sorted(rates):
                ends = [end for run in runs if run.learning_rate == rate and (end := self._end(run)) is not None]
                if ends:
                    points.append((rate, statistic(ends)))
            lines.append(self._line(row.entry, points, y=self._axis))
        return Chart(
            f"{self._measured} over learning rate",
            "The end of every run. An entry whose best is at the edge may be better beyond it.",
            Axis("learning rate", log=True, ticks=sorted(rates)),
            self._axis,
            lines,
        )

    def _cost(self, rows: Sequence[Any], over: str, x: Axis, title: str, measure: str, y: Axis, caption: str) -> Chart:
        lines = []
        for entry, style in self.styles.items():
            found = [(getattr(row, over), getattr(row, measure)) for row in rows if row.entry == entry]
            points = sorted(point for point in found if point[1] is not None)
            lines.append(Line(entry, [x for x, _ in points], [y for _, y in points], style=style))
        return Chart(title, caption, x, y, lines)

    # ---- what they share

    @property
    def _measured(self) -> str:
        return "Accuracy" if self.has_accuracy else "Validation loss"

    @property
    def _axis(self) -> Axis:
        return ACCURACY if self.has_accuracy else VALIDATION

    def _end(self, run: RunResult) -> float | None:
        return run.accuracy if self.has_accuracy else run.validation_loss

    def _runs(self, row: SummaryRow) -> list[RunResult]:
        """The finished runs that a line of the summary sums up."""
        chosen = (row.entry, row.variant, row.learning_rate)
        return [
            run
            for run in self.results.runs
            if run.status == "finished" and (run.entry, run.variant, run.learning_rate) == chosen
        ]

    def _of_best_variant(self, rows: Iterable[SummaryRow]) -> list[SummaryRow]:
        """One line an entry: that of the variant in which it did best."""
        sign = -1 if self.has_accuracy else 1
        scored = [(sign * score.mean, i, row) for i, row in enumerate(rows) if (score := self.score(row)) is not None]
        found: dict[str, SummaryRow] = {}
        for _, _, row in sorted(scored, key=lambda item: item[:2]):
            found.setdefault(row.entry, row)
        return [found[name] for name in self.styles if name in found]

    def _line(self, entry: str, points: Sequence[tuple[float, Statistic]], *, y: Axis) -> Line:
        spread = any(value.spread for _, value in points)
        # no accuracy is above 1, whatever its deviation
        most = 1.0 if y is ACCURACY else math.inf
        return Line(
            entry,
            [float(x) for x, _ in points],
            [value.mean for _, value in points],
            [max(value.mean - (value.spread or 0), 0.0) for _, value in points] if spread else (),
            [min(value.mean + (value.spread or 0), most) for _, value in points] if spread else (),
            style=self.styles[entry],
        )

    def _mean_line(
        self, entry: str, runs: Sequence[RunResult], place: Callable[[Any], float | None], *, accuracy: bool
    ) -> Line:
        """The mean over seeds at each evaluation, and the lowest and highest of them."""
        points: dict[int, list[tuple[float, float]]] = {}
        for run in runs:
            for step, x, y in self._course(run, place, accuracy=accuracy):
                points.setdefault(step, []).append((x, y))
        # a mean of other runs than those beside it would make a step in the line
        kept = [points[step] for step in sorted(points) if len(points[step]) == len(runs)]
        values = [[y for _, y in found] for found in kept]
        banded = len(runs) > 1
        return Line(
            entry,
            [fmean(x for x, _ in found) for found in kept],
            [fmean(found) for found in values],
            [min(found) for found in values] if banded else (),
            [max(found) for found in values] if banded else (),
            style=self.styles[entry],
        )

    def _course(
        self, run: RunResult, place: Callable[[Any], float | None], *, accuracy: bool
    ) -> Iterator[tuple[int, float, float]]:
        """Step, place and value of each evaluation; of each logged step where runs are evaluated once."""
        for point in run.evaluations if accuracy or self.evaluated else run.history:
            if isinstance(point, EvaluationPoint):
                y = point.accuracy if accuracy else point.validation_loss
            else:
                y = point.loss
            if (x := place(point)) is not None and y is not None:
                yield point.step, x, y


def said(variant: Mapping[str, Any]) -> str:
    """A variant in words: the last part of each key, and the value."""
    return ", ".join(f"{said_key(key)} {value}" for key, value in variant.items())


def said_key(key: str) -> str:
    """The last part of a dotted path, in words."""
    return key.rpartition(".")[2].replace("_", " ")


def _drawable(charts: Iterable[Chart | None]) -> list[Chart]:
    return [kept for chart in charts if chart is not None and (kept := chart.drawable()) is not None]


def _distinct(values: Iterable[Any]) -> list[Any]:
    return list({json.dumps(value, sort_keys=True): value for value in values}.values())


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
