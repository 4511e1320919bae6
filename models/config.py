"""The configuration of a language model: named blocks, tiled over the layers by a pattern."""

from typing import Annotated, Literal

from pydantic import Field, ValidationInfo, field_validator

from ..blocks import NORMS, BlockConfig, NormConfig
from ..registry import Config, nearest


class PaperInit(Config):
    """Every module as its paper's code does it; embedding and output projection N(0, 1/d_model)."""

    kind: Literal["paper"] = "paper"


class NormalInit(Config):
    """All matrices and embeddings N(0, std^2), whatever the module."""

    kind: Literal["normal"] = "normal"
    std: float = Field(default=0.02, gt=0)
    """Standard deviation."""


class ModelConfig(Config):
    """A language model."""

    d_model: int = Field(gt=0, le=2**20)
    """Width of the residual stream."""
    n_layers: int = Field(gt=0, le=10_000)
    """Number of layers."""
    vocab_size: int = Field(gt=0, le=2**31)
    """Number of tokens."""
    blocks: dict[str, BlockConfig] = Field(min_length=1)
    """Kinds of layers, by a name of your choice."""
    pattern: tuple[str, ...] | None = Field(default=None, min_length=1, strict=False)
    """Names of blocks, tiled over the layers; optional with a single block."""
    norm: Annotated[NormConfig, NORMS]
    """The norm after the last layer."""
    embedding_scale: float = Field(default=1.0, gt=0)
    """Factor of the embedding's output, such as sqrt(d_model) in Gemma."""
    embedding_norm: Annotated[NormConfig, NORMS] | None = None
    """The norm of the embedding's output (RWKV); null for none."""
    logit_softcap: float | None = Field(default=None, gt=0)
    """The bound of logits, which approach it as c tanh(logit / c) does (Gemma); null for none."""
    readout: Literal["each", "last"] = "each"
    """What the logits are of: `each` token's vector; or of the `last` one's, from which a network predicts every token
    of the sequence by its position (compression): such a model is no language model, and has no state."""
    tie_embeddings: bool = False
    """Whether the output projection is the embedding's matrix."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Dropout probability of the embedding, in training."""
    init: PaperInit | NormalInit = Field(default=PaperInit(), discriminator="kind")
    """How parameters are initialised."""

    @field_validator("pattern")
    @classmethod
    def _pattern_names_blocks(cls, pattern: tuple[str, ...] | None, info: ValidationInfo) -> tuple[str, ...] | None:
        blocks = info.data.get("blocks")
        n_layers = info.data.get("n_layers")
        if blocks is None or n_layers is None:
            return pattern  # their own errors are reported
        if pattern is None:
            if len(blocks) > 1:
                raise ValueError(f"pattern is missing: there are {len(blocks)} blocks, {', '.join(blocks)}")
            return None
        for name in pattern:
            if name not in blocks:
                raise ValueError(f"no block is called {name!r}; blocks: {', '.join(blocks)}{nearest(name, blocks)}")
        if len(pattern) > n_layers:
            raise ValueError(f"pattern has {len(pattern)} layers, and n_layers is {n_layers}")
        return pattern

    @property
    def layers(self) -> tuple[str, ...]:
        """The name of each layer's block."""
        pattern = self.pattern or tuple(self.blocks)
        return tuple(pattern[i % len(pattern)] for i in range(self.n_layers))
