"""The configuration of a language model: named blocks, tiled over the layers by a pattern."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

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

    d_model: int = Field(gt=0)
    """Width of the residual stream."""
    n_layers: int = Field(gt=0)
    """Number of layers."""
    vocab_size: int = Field(gt=0)
    """Number of tokens."""
    blocks: dict[str, BlockConfig] = Field(min_length=1)
    """Kinds of layers, by a name of your choice."""
    pattern: tuple[str, ...] | None = Field(default=None, min_length=1, strict=False)
    """Names of blocks, tiled over the layers; may be left out where there is one block."""
    norm: Annotated[NormConfig, NORMS]
    """The norm behind the last layer."""
    tie_embeddings: bool = False
    """Whether the output projection is the embedding's matrix."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Share of the embedding dropped in training."""
    init: PaperInit | NormalInit = Field(default=PaperInit(), discriminator="kind")
    """How parameters start."""

    @model_validator(mode="after")
    def _pattern_names_blocks(self) -> Self:
        pattern = self._pattern()
        for name in pattern:
            if name not in self.blocks:
                raise ValueError(
                    f"pattern names the block {name!r}; blocks are {', '.join(self.blocks)}{nearest(name, self.blocks)}"
                )
        if len(pattern) > self.n_layers:
            raise ValueError(f"pattern has {len(pattern)} layers, and n_layers is {self.n_layers}")
        return self

    def _pattern(self) -> tuple[str, ...]:
        if self.pattern is not None:
            return self.pattern
        if len(self.blocks) > 1:
            raise ValueError(f"pattern is missing: there are {len(self.blocks)} blocks, {', '.join(self.blocks)}")
        return tuple(self.blocks)

    @property
    def layers(self) -> tuple[str, ...]:
        """The name of each layer's block."""
        pattern = self._pattern()
        return tuple(pattern[i % len(pattern)] for i in range(self.n_layers))
