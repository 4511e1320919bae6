"""The plan: which layers get which mixer, what they take over, and the stages that teach them."""

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from ..data.source import DATA, DataConfig
from ..mixers import MIXERS, MixerConfig
from ..models import ModelConfig
from ..registry import Config, SeqmixError, load, validated
from ..training import PRESETS, RunConfig

StageName = Literal["mixer_output", "hidden", "logits", "text"]


class Swap(Config):
    """A new mixer for some layers."""

    layers: tuple[Annotated[int, Field(ge=0)], ...] | None = Field(default=None, strict=False)
    """Layers, from 0; null for all."""
    mixer: Annotated[MixerConfig, MIXERS]
    """Their mixer."""


class Stage(Config):
    """Training with one objective."""

    tokens: int = Field(gt=0)
    """Tokens to train on, rounded up to whole batches."""
    learning_rate: float = Field(gt=0)
    """Peak learning rate."""
    train: Literal["mixers", "all"] | None = None
    """What trains: the new mixers, or the whole model; null is `mixers`, and `all` of the stage `text`."""


class Stages(Config):
    """The stages, in their order; each may be left out."""

    mixer_output: Stage | None = None
    """Each new mixer learns its teacher's output on the teacher's inputs: the squared error over the output's mean
    square."""
    hidden: Stage | None = None
    """The student runs by itself, and its hidden states after each new layer learn the teacher's, by the same error."""
    logits: Stage | None = None
    """The Kullback-Leibler divergence of the student's next-token distribution from the teacher's."""
    text: Stage | None = None
    """The cross-entropy of the text, without the teacher."""


class Keep(Config):
    """Layers that stay as they are."""

    best: int = Field(ge=0)
    """Of the layers to swap, how many keep their mixer: those whose swap alone raises the loss most."""


class Plan(Config):
    """A plan of `seqmix linearize`."""

    swap: tuple[Swap, ...] = Field(strict=False)
    """What is swapped; none leaves the teacher."""
    keep: Keep | None = None
    """Layers that keep their mixer after all; null for none."""
    transfer: tuple[Literal["q", "k", "v", "o"], ...] = Field(default=("q", "k", "v", "o"), strict=False)
    """Projections that new mixers take over."""
    calibration_tokens: int = Field(default=8192, ge=0)
    """Tokens on which decays are set to the reach of the teacher's heads, and output projections are fitted to the
    teacher's outputs by least squares; 0 for neither."""
    stages: Stages = Stages()
    """What teaches the student."""
    data: Annotated[DataConfig, DATA] | None = None
    """The data; those of the source when null."""
    training: dict[str, Any] = Field(default_factory=dict)
    """Fields of `training` that differ from the source's."""
    seed: int = Field(default=0, ge=0, lt=2**31)
    """New parameters and the data order are a function of it."""

    @property
    def staged(self) -> dict[StageName, Stage]:
        """The stages of this plan, in their order."""
        found: dict[Any, Stage | None] = {name: getattr(self.stages, name) for name in Stages.model_fields}
        return {name: stage for name, stage in found.items() if stage is not None}


def load_plan(file: Path) -> Plan:
    """Read a plan.

    Raises:
        ConfigError: where it is wrong, and what is allowed.
    """
    return load(Plan, file, presets=PRESETS)


def mixers_of(plan: Plan, teacher: ModelConfig) -> dict[int, MixerConfig]:
    """The new mixer of each swapped layer.

    Raises:
        SeqmixError: a layer does not exist, or is swapped twice.
    """
    found: dict[int, MixerConfig] = {}
    for swap in plan.swap:
        for layer in range(teacher.n_layers) if swap.layers is None else swap.layers:
            if layer >= teacher.n_layers:
                raise SeqmixError(f"swap names layer {layer}, and the model has layers 0 to {teacher.n_layers - 1}")
            if layer in found:
                raise SeqmixError(f"swap names layer {layer} twice")
            found[layer] = swap.mixer
    return dict(sorted(found.items()))


def student_of(teacher: ModelConfig, mixers: dict[int, MixerConfig]) -> ModelConfig:
    """The teacher with new mixers; blocks are named after the old one and the mixer.

    Raises:
        SeqmixError: together they are no model.
    """
    if not mixers:
        return teacher
    blocks = dict(teacher.blocks)
    pattern = list(teacher.layers)
    for layer, mixer in mixers.items():
        block = teacher.blocks[old := teacher.layers[layer]].model_copy(update={"mixer": mixer, "shared": False})
        name = base = f"{old}_{str(mixer.kind).rpartition(':')[2]}"
        number = 2
        while blocks.get(name, block) != block:
            name = f"{base}_{number}"
            number = number + 1
        blocks[name], pattern[layer] = block, name
    used = {name: block.model_dump() for name, block in blocks.items() if name in pattern}
    fields = teacher.model_dump() | {"pattern": tuple(pattern), "blocks": used}
    return validated(ModelConfig, fields, "the student")


def run_config(
    source: RunConfig, plan: Plan, model: ModelConfig, stage: Stage | None = None, start: Path | None = None
) -> RunConfig:
    """The configuration of a stage's run, which starts from the weights of another run, or of the result."""
    data = source.data if plan.data is None else plan.data
    off = {"patience": None, "ema": None, "carry_state": False, "keep_best": False, "evaluation_lengths": ()}
    off |= {"start_from": None if start is None else str(start)}
    fields = source.training.model_dump() | off | plan.training
    if stage is not None:
        steps = -(-stage.tokens // (fields["batch_size"] * data.sequence_length))
        warmup = min(fields["warmup_steps"], max(steps // 10, 1))
        fields |= {"steps": steps, "learning_rate": stage.learning_rate, "warmup_steps": warmup}
    whole = {"seed": plan.seed, "model": model.model_dump(), "data": data.model_dump(), "training": fields}
    return validated(RunConfig, whole, "the plan")
