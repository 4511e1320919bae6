"""The configuration of a run: a model, what it learns, and how."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, ValidationInfo, field_validator, model_validator

from ..data.kinds.text import TextConfig
from ..data.source import DATA, DataConfig, Source
from ..models import ModelConfig
from ..registry import Config, load

PRESETS = Path(__file__).resolve().parent.parent / "configs"
"""The folder of the presets."""

Rate = Annotated[float, Field(ge=0, lt=1)]
"""How much of a running mean is kept at a step."""


class TrainingConfig(Config):
    """How a model is trained."""

    deprecated_names = {"accumulate": "grad_accum_steps", "checkpoint_activations": "activation_checkpointing"}  # noqa: RUF012

    steps: int = Field(gt=0)
    """Optimizer steps."""
    batch_size: int = Field(gt=0)
    """Sequences an optimizer step."""
    grad_accum_steps: int = Field(default=1, gt=0)
    """Micro-batches that a batch is computed in, one after another (gradient accumulation); changes memory, not the
    result."""
    learning_rate: float = Field(gt=0)
    """Peak learning rate."""
    schedule: Literal["linear", "cosine", "constant", "wsd"] = "linear"
    """How the learning rate falls after the warm-up; `wsd` (warm-up, stable, decay) keeps the peak until the last
    decay_steps, over which it falls linearly."""
    warmup_steps: int = Field(default=0, ge=0)
    """Steps over which the learning rate rises."""
    decay_steps: int | None = Field(default=None, gt=0)
    """Last steps, over which the learning rate of schedule wsd falls."""
    final_lr_ratio: float = Field(default=0.0, ge=0, le=1)
    """The last learning rate over the peak."""
    optimizer: Literal["adamw", "muon"] = "adamw"
    """`muon` moves the matrices of blocks by Muon, scaled to AdamW's steps, and the rest by AdamW."""
    muon_momentum: Rate = 0.95
    """Muon's momentum."""
    weight_decay: float = Field(default=0.05, ge=0)
    """Decay of matrices; vectors have none."""
    betas: tuple[Rate, Rate] = Field(default=(0.9, 0.98), strict=False)
    """AdamW's decay rates of its two moments."""
    clip_norm: float | None = Field(default=2.0, gt=0)
    """Largest norm of the gradient; null for no limit."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """`bfloat16` is autocast (parameters stay float32); `auto` takes it on a CUDA device that has it."""
    compile: bool = False
    """Whether each kind of block is compiled (fullgraph)."""
    activation_checkpointing: bool = False
    """Whether the backward pass recomputes the activations of each block: a third more work, and memory for the blocks'
    inputs only."""
    evaluate_every: int = Field(default=100, gt=0)
    """Steps between evaluations."""
    evaluation_batches: int = Field(default=16, gt=0)
    """Batches of an evaluation, spread evenly over the validation text."""
    final_evaluation_batches: int | None = Field(default=None, gt=0)
    """Batches of the last evaluation; null for the whole validation text."""
    evaluation_lengths: tuple[Annotated[int, Field(gt=0, le=2**31)], ...] = ()
    """Sequence lengths at which evaluations measure the loss besides data.sequence_length."""
    patience: int | None = Field(default=None, gt=0)
    """Evaluations without a better loss after which training ends; null for all steps."""
    carry_state: bool = False
    """Whether a step goes on in the text where the one before ended, with its state (truncated backpropagation through
    time); every mixer needs a state of constant size."""
    checkpoint_every: int = Field(default=500, gt=0)
    """Steps between checkpoints."""
    keep_checkpoints: int = Field(default=2, gt=0)
    """Newest checkpoints that are kept."""
    keep_best: bool = True
    """Whether an evaluation that is the best so far is followed by a checkpoint, and that of the best one is kept."""
    log_every: int = Field(default=10, gt=0)
    """Steps between lines of metrics."""
    tensorboard: bool = False
    """Whether metrics are written for TensorBoard too, to RUN/tensorboard."""

    @field_validator("grad_accum_steps")
    @classmethod
    def _micro_batches_are_equal(cls, steps: int, info: ValidationInfo) -> int:
        if (batch_size := info.data.get("batch_size")) is not None and batch_size % steps:
            raise ValueError(f"grad_accum_steps must divide batch_size, and {steps} does not divide {batch_size}")
        return steps

    @field_validator("warmup_steps")
    @classmethod
    def _warmup_fits(cls, warmup_steps: int, info: ValidationInfo) -> int:
        if (steps := info.data.get("steps")) is not None and warmup_steps > steps:
            raise ValueError(f"warmup_steps must be at most steps, and {warmup_steps} is above {steps}")
        return warmup_steps

    @model_validator(mode="after")
    def _wsd_has_a_decay(self) -> Self:
        if (self.schedule == "wsd") != (self.decay_steps is not None):
            raise ValueError(
                "schedule wsd needs decay_steps, the number of its last steps, over which the learning rate falls"
                if self.schedule == "wsd"
                else f"decay_steps belongs to schedule wsd, and the schedule is {self.schedule}"
            )
        if self.warmup_steps + (self.decay_steps or 0) > self.steps:
            raise ValueError(
                f"warmup_steps and decay_steps must fit into steps, and "
                f"{self.warmup_steps} + {self.decay_steps} is above {self.steps}"
            )
        return self


class DistributedConfig(Config):
    """How the processes that `torchrun` starts share the work: data x shard x context_parallel of them."""

    deprecated_names = {"context": "context_parallel"}  # noqa: RUF012

    data: int = Field(default=1, gt=0)
    """Copies of the model, each sharded by itself; gradients are added up over them (hybrid sharding)."""
    shard: int | None = Field(default=None, gt=0)
    """Processes that parameters, gradients and moments of a copy are sharded over, each with sequences of its own;
    what data and context_parallel leave of all processes when null."""
    context_parallel: int = Field(default=1, gt=0)
    """Processes that share each sequence, a segment each; parameters are sharded over them too."""


class RunConfig(Config):
    """A run."""

    seed: int = Field(default=0, ge=0, lt=2**31)
    """Parameters, order of the data and dropout are a function of it."""
    model: ModelConfig
    """What is trained."""
    data: Annotated[DataConfig, DATA] = TextConfig()
    """What it learns."""
    training: TrainingConfig
    """How."""
    distributed: DistributedConfig = DistributedConfig()
    """By which processes."""

    @model_validator(mode="after")
    def _parts_fit(self) -> Self:
        carried, data, processes = self.training.carry_state, self.data, self.distributed.context_parallel
        packed = isinstance(data, TextConfig) and data.packing
        if carried and data.sequence_length % processes:
            raise ValueError(
                f"training.carry_state needs segments of one length, and distributed.context_parallel = {processes} "
                f"does not divide data.sequence_length = {data.sequence_length}"
            )
        data.require_fit(self.model.vocab_size)
        if carried and not data.is_text:
            raise ValueError(f"training.carry_state goes on in a text, and data.kind is {data.kind}")
        if self.training.evaluation_lengths and not data.is_text:
            raise ValueError(f"training.evaluation_lengths are those of a text, and data.kind is {data.kind}")
        if carried and packed:
            raise ValueError("data.packing starts every document from nothing, and training.carry_state does not")
        if carried and isinstance(data, TextConfig) and data.order == "epochs":
            raise ValueError("training.carry_state reads text in its own order, and data.order epochs is another")
        for name in dict.fromkeys(self.model.layers):
            mixer = self.model.blocks[name].mixer
            if carried and mixer.traits.state == "growing":
                raise ValueError(
                    f"training.carry_state needs mixers whose state has a constant size, and that of "
                    f"model.blocks.{name}.mixer ({mixer.kind}) grows with the text"
                )
            if packed and not mixer.traits.packing:
                raise ValueError(
                    f"data.packing needs mixers that declare packing, and {mixer.kind} of model.blocks.{name} does "
                    "not: set data.packing to false, or take another mixer"
                )
        return self

    def open_data(self, run: Path | None = None) -> Source:
        """The source of batches, fit for what training asks of it.

        Args:
            run: the run's folder, whose own copy of a vocabulary is taken where there is one.

        Raises:
            SeqmixError: the data cannot be had, or are too short.
        """
        source = self.data.open(self.model.vocab_size, run)
        for length in self.training.evaluation_lengths:
            source.require_evaluation_length(length)
        return source.contiguous(self.training.batch_size) if self.training.carry_state else source


def load_config(source: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read the configuration of a run.

    Args:
        source: the name of a preset, or a YAML file.
        overrides: changes (or one) as "dotted.path=value", the value in YAML.

    Raises:
        ConfigError: what is wrong, where, and what is allowed, in one sentence.
    """
    return load(RunConfig, source, [overrides] if isinstance(overrides, str) else overrides, presets=PRESETS)
