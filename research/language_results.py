"""Language at equal parameters: compact results of the studies `language*`, merged over calls, and read at equal time.

Every entry has runs of several lengths, each with a schedule of its own, so that every loss is that of a finished run.
The loss at equal time lies between two lengths: a power law of the steps joins the two losses of each seed.
"""

import math
import re
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Literal, NamedTuple

from pydantic import Field, ValidationError

from ..lab.study.results import Machine, Results
from ..registry import Config, DataError, SeqmixError, read_bytes

STEPS = "training.steps"
"""Field that the studies vary."""
REFERENCE = "attention"
"""Entry whose steps measure time, and with which the others are compared."""
TOLERANCE = 0.02
"""Largest relative difference of the parameters of two entries of one size."""


class Trained(Config):
    """Runs of one length of an entry, at its best learning rate."""

    learning_rate: float
    losses: dict[str, float]
    """Final validation loss in nats per token, by seed."""


class Costs(Config):
    """Costs of an entry, timed with all entries of one folder interleaved; CPU time of one thread."""

    step_seconds: float
    """Seconds of a training step."""
    step_seconds_range: tuple[float, float] | None = None
    """Seconds of a training step in the fastest and the slowest round."""
    reference_seconds: float
    """Seconds of a training step of the reference entry in the same rounds."""
    decode_seconds: dict[str, float]
    """Seconds per decoded token, by tokens of the context."""
    state_bytes: dict[str, int]
    """State bytes of one sequence, by tokens of the context."""

    @property
    def relative(self) -> float:
        """Time of a training step relative to the reference's."""
        return self.step_seconds / self.reference_seconds

    @property
    def relative_range(self) -> tuple[float, float]:
        """Time of a training step in the fastest and the slowest round, relative to the reference's median."""
        low, high = self.step_seconds_range or (self.step_seconds, self.step_seconds)
        return low / self.reference_seconds, high / self.reference_seconds


class Model(Config):
    """An entry of a study: its size, its runs by number of steps, and its costs."""

    mixer: str
    """Kind of its mixers."""
    short_conv: str
    """Tokens of the short convolution before the mixer, as text; empty if all entries of the study have the same."""
    parameters: int
    runs: dict[str, Trained] = Field(default_factory=dict)
    costs: Costs | None = None
    """None before the timing, which comes after the last run of a study."""
    machine: Machine = Machine()

    def losses_at(self, steps: float, floor: float = 0.0) -> "Reading | None":
        """Return the loss of each seed after a number of steps, which need not be a whole one.

        Args:
            steps: number of steps; beyond the lengths of the runs, the loss of the nearest length is a bound.
            floor: loss that the power law approaches, in nats per token; below all losses.

        Returns:
            None if no run has finished.
        """
        lengths = {int(length): trained.losses for length, trained in self.runs.items() if trained.losses}
        if not lengths:
            return None
        if steps in lengths:
            return Reading(lengths[int(steps)])
        if steps < min(lengths):
            return Reading(lengths[min(lengths)], "at least")
        if steps > max(lengths):
            return Reading(lengths[max(lengths)], "at most")
        low, high = next(pair for pair in pairwise(sorted(lengths)) if pair[0] < steps < pair[1])
        share = math.log(steps / low) / math.log(high / low)
        below, above = lengths[low], lengths[high]
        return Reading(
            {
                seed: floor + (below[seed] - floor) ** (1 - share) * (above[seed] - floor) ** share
                for seed in below
                if seed in above
            }
        )


class Reading(NamedTuple):
    """Losses by seed."""

    losses: Mapping[str, float]
    bound: Literal["at least", "at most"] | None = None
    """Direction of the bound if the losses are only bounds of those asked for."""


class Size(Config):
    """Models of one size, trained under identical conditions."""

    conditions: str
    """Data, optimizer, learning rates, schedule, batches and precision; all but the number of steps."""
    models: dict[str, Model]
    """Models by name of the entry."""
    failed: dict[str, str] = Field(default_factory=dict)
    """Reasons of failures, by name of the run."""


class Measured(Config):
    """Results by size, such as 1M."""

    format: Literal[1] = 1
    sizes: dict[str, Size] = Field(default_factory=dict)


def read_measured(file: Path) -> Measured:
    """Read collected results; a file that does not exist holds none.

    Raises:
        DataError: the file cannot be read, or holds something else.
    """
    if not file.exists():
        return Measured()
    try:
        return Measured.model_validate_json(read_bytes(file))
    except OSError as error:
        raise DataError(f"{file} cannot be read: {error.strerror}") from None
    except ValidationError as error:
        raise DataError(f"{file} does not hold results of language studies: {error.errors()[0]['msg']}") from None


def size_of(results: Results) -> tuple[str, Size]:
    """Return what has finished of a study, and the name of its size: its models' parameters in millions."""
    short_conv = {each.entry: each.values.get("short_conv", "") for each in results.differences}
    models = {
        entry.name: Model(
            mixer=entry.mixers[0],
            short_conv=short_conv.get(entry.name, ""),
            parameters=entry.parameters,
            runs=_runs_of(entry.name, results),
            costs=_costs_of(entry.name, results),
            machine=results.machine,
        )
        for entry in results.entries
    }
    finished = {name: model for name, model in models.items() if model.runs}
    failed = {run.name: run.error or "it was stopped" for run in results.runs if run.status == "failed"}
    size = Size(conditions=_conditions(results), models=finished, failed=failed)
    return f"{results.entries[0].parameters / 1e6:.0f}M", size


