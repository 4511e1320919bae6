"""Results of a study, as values.

The values of a run are computed from the `metrics.jsonl` in its folder. FLOPs of training are three times the FLOPs of
the forward passes' matrix products. Seconds are those of training steps: tokens over the median of the logged speeds.
"""

from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from ...registry import Config
from ..statistics.learned import LEARNED
from .config_differences import format_value

FORMAT = 1

Count = Annotated[int, Field(ge=0, lt=2**63)]
"""A count; larger numbers are not measurements and cannot be drawn."""
COSTS = ("parameters", "flops_per_token", "state_bytes")
"""Names of the fields with costs of a model."""
ABSENT = "no option"
"""Value of an accessory of a mixer that has no option for it, and does not declare it as `built_in`."""
AccuracyBy = dict[str, dict[str, float]]
"""Accuracy by name and value of a difficulty, such as {"pairs": {"8": 0.9}}."""
Range = tuple[float, float]
"""Lower and upper end of a range: the lowest and the highest measurement, or the two quartiles."""


def where(variant: Mapping[str, Any]) -> str:
    """Return a variant as text that follows an entry's name, such as " where model.d_model is 64", with YAML values."""
    parts = [f"{path} is {format_value(value)}" for path, value in variant.items()]
    return f" where {', '.join(parts)}" if parts else ""


class Machine(Config):
    """Machine and versions of a computation."""

    processor: str | None = None
    threads: Count | None = None
    device: str | None = None
    precision: str | None = None
    """Dtype of matrix products."""
    python: str | None = None
    torch: str | None = None
    seqmix: str | None = None
    commit: str | None = None


class EntryResult(Config):
    """An entry of a study, in its first variant."""

    name: str
    config: str
    """Resolved configuration of the model, in YAML."""
    mixers: tuple[str, ...]
    """Distinct kinds of mixers, in the order of the layers."""
    matched: str | None = None
    """Cost that was matched, and the knob's value, as text; None if the entry was not matched."""
    parameters: Count
    flops_per_token: float
    """FLOPs of the forward pass's matrix products, per token."""
    state_bytes: Count
    """State bytes of one sequence at the training length."""
    state_grows: bool
    """True if the state grows with the sequence."""


class Difference(Config):
    """Difference of an entry from the study's subject, in one variant."""

    entry: str
    variant: dict[str, Any] = Field(default_factory=dict)
    compared: tuple[str, ...] = ()
    """Thing that the study compares: "the mixer", or names of fields; empty for the subject itself."""
    also: tuple[str, ...] = ()
    """Other fields in which the entry differs from the subject."""
    values: dict[str, str] = Field(default_factory=dict)
    """The entry's value of every field in which some entry of the variant differs from the subject."""


class _Moment(Config):
    step: Count
    tokens: Count
    """Training tokens so far."""
    flops: float
    """FLOPs of training so far."""
    seconds: float
    """Seconds of training steps so far."""


class Point(_Moment):
    """A logged step of training."""

    loss: float
    """Loss of the step's batch, in nats per token."""


class EvaluationPoint(_Moment):
    """An evaluation during training."""

    validation_loss: float
    accuracy: float | None = None


