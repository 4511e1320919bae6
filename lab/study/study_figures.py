"""The figures of a study; figures without data are left out."""

import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from operator import attrgetter
from statistics import fmean
from typing import Any

from ..bench.figures import NOISE
from ..figures.figure import ACCURACY, Axis, Figure, Forest, Point, Series, drawable
from .comparisons import comparisons
from .conclusion import has_accuracy, key_text, names, variant_text
from .conclusion import score as score_of
from .config_differences import format_value
from .results import ABSENT, Results, RunResult, Statistic, SummaryRow
from .scaling import scaling_lines
from .summary import statistic

TOKENS = {"validation": "answer token", "training": "target token"}
"""Tokens over which the losses of a task are means; a task may train on every token, but asks only for its answers."""
CURVES = {
    "validation_loss": "Validation loss during training",
    "accuracy": "Accuracy during training",
    "loss": "Loss of training batches",
}
"""Titles of curves, by the name of the field in the results."""
RATE = Axis("tokens per second", from_zero=True, log=False)
STATE = Axis("state", unit="bytes")
MEMORY = Axis("peak memory", unit="bytes", from_zero=True, log=False, noise=NOISE)
TIME = Axis("time per token", unit="seconds", from_zero=True, log=False)
LEARNED_SHARE = Axis("share of seeds that learned", unit="share", log=False)
COSTS = {
    "train-speed": ("Training speed", "tokens_per_second", RATE, "Higher is faster."),
    "train-memory": ("Memory of training", "memory_bytes", MEMORY, "Peak of a step beyond parameters and optimizer."),
    "decode-time": ("Time per decoded token", "seconds", TIME, "Lower is faster; a flat line is a constant cost."),
    "decode-memory": ("Memory of decoding", "memory_bytes", MEMORY, "Peak beyond parameters and state."),
    "decode-state": ("State of one sequence", "state_bytes", STATE, "A flat line is a constant size."),
}
"""Title, field, axis and caption of the figures of speed and memory."""
MAX_VARIANTS = 4
"""Maximum number of variants whose curves are drawn, a figure each; with more, only final results are drawn."""


