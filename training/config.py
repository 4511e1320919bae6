"""The configuration of a run: model, data and training."""

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, Field, ValidationInfo, field_validator, model_validator

from ..data.kinds.text import TextConfig
from ..data.source import DATA, DataConfig, Source
from ..models import Checkpointing, ModelConfig
from ..registry import Config, nearest
from ..registry.config import deprecation

Rate = Annotated[float, Field(ge=0, lt=1)]
"""Decay rate of a running mean, per step."""
LOGGERS = ("tensorboard", "wandb")
"""Loggers that come with the library."""


def _name_or_path(*names: str) -> AfterValidator:
    """One of these names, or a dotted path such as my_module:my_function."""

    def check(given: str) -> str:
        module, colon, name = given.partition(":")
        if given not in names and not (module and colon and name):
            raise ValueError(f"allowed: {', '.join(names)}, or a path such as my_module:name{nearest(given, names)}")
        return given

    return AfterValidator(check)


class TrainingConfig(Config):
    """Optimizer, schedule, evaluation and checkpoints."""

    deprecated_names = {"accumulate": "grad_accum_steps", "checkpoint_activations": "activation_checkpointing"}  # noqa: RUF012

    start_from: str | None = Field(default=None, min_length=1)
    """Weights that training starts from, instead of random ones: a run directory (`seqmix convert` writes one too), a
    file of `seqmix export`, or a folder of `seqmix.hf`. `model`, and the tokenizer of a text, may then be left out."""
    steps: int = Field(gt=0)
    """Optimizer steps."""
    batch_size: int = Field(gt=0)
    """Sequences per optimizer step, over all processes and micro-batches."""
    grad_accum_steps: int = Field(default=1, gt=0)
    """Micro-batches per optimizer step (gradient accumulation); changes memory, not the result."""
    learning_rate: float = Field(gt=0)
    """Peak learning rate."""
    schedule: Annotated[str, _name_or_path("linear", "cosine", "constant", "wsd")] = "linear"
    """Learning rate schedule after warm-up: `linear`, `cosine`, `constant`, or `wsd` (warm-up, stable, decay), which
    stays at the peak until the last decay_steps, over which it falls linearly. Or the path of a function of the step,
    from 0, and this configuration, which returns the whole schedule's factor of the peak: my_module:schedule."""
    warmup_steps: int = Field(default=0, ge=0)
    """Steps over which the learning rate rises linearly; as many as the run has, if it is shorter."""
    decay_steps: int | None = Field(default=None, gt=0)
    """Length of the final decay of schedule wsd, in steps."""
    final_lr_ratio: float = Field(default=0.0, ge=0, le=1)
    """Final learning rate as a fraction of the peak."""
    optimizer: Annotated[str, _name_or_path("adamw", "muon")] = "adamw"
    """`adamw`, or `muon`, which updates the matrices of blocks with Muon, scaled to AdamW's steps, and the rest with
    AdamW. Or the path of a class or function, called with parameter groups and `lr`: torch.optim:SGD."""
    optimizer_options: dict[str, Any] = Field(default_factory=dict)
    """Further arguments of an optimizer that is given by path."""
    muon_momentum: Rate = 0.95
    """Muon's momentum."""
    weight_decay: float = Field(default=0.05, ge=0)
    """Weight decay of matrices; vectors are not decayed."""
    betas: tuple[Rate, Rate] = Field(default=(0.9, 0.98), strict=False)
    """AdamW's decay rates of the first and second moment."""
    clip_norm: float | None = Field(default=2.0, gt=0)
    """Maximum gradient norm (gradient clipping); null for no limit."""
    skip_nonfinite: bool = False
    """Whether a step whose loss or gradient is not finite is skipped and counted, instead of ending the run; more than
    ten in a row still end it."""
    max_grad_norm_spike: float | None = Field(default=None, gt=1)
    """Skip and count a step whose gradient norm is more than this many times the median of the last 64 steps that were
    taken, from the 17th on; null for no limit."""
    ema: float | None = Field(default=None, gt=0, lt=1)
    """Decay per step of an exponential moving average of the parameters (0.999, say), which checkpoints then have
    beside them; null for none."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """Mixed precision: `bfloat16` is autocast with float32 parameters; `auto` takes it on a CUDA device that has it. On
    a CPU `seqmix train` takes it where a trial finds it faster, says so, and writes it into the run's config.yaml."""
    compile: bool = False
    """Whether each kind of block is compiled with `torch.compile` (fullgraph)."""
    activation_checkpointing: Checkpointing = False
    """Whether the backward pass recomputes the activations of each block: a third more compute, and memory for the
    blocks' inputs only. `matmuls` keeps the results of linear layers too and recomputes all else."""
    evaluate_every: int = Field(default=100, gt=0)
    """Steps between evaluations."""
    evaluation_batches: int = Field(default=16, gt=0)
    """Batches per evaluation, spread evenly over the validation split."""
    final_evaluation_batches: int | None = Field(default=None, gt=0)
    """Batches of the final evaluation; null for the whole validation split."""
    evaluation_lengths: tuple[Annotated[int, Field(gt=0, le=2**31)], ...] = ()
    """Further sequence lengths at which evaluations measure the loss, besides data.sequence_length."""
    patience: int | None = Field(default=None, gt=0)
    """Early stopping: evaluations without improvement after which training ends; null for never."""
    carry_state: bool = False
    """Whether each step continues the text of the previous step with its state (truncated backpropagation through
    time); every mixer needs a state of constant size."""
    checkpoint_every: int = Field(default=500, gt=0)
    """Steps between checkpoints."""
    keep_checkpoints: int = Field(default=2, gt=0)
    """Newest checkpoints that are retained; older ones are deleted."""
    keep_best: bool = True
    """Whether the best evaluation so far is followed by a checkpoint, which is retained."""
    log_every: int = Field(default=10, gt=0)
    """Steps between lines of metrics."""
    loggers: tuple[Annotated[str, _name_or_path(*LOGGERS)], ...] = ()
    """Where metrics go besides metrics.jsonl: `tensorboard`, `wandb`, or the path of a class, my_module:MyLogger."""

    @field_validator("grad_accum_steps")
    @classmethod
    def _micro_batches_are_equal(cls, steps: int, info: ValidationInfo) -> int:
        if (batch_size := info.data.get("batch_size")) is not None and batch_size % steps:
            raise ValueError(f"grad_accum_steps must divide batch_size; {steps} does not divide {batch_size}")
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
                "schedule wsd needs decay_steps, the length of its final decay"
                if self.schedule == "wsd"
                else f"decay_steps is for schedule wsd, not for {self.schedule}"
            )
        if self.compile and self.activation_checkpointing == "matmuls":
            raise ValueError(
                "activation_checkpointing = matmuls does not see into compiled blocks: set it or compile otherwise"
            )
        if self.optimizer_options and ":" not in self.optimizer:
            raise ValueError(f"optimizer_options are for an optimizer given by path, not for {self.optimizer}")
        return self

    @property
    def phases(self) -> tuple[int, int]:
        """Steps of warm-up and of wsd's decay; a run that is shorter than both keeps the decay."""
        decay = min(self.decay_steps or 0, self.steps)
        return min(self.warmup_steps, self.steps - decay), decay

    @property
    def shortened(self) -> list[str]:
        """A sentence for each phase of the schedule that is longer than the run leaves room for."""
        asked = (("warmup_steps", self.warmup_steps), ("decay_steps", self.decay_steps or 0))
        return [
            f"training.{name} = {steps} is shortened to {left}, since training.steps is {self.steps}"
            for (name, steps), left in zip(asked, self.phases, strict=True)
            if left < steps and ":" not in self.schedule
        ]