class RunResult(Config):
    """Result of one run."""

    name: str
    """Name of the run and of its folder in runs/."""
    entry: str
    seed: int
    learning_rate: float | None = None
    """Peak learning rate; None before it is chosen."""
    tunes: bool = False
    """True if the run only helped to choose the learning rate."""
    variant: dict[str, Any] = Field(default_factory=dict)
    """Values of the varied fields, by dotted path."""
    precision: str | None = None
    """Dtype of matrix products."""
    sequence_length: Count | None = None
    """Training length in tokens."""
    alone: bool | None = None
    """True if no other run of the study ran at the same time; other programs may have."""
    parameters: Count | None = None
    flops_per_token: float | None = None
    """FLOPs of the forward pass's matrix products, per token."""
    state_bytes: Count | None = None
    """State bytes of one sequence at the training length."""
    status: Literal["finished", "failed", "missing"]
    """Outcome of the run; "missing" if it has not ended or not begun."""
    error: str | None = None
    """Reason of the failure, in one sentence."""
    seconds: float | None = None
    """Seconds of all training steps."""
    tokens_per_second: float | None = None
    """Training tokens per second, median over the logged steps."""
    tokens_per_second_range: Range | None = None
    """Lower and upper quartile of the tokens per second over the logged steps."""
    peak_memory_bytes: Count | None = None
    validation_loss: float | None = None
    """Validation loss of the final evaluation, in nats per token."""
    accuracy: float | None = None
    """Accuracy of the final evaluation, from 0 to 1."""
    accuracy_by: AccuracyBy = Field(default_factory=dict)
    """Accuracy of the final evaluation, by difficulty."""
    validation_loss_by: dict[str, dict[str, float]] = Field(default_factory=dict)
    """Validation loss of slices of the targets, by kind of slice (positions, recall hits) and name of the slice."""
    validation_loss_by_length: dict[str, float] = Field(default_factory=dict)
    """Validation loss by sequence length in tokens, in nats per token."""
    scores: dict[str, dict[str, float]] = Field(default_factory=dict)
    """Scores of lm-eval tasks, by task and metric, as written by `seqmix evaluate --tasks --save`."""
    history: tuple[Point, ...] = ()
    """Logged steps of training."""
    evaluations: tuple[EvaluationPoint, ...] = ()
    """Evaluations, the final one last."""


class Statistic(Config):
    """Mean of a measured value over seeds, with its uncertainty."""

    mean: float
    spread: float | None = None
    """Sample standard deviation; None for a single seed."""
    margin: float | None = None
    """Half the width of the 95 % interval of the mean, whose standard deviation is estimated from all entries; None if
    no entry has two seeds, and where seeds either learn a task or do not."""


class SummaryRow(Config):
    """Statistics over seeds of an entry in a variant, at its best learning rate."""

    entry: str
    variant: dict[str, Any] = Field(default_factory=dict)
    ranks: tuple[Count, Count] | None = None
    """Lowest and highest rank that the entry can have in the variant, by simultaneous intervals of all pairs; None
    without intervals, and for an entry of which a seed failed."""
    learning_rate: float
    at_edge: Literal["lowest", "highest"] | None = None
    """End of the learning rates' grid at which the best rate lies, if any: a rate beyond it may be better."""
    seeds: Count
    """Number of seeds with a finished run."""
    failed: Count = 0
    """Number of seeds whose run failed."""
    learned: Count | None = None
    """Number of seeds that learned the task; None if seeds are not split into those that did and those that did not."""
    learned_interval: Range | None = None
    """Jeffreys' 95 % interval of the probability that a seed learns the task."""
    learning_steps: tuple[Count | None, ...] = ()
    """Steps after which each seed had learned the task, ascending, None for those that did not; empty if not split."""
    parameters: Count | None = None
    """Number of parameters in this variant."""
    flops_per_token: float | None = None
    """FLOPs of the forward pass's matrix products, per token, in this variant."""
    state_bytes: Count | None = None
    """State bytes of one sequence in this variant."""
    tokens_per_second: float | None = None
    """Training tokens per second: of `speed` at the length nearest to the training length, if training was timed with
    all entries interleaved; otherwise of the runs' own steps, the median over seeds."""
    tokens_per_second_range: Range | None = None
    """Lowest and highest timed speed; of the runs' own steps, the lowest lower and highest upper quartile."""
    validation_loss: Statistic
    accuracy: Statistic | None = None
    accuracy_by: dict[str, dict[str, Statistic]] = Field(default_factory=dict)
    validation_loss_by: dict[str, dict[str, Statistic]] = Field(default_factory=dict)
    validation_loss_by_length: dict[str, Statistic] = Field(default_factory=dict)
    scores: dict[str, dict[str, Statistic]] = Field(default_factory=dict)


class TrainSpeedRow(Config):
    """Training speed of an entry at one length."""

    entry: str
    length: Count
    tokens_per_second: float | None = None
    tokens_per_second_range: Range | None = None
    memory_bytes: float | None = None
    """Peak bytes of a step beyond parameters and optimizer."""
    skipped: str | None = None
    """Reason why nothing was measured; None if it was."""


