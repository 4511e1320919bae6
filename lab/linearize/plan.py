"""The plan of a linearization: which layers get which mixer, which parameters are transferred, and training stages."""

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from ...data.source import DATA, DataConfig
from ...mixers import MIXERS, MixerConfig
from ...models import ModelConfig
from ...registry import Config, SeqmixError, load, validated
from ...training import PRESETS, RunConfig

StageName = Literal["mixer_output", "hidden", "logits", "text"]


class Swap(Config):
    """A new mixer and the layers that get it."""

    layers: tuple[Annotated[int, Field(ge=0)], ...] | None = Field(default=None, strict=False)
    """Indices of the layers, from 0; null means all layers."""
    mixer: Annotated[MixerConfig, MIXERS]
    """New mixer of these layers."""


class Stage(Config):
    """Settings of one training stage of a linearization."""

    tokens: int = Field(gt=0)
    """Number of tokens to train on, rounded up to whole batches."""
    learning_rate: float = Field(gt=0)
    """Peak learning rate."""
    train: Literal["mixers", "all"] | None = None
    """Parameters to train: only those of the new mixers (`mixers`), or `all`; null means `all` in the stage `text`, and
    `mixers` in the others."""


class Stages(Config):
    """Training stages, in the order in which they run; each may be omitted."""

    mixer_output: Stage | None = None
    """Train each new mixer to reproduce the output of the teacher's mixer on the teacher's inputs; the loss is the
    squared error divided by the mean square of the teacher's output."""
    hidden: Stage | None = None
    """Train the student, running on its own hidden states, to reproduce the teacher's hidden states after each new
    layer; the loss is the squared error divided by the mean square of the teacher's hidden states."""
    logits: Stage | None = None
    """Train the student on the Kullback-Leibler divergence of its next-token distribution from the teacher's."""
    text: Stage | None = None
    """Train the student on the cross-entropy of the text, without the teacher."""


class Keep(Config):
    """Choice of layers that keep their old mixer although the plan swaps them."""

    best: int = Field(ge=0)
    """Number of swapped layers that keep their old mixer: those whose swap alone raises the teacher's loss most."""


class Plan(Config):
    """A plan of `seqmix linearize`."""

    swap: tuple[Swap, ...] = Field(strict=False)
    """New mixers and their layers; an empty list leaves the teacher as it is."""
    keep: Keep | None = None
    """Choice of layers that keep their old mixer although `swap` names them; null means none."""
    transfer: tuple[Literal["q", "k", "v", "o"], ...] = Field(default=("q", "k", "v", "o"), strict=False)
    """Projections that are copied from old to new mixers: queries `q`, keys `k`, values `v`, output `o`."""
    calibration_tokens: int = Field(default=8192, ge=0)
    """Number of tokens for calibration: decays are set so that heads reach as far back as the teacher's, and output
    projections are fitted to the teacher's outputs by least squares; 0 turns both off."""
    stages: Stages = Stages()
    """Training stages of the student."""
    data: Annotated[DataConfig, DATA] | None = None
    """Data to train and evaluate on; null means the data of the source model's run."""
    training: dict[str, Any] = Field(default_factory=dict)
    """Fields of the section `training` that differ from those of the source model's run, by name."""
    seed: int = Field(default=0, ge=0, lt=2**31)
    """Seed of the new parameters and of the data order."""

    @property
    def staged(self) -> dict[StageName, Stage]:
        """Training stages that this plan has, by name, in the order in which they run."""
        stages: dict[Any, Stage | None] = {name: getattr(self.stages, name) for name in Stages.model_fields}
        return {name: stage for name, stage in stages.items() if stage is not None}


def load_plan(file: Path) -> Plan:
    """Read a plan from a YAML file.

    Raises:
        ConfigError: the plan is not valid; the message names the field and what is allowed.
    """
    return load(Plan, file, presets=PRESETS)


def mixers_of(plan: Plan, teacher: ModelConfig) -> dict[int, MixerConfig]:
    """Return the new mixer of each swapped layer, by the index of the layer, in ascending order.

    Raises:
        SeqmixError: a layer does not exist, or is swapped twice.
    """
    mixers: dict[int, MixerConfig] = {}
    for swap in plan.swap:
        for layer in range(teacher.n_layers) if swap.layers is None else swap.layers:
            if layer >= teacher.n_layers:
                raise SeqmixError(f"swap expects layers from 0 to {teacher.n_layers - 1}, got layer {layer}")
            if layer in mixers:
                raise SeqmixError(f"swap must name each layer once, got layer {layer} twice: remove one")
            mixers[layer] = swap.mixer
    return dict(sorted(mixers.items()))


def student_of(teacher: ModelConfig, mixers: dict[int, MixerConfig]) -> ModelConfig:
    """Return the teacher's configuration with new mixers; new blocks are named after the old block and the mixer.

    Raises:
        SeqmixError: the new configuration is not valid.
    """
    if not mixers:
        return teacher
    if teacher.kv_sharing is not None:
        raise SeqmixError(
            "mixers of a model with kv_sharing cannot be swapped: its layers depend on each other's keys and values"
        )
    blocks = dict(teacher.blocks)
    pattern = list(teacher.layers)
    for layer, mixer in mixers.items():
        old = teacher.layers[layer]
        block = teacher.blocks[old].model_copy(update={"mixer": mixer, "shared": False})
        name = base = f"{old}_{str(mixer.kind).rpartition(':')[2]}"
        number = 2
        while blocks.get(name, block) != block:
            name = f"{base}_{number}"
            number = number + 1
        blocks[name], pattern[layer] = block, name
    used_blocks = {name: block.model_dump() for name, block in blocks.items() if name in pattern}
    fields = teacher.model_dump() | {"pattern": tuple(pattern), "blocks": used_blocks}
    return validated(ModelConfig, fields, "the student")


def run_config(
    source: RunConfig, plan: Plan, model: ModelConfig, stage: Stage | None = None, start: Path | None = None
) -> RunConfig:
    """Return the run configuration of a stage, or (without a stage) of the result.

    Args:
        source: the teacher's run configuration.
        plan: the plan.
        model: configuration of the model.
        stage: the stage.
        start: run directory whose weights the stage starts from.
    """
    data = source.data if plan.data is None else plan.data
    overrides: dict[str, Any] = {
        "patience": None,
        "ema": None,
        "carry_state": False,
        "keep_best": False,
        "evaluation_lengths": (),
        "start_from": None if start is None else str(start),
    }
    fields = source.training.model_dump() | overrides | plan.training
    if stage is not None:
        steps = -(-stage.tokens // (fields["batch_size"] * data.sequence_length))
        warmup = min(fields["warmup_steps"], max(steps // 10, 1))
        fields |= {"steps": steps, "learning_rate": stage.learning_rate, "warmup_steps": warmup}
    config = {"seed": plan.seed, "model": model.model_dump(), "data": data.model_dump(), "training": fields}
    return validated(RunConfig, config, "the plan")
