"""What a study found, as values and as results.json.

Figures of a run are those of its folder: what `metrics.jsonl` has, and what follows from it. Operations are those of
training, three times the forward ones of matrix products; seconds are those of training steps, by the speed of the
steps that were logged.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, ValidationError, model_validator

from ..registry import Config, SeqmixError, read_bytes, write_file

RESULTS_FILE = "results.json"
FORMAT = 1

Count = Annotated[int, Field(ge=0, lt=2**63)]
"""A number of something; a larger one is no measurement, and cannot be drawn."""
COSTS = ("parameters", "flops_per_token", "state_bytes")
"""Fields of what a model costs."""
AccuracyBy = dict[str, dict[str, float]]
"""Share of right answers, by the name of a difficulty and its value."""
Range = tuple[float, float]
"""The lowest and the highest of what was measured, or its quartiles."""


class ResultsError(SeqmixError):
    """A file does not hold the results of a study."""


def where(variant: Mapping[str, Any]) -> str:
    """A variant, after the name of an entry."""
    return f" where {', '.join(f'{path} is {value}' for path, value in variant.items())}" if variant else ""


class Machine(Config):
    """What computed it."""

    processor: str | None = None
    threads: Count | None = None
    device: str | None = None
    torch: str | None = None
    seqmix: str | None = None
    commit: str | None = None


class EntryResult(Config):
    """A model of the study, in its first variant."""

    name: str
    config: str
    """The resolved model, in YAML."""
    mixers: tuple[str, ...]
    """Kinds, in the order of the layers, once each."""
    matched: str | None = None
    """What was made equal, by which field; None where nothing was turned."""
    parameters: Count
    flops_per_token: float
    """Operations per token of matrix products, forward."""
    state_bytes: Count
    """Of one sequence, after as many tokens as it has in training."""
    state_grows: bool


class _Moment(Config):
    step: Count
    tokens: Count
    """Read so far."""
    flops: float
    """Of training so far."""
    seconds: float
    """Of training steps so far."""


class Point(_Moment):
    """One logged step of training."""

    loss: float
    """Nats per token of the step's batch."""


class EvaluationPoint(_Moment):
    """One evaluation."""

    validation_loss: float
    accuracy: float | None = None


class RunResult(Config):
    """One run."""

    name: str
    """Of its folder in runs/."""
    entry: str
    seed: int
    learning_rate: float
    """The peak."""
    variant: dict[str, Any] = Field(default_factory=dict)
    """Values by dotted path."""
    sequence_length: Count | None = None
    """Tokens of a training sequence."""
    alone: bool | None = None
    """Whether no other run of the study shared the machine with it: only then are its times its own."""
    parameters: Count | None = None
    flops_per_token: float | None = None
    """Operations per token of matrix products, forward."""
    state_bytes: Count | None = None
    status: Literal["finished", "failed", "missing"]
    """Missing is a run that has not ended."""
    error: str | None = None
    """Why it failed, in one sentence."""
    seconds: float | None = None
    tokens_per_second: float | None = None
    """The median of logged steps."""
    tokens_per_second_range: Range | None = None
    """Their quartiles."""
    peak_memory_bytes: Count | None = None
    validation_loss: float | None = None
    """Of the final evaluation, as are accuracies."""
    accuracy: float | None = None
    accuracy_by: AccuracyBy = Field(default_factory=dict)
    validation_loss_by: dict[str, dict[str, float]] = Field(default_factory=dict)
    """By slice: of positions, of recall hits and other tokens."""
    validation_loss_by_length: dict[str, float] = Field(default_factory=dict)
    scores: dict[str, dict[str, float]] = Field(default_factory=dict)
    """Of lm-eval's tasks, by task and metric, as `seqmix evaluate --tasks --save` wrote them."""
    history: tuple[Point, ...] = ()
    evaluations: tuple[EvaluationPoint, ...] = ()


class Statistic(Config):
    """A figure over seeds."""

    mean: float
    spread: float | None = None
    """The sample's standard deviation; None of one seed."""


