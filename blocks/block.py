"""The pre-norm residual block.

x ──┬── norm ── mixer ── dropout ──(+)──┬── norm ── ffn ── dropout ──(+)── y          (RetNet, Eq. 9)
    └───────────────────────────────┘   └────────────────────────────┘

The picture shows plain residual connections; `residual/` has others.
"""

from typing import Annotated, Any, Literal

from jaxtyping import Float, Int
from pydantic import Field
from torch import Tensor, nn

from ..mixers import MIXERS, MixerConfig, Paradigm
from ..ops.runtime.memo import Memo
from ..registry import Config
from .dropout import Dropout
from .ffn import FFNS, FfnConfig
from .norm import NORMS, Norm, NormConfig
from .residual import Branch, Residual, ResidualConfig, Stream
from .residual.plain import PlainConfig


class BlockConfig(Config):
    """Configuration of a block: one kind of layer, with a mixer, a feed-forward network and norms."""

    mixer: Annotated[MixerConfig, MIXERS]
    """Sequence mixer, which combines tokens."""
    ffn: Annotated[FfnConfig, FFNS] | None
    """Feed-forward network, applied to each token; null for a block that has only a mixer."""
    norm: Annotated[NormConfig, NORMS]
    """Norm of the mixer branch and of the feed-forward branch; each branch has its own parameters."""
    norm_placement: Literal["input", "output", "stream"] = "input"
    """Position of the norms: the `input` of a branch (pre-norm), its `output` (OLMo 2), or the `stream` before the
    branch, so that the branch's output is added to the normed stream (MiniMax-01)."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Dropout probability for the outputs of the mixer and of the feed-forward network, in training."""
    residual_scale: float = Field(default=1.0, gt=0)
    """Factor by which the outputs of the mixer and of the feed-forward network are multiplied before they are added to
    the residual stream."""
    shared: bool = False
    """True if all layers of this block share their parameters; each layer still has its own state."""

    @property
    def n_branches(self) -> int:
        """Number of residual branches of a layer."""
        return 1 if self.ffn is None else 2


class Block(nn.Module):
    """A layer: a mixer and a feed-forward network as residual branches with norms."""

    def __init__(
        self,
        config: BlockConfig,
        d_model: int,
        *,
        layer_idx: int,
        n_layers: int,
        residual: ResidualConfig | None = None,
        first_branch: int = 0,
    ) -> None:
        """Build the layer with index `layer_idx` of `n_layers`.

        `residual` configures the connections of its branches, None for plain ones; `first_branch` is the index of its
        first branch in the model.
        """
        super().__init__()
        self.mixer_norm = config.norm.build(d_model)
        self.mixer = config.mixer.build(d_model, layer_idx=layer_idx, n_layers=n_layers)
        self.ffn_norm = config.norm.build(d_model) if config.ffn else None
        self.ffn = config.ffn.build(d_model) if config.ffn else None
        residual = residual or PlainConfig()
        self.mixer_residual = residual.build(d_model, index=first_branch, place=0)
        self.ffn_residual = residual.build(d_model, index=first_branch + 1, place=1) if config.ffn else None
        # nn.Dropout draws a new mask for every call of a shared block
        self.dropout = nn.Dropout(config.dropout) if config.shared else Dropout(config.dropout)
        self.residual_scale = config.residual_scale
        self.norm_placement = config.norm_placement

    @property
    def residuals(self) -> tuple[Residual, ...]:
        """Connections of the branches, in the order in which they are computed."""
        return tuple(each for each in (self.mixer_residual, self.ffn_residual) if each is not None)

    def reset_parameters(self) -> None:
        """Initialise every parameter, each module as its paper does."""
        parts = self.mixer_norm, self.mixer, self.mixer_residual, self.ffn_norm, self.ffn, self.ffn_residual
        for part in parts:
            if part is not None:
                part.reset_parameters()

    def __getstate__(self) -> dict[str, Any]:
        # compiled code is bound to this object, so copies must not have it
        return {name: value for name, value in super().__getstate__().items() if name != "forward"}

    def forward(
        self,
        stream: Stream,
        state: tuple[Any, ...] | None = None,
        first_values: Float[Tensor, "B T D"] | None = None,
        *,
        paradigm: Paradigm | None = None,
        cu_seqlens: Int[Tensor, "N+1"] | None = None,
        return_state: bool = False,
        return_values: bool = False,
        donate_state: bool = False,
        memo: Memo | None = None,
    ) -> tuple[Any, ...]:
        """Apply the layer to a segment of the residual stream: [B T D] with plain connections.

        The other arguments are those of `SequenceMixer.forward`, and so are the results, with the stream in place of y.
        """
        options: dict[str, Any] = {}
        if return_values or first_values is not None:
            options["first_values"] = first_values
            options["return_values"] = return_values
        if donate_state:
            options["donate_state"] = True
        if memo is not None:
            options["memo"] = memo
        results: list[Any] = []

        def mix(x: Tensor) -> Tensor:
            y, *others = self.mixer(
                x, state, paradigm=paradigm, cu_seqlens=cu_seqlens, return_state=return_state, **options
            )
            results.extend(others)
            return y

        stream = self._add_branch(stream, mix, self.mixer_norm, self.mixer_residual)
        ffn, norm, residual = self.ffn, self.ffn_norm, self.ffn_residual  # nn.Module looks up parts by a function call
        if ffn is not None and norm is not None and residual is not None:
            stream = self._add_branch(stream, ffn, norm, residual)
        return (stream, *results)

    def _add_branch(self, stream: Stream, function: Branch, norm: Norm, residual: Residual) -> Stream:
        """Return the residual stream after the branch of a mixer or of a feed-forward network."""
        placement = self.norm_placement
        if placement == "stream":
            stream = norm(stream)

        def branch(x: Tensor) -> Tensor:
            y = function(norm(x) if placement == "input" else x)
            y = norm(y) if placement == "output" else y
            dropout = self.dropout
            y = dropout(y) if dropout.p else y
            return y if self.residual_scale == 1 else self.residual_scale * y

        return residual(stream, branch)
