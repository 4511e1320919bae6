"""The configuration of a run: a model, the text it learns, and how."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, ValidationInfo, field_validator, model_validator

from ..models import ByteTokenizer, ModelConfig
from ..registry import Config, load

PRESETS = Path(__file__).resolve().parent.parent / "configs"
"""The folder of the presets."""


class DatasetConfig(Config):
    """A data set of Hugging Face `datasets`: each row is a document."""

    path: str = Field(min_length=1)
    """A folder that `save_to_disk` wrote, or what `load_dataset` takes: a name on the hub, or a folder."""
    name: str | None = None
    """The data set's own configuration, where it has several."""
    split: str = Field(default="train", min_length=1)
    """Which of the data set's splits is read; what is held out of it is `data.split`'s choice."""
    streaming: bool = False
    """Whether rows are fetched as they are read, and nothing is kept on disk."""
    documents: int | None = Field(default=None, gt=0)
    """Rows that are read at most, from the first on; null for all."""


class DataConfig(Config):
    """The text, as documents; each is opened by a begin token."""

    paths: tuple[Annotated[str, Field(min_length=1)], ...] | None = Field(default=None, min_length=1)
    """Files and folders: text, JSON lines (.jsonl), or token files (.tokens) that `seqmix tokenize` wrote; null takes
    the source of Python's own standard library, which every machine has."""
    dataset: DatasetConfig | None = None
    """A data set in place of paths."""
    glob: str = "**/*"
    """Which files of a folder are read; hidden files never are."""
    text_field: str | None = Field(default="text", min_length=1)
    """The field of a JSON line or of a data set's row that holds the text; null reads .jsonl files as plain text."""
    tokenizer: str = Field(default="bytes", min_length=1)
    """`bytes`, or a tokenizer.json of Hugging Face; a token behind its last one opens documents."""
    split: Literal["auto", "by_document", "by_file", "tail"] = "auto"
    """`by_document` holds out whole documents, chosen by a hash of their text, so that a document and its exact copies
    lie on one side; `by_file` whole files, by a hash of their names; `tail` the end of every document; `auto` is tail
    where there is one document, by_file where all are text files, else by_document."""
    validation_fraction: float = Field(default=0.1, gt=0, lt=1)
    """Share of the documents or files (or of every document) held out."""
    sequence_length: int = Field(default=256, gt=0, le=2**31)
    """Tokens of a sequence."""
    packing: bool = False
    """Whether every document of a sequence starts from nothing: no state crosses a border. Needs mixers that declare
    packing. Otherwise a sequence is read through, and only the prediction of a begin token is left out."""
    order: Literal["random_windows", "epochs"] = "random_windows"
    """`random_windows` cuts sequences from random places, anew in every step; `epochs` cuts the text into sequences
    once and takes each once an epoch, in an order of its own."""

    @field_validator("glob")
    @classmethod
    def _glob_is_relative(cls, glob: str) -> str:
        try:
            list(Path("/nonexistent").glob(glob))
        except (ValueError, NotImplementedError, IndexError) as error:
            raise ValueError(
                f"glob is a pattern such as **/*.txt, relative to the folder; {glob!r} is none: {error}"
            ) from error
        return glob

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if self.dataset is None:
            return self
        if self.paths is not None:
            raise ValueError("paths and dataset are two sources: give one of them")
        if self.text_field is None:
            raise ValueError("text_field names the field of a dataset's rows that holds the text, and is null")
        if self.split == "by_file":
            raise ValueError("split by_file holds out files, and a dataset has none: by_document holds out its rows")
        return self


class TrainingConfig(Config):
    """How a model is trained."""

    steps: int = Field(gt=0)
    """Optimizer steps."""
    batch_size: int = Field(gt=0)
    """Sequences an optimizer step."""
    accumulate: int = Field(default=1, gt=0)
    """Parts that a batch is computed in, one after another; changes memory, not the result."""
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
    muon_momentum: float = Field(default=0.95, ge=0, lt=1)
    """Muon's momentum."""
    weight_decay: float = Field(default=0.05, ge=0)
    """Decay of matrices; vectors have none."""
    betas: tuple[float, float] = Field(default=(0.9, 0.98), strict=False)
    """AdamW's decay rates of its two moments."""
    clip_norm: float | None = Field(default=2.0, gt=0)
    """Largest norm of the gradient; null for no limit."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """`bfloat16` is autocast (parameters stay float32); `auto` takes it on a CUDA device that has it."""
    compile: bool = False
    """Whether each kind of block is compiled (fullgraph)."""
    checkpoint_activations: bool = False
    """Whether backward computes each block anew: a third more work, and memory for the blocks' inputs only."""
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

    @field_validator("accumulate")
    @classmethod
    def _accumulate_divides(cls, accumulate: int, info: ValidationInfo) -> int:
        if (batch_size := info.data.get("batch_size")) is not None and batch_size % accumulate:
            raise ValueError(f"accumulate must divide batch_size, and {accumulate} does not divide {batch_size}")
        return accumulate

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

    @field_validator("betas")
    @classmethod
    def _betas_are_rates(cls, betas: tuple[float, float]) -> tuple[float, float]:
        if not all(0 <= beta < 1 for beta in betas):
            raise ValueError(f"betas must be in [0, 1), and are {betas}")
        return betas


class RunConfig(Config):
    """A run."""

    seed: int = Field(default=0, ge=0, lt=2**31)
    """Parameters, order of the data and dropout are a function of it."""
    model: ModelConfig
    """What is trained."""
    data: DataConfig = DataConfig()
    """What it learns."""
    training: TrainingConfig
    """How."""

    @model_validator(mode="after")
    def _tokens_fit(self) -> Self:
        # a vocabulary in a file is not read before training starts: a configuration may be looked at without it
        if self.data.tokenizer == ByteTokenizer.identity and self.model.vocab_size < ByteTokenizer.vocab_size:
            raise ValueError(
                f"text as bytes has {ByteTokenizer.vocab_size} tokens (256 bytes and the begin token), "
                f"and model.vocab_size is {self.model.vocab_size}"
            )
        return self

    @model_validator(mode="after")
    def _state_can_be_carried(self) -> Self:
        if self.training.carry_state:
            if self.data.packing:
                raise ValueError("data.packing starts every document from nothing, and training.carry_state does not")
            if self.data.order == "epochs":
                raise ValueError("training.carry_state reads text in its own order, and data.order epochs is another")
            for name in dict.fromkeys(self.model.layers):
                mixer = self.model.blocks[name].mixer
                if mixer.traits.state == "growing":
                    raise ValueError(
                        f"training.carry_state needs mixers whose state has a constant size, and that of "
                        f"model.blocks.{name}.mixer ({mixer.kind}) grows with the text"
                    )
        return self

    @model_validator(mode="after")
    def _packing_is_declared(self) -> Self:
        for name in dict.fromkeys(self.model.layers) if self.data.packing else ():
            mixer = self.model.blocks[name].mixer
            if not mixer.traits.packing:
                raise ValueError(
                    f"data.packing needs mixers that declare packing, and {mixer.kind} of model.blocks.{name} does "
                    "not: set data.packing to false, or take another mixer"
                )
        return self


def load_config(source: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read the configuration of a run.

    Args:
        source: the name of a preset, or a YAML file.
        overrides: changes (or one) as "dotted.path=value", the value in YAML.

    Raises:
        ConfigError: what is wrong, where, and what is allowed, in one sentence.
    """
    return load(RunConfig, source, [overrides] if isinstance(overrides, str) else overrides, presets=PRESETS)
