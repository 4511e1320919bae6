"""The configuration of a language model: named blocks, tiled over the layers by a pattern."""

from itertools import accumulate
from typing import Annotated, Literal, Self

from pydantic import Field, ValidationInfo, field_validator, model_validator

from ..blocks import NORMS, RESIDUALS, BlockConfig, NormConfig, ResidualConfig
from ..blocks.residual.plain import PlainConfig
from ..registry import Config, choices_hint
from .kv_sharing import KVSharing, kv_sources
from .looped_layers import Loop
from .parametrization import CompleteP, Parametrization, Standard
from .value_embeddings import ValueEmbeddings


class PaperInit(Config):
    """Initialise every module as the code of its paper does; embedding and output projection from N(0, 1/d_model)."""

    kind: Literal["paper"] = "paper"


class NormalInit(Config):
    """Initialise all matrices and embeddings with N(0, std^2), in every module."""

    kind: Literal["normal"] = "normal"
    std: float = Field(default=0.02, gt=0)
    """Standard deviation of the initial values."""


class ModelConfig(Config):
    """Configuration of a language model."""

    d_model: int = Field(gt=0, le=2**20)
    """Width of the residual stream."""
    n_layers: int = Field(gt=0, le=10_000)
    """Number of layers."""
    vocab_size: int = Field(gt=0, le=2**31)
    """Number of tokens in the vocabulary."""
    blocks: dict[str, BlockConfig] = Field(min_length=1)
    """Configurations of the kinds of layers, each under a name of your choice, which `pattern` uses."""
    pattern: tuple[str, ...] | None = Field(default=None, min_length=1, strict=False)
    """Names of blocks, tiled over the layers; optional with a single block."""
    norm: Annotated[NormConfig, NORMS]
    """Norm after the last layer."""
    residual: Annotated[ResidualConfig, RESIDUALS] = PlainConfig()
    """Residual connections: what a mixer or a feed-forward network reads of the residual stream, and how its output
    changes the stream."""
    kv_sharing: KVSharing | None = None
    """Layers that read the keys and values of an earlier layer instead of having their own: `last`, the last layers
    (Gemma 3n, YOCO), or `groups` of layers (CLA); null for none."""
    embedding_scale: float = Field(default=1.0, gt=0)
    """Factor by which the embedding's output is multiplied, such as sqrt(d_model) in Gemma."""
    embedding_norm: Annotated[NormConfig, NORMS] | None = None
    """Norm of the embedding's output, before the first layer (RWKV); null for none."""
    logit_softcap: float | None = Field(default=None, gt=0)
    """Soft cap c of the logits, which become c tanh(logits / c) (Gemma); null for none."""
    readout: Literal["each", "last"] = "each"
    """Source of the logits. `each`: every token's own vector. `last`: the last token's vector, from which a network
    predicts every token of the sequence by its position (compression); such a model is not a language model and has no
    state."""
    tie_embeddings: bool = False
    """True if the output projection shares the embedding's matrix."""
    value_embeddings: ValueEmbeddings | None = None
    """Vectors of the tokens that are added to the values of some layers' mixers; null for none."""
    loop: Loop | None = None
    """Options of layers that share a block, as iterations of a loop; null for none."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Dropout probability for the embedding's output, in training."""
    init: PaperInit | NormalInit = Field(default=PaperInit(), discriminator="kind")
    """Initialisation of the parameters."""
    parametrization: Parametrization = Standard()
    """Scaling of learning rates and initial values with width and depth: `standard`, `mup` or `completep`."""

    @field_validator("pattern")
    @classmethod
    def _pattern_names_blocks(cls, pattern: tuple[str, ...] | None, info: ValidationInfo) -> tuple[str, ...] | None:
        blocks = info.data.get("blocks")
        n_layers = info.data.get("n_layers")
        if blocks is None or n_layers is None:
            return pattern  # pydantic reports the errors of these fields
        if pattern is None:
            if len(blocks) > 1:
                raise ValueError(f"pattern is missing: list the layers' blocks in order, from {', '.join(blocks)}")
            return None
        for name in pattern:
            if name not in blocks:
                raise ValueError(f"there is no block {name!r}{choices_hint(name, blocks, 'blocks')}")
        if len(pattern) > n_layers:
            raise ValueError(f"pattern must have at most n_layers = {n_layers} names, got {len(pattern)}")
        return pattern

    @model_validator(mode="after")
    def _check_parametrization(self) -> Self:
        if not isinstance(self.parametrization, Standard) and self.tie_embeddings:
            raise ValueError(
                f"parametrization = {self.parametrization.kind} needs tie_embeddings = false, got true: the learning "
                "rate of the output projection falls with the width, that of the embedding does not"
            )
        return self

    @model_validator(mode="after")
    def _check_residual(self) -> Self:
        for name, block in self.blocks.items():
            if block.norm_placement == "stream" and self.residual.kind != "plain":
                raise ValueError(
                    f"norm_placement = stream needs the residual connection plain, got {self.residual.kind} with "
                    f"block {name}: set norm_placement to input, output or both"
                )
            # a loop needs shared blocks: its own error names the connection
            if block.shared and self.loop is None and not self.residual.fits_shared_blocks:
                raise ValueError(
                    f"the residual connection {self.residual.kind} has weights for each layer, got shared = true in "
                    f"block {name}: set shared = false"
                )
        return self

    @model_validator(mode="after")
    def _check_loop(self) -> Self:
        if self.loop is None:
            return self
        if self.residual.kind != "plain":
            raise ValueError(f"loop needs the residual connection plain, got {self.residual.kind}")
        counts = {name: self.layers.count(name) for name in self.shared_blocks}
        if not counts:
            raise ValueError("loop needs a block that several layers share: set shared = true in it")
        if len(set(counts.values())) > 1:
            uses = ", ".join(f"{name} {count}" for name, count in counts.items())
            raise ValueError(f"loop needs shared blocks with equally many layers, got {uses}")
        return self

    @property
    def shared_blocks(self) -> tuple[str, ...]:
        """Names of the blocks that several layers share, in the order of their first layers."""
        names = dict.fromkeys(self.layers)
        return tuple(name for name in names if self.blocks[name].shared and self.layers.count(name) > 1)

    @property
    def iterations(self) -> tuple[int, ...]:
        """Indices of the layers with which the iterations of the loop begin; empty without a loop."""
        if self.loop is None:
            return ()
        return tuple(layer for layer, name in enumerate(self.layers) if name == self.shared_blocks[0])

    @model_validator(mode="after")
    def _check_value_embeddings(self) -> Self:
        chosen = self.value_embeddings
        if chosen is not None and chosen.gate_channels > self.d_model:
            raise ValueError(
                f"value_embeddings.gate_channels must be at most d_model = {self.d_model}, got {chosen.gate_channels}"
            )
        return self

    @property
    def value_layers(self) -> tuple[int, ...]:
        """Indices of the layers with value embeddings."""
        return () if self.value_embeddings is None else self.value_embeddings.layers(self.n_layers)

    @model_validator(mode="after")
    def _check_kv_sharing(self) -> Self:
        sources = self.kv_sources
        for i, source in enumerate(sources):
            if source is not None and self.blocks[self.layers[i]].shared:
                raise ValueError(
                    f"kv_sharing needs layers with parameters of their own, got shared = true with block "
                    f"{self.layers[i]}: set one of them"
                )
            if source is not None and i in self.value_layers:
                raise ValueError(
                    f"value_embeddings gives vectors to layer {i}, which by kv_sharing has no values of its own: turn "
                    "one of them off"
                )
        return self

    @property
    def kv_sources(self) -> tuple[int | None, ...]:
        """Index of the layer whose keys and values each layer reads; None for layers that have their own."""
        sharable = [name for name, block in self.blocks.items() if block.mixer.traits.kv_sharing]
        return kv_sources(self.kv_sharing, self.layers, sharable)

    @property
    def base(self) -> "ModelConfig | None":
        """Configuration of the base model; None with the standard parametrization."""
        if isinstance(self.parametrization, Standard):
            return None
        return self.model_copy(update={"d_model": self.parametrization.base_width, "parametrization": Standard()})

    @property
    def branch_scale(self) -> float:
        """Factor of the outputs of mixers and feed-forward networks in a model of this depth (CompleteP)."""
        chosen = self.parametrization
        return chosen.base_depth / self.n_layers if isinstance(chosen, CompleteP) else 1.0

    @property
    def layers(self) -> tuple[str, ...]:
        """Names of the layers' blocks, one per layer: the pattern, repeated."""
        pattern = self.pattern or tuple(self.blocks)
        return tuple(pattern[i % len(pattern)] for i in range(self.n_layers))

    @property
    def first_branches(self) -> tuple[int, ...]:
        """Index of each layer's first residual branch, and the number of all branches."""
        return tuple(accumulate((self.blocks[name].n_branches for name in self.layers), initial=0))