def _conditions(results: Results) -> str:
    """Return the setup of a study without its numbers of steps, and its precision."""
    parts = dict(part.split(": ", 1) for part in (results.setup or "").split(" · ") if part)
    lengths = (re.sub(r"^[\d,]+ steps", "steps", text) for text in parts.get("training", "").split(" / "))
    parts["training"] = " / ".join(dict.fromkeys(lengths))
    parts["precision"] = " / ".join(dict.fromkeys(run.precision for run in results.runs if run.precision))
    return " · ".join(f"{name}: {text}" for name, text in parts.items())


def _runs_of(entry: str, results: Results) -> dict[str, Trained]:
    runs: dict[str, Trained] = {}
    for row in results.summary:
        if row.entry == entry:
            losses = {str(run.seed): run.validation_loss for run in results.runs_of(row)}
            finite = {seed: loss for seed, loss in losses.items() if loss is not None}
            runs[str(row.variant[STEPS])] = Trained(learning_rate=row.learning_rate, losses=finite)
    return runs


def _costs_of(entry: str, results: Results) -> Costs | None:
    steps = {row.entry: 1 / row.tokens_per_second for row in results.speed.train if row.tokens_per_second}
    ranges = {row.entry: row.tokens_per_second_range for row in results.speed.train}
    tokens = results.speed.tokens
    if entry not in steps or REFERENCE not in steps or tokens is None:
        return None
    rates = ranges[entry]
    decoded = [row for row in results.speed.decode if row.entry == entry]
    return Costs(
        step_seconds=tokens * steps[entry],
        step_seconds_range=None if rates is None else (tokens / max(rates), tokens / min(rates)),
        reference_seconds=tokens * steps[REFERENCE],
        decode_seconds={str(row.context): row.seconds for row in decoded if row.seconds is not None},
        state_bytes={str(row.context): row.state_bytes for row in decoded if row.state_bytes is not None},
    )


def add(measured: Measured, results: Results) -> Measured:
    """Add the finished runs of a study; a run that is in both is replaced.

    Raises:
        SeqmixError: the study was not trained under the conditions of the results of its size, varies something else
            than the number of steps, or has not timed CPU time.
    """
    if any(list(row.variant) != [STEPS] for row in results.summary):
        raise SeqmixError(f"expected a study that varies {STEPS} and nothing else, got {results.name}")
    if results.speed.train and not results.speed.cpu_time:
        raise SeqmixError(f"expected a study that times CPU time, got {results.name}: set speed.cpu_time to true")
    name, new = size_of(results)
    if not new.models:
        return measured
    old = measured.sizes.get(name, Size(conditions=new.conditions, models={}))
    if old.conditions != new.conditions:
        ours, theirs = (set(size.conditions.split(" · ")) for size in (old, new))
        raise SeqmixError(
            f"{results.name} cannot share a table with the results of size {name}: expected "
            f"{'; '.join(sorted(ours - theirs))}, got {'; '.join(sorted(theirs - ours))}"
        )
    models = dict(old.models)
    for entry, model in new.models.items():
        models[entry] = _merged(entry, models.get(entry, model), model)
    smallest, largest = (pick(model.parameters for model in models.values()) for pick in (min, max))
    if largest > (1 + TOLERANCE) * smallest:
        raise SeqmixError(
            f"{results.name} cannot share a table with the results of size {name}: expected equal parameters, got "
            f"{smallest:,} to {largest:,}"
        )
    ended = {run.name for run in results.runs if run.status == "finished"}
    failed = {run: why for run, why in (old.failed | new.failed).items() if run not in ended}
    merged = Size(conditions=new.conditions, models=models, failed=failed)
    return Measured(sizes=measured.sizes | {name: merged})


def _merged(entry: str, old: Model, new: Model) -> Model:
    runs = dict(old.runs)
    for steps, trained in new.runs.items():
        before = runs.get(steps, trained)
        if before.learning_rate != trained.learning_rate:
            raise SeqmixError(
                f"{entry} was trained for {steps} steps with learning rate {before.learning_rate:g}, now with "
                f"{trained.learning_rate:g}: seeds of both cannot be averaged"
            )
        runs[steps] = Trained(learning_rate=trained.learning_rate, losses=before.losses | trained.losses)
    return new.model_copy(update={"runs": runs, "costs": new.costs or old.costs})


def losses_after(models: Mapping[str, Model], steps: Mapping[str, float], floor: float = 0.0) -> dict[str, list[float]]:
    """Return the losses of the entries' seeds, in bits per token, after each entry's number of steps.

    Entries of which there are only bounds are left out.
    """
    return {
        entry: [loss / math.log(2) for loss in reading.losses.values()]
        for entry, model in models.items()
        if entry in steps and (reading := model.losses_at(steps[entry], floor)) is not None and reading.bound is None
    }
