"""The pre-norm residual block.

x ──┬── norm ── mixer ── dropout ──(+)──┬── norm ── ffn ── dropout ──(+)── y          (RetNet, Eq. 9)
    └───────────────────────────────┘   └────────────────────────────┘
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


class Block(nn.Module):
    """A layer: a mixer and a feed-forward network as residual branches with norms."""

    def __init__(self, config: BlockConfig, d_model: int, *, layer_idx: int, n_layers: int) -> None:
        """Build the layer with index `layer_idx` of `n_layers`."""
        super().__init__()
        self.mixer_norm = config.norm.build(d_model)
        self.mixer = config.mixer.build(d_model, layer_idx=layer_idx, n_layers=n_layers)
        self.ffn_norm = config.norm.build(d_model) if config.ffn else None
        self.ffn = config.ffn.build(d_model) if config.ffn else None
        # nn.Dropout draws a new mask for every call of a shared block
        self.dropout = nn.Dropout(config.dropout) if config.shared else Dropout(config.dropout)
        self.residual_scale = config.residual_scale
        self.norm_placement = config.norm_placement

    def reset_parameters(self) -> None:
        """Initialise every parameter, each module as its paper does."""
        for part in (self.mixer_norm, self.mixer, self.ffn_norm, self.ffn):
            if part is not None:
                part.reset_parameters()

    def __getstate__(self) -> dict[str, Any]:
        # compiled code is bound to this object, so copies must not have it
        return {name: value for name, value in super().__getstate__().items() if name != "forward"}

    def forward(
        self,
        x: Float[Tensor, "B T D"],
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
        """Apply the layer to a segment x; arguments and results are those of `SequenceMixer.forward`."""
        norm = self.mixer_norm
        ffn = self.ffn
        ffn_norm = self.ffn_norm  # looked up once: nn.Module looks up submodules by a function call
        x, branch_input = self._branch_input(x, norm)
        options: dict[str, Any] = {}
        if return_values or first_values is not None:
            options["first_values"] = first_values
            options["return_values"] = return_values
        if donate_state:
            options["donate_state"] = True
        if memo is not None:
            options["memo"] = memo
        mixed, state, *values = self.mixer(
            branch_input, state, paradigm=paradigm, cu_seqlens=cu_seqlens, return_state=return_state, **options
        )
        x = self._add_branch(x, mixed, norm)
        if ffn is not None and ffn_norm is not None:
            x, branch_input = self._branch_input(x, ffn_norm)
            x = self._add_branch(x, ffn(branch_input), ffn_norm)
        return (x, state, *values)

    def _branch_input(self, x: Tensor, norm: Norm) -> tuple[Tensor, Tensor]:
        """Return the residual stream to which the branch's output is added, and the input of the branch."""
        if self.norm_placement == "output":
            return x, x
        normed = norm(x)
        return normed if self.norm_placement == "stream" else x, normed

    def _add_branch(self, x: Tensor, branch: Tensor, norm: Norm) -> Tensor:
        """Add the output of a branch to the residual stream."""
        branch = norm(branch) if self.norm_placement == "output" else branch
        dropout = self.dropout
        branch = dropout(branch) if dropout.p else branch
        return x + (branch if self.residual_scale == 1 else self.residual_scale * branch)
