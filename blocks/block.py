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
    """One kind of layer."""

    mixer: Annotated[MixerConfig, MIXERS]
    """What mixes tokens."""
    ffn: Annotated[FfnConfig, FFNS] | None
    """What maps each token; null for a block that only mixes."""
    norm: Annotated[NormConfig, NORMS]
    """The norm of each of the two."""
    norm_placement: Literal["input", "output", "stream"] = "input"
    """Where it is: `input` of the branch, as above; its `output` (OLMo 2); or the `stream` itself, so that the normed
    input is also what the branch is added to (MiniMax-01)."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Dropout probability of the outputs of mixer and ffn, in training."""
    residual_scale: float = Field(default=1.0, gt=0)
    """Factor of the outputs of mixer and ffn before they are added to the residual stream."""
    shared: bool = False
    """Whether all layers of this block have the same parameters; each has a state of its own."""


class Block(nn.Module):
    """A mixer and a feed-forward network, each on a normed copy of the residual stream."""

    def __init__(self, config: BlockConfig, d_model: int, *, layer_idx: int, n_layers: int) -> None:
        """Build the layer with index `layer_idx` of `n_layers`."""
        super().__init__()
        self.mixer_norm = config.norm.build(d_model)
        self.mixer = config.mixer.build(d_model, layer_idx=layer_idx, n_layers=n_layers)
        self.ffn_norm = config.norm.build(d_model) if config.ffn else None
        self.ffn = config.ffn.build(d_model) if config.ffn else None
        # every call of a shared block has a mask of its own
        self.dropout = nn.Dropout(config.dropout) if config.shared else Dropout(config.dropout)
        self.residual_scale = config.residual_scale
        self.norm_placement = config.norm_placement

    def reset_parameters(self) -> None:
        """Initialise every parameter, each module as its paper does."""
        for part in (self.mixer_norm, self.mixer, self.ffn_norm, self.ffn):
            if part is not None:
                part.reset_parameters()

    def __getstate__(self) -> dict[str, Any]:
        # compiled code is bound to this object: a copy starts without
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
        """One layer over one segment; arguments and result are the mixer's."""
        norm = self.mixer_norm
        ffn = self.ffn
        ffn_norm = self.ffn_norm  # each read of a part is a call
        x, given = self._given(x, norm)
        options: dict[str, Any] = {}
        if return_values or first_values is not None:
            options["first_values"] = first_values
            options["return_values"] = return_values
        if donate_state:
            options["donate_state"] = True
        if memo is not None:
            options["memo"] = memo
        mixed, state, *values = self.mixer(
            given, state, paradigm=paradigm, cu_seqlens=cu_seqlens, return_state=return_state, **options
        )
        x = self._added(x, mixed, norm)
        if ffn is not None and ffn_norm is not None:
            x, given = self._given(x, ffn_norm)
            x = self._added(x, ffn(given), ffn_norm)
        return (x, state, *values)

    def _given(self, x: Tensor, norm: Norm) -> tuple[Tensor, Tensor]:
        """The residual stream, and what a branch reads."""
        if self.norm_placement == "output":
            return x, x
        normed = norm(x)
        return normed if self.norm_placement == "stream" else x, normed

    def _added(self, x: Tensor, branch: Tensor, norm: Norm) -> Tensor:
        """The residual stream with a branch's output."""
        branch = norm(branch) if self.norm_placement == "output" else branch
        branch = dropout(branch) if (dropout := self.dropout).p else branch
        return x + (branch if self.residual_scale == 1 else self.residual_scale * branch)