class DistributedConfig(Config):
    """Parallelism over the processes that `torchrun` starts: data x shard x context_parallel of them."""

    deprecated_names = {"context": "context_parallel"}  # noqa: RUF012

    data: int = Field(default=1, gt=0)
    """Replicas of the model, each sharded; gradients are reduced over them (hybrid sharding)."""
    shard: int | None = Field(default=None, gt=0)
    """Processes that parameters, gradients and optimizer state are sharded over (FSDP), each with its own sequences;
    null takes all processes that data and context_parallel leave."""
    context_parallel: int = Field(default=1, gt=0)
    """Processes that each sequence is split over, one segment per process; parameters are sharded over them too."""
    gather_dtype: Literal["float32", "bfloat16"] = "float32"
    """The dtype that parameters are gathered in. `bfloat16` halves what that sends and holds, and rounds all of them to
    8 bits, decays and norms too; gradients are reduced in float32."""
    gather_once: bool = False
    """Whether parameters are gathered once per step and gradients reduced once, whatever training.grad_accum_steps is:
    each process then holds all of the model and of its gradients."""
    timeout: int = Field(default=1800, gt=0, le=7 * 24 * 3600)
    """Seconds that a process waits for another one before the run ends and names the step."""


class RunConfig(Config):
    """A run."""

    seed: int = Field(default=0, ge=0, lt=2**31)
    """Initial parameters, data order and dropout are a function of it."""
    model: ModelConfig
    """The model."""
    data: Annotated[DataConfig, DATA] = TextConfig()
    """The training data."""
    training: TrainingConfig
    """How the model is trained."""
    distributed: DistributedConfig = DistributedConfig()
    """Parallelism over processes."""

    @model_validator(mode="after")
    def _parts_fit(self) -> Self:
        carried = self.training.carry_state
        data = self.data
        processes = self.distributed.context_parallel
        packed = isinstance(data, TextConfig) and data.packing
        if carried and data.sequence_length % processes:
            raise ValueError(
                f"training.carry_state needs segments of equal length, and distributed.context_parallel = {processes} "
                f"does not divide data.sequence_length = {data.sequence_length}"
            )
        if self.distributed.gather_dtype == "bfloat16" and self.training.precision != "bfloat16":
            raise ValueError(
                "distributed.gather_dtype = bfloat16 needs products in bfloat16: set training.precision to bfloat16"
            )
        data.require_fit(self.model.vocab_size)
        if self.model.readout != data.readout:
            raise ValueError(f"data.kind {data.kind} needs model.readout: {data.readout}")
        if carried and not data.is_text:
            raise ValueError(f"training.carry_state needs a text, and data.kind is {data.kind}")
        if self.training.evaluation_lengths and not data.is_text:
            raise ValueError(f"training.evaluation_lengths needs a text, and data.kind is {data.kind}")
        if carried and packed:
            raise ValueError("data.packing resets the state at document boundaries, and training.carry_state does not")
        if carried and isinstance(data, TextConfig) and data.order == "epochs":
            raise ValueError("training.carry_state reads the text in its own order, so data.order cannot be epochs")
        for name in dict.fromkeys(self.model.layers):
            mixer = self.model.blocks[name].mixer
            if carried and mixer.traits.state == "growing":
                raise ValueError(
                    f"training.carry_state needs mixers whose state has a constant size; the state of "
                    f"model.blocks.{name}.mixer ({mixer.kind}) grows with the text"
                )
            if packed and not mixer.traits.packing:
                raise ValueError(
                    f"data.packing needs mixers that declare packing, and {mixer.kind} of model.blocks.{name} does "
                    "not: set data.packing to false, or choose another mixer"
                )
        return self

    def open_data(self, run: Path | None = None) -> Source:
        """The source of batches for this training configuration.

        Args:
            run: the run directory; its own copy of a tokenizer takes precedence.

        Raises:
            SeqmixError: the data cannot be opened, or are too short.
        """
        source = self.data.open(self.model.vocab_size, run)
        for length in self.training.evaluation_lengths:
            source.require_evaluation_length(length)
        return source.contiguous(self.training.batch_size) if self.training.carry_state else source