class DecodeSpeedRow(Config):
    """Decoding speed of an entry after one context."""

    entry: str
    context: Count
    """Tokens of the context."""
    seconds: float | None = None
    """Seconds per decoding step, in which every sequence gets one token."""
    seconds_range: Range | None = None
    memory_bytes: float | None = None
    """Peak bytes of a call beyond parameters and state."""
    state_bytes: Count | None = None
    """State bytes of all sequences."""
    skipped: str | None = None
    """Reason why nothing was measured; None if it was."""


class SpeedResult(Config):
    """Speeds of all entries, timed interleaved: medians, with ranges from the lowest to the highest."""

    repeat: Count | None = None
    """Number of timing rounds, over which the medians are taken."""
    threads: Count | None = None
    """CPU threads; None on a GPU."""
    tokens: Count | None = None
    """Maximum tokens of a training step, which has whole sequences."""
    batch: Count | None = None
    """Sequences that are decoded at once."""
    cpu_time: bool = False
    """True if seconds are CPU time."""

    train: tuple[TrainSpeedRow, ...] = ()
    decode: tuple[DecodeSpeedRow, ...] = ()


class PaperRow(Config):
    """A number of a paper and our measurement beside it."""

    label: str
    entry: str
    theirs: float
    ours: float | None = None


class Results(Config):
    """Results of a study, as stored in results.json."""

    format: Literal[1] = FORMAT
    name: str
    question: str | None = None
    created: str
    """Date and time in ISO 8601, UTC."""
    machine: Machine = Machine()
    x_label: str | None = None
    """Label of the x axis in figures of accuracy by difficulty; None for the difficulty's own name."""
    setup: str | None = None
    """Data, optimizer, learning rate, schedule and length of training, in one line; None if unknown."""
    fairness: tuple[str, ...] = ()
    """Sentences on what was the same for all entries and what was not."""
    subject: str | None = None
    """Entry that the question is about; None for the first entry."""
    margin: float | None = None
    """Size up to which a difference of scores does not matter: a share for accuracies, nats per token for losses."""
    learned: float = LEARNED
    """Accuracy from which a seed has learned a task."""
    differences: tuple[Difference, ...] = ()
    """Differences of each entry from the subject, in every variant."""
    entries: tuple[EntryResult, ...]
    runs: tuple[RunResult, ...]
    summary: tuple[SummaryRow, ...] = ()
    speed: SpeedResult = SpeedResult()
    paper: tuple[PaperRow, ...] = ()

    @property
    def about(self) -> str:
        """Name of the entry that the question is about."""
        return self.entries[0].name if self.subject is None else self.subject

    @property
    def first_variant(self) -> dict[str, Any]:
        """The first variant, which the entries' configurations and matched costs are of; empty for a single variant."""
        return self.runs[0].variant if self.runs else {}

    @property
    def learning_rates(self) -> list[float]:
        """All learning rates, tuning included, ascending."""
        return sorted({run.learning_rate for run in self.runs if run.learning_rate is not None})

    def runs_of(self, row: SummaryRow) -> list[RunResult]:
        """Return the finished runs behind a row of the summary."""
        chosen = (row.entry, row.variant, row.learning_rate, "finished", False)
        return [
            run for run in self.runs if (run.entry, run.variant, run.learning_rate, run.status, run.tunes) == chosen
        ]

    def entry_of(self, row: SummaryRow) -> EntryResult:
        """Return the entry of a row of the summary, with its costs in the row's variant."""
        entry = next(entry for entry in self.entries if entry.name == row.entry)
        costs = {name: getattr(row, name) for name in COSTS}
        return entry.model_copy(update={name: cost for name, cost in costs.items() if cost is not None})

    @model_validator(mode="after")
    def _runs_are_of_entries(self) -> Self:
        names = {entry.name for entry in self.entries}
        subject = () if self.subject is None else (Difference(entry=self.subject),)
        rows = (*self.runs, *self.summary, *self.differences, *subject)
        for row in (*rows, *self.speed.train, *self.speed.decode, *self.paper):
            if row.entry not in names:
                raise ValueError(f"unknown entry {row.entry!r}; entries: {', '.join(sorted(names))}")
        return self