class SummaryRow(Config):
    """An entry in a variant, at its best learning rate."""

    entry: str
    variant: dict[str, Any] = Field(default_factory=dict)
    learning_rate: float
    at_edge: Literal["lowest", "highest"] | None = None
    """Whether the best rate is the last of the grid on one side: one beyond it may be better."""
    seeds: Count
    """Finished runs."""
    parameters: Count | None = None
    """In this variant, as are operations and state."""
    flops_per_token: float | None = None
    state_bytes: Count | None = None
    tokens_per_second: float | None = None
    """The median over seeds."""
    tokens_per_second_range: Range | None = None
    """The lowest and the highest quartile of the seeds."""
    validation_loss: Statistic
    accuracy: Statistic | None = None
    accuracy_by: dict[str, dict[str, Statistic]] = Field(default_factory=dict)
    validation_loss_by: dict[str, dict[str, Statistic]] = Field(default_factory=dict)
    validation_loss_by_length: dict[str, Statistic] = Field(default_factory=dict)
    scores: dict[str, dict[str, Statistic]] = Field(default_factory=dict)


class TrainSpeedRow(Config):
    """Training of an entry, timed at one length."""

    entry: str
    length: Count
    tokens_per_second: float | None = None
    tokens_per_second_range: Range | None = None
    memory_bytes: float | None = None
    """Peak memory of a step beyond parameters and optimizer."""
    skipped: str | None = None
    """Why there are no figures."""


class DecodeSpeedRow(Config):
    """Decoding of an entry, timed after one context."""

    entry: str
    context: Count
    seconds: float | None = None
    """Of a token."""
    seconds_range: Range | None = None
    memory_bytes: float | None = None
    """Peak memory of a call beyond parameters and state."""
    state_bytes: Count | None = None
    skipped: str | None = None


class SpeedResult(Config):
    """What was timed, all entries interleaved; figures are medians, and ranges their lowest and highest."""

    repeat: Count | None = None
    """Rounds."""
    threads: Count | None = None
    """Of a CPU; None on a GPU."""
    tokens: Count | None = None
    """Tokens of a training step at most, in whole sequences."""
    batch: Count | None = None
    """Sequences that are decoded at once."""

    train: tuple[TrainSpeedRow, ...] = ()
    decode: tuple[DecodeSpeedRow, ...] = ()


class PaperRow(Config):
    """A figure of a paper beside ours."""

    label: str
    entry: str
    theirs: float
    ours: float | None = None


class Results(Config):
    """All that a study found."""

    format: Literal[1] = FORMAT
    name: str
    question: str | None = None
    created: str
    """ISO 8601, UTC."""
    machine: Machine = Machine()
    x_label: str | None = None
    """What an axis of difficulty is called, where the study says so."""
    fairness: tuple[str, ...] = ()
    """What was the same for all entries, and what was not, a sentence each."""
    entries: tuple[EntryResult, ...]
    runs: tuple[RunResult, ...]
    summary: tuple[SummaryRow, ...] = ()
    speed: SpeedResult = SpeedResult()
    paper: tuple[PaperRow, ...] = ()

    def entry_of(self, row: SummaryRow) -> EntryResult:
        """The entry of a line of the summary, with what it costs in that variant."""
        entry = next(entry for entry in self.entries if entry.name == row.entry)
        costs = {name: getattr(row, name) for name in COSTS}
        return entry.model_copy(update={name: cost for name, cost in costs.items() if cost is not None})

    @model_validator(mode="after")
    def _runs_are_of_entries(self) -> Self:
        names = {entry.name for entry in self.entries}
        for row in (*self.runs, *self.summary, *self.speed.train, *self.speed.decode, *self.paper):
            if row.entry not in names:
                raise ValueError(f"a figure is of {row.entry!r}, which is not an entry: {', '.join(sorted(names))}")
        return self


def read_results(path: str | Path) -> Results:
    """Read results.json, or that of a study's folder.

    Raises:
        ResultsError: it is not there, or is something else.
    """
    path = Path(path)
    file = path / RESULTS_FILE if path.is_dir() else path
    try:
        return Results.model_validate_json(read_bytes(file))
    except OSError as error:
        raise ResultsError(f"{file} cannot be read: {error.strerror}") from None
    except ValidationError as error:
        detail = error.errors(include_url=False)[0]
        place = "".join(f"{key}." for key in detail["loc"])[:-1]
        raise ResultsError(
            f"{file} does not hold the results of a study: {f'{place}: ' if place else ''}{detail['msg']}"
        ) from None


def write(results: Results, folder: Path) -> Path:
    """Write results.json; an older one is replaced when the new one is whole."""
    return write_file(results.model_dump_json(indent=1) + "\n", folder / RESULTS_FILE)