class Plots:
    """The figures of one study's results.

    An entry has the same style in all figures: its index among the entries. Curves and final results are those of each
    entry's best learning rate, as in the summary.
    """

    def __init__(self, results: Results) -> None:
        self.results = results
        self.styles = {entry.name: i for i, entry in enumerate(results.entries)}
        self.variants = _distinct(row.variant for row in results.summary)
        finished = [run for run in results.runs if run.status == "finished" and not run.tunes]
        self.curve_field = "validation_loss" if all(len(run.evaluations) > 1 for run in finished) else "loss"
        """Field of a point that curves show; the training loss if some run was evaluated only at the end."""
        self.alone = all(run.alone for run in finished)
        """True if runs went one after another, so that none of them slowed another one."""
        self.has_accuracy = has_accuracy(results)
        self.validation_axis, training_axis = (
            Axis(f"{split} loss (nats per {tokens if self.has_accuracy else 'token'})", log=False)
            for split, tokens in TOKENS.items()
        )
        self.measured = {"accuracy": ACCURACY, "validation_loss": self.validation_axis, "loss": training_axis}
        """Axis of each measured value, by the name of its field in the results."""
        self.score_name = "accuracy" if self.has_accuracy else "validation loss"
        self.score_axis = ACCURACY if self.has_accuracy else self.validation_axis
        lengths = sorted({run.sequence_length for run in results.runs if run.sequence_length is not None})
        self.training_marks = dict.fromkeys(map(float, lengths), "trained")
        """Label of the mark at each training length (tokens), for figures over the sequence length."""

    def score(self, row: SummaryRow) -> Statistic | None:
        """Return the score by which the study compares entries: accuracy for tasks, validation loss for text."""
        return score_of(self.results, row)

    def all(self) -> list[Figure]:
        """Return every figure, results first."""
        return [*self.differences(), *self.outcomes(), *self.curves(), *self.speed()]

    # ---- figures, section by section

    def differences(self) -> list[Figure]:
        """Return the forest plots of the entries' differences from the subject, one for each variant."""
        if self.variants[MAX_VARIANTS:]:
            return []
        return drawable(self._differences(i, variant) for i, variant in enumerate(self.variants, 1))

    def curves(self) -> list[Figure]:
        """Return the figures of training: curves over tokens, computation and time."""
        if self.variants[MAX_VARIANTS:]:
            return []
        if self.variants[1:]:
            titles = ((f"Loss over tokens: {variant_text(variant)}", variant) for variant in self.variants)
            figures = (self._curve(f"loss-{i}", t, "tokens", self.curve_field, v) for i, (t, v) in enumerate(titles, 1))
            return drawable(figures)
        figures = [
            self._curve("loss", "Loss over tokens", "tokens", self.curve_field),
            self._curve("loss-flops", "Loss over computation", "flops", self.curve_field),
            self._curve("accuracy", "Accuracy over tokens", "tokens", "accuracy"),
        ]
        if self.alone:
            figures.insert(2, self._curve("loss-time", "Loss over time", "seconds", self.curve_field))
        return drawable(figures)

    def outcomes(self) -> list[Figure]:
        """Return the figures of final results: by difficulty, slice, length, variant, state size and learning rate."""
        difficulties = dict.fromkeys(name for row in self.results.summary for name in row.accuracy_by)
        slices = dict.fromkeys(name for row in self.results.summary for name in row.validation_loss_by)
        figures = [*map(self._difficulty, difficulties), *map(self._slices, slices)]
        sizes = [self._lengths(), *self._variants(), *self._scaling()]
        return drawable([self._seeds(), *figures, *sizes, *self._states(), *self._learning_rates()])

    def speed(self) -> list[Figure]:
        """Return the figures of speed and memory of training and decoding."""
        rows = {"train": self.results.speed.train, "decode": self.results.speed.decode}
        return drawable(self._cost(name, rows[name.partition("-")[0]], *COSTS[name]) for name in COSTS)

    # ---- one figure each

    def _differences(self, number: int, variant: Mapping[str, Any]) -> Forest:
        compared = [each for each in comparisons(self.results) if each.variant == variant and each.low is not None]
        of_losses = any(each.measure == "validation_loss" for each in compared)
        compared.sort(key=lambda each: each.difference if of_losses else -each.difference)
        subject = self.results.about
        points = {
            each.entry: [Point(each.entry, each.difference, each.low or 0.0, each.high or 0.0)] for each in compared
        }
        measure = {"accuracy": ACCURACY, "learned": LEARNED_SHARE}.get(compared[0].measure if compared else "")
        label = f"{(measure or self.validation_axis).label} minus that of {subject}"
        axis = Axis(label, unit=measure.unit if measure else "", log=False)
        caption = f"Best first; bars are simultaneous 95 % intervals, and the broken line is {subject}."
        margin = None if any(each.measure == "learned" for each in compared) else self.results.margin
        if margin is not None:
            caption += " Differences in the shaded range do not matter, as the study declares."
        several = len(self.variants) > 1
        title = f"Difference from {subject}" + (f": {variant_text(variant)}" if several else "")
        return Forest(
            f"differences-{number}" if several else "differences",
            title,
            caption,
            Axis("entry", names=list(points)),
            axis,
            self._series(points),
            joined=False,
            words={each.entry: each.words for each in compared},
            margin=margin,
        )

    def _seeds(self) -> Figure:
        """Return the accuracy of every seed, where seeds either learn a task or do not."""
        rows = self._of_best_variant(row for row in self.results.summary if row.learned is not None)
        points = {
            row.entry: [Point(row.entry, run.accuracy) for run in self.results.runs_of(row) if run.accuracy is not None]
            for row in rows
        }
        caption = f"One point a seed. A seed has learned the task at {100 * self.results.learned:g} % and above."
        caption += self._best_variant_note(rows)
        axis = Axis("entry", names=list(points))
        return Figure("seeds", "Accuracy of each seed", caption, axis, ACCURACY, self._series(points), joined=False)

    def _curve(
        self, name: str, title: str, over: str, measure: str, variant: Mapping[str, Any] | None = None
    ) -> Figure:
        """Return the curves of a measure: the mean over seeds, and a band from the lowest to the highest seed."""
        rows = [row for row in self.results.summary if variant is None or row.variant == variant]
        by_entry = {row.entry: runs for row in rows if (runs := self.results.runs_of(row))}
        points = {entry: list(_mean_curve(runs, over, measure)) for entry, runs in by_entry.items()}
        several_seeds = any(len(runs) > 1 for runs in by_entry.values())
        band = "; the mean over seeds, in a band from the lowest to the highest seed." if several_seeds else "."
        rates = ", each entry at its tuned learning rate" if any(run.tunes for run in self.results.runs) else ""
        x = {
            "tokens": Axis("tokens", log=False),
            "flops": Axis("training matmul FLOPs", log=False),
            "seconds": Axis("training time", unit="seconds", log=False),
        }
        caption = f"{CURVES[measure]}{rates}{band}"
        if over == "flops":
            caption += " FLOPs of matrix products only: three times those of the forward passes."
        if over == "seconds":
            caption += (
                " Time: tokens over the median speed of each run's logged steps. Runs went one after another; other "
                "load on the machine lengthens their times."
            )
        return Figure(name, title, caption, x[over], self.measured[measure], self._series(points), smooth=True)

    def _difficulty(self, name: str) -> Figure:
        rows = self._of_best_variant(row for row in self.results.summary if name in row.accuracy_by)
        keys = dict.fromkeys(key for row in self.results.summary for key in row.accuracy_by.get(name, ()))
        label = self.results.x_label or name.replace("_", " ")
        axis, place = _axis_of(label, keys)
        values = {row.entry: {place[repr(key)]: value for key, value in row.accuracy_by[name].items()} for row in rows}
        caption = "Share of answer tokens predicted correctly, "
        caption += f"by {label}." if axis.names else f"by {label}; larger values are to the right."
        caption += self._best_variant_note(rows)
        return self._scores(f"accuracy by {name.replace('_', ' ')}", caption, axis, ACCURACY, values)

    def _slices(self, name: str) -> Figure:
        rows = self._of_best_variant(row for row in self.results.summary if name in row.validation_loss_by)
        axis, place = _axis_of(name, dict.fromkeys(key for row in rows for key in row.validation_loss_by[name]))
        values = {row.entry: {place[repr(key)]: v for key, v in row.validation_loss_by[name].items()} for row in rows}
        caption = "Validation loss in bins of positions; each point lies at the end of its bin."
        if axis.names:
            caption = (
                "Validation loss of recall hits (rare n-grams that the sequence contained before) and of other tokens."
            )
        caption += self._best_variant_note(rows)
        return self._scores(f"loss by {name}", caption, axis, self.validation_axis, values)

    def _lengths(self) -> Figure:
        rows = self._of_best_variant(self.results.summary)
        losses = {row.entry: {float(key): v for key, v in row.validation_loss_by_length.items()} for row in rows}
        axis = Axis("sequence length (tokens)", ticks=sorted({x for values in losses.values() for x in values}))
        caption = (
            "Validation loss at each sequence length. Beyond the training length, a flat or falling line is a model "
            "that extrapolates."
        )
        figure = self._scores(
            "loss by length", caption + self._best_variant_note(rows), axis, self.validation_axis, losses
        )
        return replace(figure, marks=self.training_marks)

    def _variants(self) -> Iterator[Figure]:
        """Yield the figure of the score over the varied field, if exactly one field varies."""
        keys = {key for variant in self.variants for key in variant}
        if len(self.variants) < 2 or len(keys) != 1:
            return
        (key,) = keys
        label = key_text(key)
        axis, place = _axis_of(label, [variant.get(key) for variant in self.variants])
        scores: dict[str, dict[Any, Statistic | None]] = {entry: {} for entry in self.styles}
        for row in self.results.summary:
            scores[row.entry][place[repr(row.variant[key])]] = self.score(row)
        title = f"{self.score_name} over {label}"
        caption = f"Each entry at each {label}."
        option = key.removeprefix("equal.")
        lacking = dict.fromkeys(each.entry for each in self.results.differences if each.values.get(option) == ABSENT)
        if key != option and lacking:
            have = "has" if len(lacking) == 1 else "have"
            its = "its" if len(lacking) == 1 else "their"
            caption += f" {names(list(lacking))} {have} no option {option}: {its} models are the same at all values."
        yield self._scores(title, caption, axis, self.score_axis, scores)

    def _scaling(self) -> Iterator[Figure]:
        """Yield the figure of the loss over model size with fitted power laws, if there are enough sizes."""
        if not (lines := list(scaling_lines(self.results))):
            return
        scores: dict[str, dict[Any, Statistic | None]] = {line.entry: {} for line in lines}
        for row in self.results.summary:
            if row.entry in scores and row.parameters:
                scores[row.entry][float(row.parameters)] = self.score(row)
        caption = f"Lines are fitted power laws. {'; '.join(map(str, lines))}."
        axes = Axis("parameters", log=True), replace(self.validation_axis, log=True)
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
            caption += (
                f" The state of {growing} grows with the sequence; the size shown is that at the training length."
            )
        caption += self._best_variant_note(rows)
        axis = Axis("state of one sequence", unit="bytes", log=True)
        scores = {row.entry: {float(entries[row.entry].state_bytes): self.score(row)} for row in rows}
        yield replace(self._scores(f"{self.score_name} by state", caption, axis, self.score_axis, scores), joined=False)

    def _learning_rates(self) -> Iterator[Figure]:
        tuning = [run for run in self.results.runs if run.tunes]
        rates = sorted({run.learning_rate for run in tuning if run.learning_rate is not None})
        if len(rates) < 2:
            return
        seeds = len({run.seed for run in tuning})
        number = "with one seed" if seeds == 1 else f"means over {seeds} seeds"
        caption = (
            f"Final validation losses of the runs that chose the learning rates, {number}. An entry that is best at an "
            "edge of the grid may be better beyond it."
        )
        axis = Axis("learning rate", log=True, ticks=rates)
        variants = _distinct(run.variant for run in tuning)
        best = self._of_best_variant(self.results.summary)
        if few := len(variants) <= MAX_VARIANTS:
            drawn = [(variant, [(entry, variant) for entry in self.styles]) for variant in variants]
        else:
            drawn = [({}, [(row.entry, row.variant) for row in best])]
            caption += self._best_variant_note(best)
        for i, (variant, models) in enumerate(drawn, 1):
            scores = {
                entry: _by_rate(run for run in tuning if (run.entry, run.variant) == (entry, at))
                for entry, at in models
            }
            figure = self._scores("validation loss by learning rate", caption, axis, self.validation_axis, scores)
            if few and len(variants) > 1:
                title = f"{figure.title}: {variant_text(variant)}"
                figure = replace(figure, name=f"{figure.name}-{i}", title=title)
            yield figure

    def _cost(self, name: str, rows: Sequence[Any], title: str, measure: str, y: Axis, caption: str) -> Figure:
        over = "length" if name.startswith("train") else "context"
        points: dict[str, list[Point]] = {entry: [] for entry in self.styles}
        for row in sorted(rows, key=attrgetter(over)):
            if (value := getattr(row, measure)) is not None:
                spread = getattr(row, f"{measure}_range", None) or ()
                points[row.entry].append(Point(getattr(row, over), value, *spread))
        if any(point.low < point.high for of_entry in points.values() for point in of_entry):
            caption += f" Medians of {self.results.speed.repeat} rounds; bars from lowest to highest."
        label = "sequence length (tokens)" if over == "length" else "context (tokens)"
        marks = self.training_marks if over == "length" else {}
        axis = Axis(label, ticks=sorted({getattr(row, over) for row in rows}))
        return Figure(name, title, caption, axis, y, self._series(points), marks=marks)

    # ---- common parts

    def _series(self, points: Mapping[str, Sequence[Point]]) -> list[Series]:
        return [Series(entry, of_entry, self.styles[entry]) for entry, of_entry in points.items()]

    def _scores(
        self, title: str, caption: str, x: Axis, y: Axis, values: Mapping[str, Mapping[Any, Statistic | None]]
    ) -> Figure:
        """Return a figure of means and intervals by entry and x value; its name is derived from the title."""
        series = self._series({entry: _points(of_entry, x, y) for entry, of_entry in values.items()})
        name = re.sub("[ _]", "-", title.removeprefix("validation "))
        if any(point.low < point.high for each in series for point in each.points):
            caption += " Bars are 95 % intervals of means over seeds"
            caption += ", cut at 0 and 100 %." if y is ACCURACY else "."
        return Figure(name, title[:1].upper() + title[1:], caption, x, y, series)

    def _best_variant_note(self, rows: Iterable[SummaryRow]) -> str:
        """Return a sentence for captions of figures with rows of `_of_best_variant`; empty for a single variant."""
        if len(self.variants) < 2:
            return ""
        entries: dict[str, list[str]] = {}
        for row in rows:
            entries.setdefault(variant_text(row.variant), []).append(row.entry)
        drawn = [f"{variant} ({'all' if len(entries) == 1 else ', '.join(of)})" for variant, of in entries.items()]
        return f" Of each entry, only the variant with its best {self.score_name} is drawn: {', '.join(drawn)}."

    def _of_best_variant(self, rows: Iterable[SummaryRow]) -> list[SummaryRow]:
        """Return one row per entry: that of the variant with its best score."""
        sign = -1 if self.has_accuracy else 1
        scored = [(sign * score.mean, row) for row in rows if (score := self.score(row)) is not None]
        best: dict[str, SummaryRow] = {}
        for _, row in sorted(scored, key=lambda pair: pair[0]):
            best.setdefault(row.entry, row)
        return [best[name] for name in self.styles if name in best]


