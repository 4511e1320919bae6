"""The configuration of a run: model, data and training."""

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, ValidationInfo, field_validator, model_validator

from ..data.source import DATA, DataConfig, Source
from ..data.tasks.text import TextConfig
from ..models import Checkpointing, ModelConfig
from ..registry import Config, Duration, nearest_hint
from ..registry.config import deprecation
from ..registry.errors import shown

Rate = Annotated[float, Field(ge=0, lt=1)]
"""Decay rate of a running mean, per step."""
LOGGERS = ("tensorboard", "wandb")
"""Names of the built-in loggers."""


def _name_or_path(*names: str) -> BeforeValidator:
    """Return a validator that accepts one of these names, or a dotted path such as my_module:my_function."""

    def check(value: Any) -> Any:
        word = value.get("kind") if isinstance(value, Mapping) else value  # a name is not written as a kind
        module, colon, name = str(word).partition(":")
        if not isinstance(value, str) or (value not in names and not (module and colon and name)):
            remedy = "" if isinstance(value, str) else "; write only the name"
            raise ValueError(
                f"expected {', '.join(names)}, or a path such as my_module:name, got {shown(value)}{remedy}"
                f"{nearest_hint(str(word), names)}"
            )
        return value

    return BeforeValidator(check)


class TrainingConfig(Config):
    """Optimizer, schedule, evaluation and checkpoints."""

    start_from: str | None = Field(default=None, min_length=1)
    """Path of weights to start from, instead of random ones: a run directory (`seqmix convert` writes one too), a file
    of `seqmix export`, or a folder for Hugging Face. You may then leave out `model`, and the tokenizer of a text: both
    come from that path."""
    steps: int = Field(gt=0, le=2**31)
    """Optimizer steps."""
    batch_size: int = Field(gt=0, le=2**20)
    """Sequences per optimizer step, over all processes and micro-batches."""
    grad_accum_steps: int = Field(default=1, gt=0)
    """Micro-batches per optimizer step (gradient accumulation); changes memory, not the result."""
    learning_rate: float = Field(gt=0)
    """Peak learning rate."""
    schedule: Annotated[str, _name_or_path("linear", "cosine", "constant", "wsd")] = "linear"
    """Learning rate schedule after warm-up: `linear`, `cosine`, `constant`, or `wsd` (warm-up, stable, decay), which
    stays at the peak and falls linearly over the last decay_steps. Or the path of a function, my_module:schedule: it is
    called with the step (from 0) and this configuration, and returns the learning rate as a fraction of the peak, for
    warm-up too."""
    warmup_steps: int = Field(default=0, ge=0)
    """Steps over which the learning rate rises linearly to its peak; at most the length of the run."""
    decay_steps: int | None = Field(default=None, gt=0)
    """Length of the final decay of schedule wsd, in steps."""
    final_lr_ratio: float = Field(default=0.0, ge=0, le=1)
    """Final learning rate as a fraction of the peak."""
    optimizer: Annotated[str, _name_or_path("adamw", "muon", "normuon")] = "adamw"
    """`adamw`; or `muon`: Muon for matrices, with steps scaled to those of AdamW, and AdamW for all other parameters;
    or `normuon`, which also normalises the rows of a step. Or the path of a class or function that is called with
    parameter groups and `lr`: torch.optim:SGD."""
    optimizer_options: dict[str, Any] = Field(default_factory=dict)
    """Further keyword arguments for an optimizer given by path."""
    muon_momentum: Rate = 0.95
    """Momentum of Muon."""
    muon_split: Literal["projections", "heads"] = "projections"
    """Matrices that Muon orthogonalises separately: the `projections` that share one weight matrix (queries, keys,
    values, output gate), or each of their `heads`."""
    weight_decay: float = Field(default=0.05, ge=0)
    """Weight decay of matrices and embeddings; rates, norms, convolutions and other vectors are not decayed."""
    betas: tuple[Rate, Rate] = Field(default=(0.9, 0.98), strict=False)
    """Decay rates of AdamW's first and second moment."""
    clip_norm: float | None = Field(default=2.0, gt=0)
    """Maximum gradient norm (gradient clipping); null for no limit."""
    skip_nonfinite: bool = False
    """Skip and count a step whose loss or gradient is NaN or infinite, instead of ending the run. More than ten such
    steps in a row still end it."""
    max_grad_norm_spike: float | None = Field(default=None, gt=1)
    """Skip and count a step whose gradient norm exceeds this many times the median of the last 64 norms. Skipped steps
    do not enter the median, and nothing is skipped before it has 16 norms. Null for no limit."""
    ema: float | None = Field(default=None, gt=0, lt=1)
    """Decay per step, such as 0.999, of an exponential moving average of the parameters, which checkpoints store beside
    the parameters; null for no average."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """Precision of matrix products: `bfloat16` is autocast with float32 parameters. `auto` depends on the device alone:
    bfloat16 on a CUDA device that supports it and on a CPU with bfloat16 instructions (AVX-512-BF16), else float32."""
    compile: bool = False
    """Compile each kind of block with `torch.compile` (fullgraph)."""
    activation_checkpointing: Checkpointing = False
    """Recompute the activations of each block in the backward pass: a third more compute, and only the blocks' inputs
    stay in memory. `matmuls` also keeps the results of linear layers, and recomputes the rest."""
    evaluate_every: int = Field(default=100, gt=0)
    """Steps between evaluations."""
    evaluation_batches: int = Field(default=16, gt=0)
    """Batches per evaluation, spread evenly over the validation split."""
    final_evaluation_batches: int | None = Field(default=None, gt=0)
    """Batches of the final evaluation; null for the whole validation split."""
    evaluation_lengths: tuple[Annotated[int, Field(gt=0, le=2**31)], ...] = ()
    """Sequence lengths at which evaluations also measure the loss, besides data.sequence_length."""
    patience: int | None = Field(default=None, gt=0)
    """Early stopping: end training after this many evaluations without improvement; null to disable."""
    max_time: Duration | None = None
    """Time budget, such as 30m, 1h30m or 90 (seconds), counted from the start or resumption of the run. The step during
    which it ends is the last; an evaluation and a checkpoint follow. The schedule depends on steps only: it is cut off,
    and a resumed run continues it."""
    carry_state: bool = False
    """Continue the text of the previous step from its final state (truncated backpropagation through time). Every mixer
    needs a state of constant size."""
    checkpoint_every: int = Field(default=500, gt=0)
    """Steps between checkpoints."""
    keep_checkpoints: int = Field(default=2, gt=0)
    """Number of newest checkpoints to keep; older ones are deleted."""
    keep_best: bool = True
    """Write a checkpoint after each evaluation that is the best so far, and keep the best one."""
    log_every: int = Field(default=10, gt=0)
    """Steps between lines of metrics."""
    loggers: tuple[Annotated[str, _name_or_path(*LOGGERS)], ...] = ()
    """Loggers that receive metrics besides metrics.jsonl: `tensorboard`, `wandb`, or the path of a class,
    my_module:MyLogger."""

    @field_validator("learning_rate", mode="before")
    @classmethod
    def _learning_rate_is_one_number(cls, rate: Any) -> Any:
        if isinstance(rate, list | tuple):
            raise ValueError(
                f"expected one number, got {shown(rate)}: a study chooses among several with "
                "tune: {learning_rate: [1e-3, 3e-3]}"
            )
        return rate

    @field_validator("grad_accum_steps")
    @classmethod
    def _micro_batches_are_equal(cls, steps: int, info: ValidationInfo) -> int:
        if (batch_size := info.data.get("batch_size")) is not None and batch_size % steps:
            raise ValueError(f"expected grad_accum_steps to divide batch_size = {batch_size}, got {steps}")
        return steps

    @model_validator(mode="before")
    @classmethod
    def _tensorboard_is_a_logger(cls, value: Any) -> Any:
        if not isinstance(value, Mapping) or not isinstance(value.get("tensorboard"), bool):
            return value
        rest = {name: entry for name, entry in value.items() if name != "tensorboard"}
        if value["tensorboard"]:
            warnings.warn(deprecation("tensorboard", "loggers: [tensorboard]"), FutureWarning, stacklevel=2)
            rest["loggers"] = (*rest.get("loggers", ()), "tensorboard")
        return rest

    @model_validator(mode="after")
    def _fields_fit(self) -> Self:
        if (self.schedule == "wsd") != (self.decay_steps is not None):
            raise ValueError(
                "schedule wsd needs decay_steps: set it to the length of the final decay, in steps"
                if self.schedule == "wsd"
                else f"decay_steps requires schedule wsd, got {self.schedule}: leave out decay_steps"
            )
        if self.compile and self.activation_checkpointing == "matmuls":
            raise ValueError(
                "activation_checkpointing = matmuls does not work with compiled blocks: set activation_checkpointing "
                "to true, or compile to false"
            )
        if self.optimizer_options and ":" not in self.optimizer:
            raise ValueError(
                f"optimizer_options require an optimizer given by path, got {self.optimizer}: leave them out"
            )
        return self

    @property
    def phases(self) -> tuple[int, int]:
        """Number of steps of the warm-up, and of the final decay of schedule wsd (0 for other schedules).

        If the run is too short for both, the warm-up is shortened first.
        """
        decay = min(self.decay_steps or 0, self.steps)
        return min(self.warmup_steps, self.steps - decay), decay

    @property
    def shortening_notes(self) -> list[str]:
        """One sentence per phase of the schedule that was shortened to fit the run."""
        requested = (("warmup_steps", self.warmup_steps), ("decay_steps", self.decay_steps or 0))
        return [
            f"training.{name} = {steps} is shortened to {actual}, since training.steps is {self.steps}"
            for (name, steps), actual in zip(requested, self.phases, strict=True)
            if actual < steps and ":" not in self.schedule
        ]


class DistributedConfig(Config):
    """Parallelism over the data x shard x context_parallel processes that `torchrun` starts."""

    data: int = Field(default=1, gt=0)
    """Replicas of the model; each is sharded, and gradients are reduced over all replicas (hybrid sharding)."""
    shard: int | None = Field(default=None, gt=0)
    """Processes that share the parameters, gradients and optimizer state of a replica (FSDP), each with its own
    sequences; null for all processes that remain after data and context_parallel."""
    context_parallel: int = Field(default=1, gt=0)
    """Processes that share each sequence, one segment per process; parameters are sharded over them too."""
    gather_dtype: Literal["float32", "bfloat16"] = "float32"
    """Dtype in which parameters are gathered. `bfloat16` halves the traffic and memory of gathered parameters, and
    rounds all of them to 8 significant bits, decays and norms too. Gradients are always reduced in float32."""
    gather_once: bool = False
    """Gather parameters once per step, and reduce gradients once, instead of once per micro-batch
    (training.grad_accum_steps). Each process then holds the whole model and all of its gradients."""
    timeout: int = Field(default=1800, gt=0, le=7 * 24 * 3600)
    """Seconds that a process waits for another one before the run ends with an error that names the step."""


class RunConfig(Config):
    """A run: seed, model, data, training and parallelism."""

    seed: int = Field(default=0, ge=0, lt=2**31)
    """Random seed; initial parameters, data order and dropout are a function of it."""
    model: ModelConfig
    """Architecture of the model."""
    data: Annotated[DataConfig, DATA] = TextConfig()
    """Training and validation data."""
    training: TrainingConfig
    """Optimizer, schedule, evaluation and checkpoints."""
    distributed: DistributedConfig = DistributedConfig()
    """Parallelism over processes."""

    @model_validator(mode="after")
    def _parts_fit(self) -> Self:
        carry_state = self.training.carry_state
        data = self.data
        processes = self.distributed.context_parallel
        packed = isinstance(data, TextConfig) and data.packing
        if carry_state and data.sequence_length % processes:
            raise ValueError(
                f"training.carry_state needs segments of equal length, but distributed.context_parallel = {processes} "
                f"does not divide data.sequence_length = {data.sequence_length}: choose a multiple of {processes}"
            )
        if self.distributed.gather_dtype == "bfloat16" and self.training.precision != "bfloat16":
            raise ValueError(
                "distributed.gather_dtype = bfloat16 needs matrix products in bfloat16: set training.precision to "
                "bfloat16"
            )
        data.require_fit(self.model.vocab_size)
        if self.model.readout != data.readout:
            raise ValueError(
                f"data.kind {data.kind} needs model.readout = {data.readout}, got {self.model.readout}: set it to "
                f"{data.readout}"
            )
        if carry_state and not data.is_text:
            raise ValueError(
                f"training.carry_state needs data.kind text, got {data.kind}: set training.carry_state to false"
            )
        if self.training.evaluation_lengths and not data.is_text:
            raise ValueError(
                f"training.evaluation_lengths needs data.kind text, got {data.kind}: leave out evaluation_lengths"
            )
        if carry_state and packed:
            raise ValueError(
                "training.carry_state carries the state across document boundaries, but data.packing resets it there: "
                "set one of them to false"
            )
        if carry_state and isinstance(data, TextConfig) and data.order == "epochs":
            raise ValueError(
                "training.carry_state reads the text in its original order, but data.order is epochs: leave out "
                "data.order, or set training.carry_state to false"
            )
        for name in dict.fromkeys(self.model.layers):
            mixer = self.model.blocks[name].mixer
            if carry_state and mixer.traits.state == "growing":
                raise ValueError(
                    f"training.carry_state needs mixers whose state has a constant size; the state of "
                    f"model.blocks.{name}.mixer ({mixer.kind}) grows with the text: set training.carry_state to false, "
                    "or choose another mixer"
                )
            if packed and not mixer.traits.packing:
                raise ValueError(
                    f"data.packing needs mixers that support packing, and {mixer.kind} of model.blocks.{name} does "
                    "not: set data.packing to false, or choose another mixer"
                )
        return self

    def open_data(self, run: Path | None = None) -> Source:
        """Open the source of batches for this run.

        Args:
            run: the run directory; its copy of a tokenizer takes precedence over `data.tokenizer`.

        Raises:
            SeqmixError: the data cannot be opened, or are too short.
        """
        source = self.data.open(self.model.vocab_size, run)
        for length in self.training.evaluation_lengths:
            source.require_evaluation_length(length)
        return source.contiguous(self.training.batch_size) if self.training.carry_state else source