def _mean_curve(runs: Sequence[RunResult], over: str, measure: str) -> Iterator[Point]:
    """Yield mean, lowest and highest value over runs, at each step that all runs have measured."""
    steps: dict[int, list[tuple[float, float]]] = {}
    for run in runs:
        for point in run.history if measure == "loss" else run.evaluations:
            if (y := getattr(point, measure)) is not None:
                steps.setdefault(point.step, []).append((getattr(point, over), y))
    for _, pairs in sorted(steps.items()):
        # a mean over fewer runs than at other steps would make the line jump
        if len(pairs) == len(runs):
            ys = [y for _, y in pairs]
            yield Point(fmean(x for x, _ in pairs), fmean(ys), *((min(ys), max(ys)) if len(runs) > 1 else ()))


def _by_rate(runs: Iterable[RunResult]) -> dict[Any, Statistic | None]:
    """Return mean and interval of the final validation loss, by learning rate."""
    losses: dict[float, list[float]] = {}
    for run in runs:
        if run.validation_loss is not None and run.learning_rate:
            losses.setdefault(run.learning_rate, []).append(run.validation_loss)
    return {rate: statistic(values) for rate, values in losses.items()}


def _points(values: Mapping[Any, Statistic | None], x: Axis, y: Axis) -> list[Point]:
    """Return means with error bars, in order; without bars if there are none. Bars stay in the valid range."""
    points = []
    highest = 1.0 if y is ACCURACY else math.inf
    for place in x.names or sorted(values):
        if (value := values.get(place)) is not None:
            margin = value.margin or 0.0
            points.append(Point(place, value.mean, max(value.mean - margin, 0.0), min(value.mean + margin, highest)))
    return points if any(point.low < point.high for point in points) else [Point(point.x, point.y) for point in points]


def _axis_of(label: str, values: Iterable[Any]) -> tuple[Axis, dict[str, float | str]]:
    """Return an axis for values, and the position of each value on it, by its `repr`.

    The axis is numeric if all values are numbers; otherwise it has categories.
    """
    values = _distinct(values)
    if all(map(_is_number, values)):
        numbers = {repr(value): float(value) for value in values}
        return Axis(label, ticks=sorted(numbers.values())), dict(numbers)
    return Axis(label, names=list(map(format_value, values))), {repr(value): format_value(value) for value in values}


def _distinct(values: Iterable[Any]) -> list[Any]:
    return list({json.dumps(value, sort_keys=True): value for value in values}.values())


def _is_number(value: Any) -> bool:
    try:
        float(value)
    except (TypeError, ValueError):
        return False
    return not isinstance(value, bool)
